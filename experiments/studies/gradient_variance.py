"""The variance of the gradient of eq. (2) under each estimator.

    python experiments/studies/gradient_variance.py --epochs 10 --draws 100

A GPVAE is trained on the embedded digits, and the gradient of one minibatch is then drawn many
times under every estimator. The variance, summed over the parameters of a group, is relative to
that of "functions" with analytic KLs. All estimators have the same expectation, except "marginal",
whose bound is tighter. Writes gradient_variance.json and .md; ``--render`` makes the latter again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from _study import publish
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from guides import GPGuide
from guides.gp import Estimator
from pyro_gpvae import ImageModel, PerImage, fit, initial_sigma, load_data, pair

ESTIMATORS: dict[str, tuple[Estimator, type[Trace_ELBO]]] = {
    "functions, analytic KL": ("functions", TraceMeanField_ELBO),
    "functions, sampled KL": ("functions", Trace_ELBO),
    "weights, analytic KL": ("weights", TraceMeanField_ELBO),
    "weights, sampled KL": ("weights", Trace_ELBO),
    "marginal": ("marginal", Trace_ELBO),
}


@dataclass(kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
        epochs: Passes over the training images before the measurement.
        draws: Number of gradients for each estimator.
        latent_dim: Dimension p of z.
        batch: Number of images in the minibatch.
        seed: Seed of all random numbers.
        out: Folder of the results.
        render: Only make the page again from the record.
    """

    epochs: int = 10
    draws: int = 100
    latent_dim: int = 20
    batch: int = 128
    seed: int = 0
    out: Path = Path("runs/gradient_variance")
    render: bool = False


def measure(options: Options) -> dict[str, Any]:
    """Trains the guide and returns the variances of each estimator."""
    data = load_data("mnist5k")
    num_images = len(data.train)
    torch.manual_seed(options.seed)
    model = ImageModel(data.image_shape, options.latent_dim, sigma=initial_sigma(data.train))
    guide = GPGuide(model)
    fit(model, guide, data.train, epochs=options.epochs, seed=options.seed)
    x = data.train[: options.batch] / 255
    groups: dict[str, list[torch.Tensor]] = {
        "decoder": list(model.parameters()),
        "encoder": [*guide.encoder.parameters(), *guide.head.parameters()],
        "means of W": [guide.W.loc],
        "log sd of W": [p for name, p in guide.W.named_parameters() if name == "log_scale"],
        "means of U": [guide.U.loc],
        "log sd of U": [p for name, p in guide.U.named_parameters() if name == "log_scale"],
    }
    programs = PerImage(pair(model, guide), num_images), PerImage(guide, num_images)
    variances = {}
    for name, (estimator, objective) in ESTIMATORS.items():
        guide.estimator = estimator
        variances[name] = _variances(objective(), programs, x, groups, options)
        print(name, variances[name], flush=True)
    return {"train_images": num_images, "variances": variances}


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record."""
    table = pd.DataFrame(record["variances"]).T
    ratios = table / table.loc["functions, analytic KL"]
    lines = ["| estimator | " + " | ".join(ratios) + " |", "|---|" + "--:|" * ratios.shape[1]]
    for name, row in ratios.iterrows():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    caption = (
        f"Variance of the gradient of one minibatch of {record['batch']} digits, relative to the "
        f"first row; p = {record['latent_dim']}, after {record['epochs']} epochs on "
        f"{record['train_images']} digits, {record['draws']} draws, seed {record['seed']}."
    )
    return "\n".join([*lines, "", caption, ""])


def _variances(
    objective: Trace_ELBO,
    programs: tuple[PerImage, PerImage],
    x: torch.Tensor,
    groups: dict[str, list[torch.Tensor]],
    options: Options,
) -> dict[str, float]:
    """Returns the variance of the gradient, summed over each group (Welford's recurrence)."""
    torch.manual_seed(options.seed)
    parameters = [p for group in groups.values() for p in group]
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    square = [0.0] * len(parameters)
    for count in range(1, options.draws + 1):
        loss = objective.differentiable_loss(*programs, x)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        for i, gradient in enumerate(gradients):
            step = gradient.double() - mean[i]
            mean[i] += step / count
            square[i] += float((step * (gradient - mean[i])).sum())
    totals = iter(square)
    return {
        name: sum(next(totals) for _ in group) / (options.draws - 1)
        for name, group in groups.items()
    }


def main(options: Options) -> None:
    publish("gradient_variance", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
