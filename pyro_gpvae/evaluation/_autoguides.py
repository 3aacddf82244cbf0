r"""Pyro's autoguides as posteriors of single images: a check of the instance-wise optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import AffineTransform
from pyro.infer import Trace_ELBO, autoguide
from torch import Size, Tensor

from pyro_gpvae.core._seeds import seeded

__all__ = ["Stack", "fit_autoguide", "load_autoguide"]

# Adam: the rate falls by a factor of 3 whenever 50 steps gain too little
_PARTICLES, _WINDOW, _RATES = 16, 50, (0.05, 0.015, 0.005)


def load_autoguide(spec: Callable[[Any], Any] | str | None) -> Callable[[Any], Any] | None:
    """Returns the autoguide of a name, such as "AutoNormal"; anything else as it is."""
    if not isinstance(spec, str):
        return spec
    found: Callable[[Any], Any] | None = getattr(autoguide, spec, None)
    if found is None:
        raise ValueError(f"unknown autoguide {spec!r}: expected a class of pyro.infer.autoguide")
    return found


def fit_autoguide(
    model: Any,
    image: Tensor,
    loc: Tensor,
    scale: Tensor,
    make: Callable[[Any], Any],
    tolerance: float,
    max_steps: int,
) -> tuple[TorchDistribution, float, float, int]:
    """Fits an autoguide to the posterior of one image, with z = μ + s u for its site ``"u"``.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        image: (1, C, H, W).
        loc, scale: μ and s, (p,).
        make: A class of :mod:`pyro.infer.autoguide`, or a function from a Pyro model to a guide.
        tolerance: Training stops when a window of steps gains less, in nats.
        max_steps: At most so many steps.

    Returns:
        q(z|x), event shape (p,); its ELBO; the gain of the last window; the number of steps.
    """

    def program() -> None:
        flat = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1).mask(False)
        u = pyro.sample("u", flat)
        log_joint = model.log_joint(image, (loc + scale * u).unsqueeze(-2)).squeeze(-1)
        pyro.factor("log_joint", log_joint + scale.log().sum())

    with (
        pyro.get_param_store().scope(),  # or this image's guide would start as the last one's
        seeded(0, image.device),  # every image alike, whatever its place in the batch
        torch.enable_grad(),
    ):
        with _defaults(loc):
            guide = make(program)
            guide()  # creates the parameters
            _posterior(guide)  # refuses a guide without density before the work
        objective = Trace_ELBO(_PARTICLES, vectorize_particles=True, max_plate_nesting=0)
        parameters = list(guide.parameters())
        optimizer = torch.optim.Adam(parameters, _RATES[0])
        elbo, gap, steps = -math.inf, math.inf, 0
        for rate in _RATES:
            optimizer.param_groups[0]["lr"] = rate
            gap = math.inf
            while gap >= tolerance and steps < max_steps:
                total = 0.0
                for _ in range(_WINDOW):
                    loss = objective.differentiable_loss(program, guide)
                    optimizer.zero_grad()
                    loss.backward(inputs=parameters)
                    optimizer.step()
                    total -= float(loss.detach()) / _WINDOW
                gap, elbo, steps = max(total - elbo, 0.0), total, steps + _WINDOW
        with torch.no_grad():
            q = _posterior(guide)
            q = dist.TransformedDistribution(q, [AffineTransform(loc, scale, event_dim=1)])
    return q, elbo, gap, steps


def _posterior(guide: Any) -> Any:
    """The distribution of the site "u", or of its unconstrained twin, in an autoguide."""
    if isinstance(guide, autoguide.AutoContinuous):
        q = guide.get_posterior()
    else:
        nodes = poutine.trace(guide).get_trace().nodes
        q = nodes.get("u_unconstrained", nodes["u"])["fn"]
    if isinstance(getattr(q, "base_dist", q), dist.Delta) or isinstance(q, dist.Delta):
        raise ValueError(
            f"{type(guide).__name__} has no density, its posterior is a point: use an autoguide "
            "that has one, such as AutoNormal"
        )
    return q


@contextmanager
def _defaults(like: Tensor) -> Iterator[None]:
    """Makes new tensors alike: flows of autoguides are created in the default dtype and place."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(dtype)


class Stack(TorchDistribution):
    """One distribution for each image, side by side: batch shape (..., B)."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, members: tuple[TorchDistribution, ...], batch_shape: Size | None = None
    ) -> None:
        self.members = members
        shape = torch.Size([len(members)]) if batch_shape is None else batch_shape
        super().__init__(shape, members[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.members[0].support

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Stack:
        return Stack(self.members, torch.Size(batch_shape))

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape[:-1]
        return torch.stack([member.rsample(shape) for member in self.members], dim=-2)

    def log_prob(self, value: Tensor) -> Tensor:
        columns = zip(self.members, value.unbind(-2), strict=True)
        with _defaults(value):  # in which Pyro's autoregressive flows invert
            return torch.stack([member.log_prob(column) for member, column in columns], dim=-1)
