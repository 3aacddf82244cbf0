"""Answers the requests of peer.py with this package."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from _handwritten import NETS
from _worker import serve

from pyro_gpvae import ImageModel, fit, log_evidence, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import ParetoWarning


class Ours:
    """``fit`` and ``log_evidence`` on the networks of Table 1; σ = 1, as in pythae."""

    def setup(
        self, guide: str, latent_dim: int, batch_size: int, device: str, images: str, seed: int
    ) -> dict[str, str]:
        arrays = np.load(images)
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.train_images, self.test = data["train"], data["test"].to(device)
        self.batch_size, self.seed = batch_size, seed
        with seeded(seed, torch.device(device)):
            self.model = ImageModel(NETS["conv"].image_shape, latent_dim).to(device)
            self.guide = make_guide({"iaf": "iaf:2"}.get(guide, guide), self.model).to(device)
        assert self.model.log_sigma is not None
        self.model.log_sigma.requires_grad_(False)
        return {"torch": torch.__version__}

    def train(self, epochs: int, backend: Any) -> dict[str, float]:
        """Returns the seconds of an epoch, without the first one."""
        history = fit(
            self.model,
            self.guide,
            self.train_images,
            epochs=epochs + 1,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=False,
            backend=backend,
        )
        return {"epoch": (history.rows[-1]["seconds"] - history.rows[0]["seconds"]) / epochs}

    def nll(
        self, num_images: int, num_samples: int, batch_size: int | None = None
    ) -> dict[str, float]:
        """Returns the seconds of an image's log p(x), its mean over images and its error."""
        self.model.eval()
        self.guide.eval()
        x = self.test[:num_images]
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)
            found = log_evidence(self.model, self.guide, x, num_samples, chunk_size=batch_size)
        mean = found.mean  # waits for the device
        seconds = (time.perf_counter() - start) / len(x)
        return {"seconds": seconds, "mean": mean, "error": found.monte_carlo_error}

    def save(self, path: str) -> None:
        """Writes the parameters of encoder and decoder."""
        modules = (self.guide.encoder, self.guide.head, self.model.decoder)
        parameters = [p.detach().cpu().numpy() for m in modules for p in m.parameters()]
        np.savez(path, *parameters)


if __name__ == "__main__":
    serve(Ours())
