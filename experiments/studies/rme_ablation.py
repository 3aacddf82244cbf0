"""The options of the recursive mixture, scored on held-out training images.

    python experiments/studies/rme_ablation.py --epochs 10

Trains RME(2) on the embedded digits for several strengths η of the repulsion and bounds C of the
divergence, and the VAE and the plain mixture for comparison. ELBO and IWAE are those of validation
images; no test image is used. Writes rme_ablation.json and .md; ``--render`` makes the latter
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _study import publish

from pyro_gpvae import ImageModel, fit, initial_sigma, load_data, log_evidence, make_guide
from pyro_gpvae.data.images import split_validation

GUIDES = (
    "vae",
    "me:2",
    "rme:2,repulsion=0",
    "rme:2,repulsion=0.5",
    "rme:2,max_divergence=2",
    "rme:2,max_divergence=5",
    "rme:2",
)


@dataclass(kw_only=True)
class Options:
    """Options of the ablation.

    Attributes:
        epochs: Passes over the training images.
        latent_dim: Dimension p of z.
        validation: Number of training images held out for the scores.
        seed: Seed of all random numbers.
        out: Folder of the results.
        render: Only make the page again from the record.
    """

    epochs: int = 10
    latent_dim: int = 10
    validation: int = 400
    seed: int = 0
    out: Path = Path("runs/rme_ablation")
    render: bool = False


def measure(options: Options) -> dict[str, Any]:
    """Trains every guide and returns its scores."""
    data = load_data("mnist5k")
    train, validation = split_validation(data.train, options.validation)
    scores = {}
    for spec in GUIDES:
        torch.manual_seed(options.seed)
        model = ImageModel(data.image_shape, options.latent_dim, sigma=initial_sigma(train))
        guide = make_guide(spec, model)
        fit(model, guide, train, epochs=options.epochs, seed=options.seed, progress=spec)
        result = log_evidence(model, guide, validation, 100, seed=options.seed)
        scores[spec] = {"elbo": float(result.elbo.mean()), "iwae": result.mean}
        print(spec, scores[spec], flush=True)
    return {"train_images": len(train), "scores": scores}


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record."""
    lines = ["| guide | ELBO | IWAE |", "|---|--:|--:|"]
    lines += [
        f"| `{spec}` | {s['elbo']:.1f} | {s['iwae']:.1f} |" for spec, s in record["scores"].items()
    ]
    caption = (
        f"Nats per image on {record['validation']} held-out training digits; "
        f"{record['train_images']} training digits, p = {record['latent_dim']}, "
        f"{record['epochs']} epochs, K = 100, seed {record['seed']}. The default is η = 1, C = 20."
    )
    return "\n".join([*lines, "", caption, ""])


def main(options: Options) -> None:
    publish("rme_ablation", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
