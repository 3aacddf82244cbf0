"""How noisy is the gradient of eq. (2) under each estimator?

    python experiments/studies/gradient_variance.py --epochs 10 --draws 100

A GPVAE is trained on the embedded digits, and the gradient of one minibatch is then drawn many
times under every estimator. The variance, summed over the parameters of a group, is printed
relative to the one of "functions" with analytic KLs, and written to --out as JSON and Markdown.
All estimators have the same expectation but "marginal", whose bound is tighter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from guides import GPGuide
from guides.gp import Estimator
from pyro_gpvae import ImageModel, PerImage, fit, initial_sigma, load_data, pair
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text

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
        draws: Gradients drawn under each estimator.
        latent_dim: Dimension p of z.
        batch: Images of the minibatch.
        seed: Seed of everything.
        out: Folder of the results.
    """

    epochs: int = 10
    draws: int = 100
    latent_dim: int = 20
    batch: int = 128
    seed: int = 0
    out: Path = Path("runs/gradient_variance")


def main(options: Options) -> None:
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
    table = pd.DataFrame(variances).T
    ratios = table / table.loc["functions, analytic KL"]
    lines = ["| estimator | " + " | ".join(groups) + " |", "|---|" + "--:|" * len(groups)]
    for name, row in ratios.iterrows():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    caption = (
        f"Variance of the gradient of one minibatch of {options.batch} digits, relative to the "
        f"first row; p = {options.latent_dim}, after {options.epochs} epochs on {num_images} "
        f"digits, {options.draws} draws, seed {options.seed}."
    )
    lines += ["", caption, ""]
    record = {k: v for k, v in vars(options).items() if k != "out"}
    record |= environment(torch.device("cpu")) | {"variances": variances}
    write_json(options.out / "gradient_variance.json", record)
    write_text(options.out / "gradient_variance.md", "\n".join(lines))
    print("\n".join(lines))


def _variances(
    objective: Trace_ELBO,
    programs: tuple[PerImage, PerImage],
    x: torch.Tensor,
    groups: dict[str, list[torch.Tensor]],
    options: Options,
) -> dict[str, float]:
    """The variance of the gradient, summed over each group (Welford's recurrence)."""
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


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    main(options)
