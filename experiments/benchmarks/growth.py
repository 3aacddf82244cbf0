"""How do a training step and an evaluation grow with N, p, K, B and D?

    OMP_NUM_THREADS=1 python experiments/benchmarks/growth.py

One of them at a time grows from a common setting: N training images, p latent dimensions, K
importance samples, B images of a batch, D pixels times channels (networks of Tables 1 to 3). The
sizes of a letter take turns. A table has the ratio to the smallest size, and the slope of log time
on log size: 0 is flat, 1 is linear. A step must not depend on N, nor an evaluation be worse than
linear in K and B. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import tyro
from _bench import Ceilings, Options, Program, Quartiles, Timings, interleave
from _report import Report, Target
from step import on_batches

from pyro_gpvae import ImageModel, log_evidence, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import ParetoWarning
from pyro_gpvae.training.step import Backend, TrainingStep


@dataclass(frozen=True)
class Size:
    """One setting: N, p, K, B and D."""

    images: int
    latent_dim: int = 10
    samples: int = 100
    batch_size: int = 128
    image_shape: tuple[int, int, int] = (1, 28, 28)


FIELDS = dict(zip("NpKBD", (field.name for field in fields(Size)), strict=True))


@dataclass(kw_only=True)
class GrowthOptions(Options):
    """Options of the measurement.

    Attributes:
        guides: What is trained and evaluated.
        backend: Of the training step; None is "captured" on CUDA, and "eager" on a CPU, where
            all sizes would take long to compile.
        images: N; the first is that of the common setting.
        latent_dims: p; likewise.
        samples: K; the common setting has 100.
        batch_sizes: B in training; the common setting has 128.
        test_batch_sizes: B in an evaluation; the first is that of the common setting.
        image_shapes: (C, H, W), whose product is D; the first is that of the common setting.
    """

    rounds: int = 9
    guides: tuple[str, ...] = ("vae", "gp")
    backend: Backend | None = None
    images: tuple[int, ...] = (1_000, 10_000, 100_000)
    latent_dims: tuple[int, ...] = (10, 20, 50, 100)
    samples: tuple[int, ...] = (10, 30, 100, 300)
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256)
    test_batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    image_shapes: tuple[tuple[int, int, int], ...] = ((1, 28, 28), (3, 32, 32), (3, 64, 64))

    def of_steps(self) -> Backend:
        """The backend of the training step."""
        return self.backend or ("captured" if self.on().type == "cuda" else "eager")


def main(options: GrowthOptions) -> None:
    report = Report(
        "growth",
        "Growth with N, p, K, B and D",
        options,
        f"N = {options.images[0]:,}, p = {options.latent_dims[0]}, K = 100, B = 128 in training "
        f"and {options.test_batch_sizes[0]} in an evaluation, D = "
        f"{math.prod(options.image_shapes[0])}, unless the letter says otherwise; backend "
        f"{options.of_steps()}; random images, networks of Tables 1 to 3.",
        Ceilings.measure(options.on()),
    )
    shared: dict[str, Sequence[Any]] = {"p": options.latent_dims, "D": options.image_shapes}
    axes: dict[str, tuple[Callable[..., Program], int, dict[str, Sequence[Any]]]] = {
        "a step": (training, 128, {"N": options.images, "B": options.batch_sizes} | shared),
        "an evaluation": (
            evaluation,
            options.test_batch_sizes[0],
            {"K": options.samples, "B": options.test_batch_sizes} | shared,
        ),
    }
    for what, (program, batch_size, letters) in axes.items():
        base = Size(options.images[0], options.latent_dims[0], batch_size=batch_size)
        base = replace(base, image_shape=options.image_shapes[0])
        lines = ["| guide | letter | ratio at each size | slope | ms at the first |"]
        lines.append("|---|---|---|--:|--:|")
        for guide in options.guides:
            for letter, values in letters.items():
                timings, slope = grow(program, guide, base, letter, values, options)
                lines.append(row(guide, letter, timings, slope))
                report.record[f"{what}, {guide}, {letter}"] = {
                    "slope": slope,
                    "seconds": timings.seconds,
                }
                report.targets += growth_targets(f"{what}, {guide}", letter, timings, slope)
        report.tables[what] = "\n".join(lines)
    report.write()


def grow(
    program: Callable[..., Program],
    guide: str,
    base: Size,
    letter: str,
    values: Sequence[Any],
    options: GrowthOptions,
) -> tuple[Timings, float]:
    """Times all sizes of one letter in turns. Returns the timings, and the slope."""
    device = options.on()
    with seeded(options.seed, device):
        programs = {
            f"{extent(value):,}": program(guide, replace(base, **{FIELDS[letter]: value}), options)
            for value in values
        }
        timings = interleave(programs, device, options)
    medians = [timings.of(name).median for name in programs]
    return timings, log_slope([extent(value) for value in values], medians)


def extent(value: int | tuple[int, int, int]) -> int:
    return math.prod(value) if isinstance(value, tuple) else value


def log_slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent of a power law, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def growth_targets(name: str, letter: str, timings: Timings, slope: float) -> list[Target]:
    """What must be flat, and what at most linear."""
    first, *_, last = timings.seconds
    if letter == "N":
        flat = timings.ratio(last, first).median
        return [Target(f"{name}: N = {last} / N = {first}", 1.1, flat)]
    if name.startswith("an evaluation") and letter in "KB":
        return [Target(f"{name}: slope of log time on log {letter}", 1.05, slope)]
    return []


def row(guide: str, letter: str, timings: Timings, slope: float) -> str:
    first = next(iter(timings.seconds))
    ratios = ", ".join(f"{n}: {timings.ratio(n, first)}" for n in timings.seconds if n != first)
    milliseconds = Quartiles.of([1000 * s for s in timings.seconds[first]])
    return f"| {guide} | {letter} from {first} | {ratios} | {slope:.2f} | {milliseconds} |"


def training(guide: str, size: Size, options: GrowthOptions) -> Program:
    """A step on the next batch."""
    model, made, images = _pair(guide, size, options.on())
    step = TrainingStep(
        model.train(),
        made.train(),
        images,
        batch_size=size.batch_size,
        backend=options.of_steps(),
    )
    return on_batches(step, images, size.batch_size)


def evaluation(guide: str, size: Size, options: GrowthOptions) -> Program:
    """log p(x) of a batch."""
    model, made, images = _pair(guide, size, options.on())
    model.eval()
    made.eval()
    x = images[: size.batch_size]

    def program() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)
            return log_evidence(model, made, x, size.samples)

    return program


def _pair(guide: str, size: Size, device: torch.device) -> tuple[ImageModel, Any, torch.Tensor]:
    shape = (size.images, *size.image_shape)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    model = ImageModel(size.image_shape, size.latent_dim)
    made = make_guide(guide, model)
    return model.pair(made).to(device), made.to(device), images


if __name__ == "__main__":
    main(tyro.cli(GrowthOptions, description=__doc__))
