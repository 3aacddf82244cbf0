"""What an encoder misses: the test images whose inference gap is largest, decoded three times.

    python experiments/studies/missed.py --epochs 100

Trains a VAE on the embedded digits, decomposes the gap of the first test images, and draws those
with the largest gap: the image, what the mean of the encoder's q(z|x) decodes to, and what the mean
of the best Gaussian of that image decodes to, each with the nats that the q loses. It writes
``results/missed.json`` and ``images/missed.png`` to --docs. Two cores need about ten minutes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from pyro_gpvae import ImageModel, decompose, fit, initial_sigma, load_data, make_guide
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json
from pyro_gpvae.plots import missed_images
from pyro_gpvae.runs.sections import decoded_means


@dataclass(kw_only=True)
class Options:
    """Options of the picture.

    Attributes:
        epochs: Passes over the 4,000 training images.
        latent_dim: Dimension p of z.
        sigma_learning_rate: Learning rate of log σ; all other parameters have 5e-4.
        seed: Seed of the training.
        images: The largest gaps of the first so many test images are shown.
        columns: The number of images in the picture.
        docs: Folder of the results.
    """

    epochs: int = 100
    latent_dim: int = 10
    sigma_learning_rate: float = 1e-2
    seed: int = 0
    images: int = 200
    columns: int = 10
    docs: str = "docs"


def main(options: Options) -> None:
    data = load_data("mnist5k")
    torch.manual_seed(options.seed)
    model = ImageModel(data.image_shape, options.latent_dim, sigma=initial_sigma(data.train))
    guide = make_guide("vae", model)
    fit(
        model, guide, data.train, epochs=options.epochs, seed=options.seed,
        learning_rates={"model.log_sigma": options.sigma_learning_rate},
    )  # fmt: skip
    images = data.test[: options.images]
    gap = decompose(model, guide, images, seed=options.seed)
    encoder, best = gap.log_evidence - gap.elbo, gap.log_evidence - gap.elbo_full
    worst = encoder.argsort(descending=True)[: options.columns]
    decoded = decoded_means(model, guide, images[worst], encoder[worst], best[worst])
    # the guide of this study is an encoder
    decoded = {name.replace("guide", "encoder"): row for name, row in decoded.items()}
    caption = (
        f"The {options.columns} largest inference gaps of the first {options.images} test digits. "
        "Numbers are ELBO - log p(x) in nats. Embedded digits: a VAE with p = "
        f"{options.latent_dim} and the networks of the paper's Table 1, 4,000 training images, "
        f"{options.epochs} epochs, learning rate 5e-4 and {options.sigma_learning_rate:g} for σ, "
        f"seed {options.seed}. Mean gap of the {options.images} images: "
        f"{float(encoder.mean()):.1f} nats, of which the best Gaussian leaves "
        f"{float(best.mean()):.1f}."
    )
    record: dict[str, Any] = {
        "options": {k: v for k, v in asdict(options).items() if k != "docs"},
        "environment": environment(torch.device("cpu")),
        "images": worst.tolist(),
        "encoder_gap": encoder[worst].tolist(),
        "best_gaussian_gap": best[worst].tolist(),
        "mean_encoder_gap": float(encoder.mean()),
        "mean_best_gaussian_gap": float(best.mean()),
        "mean_log_evidence": float(gap.log_evidence.mean()),
        "not_trusted": int((~gap.trusted).sum()),
        "sigma": model.state_dict()["log_sigma"].exp().item(),
    }
    docs = Path(options.docs)
    write_json(docs / "results" / "missed.json", record)
    missed_images(images[worst].numpy(), decoded, caption).savefig(docs / "images" / "missed.png")
    print(caption)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
