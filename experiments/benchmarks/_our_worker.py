"""What peer.py times of this package, by the same requests as the peer."""

from __future__ import annotations

import time
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
from _bench import page_faults
from _handwritten import NETS
from _worker import serve

from pyro_gpvae import ImageModel, elbo_terms, fit, log_evidence, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import ParetoWarning


class Clock:
    """``elbo_terms``, which end an epoch: notes their seconds, and page faults until then."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.faults: list[int] = []

    def __call__(self, *values: Any) -> dict[str, float]:
        start = time.perf_counter()
        terms = elbo_terms(*values)
        self.seconds.append(time.perf_counter() - start)
        self.faults.append(page_faults())
        return terms


class Ours:
    """``fit`` and ``log_evidence`` on the networks of Table 1; σ = 1, as the peer has it."""

    def setup(
        self, guide: str, latent_dim: int, batch_size: int, device: str, images: str, seed: int
    ) -> dict[str, str]:
        arrays = np.load(images)
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.train_images, self.test = data["train"], data["test"].to(device)
        self.device, self.batch_size, self.seed = device, batch_size, seed
        with seeded(seed, torch.device(device)):
            self.model = ImageModel(NETS["conv"].image_shape, latent_dim).to(device)
            self.guide = make_guide({"iaf": "iaf:2"}.get(guide, guide), self.model).to(device)
        assert self.model.log_sigma is not None
        self.model.log_sigma.requires_grad_(False)
        return {"torch": torch.__version__}

    def train(self, epochs: int, backend: Any) -> dict[str, float]:
        """Seconds of the first epoch with all that comes before it, of another, and of its end;
        the page faults of that."""
        clock, start = Clock(), time.perf_counter()
        with mock.patch("pyro_gpvae.training.loop.elbo_terms", clock):
            history = fit(
                self.model,
                self.guide,
                self.train_images,
                epochs=epochs + 1,
                batch_size=self.batch_size,
                device=self.device,
                seed=self.seed,
                progress=False,
                backend=backend,
            )
        seconds = time.perf_counter() - start
        epoch = (history.rows[-1]["seconds"] - history.rows[0]["seconds"]) / epochs
        return {
            "first": seconds - epochs * epoch,
            "epoch": epoch,
            "epoch_end": sum(clock.seconds[1:]) / epochs,
            "page_faults": (clock.faults[-1] - clock.faults[0]) / epochs,
        }

    def nll(
        self, num_images: int, num_samples: int, batch_size: int | None = None
    ) -> dict[str, float]:
        """Seconds of an image's log p(x) by K importance samples, and its mean over images."""
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
        """Writes encoder and decoder."""
        modules = (self.guide.encoder, self.guide.head, self.model.decoder)
        parameters = [p.detach().cpu().numpy() for m in modules for p in m.parameters()]
        np.savez(path, *parameters)


if __name__ == "__main__":
    serve(Ours())
