"""What does evaluation cost beside the decoder's forward pass, and how much memory does it take?

    OMP_NUM_THREADS=1 python experiments/benchmarks/evaluation.py

For each guide, the log weights of K samples of B images are timed against bare forward passes of
the decoder on K·B latent vectors in the same chunks, before and after: ratios are medians and
quartiles of rounds. Networks are untrained; the cost does not depend on it. Memory is the most that
tensors take at once beside images and networks, for several K and B. A VAE is then trained for a
few epochs, and its evidence compared between precisions of the decoder. JSON and Markdown are
written to --out.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor

from pyro_gpvae import ImageModel, RunConfig, load_run, log_evidence, make_guide, train_run
from pyro_gpvae.files import write_json, write_text
from pyro_gpvae.importance import default_chunk_size, log_weights
from pyro_gpvae.memory import PeakMemory
from pyro_gpvae.provenance import environment

# evaluation / decoder
TARGET = 1.10
SHAPE = (1, 28, 28)


@dataclass(kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
        guides: Guides whose evaluation is timed.
        latent_dims: Dimensions p of z.
        samples: Importance samples K.
        images: Images B.
        rounds: How often everything is timed.
        memory_samples: Values of K for the memory, at B = images.
        memory_images: Values of B for the memory, at the smallest of these K.
        epochs: Passes over the training images before precisions are compared.
        train_images: How many training images; None is all.
        device: "cpu" or "cuda".
        seed: Seed of everything.
        out: Folder of the results.
    """

    guides: list[str] = field(default_factory=lambda: ["vae", "gp", "vlae:1", "iaf:2", "me:2"])
    latent_dims: list[int] = field(default_factory=lambda: [10, 50])
    samples: int = 100
    images: int = 128
    rounds: int = 5
    memory_samples: list[int] = field(default_factory=lambda: [10, 100, 400])
    memory_images: list[int] = field(default_factory=lambda: [32, 128, 512])
    epochs: int = 3
    train_images: int | None = None
    device: str = "cpu"
    seed: int = 0
    out: Path = Path("docs/results")


def main(options: Options) -> None:
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    costs = [row for p in options.latent_dims for row in _costs(options, p, device)]
    memory = _memory(options, device)
    precisions = _precisions(options, device)
    record = {k: v for k, v in vars(options).items() if k != "out"}
    record |= environment(device) | {"chunk_size": default_chunk_size(device), "target": TARGET}
    record |= {"costs": costs, "memory": memory, "precisions": precisions}
    text = _text(options, record)
    write_json(options.out / "evaluation_cost.json", record)
    write_text(options.out / "evaluation_cost.md", text)
    print(text)


