r"""A guide whose posteriors are given, for one batch of images."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor

from pyro_gpvae.core._plates import DATA_PLATE

__all__ = ["PrecomputedPosterior"]


class PrecomputedPosterior:
    """A guide that knows q(z|x) for the images it was computed for, and for no others.

    It spares an encoder or an optimisation a second run, and makes any distribution a proposal.
    Functions that take images in parts, as :func:`pyro_gpvae.log_weights` does, must be given no
    more of them than are in a part.

    Arguments:
        q: The posteriors of B images: batch shape (B,), event shape (p,).

    Raises:
        ValueError: If it is asked for another number of images than B.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> guide = PrecomputedPosterior(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
        >>> guide.posterior(torch.zeros(3, 1, 28, 28)) is guide.q
        True
    """

    def __init__(self, q: Any) -> None:
        self.q = q

    def posterior(self, x: Tensor) -> Any:
        known = self.q.batch_shape[-1]
        if len(x) != known:
            raise ValueError(
                f"this guide knows the posteriors of {known} images, and was asked for {len(x)}: "
                "give fewer images at a time, or a larger chunk_size"
            )
        return self.q

    def __call__(self, x: Tensor) -> None:
        q = self.posterior(x)
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", q)
