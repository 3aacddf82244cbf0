"""What does evaluation cost beside the decoder's forward pass, and how much memory does it take?

    OMP_NUM_THREADS=1 python experiments/benchmarks/evaluation.py

For each guide, the log weights of K samples of B images take turns with bare forward passes of the
decoder on K·B latent vectors in the same chunks, and with q(z|x) alone. Networks are untrained; the
cost does not depend on it. Memory is the most that tensors take at once beside images and networks,
for several K and B. A VAE is then trained for a few epochs, and its evidence compared between
precisions of the decoder. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
import tyro
from _bench import Ceilings, Options, Program, Work, interleave, short
from _report import Report, Target, profile
from torch import Tensor

from pyro_gpvae import ImageModel, RunConfig, load_run, log_evidence, make_guide, train_run
from pyro_gpvae.core._memory import PeakMemory
from pyro_gpvae.core._precision import Precision
from pyro_gpvae.evaluation.importance import ParetoWarning, default_chunk_size, log_weights

SHAPE = (1, 28, 28)
DECODER = "decoder"
# of the memory's table: flat in K means little where all samples are decoded at once
MEMORY_CHUNK = 640


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """Options of the measurement.

    Attributes:
        guides: Guides whose evaluation is timed.
        latent_dims: Dimensions p of z.
        samples: Importance samples K.
        images: Images B.
        memory_samples: Values of K for the memory, at B = images; the first is the smallest.
        memory_images: Values of B for the memory, at the smallest of these K.
        epochs: Passes over the training images before precisions are compared.
        train_images: How many training images; None is all.
    """

    rounds: int = 9
    guides: tuple[str, ...] = ("vae", "gp", "vlae:1", "iaf:2", "me:2")
    latent_dims: tuple[int, ...] = (10, 50)
    samples: int = 100
    images: int = 128
    memory_samples: tuple[int, ...] = (10, 100, 400)
    memory_images: tuple[int, ...] = (32, 128, 512)
    epochs: int = 3
    train_images: int | None = None


def main(options: EvaluationOptions) -> None:
    device = options.on()
    torch.manual_seed(options.seed)
    report = Report(
        "evaluation",
        "An evaluation",
        options,
        f"K = {options.samples}, B = {options.images}, decoder of Table 1, chunks of "
        f"{default_chunk_size(device)} latent vectors, untrained networks. Memory: p = "
        f"{max(options.latent_dims)}, chunks of {MEMORY_CHUNK}, tensors alive at once, without "
        "workspaces inside operators. "
        f"Precisions: a VAE with p = {min(options.latent_dims)} after {options.epochs} epochs on "
        f"mnist5k (the paper: 2000), {options.images} test digits, the same random numbers; TF32 "
        "exists on GPUs only. Limit: operations and unavoidable bytes of the decoder at the speed "
        "of the ceilings.",
        Ceilings.measure(device),
    )
    for latent_dim in options.latent_dims:
        costs(report, options, latent_dim)
    memory(report, options)
    precisions(report, options)
    report.write()


def costs(report: Report, options: EvaluationOptions, latent_dim: int) -> None:
    """Adds the times of decoder, evaluations and encoders."""
    device = options.on()
    model = ImageModel(SHAPE, latent_dim).to(device).requires_grad_(False)
    guides = {name: make_guide(name, model).to(device).eval() for name in options.guides}
    x = torch.rand(options.images, *SHAPE, device=device)
    z = torch.randn(options.samples * options.images, latent_dim, device=device)
    # as log_weights does: whole samples of a batch of images
    rows = max(1, default_chunk_size(device) // options.images) * options.images

    def decode() -> None:
        for part in z.split(rows):
            model.decoder(part)

    programs: dict[str, Program] = {DECODER: decode}
    for name, guide in guides.items():
        programs[name] = partial(log_weights, model, guide, x, options.samples)
        programs[f"{name}, q(z\\|x) alone"] = partial(guide.posterior, x)
    with torch.no_grad():
        timings = interleave(programs, device, options, warm_up=1)
        work = Work.of(decode, model.parameters(), z)
        limits = dict.fromkeys(programs, report.ceilings.limit(work))
        report.tables[f"p = {latent_dim}"] = timings.table(DECODER, limits)
        for name in guides:
            found = timings.ratio(name, DECODER).median
            target = Target(f"{name}, p = {latent_dim}: evaluation / decoder", 1.10, found)
            report.targets.append(target)
            if not target.reached:
                text = profile(programs[name], device, options.seconds)
                report.tables[f"p = {latent_dim}: profile of {name}"] = text
    report.record[f"p = {latent_dim}"] = {"seconds": timings.seconds, "limit_seconds": limits}


def memory(report: Report, options: EvaluationOptions) -> None:
    """Adds the peak memory of the first guide and of "gp", for several K and B."""
    device = options.on()
    model = ImageModel(SHAPE, max(options.latent_dims)).to(device).requires_grad_(False)
    few, *_, many = options.memory_samples
    lines = ["| guide | K | B | peak memory, MiB |", "|---|--:|--:|--:|"]
    for name in dict.fromkeys([options.guides[0], "gp"]):
        guide = make_guide(name, model).to(device)
        settings = [(k, options.images) for k in options.memory_samples]
        settings += [(few, b) for b in options.memory_images]
        peaks = {}
        for samples, images in dict.fromkeys(settings):
            x = torch.rand(images, *SHAPE, device=device)
            program = partial(log_weights, model, guide, x, samples, chunk_size=MEMORY_CHUNK)
            peaks[samples, images] = peak_of(program, device)
        lines += [f"| {name} | {k} | {b} | {short(v / 2**20)} |" for (k, b), v in peaks.items()]
        flat = peaks[many, options.images] / peaks[few, options.images]
        report.targets.append(Target(f"{name}: peak memory, K = {many} / K = {few}", 1.05, flat))
        report.record[f"memory, {name}"] = {f"K = {k}, B = {b}": v for (k, b), v in peaks.items()}
    report.tables["Memory"] = "\n".join(lines)


def peak_of(program: Program, device: torch.device) -> int:
    """The most bytes that tensors of a program take at once."""
    program()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        program()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as found:
        program()
    return found.peak


def precisions(report: Report, options: EvaluationOptions) -> None:
    """Adds the evidence of a trained VAE, with the decoder in each precision."""
    device = options.on()
    with TemporaryDirectory() as folder:
        config = RunConfig(
            guide="vae",
            latent_dim=min(options.latent_dims),
            epochs=options.epochs,
            train_images=options.train_images,
            test_images=options.images,
            seed=options.seed,
            device=str(device),
        )
        train_run(config, folder, overwrite=True, progress=False)
        run = load_run(folder)
        x = run.data.test[: options.images]
    found: dict[str, Tensor] = {}

    def evaluation(precision: Precision) -> Program:
        def program() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ParetoWarning)  # heavy tails are not the subject
                found[precision] = log_evidence(
                    run.model,
                    run.guide,
                    x,
                    options.samples,
                    precision=precision,
                    seed=options.seed,
                ).log_evidence

        return program

    programs = {precision: evaluation(precision) for precision in get_args(Precision)}
    timings = interleave(programs, device, options, warm_up=1)
    record: dict[str, Any] = {"seconds": timings.seconds}
    lines = [
        "| decoder in | log p(x), nats per image | mean difference | largest | time / float32 |",
        "|---|--:|--:|--:|--:|",
    ]
    for precision, scores in found.items():
        difference = scores - found["float32"]
        mean, largest = float(difference.mean()), float(difference.abs().max())
        record[precision] = {
            "log_evidence": float(scores.mean()),
            "mean_difference": mean,
            "largest_difference": largest,
        }
        lines.append(
            f"| {precision} | {float(scores.mean()):.3f} | {mean:+.4f} | {largest:.4f} "
            f"| {timings.ratio(precision, 'float32')} |"
        )
    report.tables["Precision of the decoder"] = "\n".join(lines)
    report.record["precisions"] = record


if __name__ == "__main__":
    main(tyro.cli(EvaluationOptions, description=__doc__))
