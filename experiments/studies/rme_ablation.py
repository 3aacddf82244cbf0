"""How much do the options of the recursive mixture matter? Scored on held-out training images.

    python experiments/studies/rme_ablation.py --epochs 10

Trains RME(2) on the embedded digits for several strengths η of the repulsion and bounds C of the
divergence, beside the VAE and the plain mixture, and writes ELBO and IWAE on validation images to
--out as JSON and Markdown. No test image is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pyro_gpvae import ImageModel, fit, initial_sigma, load_data, log_evidence, make_guide
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text
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
        validation: Training images held out for the scores.
        seed: Seed of everything.
        out: Folder of the results.
    """

    epochs: int = 10
    latent_dim: int = 10
    validation: int = 400
    seed: int = 0
    out: Path = Path("runs/rme_ablation")


def main(options: Options) -> None:
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
    lines = ["| guide | ELBO | IWAE |", "|---|--:|--:|"]
    lines += [f"| `{spec}` | {s['elbo']:.1f} | {s['iwae']:.1f} |" for spec, s in scores.items()]
    caption = (
        f"Nats per image on {options.validation} held-out training digits; {len(train)} training "
        f"digits, p = {options.latent_dim}, {options.epochs} epochs, K = 100, seed {options.seed}. "
        "The default is η = 1, C = 20."
    )
    record = {k: v for k, v in vars(options).items() if k != "out"}
    record |= environment(torch.device("cpu")) | {"scores": scores}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "rme_ablation.json", record)
    write_text(options.out / "rme_ablation.md", "\n".join([*lines, "", caption, ""]))
    print("\n".join([*lines, "", caption]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
