"""What does an image's log p(x) cost, by annealing and by importance sampling, at equal error?

    OMP_NUM_THREADS=1 python experiments/benchmarks/ais_cost.py

A VAE is trained on the embedded digits. Test digits are then evaluated by importance sampling,
from the encoder's q(z|x) and from the instance-wise optimum, and by annealing from the prior, from
the encoder and from the optimum. Settings are interleaved, and repeated with other seeds: times are
medians. Images simulated from the model give upper bounds as well, so that a looseness that no
standard error shows can be seen. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor

from pyro_gpvae import RunConfig, load_run, log_evidence, make_guide, train_run
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
from pyro_gpvae.evaluation.importance import ParetoWarning, as_pixels

Setting = tuple[str, str, int]

# the error at which costs are compared, in nats
TARGET = 0.05


@dataclass(kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
        epochs: Passes over the training images before the measurement.
        latent_dim: Dimension p of z.
        images: Test images, and as many simulated ones.
        samples: Importance samples K.
        steps: Steps of annealing.
        chains: Chains of annealing.
        repeats: How often each setting is timed.
        seed: Seed of everything.
        out: Folder of the results.
    """

    epochs: int = 20
    latent_dim: int = 10
    images: int = 6
    samples: list[int] = field(default_factory=lambda: [100, 1000, 5000])
    steps: list[int] = field(default_factory=lambda: [20, 100])
    chains: int = 16
    repeats: int = 3
    seed: int = 0
    out: Path = Path("docs/results")


def main(options: Options) -> None:
    with TemporaryDirectory() as folder:
        config = RunConfig(
            guide="vae",
            latent_dim=options.latent_dim,
            epochs=options.epochs,
            test_images=options.images,
            seed=options.seed,
            device="cpu",
        )
        train_run(config, folder, overwrite=True)
        run = load_run(folder)
    model = run.model.requires_grad_(False)
    x = run.data.test[: options.images]
    optimum = make_guide("instance:full", model, warm_start=run.guide)
    guides: dict[str, Any] = {"prior": None, "encoder": run.guide, "optimum": optimum}
    settings = [("IWAE", start, k) for start in ("encoder", "optimum") for k in options.samples]
    settings += [("AIS", start, t) for start in guides for t in options.steps]

    fixed: dict[str, list[float]] = {start: [] for start in guides}
    seconds: dict[Setting, list[float]] = {s: [] for s in settings}
    errors: dict[Setting, list[Tensor]] = {s: [] for s in settings}
    values: dict[Setting, list[Tensor]] = {s: [] for s in settings}
    heavy: dict[Setting, int] = {}
    for repeat in range(options.repeats):
        for start, guide in guides.items():
            begin = time.perf_counter()
            if guide is not None:
                guide.posterior(as_pixels(model, x))
            fixed[start].append((time.perf_counter() - begin) / len(x))
        for setting in settings:
            method, start, size = setting
            seed = options.seed + repeat
            begin = time.perf_counter()
            if method == "IWAE":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ParetoWarning)  # counted below
                    found: Any = log_evidence(model, guides[start], x, size, seed=seed)
                heavy[setting] = int((found.pareto_k > 0.7).sum())
            else:
                found = annealed_evidence(
                    model, x, guides[start], num_chains=options.chains, num_steps=size, seed=seed
                )
            seconds[setting].append((time.perf_counter() - begin) / len(x))
            errors[setting].append(found.standard_error)
            values[setting].append(found.log_evidence)
            print(*setting, f"{seconds[setting][-1]:.3f} s", flush=True)

    sandwiches: dict[tuple[str, int], Any] = {}
    for start, guide in guides.items():
        for size in options.steps:
            sandwiches[start, size] = bidirectional(
                model,
                guide,
                num_images=options.images,
                num_chains=options.chains,
                num_steps=size,
                seed=options.seed,
            )
    simulated = next(iter(sandwiches.values())).x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)
        inside = log_evidence(model, optimum, simulated, max(options.samples), seed=options.seed)

    best = torch.stack(values["IWAE", "optimum", max(options.samples)]).mean()
    rows = []
    for method, start, size in settings:
        key = (method, start, size)
        error = float(torch.stack(errors[key]).square().mean().sqrt())
        middle = statistics.median(seconds[key])
        once = statistics.median(fixed[start])
        # neither a heavy tail nor a single chain or sample that carries all the weight
        known = 2 * heavy.get(key, 0) <= len(x) and error < 0.5
        sandwich = sandwiches.get((start, size)) if method == "AIS" else None
        rows.append(
            {
                "method": method,
                "start": start,
                "samples" if method == "IWAE" else "steps": size,
                "seconds": middle,
                "seconds_for_the_start": once,
                "seconds_of_repeats": seconds[key],
                "standard_error": error,
                "seconds_at_target": once + (middle - once) * (error / TARGET) ** 2
                if known
                else None,
                "below_reference": float(best - torch.stack(values[key]).mean()),
                "pareto_k_above_0.7": heavy.get(key),
                "sandwich": None if sandwich is None else sandwich.gap,
            }
        )
    widest = sandwiches["optimum", max(options.steps)]
    bounds = {
        "lower": float(widest.lower.mean()),
        "upper": float(widest.upper.mean()),
        "error": float(widest.upper_error.square().sum().sqrt() / len(simulated)),
        f"IWAE({max(options.samples)}), optimum": float(inside.mean),
    }
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    record |= environment(torch.device("cpu")) | {"rows": rows, "simulated": bounds}
    text = _table(rows, bounds, options, record)
    write_json(options.out / "ais_cost.json", record)
    write_text(options.out / "ais_cost.md", text)
    print(text)


