"""What do ten seeds cost at once, beside one, and beside one after the other?

    OMP_NUM_THREADS=1 python experiments/benchmarks/seeds.py

A step of ten trainings that are stacked into one program, as ``fit(..., seeds=range(10))`` makes
it; a step of one of them; and a step of each of ten, one by one. All take turns, on the same random
images, with the networks of Table 1, p = 10 and p = 50, and with a tiny net whose steps are all
overhead. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import tyro
from _bench import Ceilings, Options, Program, Work, interleave
from _handwritten import NETS, VAE, Net, eager
from _report import Report, Target, profile
from step import lasting, on_batches, ours
from torch import Tensor

from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.training._stacked import StackedStep
from pyro_gpvae.training.step import Backend

ONE = "one seed"


@dataclass(kw_only=True)
class SeedsOptions(Options):
    """Options of the measurement.

    Attributes:
        seeds: How many are trained.
        latent_dims: Dimensions p of z with the networks of Table 1.
        tiny: Whether to measure the tiny net as well.
        guides: What is trained.
        images: Training images.
        batch_size: Images per step and seed with the networks of Table 1.
        backend: Of the steps; None is what ``fit`` chooses for long trainings.
    """

    rounds: int = 15
    seeds: int = 10
    latent_dims: tuple[int, ...] = (10, 50)
    tiny: bool = True
    guides: tuple[str, ...] = ("vae", "gp")
    images: int = 4096
    batch_size: int = 128
    backend: Backend | None = None


def main(options: SeedsOptions) -> None:
    backend = options.backend or lasting(options.on())
    report = Report(
        "seeds",
        f"{options.seeds} seeds at once",
        options,
        f"conv: networks of Table 1, B = {options.batch_size} for each seed; tiny: 8×8, 64 hidden "
        f"units, p = 5, B = 32. {options.images:,} random images; a step, all seeds together; "
        f"backend {backend}. Limit: operations and unavoidable bytes of hand-written steps of a "
        "VAE, one for each seed, at the speed of the ceilings.",
        Ceilings.measure(options.on()),
    )
    shape = NETS["conv"].image_shape
    nets = [Net("conv", shape, p, options.batch_size) for p in options.latent_dims]
    nets += [NETS["tiny"]] if options.tiny else []
    for guide, net in itertools.product(options.guides, nets):
        measure(report, options, guide, net, backend)
    report.write()


def measure(report: Report, options: SeedsOptions, guide: str, net: Net, backend: Backend) -> None:
    """Adds the table and the figure of one guide and p."""
    device, count = options.on(), options.seeds
    many, loop = f"{count} seeds, stacked", f"{count} seeds, one by one"
    with seeded(options.seed, device):
        shape = (options.images, *net.image_shape)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        yardstick = VAE(net).to(device)
        step = on_batches(eager(yardstick, images), images, net.batch_size)
        limit = report.ceilings.limit(
            Work.of(step, yardstick.parameters(), images[: net.batch_size])
        )
        one, *others = (
            on_batches(ours(net, guide, images, backend), images, net.batch_size)
            for _ in range(count + 1)
        )
        programs: dict[str, Program] = {
            ONE: one,
            many: stacked(net, guide, images, backend, count),
            loop: lambda: [program() for program in others],
        }
        timings = interleave(programs, device, options)
        bound = 2.5 if device.type == "cuda" else 4
        kind = "tiny" if net == NETS["tiny"] else "conv"
        name = f"{guide}, {kind}, p = {net.latent_dim}"
        target = Target(f"{name}: {many} / {ONE}", bound, timings.ratio(many, ONE).median)
        limits = {ONE: limit, many: count * limit, loop: count * limit}
        report.tables[name] = timings.table(ONE, limits)
        if target.reached is False:
            for missed in (ONE, many):
                text = profile(programs[missed], device, 10 * options.seconds)
                report.tables[f"{name}: profile of {missed}"] = text
    report.targets.append(target)
    report.record[name] = {"step_seconds": timings.seconds, "limit_seconds": limits}


def stacked(net: Net, guide: str, images: Tensor, backend: Backend, count: int) -> Program:
    """A step of all runs on the next batch of a permutation of each."""
    runs = [ours(net, guide, images, "eager") for _ in range(count)]
    generators = [torch.Generator(images.device).manual_seed(seed) for seed in range(count)]
    step = StackedStep(runs, generators, backend)
    orders = torch.stack([torch.randperm(len(images), device=images.device) for _ in runs])
    full = [part for part in orders.split(net.batch_size, 1) if part.shape[1] == net.batch_size]
    batches = itertools.cycle(full)
    return lambda: step(next(batches))


if __name__ == "__main__":
    main(tyro.cli(SeedsOptions, description=__doc__))
