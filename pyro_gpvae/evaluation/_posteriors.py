"""Means of posteriors, and posteriors that are wider."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.model.guide import posterior_of

__all__ = ["Widened", "draws", "estimated_mean", "known_mean", "posterior_mean"]

#: The number of draws whose mean stands for that of a distribution without ``mean``.
_MEAN_DRAWS = 100


def posterior_mean(guide: PyroProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E_q[z|x] and an error of its estimate, (B, p) each.

    Where the mean is not known, it is the mean of 100 draws with the global random state. The
    error is then half the difference between the means of the two halves of the draws. It has the
    distribution of the estimate's own error, and is uncorrelated with it. A known mean has the
    error zero.
    """
    q = posterior_of(guide, x)
    return _mean_of_draws(draws(guide, x, _MEAN_DRAWS)) if q is None else estimated_mean(q)


def estimated_mean(q: Distribution) -> tuple[Tensor, Tensor]:
    """Returns the mean of a distribution and its error, see :func:`posterior_mean`."""
    mean = known_mean(q)
    if mean is None:
        return _mean_of_draws(q.sample(torch.Size((_MEAN_DRAWS,))))
    return mean, torch.zeros_like(mean)


def known_mean(q: Distribution) -> Tensor | None:
    """Returns the mean of a distribution, or None where it has none, such as a flow."""
    try:
        return q.mean
    except (AttributeError, NotImplementedError):
        return None


def _mean_of_draws(z: Tensor) -> tuple[Tensor, Tensor]:
    first, last = (half.mean(0) for half in z.chunk(2))
    return (first + last) / 2, (first - last) / 2


def draws(guide: PyroProgram, x: Tensor, count: int) -> Tensor:
    """Returns draws from q(z|x), (count, B, p)."""
    q = posterior_of(guide, x)
    if q is not None:
        z: Tensor = q.sample(torch.Size((count,)))
        return z
    values: list[Any] = []
    for _ in range(count):
        trace = poutine.trace(guide).get_trace(x)
        if "z" not in trace:
            raise ValueError(f"the guide must have a site 'z' in plate({DATA_PLATE!r})")
        values.append(trace.nodes["z"]["value"])
    return torch.stack(values)


class Widened(TorchDistribution):
    r"""Distribution of :math:`m + c (z - m)` with :math:`z \sim q`: q widened about its mean m.

    .. math:: q_c(z') = q\bigl(m + (z' - m) / c\bigr) \, c^{-p}

    The density is exact for any q and any m. The last sample is scored by the draw of q that it
    came from, so that an autoregressive flow does not have to invert it.

    Arguments:
        base: q, with batch shape (B,) and event shape (p,).
        mean: m, (B, p).
        factor: The width c.

    Raises:
        ValueError: If c is not positive and finite.

    Example:
        >>> import pyro.distributions as dist
        >>> q = dist.Normal(torch.ones(1, 2), 0.5).to_event(1)
        >>> wide, z = Widened(q, q.mean, 2.0), torch.tensor([[0.0, 2.5]])
        >>> expected = dist.Normal(torch.ones(1, 2), 1.0).to_event(1)
        >>> bool(torch.isclose(wide.log_prob(z), expected.log_prob(z)))
        True
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, base: Any, mean: Tensor, factor: float) -> None:
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"the width must be positive and finite, got {factor}")
        self.base, self.centre, self.factor = base, mean, factor
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Widened:
        shape = torch.Size(batch_shape)
        mean = self.centre.expand(shape + self.event_shape)
        return Widened(self.base.expand(shape), mean, self.factor)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        z = self.base.sample(torch.Size(sample_shape))
        value: Tensor = self.centre + self.factor * (z - self.centre)
        self._last = value, z
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is value:
            z = self._last[1]
        else:
            z = self.centre + (value - self.centre) / self.factor
        density: Tensor = self.base.log_prob(z)
        return density - self.event_shape.numel() * math.log(self.factor)
