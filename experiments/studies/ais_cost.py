"""The cost of an image's log p(x) by annealing and by importance sampling, at equal error.

    OMP_NUM_THREADS=1 python experiments/studies/ais_cost.py

A VAE is trained on the embedded digits. Test digits are then evaluated by importance sampling from
the encoder's q(z|x) and from the optimal Gaussian of each image, and by annealing from the prior,
the encoder and the optimum. Settings take turns and are repeated with other seeds; times are
medians. Writes ais_cost.json and ais_cost.md; ``--render`` makes the latter again.
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from _study import publish
from torch import Tensor

from pyro_gpvae import ImageModel, fit, initial_sigma, load_data, log_evidence, make_guide
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation.annealing import annealed_evidence
from pyro_gpvae.evaluation.importance import ParetoWarning

Setting = tuple[str, str, int]

#: The error at which costs are compared, in nats.
TARGET = 0.05


@dataclass(kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
        epochs: Passes over the training images before the measurement.
        latent_dim: Dimension p of z.
        images: Number of test images.
        samples: Importance samples K.
        steps: Steps of annealing.
        chains: Chains of annealing.
        repeats: How often each setting is timed.
        seed: Seed of all random numbers.
        out: Folder of the results.
        render: Only make the page again from the record in --out.
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
    render: bool = False


def measure(options: Options) -> dict[str, Any]:
    """Trains the VAE, and returns a row for each setting."""
    data = load_data("mnist5k")
    torch.manual_seed(options.seed)
    model = ImageModel(data.image_shape, options.latent_dim, sigma=initial_sigma(data.train))
    encoder = make_guide("vae", model)
    fit(model, encoder, data.train, epochs=options.epochs, seed=options.seed, progress=False)
    model.requires_grad_(False)
    x = data.test[: options.images]
    optimum = make_guide("instance:full", model, warm_start=encoder)
    guides: dict[str, Any] = {"prior": None, "encoder": encoder, "optimum": optimum}
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
                guide.posterior(to_batch(x, model)[0])
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

    best = torch.stack(values["IWAE", "optimum", max(options.samples)]).mean()
    rows = []
    for key in settings:
        method, start, size = key
        error = float(torch.stack(errors[key]).square().mean().sqrt())
        middle = statistics.median(seconds[key])
        once = statistics.median(fixed[start])
        # the error is known if neither the tail is heavy nor one chain or sample dominates
        known = 2 * heavy.get(key, 0) <= len(x) and error < 0.5
        cost = once + (middle - once) * (error / TARGET) ** 2 if known else None
        rows.append(
            {
                "method": method,
                "start": start,
                "samples" if method == "IWAE" else "steps": size,
                "seconds": middle,
                "seconds_for_the_start": once,
                "seconds_of_repeats": seconds[key],
                "standard_error": error,
                "seconds_at_target": cost,
                "below_reference": float(best - torch.stack(values[key]).mean()),
                "pareto_k_above_0.7": heavy.get(key),
            }
        )
    return {"rows": rows}


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record."""
    lines = [
        "| estimator | start | K or T | s per image | standard error | below the reference "
        f"| s per image for ± {TARGET} | Pareto k > 0.7 |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    images = record["images"]
    for row in record["rows"]:
        cost, heavy = row["seconds_at_target"], row["pareto_k_above_0.7"]
        size = row["samples" if row["method"] == "IWAE" else "steps"]
        lines.append(
            f"| {row['method']} | {row['start']} | {size} "
            f"| {row['seconds']:.2f} | {row['standard_error']:.3f} | {row['below_reference']:.2f} "
            f"| {'–' if cost is None else f'{cost:.2g}'} "
            f"| {'' if heavy is None else f'{heavy} of {images}'} |"
        )
    caption = (
        f"{images} test digits of mnist5k; VAE with p = {record['latent_dim']}, "
        f"{record['epochs']} epochs (the paper: 2000), seed {record['seed']}; AIS with "
        f"{record['chains']} chains and 3 leapfrog steps per transition; nats per image. Times: "
        f"medians of {record['repeats']} interleaved repeats, {record['device']}, "
        f"{record['threads']} thread(s), including the optimisation where the start is the "
        "optimum. Standard errors: root mean squares over images and repeats. The time for "
        f"± {TARGET} nats assumes that the error falls with the square root of the time after the "
        "optimisation. It is omitted where most images have a Pareto k above 0.7, or where the "
        "error is above 0.5, because such an error cannot be extrapolated. Reference: "
        f"IWAE({max(record['samples'])}) from the optimum, mean of the repeats."
    )
    return "\n".join([*lines, "", caption, ""])


def main(options: Options) -> None:
    publish("ais_cost", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
