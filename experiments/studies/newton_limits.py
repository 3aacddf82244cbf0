"""What a Newton step leaves of the gap, and whether the uncertainty of GPVAE knows where it helps.

    python experiments/studies/newton_limits.py

Trains a VAE on the embedded digits, then ``newton:1`` and ``gp`` from its encoder on its frozen
decoder, for as many epochs. It measures

* the nats per image that q loses against the best full Gaussian of each image, if its mean or its
  covariance is replaced by that of the best Gaussian, and after more steps of the same networks, on
  test and on training images;
* the rank correlation of scores of each image with the nats that a step from the mean of ``gp``
  gains.

It writes newton_limits.json and .md; ``--render`` makes the latter again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
import tyro
from _study import publish
from torch import Tensor

from guides import InstanceGuide, NewtonGuide
from pyro_gpvae import ImageModel, fit, initial_sigma, load_data, make_guide
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation.uncertainty import rank_correlation, uncertainty_scores

#: Steps of the networks that were trained with one step.
STEPS = (2, 5, 10)
SCORES = {
    "uncertainty": "uncertainty of `gp`, Σ v/h² + r",
    "reconstruction": "−log p(x given the mean of `gp`)",
    "whitened": "norm of the whitened gradient, which the step computes",
}


@dataclass(kw_only=True)
class Options:
    """Options of the study.

    Attributes:
        epochs: Passes over the training images, for the VAE and again for both guides.
        train_images: The number of training images.
        images: The number of images of the gaps, test and training images each.
        scored_images: The number of test images of the correlations.
        num_samples: Samples of each ELBO.
        seed: The seed of training and sampling.
        out: Folder of the results.
        render: Only make the page again from the record.
    """

    epochs: int = 20
    train_images: int = 4000
    images: int = 200
    scored_images: int = 1000
    num_samples: int = 100
    seed: int = 0
    out: Path = Path("runs/newton_limits")
    render: bool = False


def measure(options: Options) -> dict[str, Any]:
    """Trains the guides and returns gaps and correlations."""
    data = load_data("mnist5k").take(options.train_images, options.scored_images)
    torch.manual_seed(options.seed)
    model = ImageModel(data.image_shape, latent_dim=10, sigma=initial_sigma(data.train))
    vae = make_guide("vae", model)
    train: dict[str, Any] = {"epochs": options.epochs, "seed": options.seed, "progress": False}
    fit(model, vae, data.train, **train)
    model.requires_grad_(False)
    newton, gp = NewtonGuide(model, 1, warm_start=vae), make_guide("gp", model, warm_start=vae)
    for guide in (newton, gp):
        fit(model, guide, data.train, **train)
        guide.eval()
    gaps = {}
    for name, images in (("test", data.test), ("training", data.train)):
        x = to_batch(images[: options.images])[0]
        best = InstanceGuide(model, "full", warm_start=vae).posterior(x)
        gaps[name] = gaps_of(model, newton, vae, x, best, options)
    x = to_batch(data.test)[0]
    return {"gaps": gaps, "correlations": correlations(model, newton, gp, x, options)}


def elbo(model: ImageModel, x: Tensor, q: Any, options: Options) -> Tensor:
    """Returns the ELBO of each image in nats, (B,), with the same noise for every Gaussian."""
    torch.manual_seed(options.seed)
    with torch.no_grad():
        draws = [q.sample() for _ in range(options.num_samples)]
        return torch.stack([model.log_joint(x, z) - q.log_prob(z) for z in draws]).mean(0)


def gaps_of(
    model: ImageModel, newton: NewtonGuide, vae: Any, x: Tensor, best: Any, options: Options
) -> dict[str, list[float]]:
    """Returns the mean and the median over images of what each q loses, in nats."""
    gaussian = dist.MultivariateNormal
    with torch.no_grad():
        q = newton.posterior(x)
        candidates = {
            "encoder of the VAE": vae.posterior(x),
            "`newton:1`": q,
            "`newton:1`, covariance of the best Gaussian": gaussian(q.mean, best.covariance_matrix),
            "`newton:1`, mean of the best Gaussian": gaussian(best.mean, q.covariance_matrix),
        }
        for steps in STEPS:
            newton.num_steps = steps
            candidates[f"its networks, {steps} steps"] = newton.posterior(x)
        newton.num_steps = 1
    optimum = elbo(model, x, best, options)
    losses = {name: optimum - elbo(model, x, q, options) for name, q in candidates.items()}
    return {name: [float(loss.mean()), float(loss.median())] for name, loss in losses.items()}


def correlations(
    model: ImageModel, newton: NewtonGuide, gp: Any, x: Tensor, options: Options
) -> dict[str, Any]:
    """Returns the rank correlation of each score with the nats that a step gains, and their mean.

    The step starts at the mean a(x) of the random encoder, whose q counts as N(a, v + exp(2b)).
    """
    with torch.no_grad():
        loc, variance, log_scale, _ = gp.moments(x)
        factor = newton.factor(loc)
        moved = newton.step(x, loc, factor)
        start = dist.Normal(loc, (variance + (2 * log_scale).exp()).sqrt()).to_event(1)
        end = dist.MultivariateNormal(moved, scale_tril=newton.factor(moved))
    gain = elbo(model, x, end, options) - elbo(model, x, start, options)
    z = loc.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_joint(x, z).sum(), z)
    scores = uncertainty_scores(model, gp, x)
    scores["whitened"] = (factor.mT @ gradient.unsqueeze(-1)).squeeze(-1).norm(dim=-1).numpy()
    found = {name: list(rank_correlation(scores[name], gain.numpy())) for name in SCORES}
    return {"gain": float(gain.mean()), "rho": found}


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record."""
    lines = ["| q | test images | training images |", "|---|--:|--:|"]
    for name in record["gaps"]["test"]:
        cells = ["{:.2f} ({:.2f})".format(*record["gaps"][part][name]) for part in record["gaps"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| score of an image | ρ with the nats gained | 95 % interval |", "|---|--:|--:|"]
    for name, (rho, low, high, _) in record["correlations"]["rho"].items():
        lines.append(f"| {SCORES[name]} | {rho:.2f} | {low:.2f} to {high:.2f} |")
    caption = (
        "First table: nats that q loses against the best full Gaussian of each image, mean "
        f"(median) over {record['images']} images. Second: Spearman's ρ over "
        f"{record['scored_images']:,} test images, with bootstrap intervals; a step from the mean "
        f"of `gp` gains {record['correlations']['gain']:.1f} nats on average. Embedded digits, "
        f"{record['train_images']:,} for training, p = 10, networks of the paper's Table 1, "
        f"{record['epochs']} epochs for the VAE and as many again for `newton:1` and `gp` on its "
        f"frozen decoder, learning rate 5e-4, {record['num_samples']} samples of each ELBO, seed "
        f"{record['seed']}."
    )
    return "\n".join([*lines, "", caption, ""])


def main(options: Options) -> None:
    publish("newton_limits", options, partial(measure, options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
