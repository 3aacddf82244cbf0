"""What `fit` does to the allocator is worth: steps in processes of their own, one after the other.

    OMP_NUM_THREADS=1 python experiments/benchmarks/allocator.py

`fit` lets glibc keep freed memory (`pyro_gpvae.core._allocator`), which is a setting of the whole
process: a hand-written step beside it would profit as well. Here every timing has a process of its
own, hand-written and ours in turns; its page faults are counted. Writes allocator_cpu.json and .md.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass

import torch
import tyro
from _bench import Ceilings, Options, Quartiles, Timings, page_faults, seconds_of
from _handwritten import NETS, VAE, eager
from _report import Report, Target
from step import on_batches, ours

from pyro_gpvae.core._allocator import keep_freed_memory

HAND, KEPT, OURS = "hand-written", "hand-written, freed memory kept", "vae, eager, as fit runs it"


@dataclass
class Settings(Options):
    """What the allocator is worth.

    Attributes:
        variant: Time one variant in this process, and print its seconds and page faults: how the
            script calls itself.
        net: "conv" or "tiny".
        images: Training images.
    """

    rounds: int = 8
    seconds: float = 2.0
    variant: str | None = None
    net: str = "conv"
    images: int = 4096


def measure(settings: Settings) -> tuple[float, float]:
    """Seconds and minor page faults of a step of one variant, in this process."""
    torch.manual_seed(settings.seed)
    net, device = NETS[settings.net], torch.device("cpu")
    images = torch.randint(256, (settings.images, *net.image_shape), dtype=torch.uint8)
    if settings.variant != HAND:
        keep_freed_memory()
    step = (
        ours(net, "vae", images, "eager") if settings.variant == OURS else eager(VAE(net), images)
    )
    program = on_batches(step, images, net.batch_size)
    for _ in range(5):
        program()
    calls = max(3, round(settings.seconds / seconds_of(program, device)))
    before = page_faults()
    seconds = seconds_of(program, device, calls)
    return seconds, (page_faults() - before) / calls


def main(settings: Settings) -> None:
    if settings.variant is not None:
        print(*measure(settings))
        return
    command = [sys.executable, __file__, "--net", settings.net, "--images", str(settings.images)]
    command += ["--seconds", str(settings.seconds), "--seed", str(settings.seed)]
    seconds: dict[str, list[float]] = {HAND: [], KEPT: [], OURS: []}
    faults: dict[str, list[float]] = {variant: [] for variant in seconds}
    order = list(seconds)
    generator = random.Random(settings.seed)
    for _ in range(settings.rounds):
        generator.shuffle(order)
        for variant in order:
            done = subprocess.run(
                [*command, "--variant", variant], capture_output=True, text=True, check=True
            )
            for found, value in zip((seconds, faults), done.stdout.split()[-2:], strict=True):
                found[variant].append(float(value))
    timings = Timings(seconds)
    report = Report(
        "allocator",
        "A step in a process of its own",
        settings,
        f"Network {settings.net} as in the table of steps. Every timing is the mean of about "
        f"{settings.seconds:g} s of steps in a fresh process.",
        Ceilings.measure(torch.device("cpu")),
    )
    limit = {"conv": 0.85, "tiny": 1.0}[settings.net]
    report.targets.append(
        Target(f"{settings.net}, {OURS} / {HAND}", limit, timings.ratio(OURS, HAND).median)
    )
    report.tables["A step"] = timings.table(HAND)
    rows = [f"| {variant} | {Quartiles.of(found)} |" for variant, found in faults.items()]
    report.tables["Minor page faults of a step"] = "\n".join(["| | faults |", "|---|--:|", *rows])
    report.record["step_seconds"] = seconds
    report.record["minor_page_faults_per_step"] = faults
    report.write()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
