"""Pyro's autoguides, fitted to single images: a check of the instance-wise optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import AffineTransform
from pyro.infer import Trace_ELBO, autoguide
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Data, to_batch
from pyro_gpvae.evaluation._common import evaluator
from pyro_gpvae.evaluation._modes import laplace_start
from pyro_gpvae.evaluation.optimum import InstanceOptimum, check_optimum_options
from pyro_gpvae.model._local import is_point
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.guide import check_program_data

Autoguide = Callable[[Any], Any] | str

# Adam: the rate falls by a factor of 3 whenever 50 steps gain too little
_PARTICLES, _WINDOW, _RATES = 16, 50, (0.05, 0.015, 0.005)


@evaluator
def optimise_autoguide(
    model: PyroProgram,
    data: Data,
    guide: Autoguide,
    *,
    start: Any = None,
    tolerance: float = 0.05,
    max_steps: int = 3000,
    num_starts: int = 2,
) -> InstanceOptimum:
    """Fits one of Pyro's autoguides to the posterior of each image, one after the other, by Adam.

    The guide's site is ``"v"``, with u = μ + s v for the mode μ and the scale s of the Laplace
    approximation. The gap is the gain of the last 50 steps. This is slow, and meant as a check of
    :func:`pyro_gpvae.evaluation.optimum.optimise_gaussian`.

    Arguments:
        guide: A class of :mod:`pyro.infer.autoguide` with a density, such as
            ``AutoMultivariateNormal``, its name, or a function from a Pyro model to a guide.
        model, data, start, tolerance, max_steps, num_starts: See
            :func:`pyro_gpvae.evaluation.optimum.optimise_gaussian`.

    Raises:
        ValueError: If an option is unknown, a number is not positive, or the autoguide has no
            density.
    """
    make = load_autoguide(guide)
    check_optimum_options("diagonal", tolerance, max_steps, num_starts)
    check_program_data(model, data)
    density = JointDensity(model, to_batch(data, model))
    loc, factor, jitter = laplace_start(density, "diagonal", start, num_starts)
    scale = factor.diagonal(dim1=-2, dim2=-1)
    found = [
        _fit(density[n : n + 1], loc[n], scale[n], make, tolerance, max_steps)
        for n in range(len(density))
    ]
    posteriors, elbos, gaps, steps = zip(*found, strict=True)
    elbo, gap = loc.new_tensor(elbos), loc.new_tensor(gaps)
    counts = torch.tensor(steps, device=loc.device)
    q = density.posterior(Stack(posteriors))
    return InstanceOptimum(q, elbo, gap, gap < tolerance, counts, jitter, tolerance, density)


def load_autoguide(spec: Autoguide) -> Callable[[Any], Any]:
    """Returns the autoguide of a name, such as "AutoNormal", and any other callable as it is."""
    if not isinstance(spec, str):
        return spec
    found: Callable[[Any], Any] | None = getattr(autoguide, spec, None)
    if found is None:
        raise ValueError(f"unknown autoguide {spec!r}: expected a class of pyro.infer.autoguide")
    return found


def _fit(
    density: JointDensity,
    loc: Tensor,
    scale: Tensor,
    make: Callable[[Any], Any],
    tolerance: float,
    max_steps: int,
) -> tuple[TorchDistribution, float, float, int]:
    """Returns q(u|x) of one image, its ELBO, last gain and number of steps."""

    def program() -> None:
        flat = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1).mask(False)
        v = pyro.sample("v", flat)
        log_joint = density.log_prob((loc + scale * v).reshape(-1, 1, len(loc)))
        pyro.factor("log_joint", log_joint.reshape(v.shape[:-1]) + scale.log().sum())

    with (
        _without_modules(),  # else the guide would start with the last image's values
        seeded(0, loc.device),  # the same numbers for every image, wherever it is in the batch
        torch.enable_grad(),
    ):
        with _defaults(loc):
            guide = make(program)
            guide()  # creates the parameters
            _posterior(guide)  # refuses a guide without a density before the work
        # the plate of particles must leave the dimensions of the model's plates free
        dims = density.structure.nesting + 1
        objective = Trace_ELBO(_PARTICLES, vectorize_particles=True, max_plate_nesting=dims)
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
    """The distribution of the site "v", or of its unconstrained value, in an autoguide."""
    if isinstance(guide, autoguide.AutoContinuous):
        q = guide.get_posterior()
    else:
        nodes = poutine.trace(guide).get_trace().nodes
        q = nodes.get("v_unconstrained", nodes["v"])["fn"]
    if is_point(q):
        raise ValueError(
            f"the posterior of {type(guide).__name__} is a point and has no density: use another "
            "autoguide, such as AutoNormal"
        )
    return q


@contextmanager
def _without_modules() -> Iterator[None]:
    """Hides parameters of PyroModules in Pyro's store, which a new guide would take as its own."""
    store = pyro.get_param_store()
    state: Any = store.get_state()
    own = {n for n, p in state["params"].items() if "$$$" in n or not isinstance(p, nn.Parameter)}
    kept: Any = {key: {n: v for n, v in part.items() if n in own} for key, part in state.items()}
    with store.scope(kept):
        yield


@contextmanager
def _defaults(like: Tensor) -> Iterator[None]:
    """Sets the default dtype and device, in which autoguides create their flows."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(dtype)


class Stack(TorchDistribution):
    """Joins the distributions of B images: batch shape (..., B)."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, members: Sequence[TorchDistribution], batch_shape: Any = None) -> None:
        self.members = members
        shape = Size([len(members)]) if batch_shape is None else Size(batch_shape)
        super().__init__(shape, members[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Stack:
        return Stack(self.members, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape[:-1]
        return torch.stack([member.rsample(shape) for member in self.members], dim=-2)

    def log_prob(self, value: Tensor) -> Tensor:
        columns = zip(self.members, value.unbind(-2), strict=True)
        with _defaults(value):  # Pyro's autoregressive flows invert in the default dtype
            return torch.stack([member.log_prob(column) for member, column in columns], dim=-1)
