r"""A guide with given posteriors of one batch of images."""

from __future__ import annotations

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_gpvae.core._plates import DATA_PLATE

__all__ = ["PrecomputedPosterior"]


class PrecomputedPosterior:
    """A guide that returns given posteriors q of B images: batch shape (B,), event shape (p,).

    It raises ValueError if it is called with another number of images.
    """

    def __init__(self, q: TorchDistribution) -> None:
        self.q = q

    def posterior(self, x: Tensor) -> TorchDistribution:
        known = self.q.batch_shape[-1]
        if len(x) != known:
            raise ValueError(
                f"this guide knows the posteriors of {known} images, and was asked for {len(x)}: "
                "pass fewer images at a time, or a larger chunk_size"
            )
        return self.q

    def __call__(self, x: Tensor) -> None:
        q = self.posterior(x)
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", q)
