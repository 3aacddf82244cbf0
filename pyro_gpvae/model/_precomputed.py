r"""A guide with given posteriors of one batch of images."""

from __future__ import annotations

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_gpvae.core._plates import DATA_PLATE

__all__ = ["PrecomputedPosterior"]


class PrecomputedPosterior:
    """A guide that returns a given q(z|x), for the batch of images that it was computed for.

    It avoids a second run of an encoder or of an optimisation, and makes any distribution a
    proposal. Functions that divide images into parts, as :func:`pyro_gpvae.log_weights` does, must
    be called with a single part.

    Arguments:
        q: The posteriors of B images: batch shape (B,), event shape (p,).

    Raises:
        ValueError: If it is called with another number of images than B.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> guide = PrecomputedPosterior(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
        >>> guide.posterior(torch.zeros(3, 1, 28, 28)) is guide.q
        True
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
