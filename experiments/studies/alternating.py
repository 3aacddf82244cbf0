"""Why the model must not be updated after the encoder on the same minibatch.

    python experiments/studies/alternating.py --epochs 20 --seeds 2

Trains the VAE of the paper's Table 1 on the embedded digits in a plain PyTorch loop with two Adam
optimisers, one for the encoder and one for the decoder. ``simultaneous``: both take the gradient at
the same parameters. ``alternating``: the encoder is updated first, and the decoder takes its
gradient, with new noise, after that. It writes alternating.json and .md; ``--render`` makes the
latter again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _study import publish
from torch import Tensor
from torch.distributions import kl_divergence

from guides import GaussianGuide
from pyro_gpvae import ImageModel, initial_sigma, load_data

SCHEDULES = ("simultaneous", "alternating")


@dataclass(kw_only=True)
class Options:
    """Options of the study.

    Attributes:
        epochs: Passes over the training images.
        seeds: The number of seeds.
        train_images: The number of training images.
        test_images: The number of test images of the ELBO.
        out: Folder of the results.
        render: Only make the page again from the record.
    """

    epochs: int = 20
    seeds: int = 2
    train_images: int = 4000
    test_images: int = 200
    out: Path = Path("runs/alternating")
    render: bool = False


def train(schedule: str, seed: int, options: Options) -> list[float]:
    """Returns the ELBO of the test images after each epoch, in nats per image."""
    data = load_data("mnist5k").take(options.train_images, options.test_images)
    torch.manual_seed(seed)
    model = ImageModel(data.image_shape, latent_dim=10, sigma=initial_sigma(data.train))
    guide = GaussianGuide(model)
    noise = [p for name, p in model.named_parameters() if name == "log_sigma"]
    encoder = torch.optim.Adam(guide.parameters(), 5e-4)
    groups: list[dict[str, Any]] = [
        {"params": model.decoder.parameters()},
        {"params": noise, "lr": 1e-2},
    ]
    decoder = torch.optim.Adam(groups, 5e-4)

    def loss(x: Tensor) -> Tensor:
        q = guide.posterior(x)
        kl = kl_divergence(q, model.prior().expand(q.batch_shape))
        return (kl - model.likelihood(q.rsample()).log_prob(x)).mean()

    images, test = data.train / 255, data.test / 255
    elbos = []
    for _ in range(options.epochs):
        for index in torch.randperm(len(images)).split(128):
            steps = [[encoder, decoder]] if schedule == "simultaneous" else [[encoder], [decoder]]
            for optimizers in steps:
                encoder.zero_grad()
                decoder.zero_grad()
                loss(images[index]).backward()
                for optimizer in optimizers:
                    optimizer.step()
        with torch.no_grad():
            elbos.append(-float(loss(test)))
    return elbos


def measure(options: Options) -> dict[str, Any]:
    """Trains every seed with both schedules and returns the curves."""
    seeds = range(options.seeds)
    return {"elbo": {name: [train(name, seed, options) for seed in seeds] for name in SCHEDULES}}


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record."""
    epochs = record["epochs"]
    shown = [n for n in (5, 10, 15, 20, 40) if n <= epochs] or [epochs]
    lines = [
        "| updates | " + " | ".join(f"{n} epochs" for n in shown) + " |",
        "|---|" + "--:|" * len(shown),
    ]
    for name, runs in record["elbo"].items():
        cells = [", ".join(f"{run[n - 1]:.1f}" for run in runs) for n in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    caption = (
        f"ELBO of {record['test_images']} test digits in nats per image, one number per seed: a "
        "VAE with p = 10 and the networks of the paper's Table 1, "
        f"{record['train_images']:,} training images, batch size 128, Adam at 5e-4 and 1e-2 for σ."
    )
    return "\n".join([*lines, "", caption, ""])


def main(options: Options) -> None:
    publish("alternating", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