def _costs(options: Options, latent_dim: int, device: torch.device) -> list[dict[str, Any]]:
    """Evaluation over decoder, for each guide."""
    model = ImageModel(SHAPE, latent_dim).to(device).requires_grad_(False)
    guides = {name: make_guide(name, model).to(device).eval() for name in options.guides}
    x = torch.rand(options.images, *SHAPE, device=device)
    z = torch.randn(options.samples * options.images, latent_dim, device=device)
    # as log_weights does: whole samples of a batch of images
    chunk = default_chunk_size(device)
    rows = max(1, chunk // options.images) * options.images

    def decode() -> None:
        for part in z.split(rows):
            model.decoder(part)

    ratios: dict[str, list[float]] = {name: [] for name in guides}
    once: dict[str, list[float]] = {name: [] for name in guides}
    decoder: list[float] = []
    with torch.no_grad():
        for turn in range(options.rounds + 1):  # the first warms up
            before = _seconds(decode, device)
            for name, guide in guides.items():
                total = _seconds(partial(log_weights, model, guide, x, options.samples), device)
                fixed = _seconds(partial(guide.posterior, x), device)
                after = _seconds(decode, device)  # on both sides: the machine's speed drifts
                base, before = (before + after) / 2, after
                if turn:
                    decoder.append(base)
                    ratios[name].append(total / base)
                    once[name].append(fixed / base)
            print(f"p = {latent_dim}, round {turn} of {options.rounds}", flush=True)
    found = []
    for name in guides:
        low, middle, high = _quartiles(ratios[name])
        found.append(
            {
                "guide": name,
                "latent_dim": latent_dim,
                "ratio": middle,
                "quartiles": [low, high],
                "ratios": ratios[name],
                "posterior_once": statistics.median(once[name]),
                "decoder_seconds": statistics.median(decoder),
                "reached": middle <= TARGET,
                "profile": [] if middle <= TARGET else _profile(model, guides[name], x, options),
            }
        )
    return found


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of the processor on a CPU, where others may interrupt; of the clock on a GPU."""
    if device.type == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, middle, high


def _profile(model: Any, guide: Any, x: Tensor, options: Options) -> list[list[Any]]:
    """The operators that take longest, as shares of the evaluation."""
    cuda = x.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        log_weights(model, guide, x, options.samples)
    clock = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [(event.key, getattr(event, clock)) for event in profile.key_averages()]
    total = sum(spent for _, spent in events) or 1
    events.sort(key=lambda event: -event[1])
    return [[name, spent / total] for name, spent in events[:10]]


def _memory(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """Peak memory of the first guide and of "gp", for several K and B."""
    settings = [(k, options.images) for k in options.memory_samples]
    settings += [(min(options.memory_samples), b) for b in options.memory_images]
    model = ImageModel(SHAPE, max(options.latent_dims)).to(device).requires_grad_(False)
    rows = []
    for name in dict.fromkeys([options.guides[0], "gp"]):
        guide = make_guide(name, model).to(device)
        for samples, images in dict.fromkeys(settings):
            x = torch.rand(images, *SHAPE, device=device)
            log_weights(model, guide, x[:1], 1)
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                log_weights(model, guide, x, samples)
                peak = torch.cuda.max_memory_allocated(device) - before
            else:
                with PeakMemory() as memory:
                    log_weights(model, guide, x, samples)
                peak = memory.peak
            rows.append({"guide": name, "samples": samples, "images": images, "peak": peak})
    return rows


def _precisions(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """The evidence of a trained VAE, with the decoder in each precision."""
    with TemporaryDirectory() as folder:
        config = RunConfig(
            guide="vae",
            latent_dim=min(options.latent_dims),
            epochs=options.epochs,
            train_images=options.train_images,
            test_images=options.images,
            seed=options.seed,
            device=options.device,
        )
        train_run(config, folder, overwrite=True)
        run = load_run(folder)
    x = run.data.test[: options.images]
    found: dict[str, Tensor] = {}
    rows = []
    for precision in ("float32", "tf32", "bf16"):
        seconds = []
        for _ in range(max(2, options.rounds)):

            def evaluate(precision: Any = precision) -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # heavy tails are not the subject here
                    found[precision] = log_evidence(
                        run.model,
                        run.guide,
                        x,
                        options.samples,
                        precision=precision,
                        seed=options.seed,
                    ).log_evidence

            seconds.append(_seconds(evaluate, device))
        difference = found[precision] - found["float32"]
        rows.append(
            {
                "precision": precision,
                "log_evidence": float(found[precision].mean()),
                "mean_difference": float(difference.mean()),
                "largest_difference": float(difference.abs().max()),
                "seconds": statistics.median(seconds[1:]),
            }
        )
    return rows


def _text(options: Options, record: dict[str, Any]) -> str:
    lines = [
        "| guide | p | evaluation / decoder | quartiles | of which q(z\\|x), once per image "
        f"| target {TARGET:.2f} |",
        "|---|--:|--:|--:|--:|---|",
    ]
    notes = []
    for row in record["costs"]:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['guide']} | {row['latent_dim']} | {row['ratio']:.3f} "
            f"| {low:.3f}-{high:.3f} | {row['posterior_once']:.3f} "
            f"| {'reached' if row['reached'] else 'missed'} |"
        )
        if not row["reached"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["profile"])
            rest = row["ratio"] - 1 - row["posterior_once"]
            notes.append(
                f"* {row['guide']}, p = {row['latent_dim']}: missed. q(z|x) takes "
                f"{row['posterior_once']:.3f} of the decoder's time, once per image and not per "
                f"sample; densities and all else take {rest:.3f}. Operators: {shares}."
            )
    lines += ["", *notes, *([""] if notes else [])]
    lines += ["| guide | K | B | peak memory, MiB |", "|---|--:|--:|--:|"]
    lines += [
        f"| {row['guide']} | {row['samples']} | {row['images']} | {row['peak'] / 2**20:.2f} |"
        for row in record["memory"]
    ]
    base = record["precisions"][0]["seconds"]
    lines += [
        "",
        "| decoder in | log p(x), nats per image | mean difference | largest | time / float32 |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['precision']} | {row['log_evidence']:.3f} | {row['mean_difference']:+.4f} "
        f"| {row['largest_difference']:.4f} | {row['seconds'] / base:.2f} |"
        for row in record["precisions"]
    ]
    cpu = options.device == "cpu"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines += [
        "",
        f"Times: K = {options.samples}, B = {options.images}, convolutional decoder of Table 1, "
        f"chunks of {record['chunk_size']} latent vectors, untrained networks, "
        f"{options.rounds} alternating rounds, "
        f"{'processor time' if cpu else 'wall time'}, {record['device']}, "
        f"{record['threads']} thread(s); {versions}. Memory: p = {max(options.latent_dims)}, "
        + (
            "tensors alive at once, without workspaces inside operators. "
            if cpu
            else "peak of torch's allocator above what was allocated before. "
        )
        + f"Precisions: VAE with p = {min(options.latent_dims)} after {options.epochs} epochs on "
        f"mnist5k (the paper: 2000), {options.images} test digits, K = {options.samples}, the same "
        f"random numbers, seed {options.seed}."
        + (" TF32 exists on GPUs only, and changes nothing here." if cpu else ""),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    main(options)
