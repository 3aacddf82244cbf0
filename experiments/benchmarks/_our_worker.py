"""Trains or scores with this package, in a process of its own: see peer.py."""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from _handwritten import NETS

from pyro_gpvae import ImageModel, fit, log_evidence, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import ParetoWarning


def main(
    task: str, guide: str, latent_dim: int, device: str, images: str, seed: int, **options: Any
) -> dict[str, Any]:
    """Does the task on the networks of Table 1; σ = 1, as in pythae."""
    arrays = np.load(images)
    train_images, test = (torch.from_numpy(arrays[name]).to(device) for name in ("train", "test"))
    with seeded(seed, torch.device(device)):
        model = ImageModel(NETS["conv"].image_shape, latent_dim).to(device)
        encoder: Any = make_guide({"iaf": "iaf:2"}.get(guide, guide), model).to(device)
    assert model.log_sigma is not None
    model.log_sigma.requires_grad_(False)
    answer: dict[str, Any] = {"torch": torch.__version__}
    if "epochs" in options:
        answer["epoch"] = train(model, encoder, train_images, seed, **options)
    if weights := options.get("save"):
        modules = (encoder.encoder, encoder.head, model.decoder)
        np.savez(weights, *(p.detach().cpu().numpy() for m in modules for p in m.parameters()))
    if task == "nll":
        answer |= nll(model.eval(), encoder.eval(), test, options["num_samples"])
    return answer


def train(
    model: Any, guide: Any, images: torch.Tensor, seed: int, epochs: int, backend: Any, **_: Any
) -> float:
    """Returns the seconds of an epoch, without the first one."""
    options: Any = {"batch_size": NETS["conv"].batch_size, "seed": seed, "progress": False}
    history = fit(model, guide, images, epochs=epochs + 1, backend=backend, **options)
    return float(history.rows[-1]["seconds"] - history.rows[0]["seconds"]) / epochs


def nll(model: Any, guide: Any, x: torch.Tensor, num_samples: int) -> dict[str, float]:
    """Returns the seconds of an image's log p(x), its mean over images and its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)
        log_evidence(model, guide, x[:2], num_samples)  # warm-up
        start = time.perf_counter()
        found = log_evidence(model, guide, x, num_samples)
        mean = found.mean  # waits for the device
    seconds = (time.perf_counter() - start) / len(x)
    return {"seconds": seconds, "mean": mean, "error": found.monte_carlo_error}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