def _table(
    rows: list[dict[str, Any]],
    bounds: dict[str, float],
    options: Options,
    record: dict[str, Any],
) -> str:
    lines = [
        "| estimator | start | K or T | s per image | standard error | below the reference "
        f"| s per image for ± {TARGET} | Pareto k > 0.7 | sandwich |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cost, heavy, width = (
            row[name] for name in ("seconds_at_target", "pareto_k_above_0.7", "sandwich")
        )
        size = row["samples" if row["method"] == "IWAE" else "steps"]
        lines.append(
            f"| {row['method']} | {row['start']} | {size} "
            f"| {row['seconds']:.2f} | {row['standard_error']:.3f} | {row['below_reference']:.2f} "
            f"| {'–' if cost is None else f'{cost:.2g}'} "
            f"| {'' if heavy is None else f'{heavy} of {options.images}'} "
            f"| {'' if width is None else f'{width:.2f}'} |"
        )
    *_, name = bounds
    caption = (
        f"{options.images} test digits of mnist5k; VAE with p = {options.latent_dim}, "
        f"{options.epochs} epochs (the paper: 2000), seed {options.seed}; AIS with "
        f"{options.chains} chains and 3 leapfrog steps a move; nats per image. Times: medians of "
        f"{options.repeats} interleaved repeats, {record['device']}, {record['threads']} "
        "thread(s), with the optimisation where the start is the optimum. Standard errors: root "
        f"mean squares over images and repeats. The time for ± {TARGET} nats assumes that the "
        "error falls as the square root of the time that follows the optimisation; where most "
        "images have a Pareto k above 0.7, or the error is above 0.5, it is too small to "
        f"extrapolate. Reference: IWAE({max(options.samples)}) from the optimum, mean of the "
        "repeats. Sandwich: mean upper minus lower bound by BDMC on "
        f"{options.images} images simulated from the model; with T = {max(options.steps)} from "
        f"the optimum, their mean log p(x) lies between {bounds['lower']:.2f} and "
        f"{bounds['upper']:.2f} (± {bounds['error']:.2f} each), and {name} gives "
        f"{bounds[name]:.2f}."
    )
    return "\n".join([*lines, "", caption, ""])


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    main(options)
