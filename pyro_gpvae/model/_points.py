r"""Latent sites of a guide that are points, as functions of its auxiliary draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_gpvae.core._plates import hide_observations, in_plate, is_observation, is_sampled
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.batch import Batch
from pyro_gpvae.model._local import is_point, name_of, support_of

_MEMBERS = 4  # of the batch, at which the log densities are compared


class FixedDraws(Messenger):
    """Replaces draws by given values, by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def check_points(guide: PyroProgram, batch: Batch, q: Any, p: Any, plate: str) -> None:
    r"""Checks the density of a guide whose latents are points, functions of auxiliary draws.

    The log densities of the ``Delta`` of all points of a member, and the local factors of the
    guide, must sum to :math:`-\log |\det \partial z / \partial u|`, up to 0.01 nats and 0.1 %, for
    the median of a few members of the batch. The determinant is that of automatic differentiation.
    Nothing else is checked if a part of z or u is discrete, if their dimensions are different, if
    gradients do not pass from u to z, or if an auxiliary site belongs to several members of the
    batch.

    Arguments:
        guide: A guide, which is run once more.
        batch: The batch of the traces.
        q: A trace of the guide, without a plate of particles.
        p: A trace of the model with the draws of the guide.
        plate: The data plate of the guide.

    Raises:
        ValueError: If the density is another one, z is no invertible function of u, or z and u do
            not have as many discrete numbers.
    """
    drawn = {n: s for n, s in q.nodes.items() if is_sampled(s) and not s["is_observed"]}
    points = [
        n for n, s in drawn.items() if n in p.nodes and in_plate(s, plate) and is_point(s["fn"])
    ]
    own = [n for n, s in drawn.items() if n not in p.nodes and s["mask"] is not False]
    size = len(batch[0])
    if not points or not own or any(not in_plate(drawn[n], plate) for n in own if size > 1):
        return
    what = f"the sites {points} of the guide {name_of(guide)} are points"
    supports = {n: support_of(drawn[n]["fn"]) for n in own}
    supports |= {n: support_of(p.nodes[n]["fn"]) for n in points}
    discrete = {name for name, support in supports.items() if support.is_discrete}
    if discrete:
        in_u, in_z = (
            sum(_rows(drawn[n], drawn[n]["value"], size).shape[1] for n in discrete.intersection(s))
            for s in (own, points)
        )
        if in_u != in_z:
            raise ValueError(
                f"{what}, functions of its auxiliary sites {own}, and some of them are discrete "
                "where the others are continuous, so that log q(z|x) is no density: sample a "
                "discrete auxiliary site under poutine.mask(mask=False), and the points from a "
                "distribution with a density given its value"
            )
        return
    transforms = {n: biject_to(support) for n, support in supports.items()}
    found = _minus_log_jacobian(guide, batch, drawn, own, points, transforms)
    if found is None:
        return
    expected, trace = found
    given = _log_density(trace, points, plate, size)
    gap = (given - expected)[expected.isfinite() & given.isfinite()]
    if len(gap) == 0:
        if bool((expected == torch.inf).all()):
            raise ValueError(
                f"{what}, and no invertible function of its auxiliary sites {own}: sample "
                "these under poutine.mask(mask=False), and the points from a distribution with a "
                "density"
            )
        return
    if float(gap.abs().median()) > 0.01 + 0.001 * float(expected.abs().median()):
        raise ValueError(
            f"{what}, functions of its auxiliary sites {own}, whose log_density differs from minus "
            f"the log-Jacobian of the function by {float(gap[0]):.3g} nats, so that log q(z|x) is "
            "wrong: write pyro.sample(name, Delta(value, log_density=-log_jacobian))"
        )


def _minus_log_jacobian(
    guide: PyroProgram,
    batch: Batch,
    drawn: Mapping[str, Any],
    own: Sequence[str],
    points: Sequence[str],
    transforms: Mapping[str, Any],
) -> tuple[Tensor, Any] | None:
    """Returns -log |det ∂z/∂u| of the first members, and a trace of the guide with the same draws.

    It is None if gradients do not pass from u to z, or if these have different dimensions.
    """
    size = len(batch[0])
    fixed = {n: s["value"].detach() for n, s in drawn.items() if n not in points}
    with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
        free = {n: transforms[n].inv(fixed[n]).detach().requires_grad_() for n in own}
        fixed |= {n: transforms[n](free[n]) for n in own}
        with FixedDraws(fixed):
            trace: Any = poutine.trace(hide_observations(guide)).get_trace(*batch)
        ends = {n: transforms[n].inv(trace.nodes[n]["value"]) for n in points}
        end = torch.cat([_rows(trace.nodes[n], ends[n], size) for n in points], 1)
        numbers = sum(_rows(drawn[n], free[n], size).shape[1] for n in own)
        if numbers != end.shape[1] or not end.requires_grad:
            return None
        jacobian = []
        for column in end.unbind(1):
            found = torch.autograd.grad(
                column.sum(), [*free.values()], retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            parts = [_rows(drawn[n], part, size) for n, part in zip(free, found, strict=True)]
            jacobian.append(torch.cat(parts, 1)[:_MEMBERS].double())
    # the determinant is that of unconstrained values
    result = -torch.linalg.slogdet(torch.stack(jacobian, 1)).logabsdet
    for n in own:
        log_det = transforms[n].log_abs_det_jacobian(free[n], fixed[n])
        result += _rows(drawn[n], log_det, size).sum(1).detach()[:_MEMBERS]
    for n in points:
        log_det = transforms[n].log_abs_det_jacobian(ends[n], trace.nodes[n]["value"])
        result -= _rows(trace.nodes[n], log_det, size).sum(1).detach()[:_MEMBERS]
    return result, trace


def _rows(site: Any, part: Tensor, size: int) -> Tensor:
    """Returns a tensor (..., B, event) of a site as (B, its other numbers)."""
    depth = site["value"].dim() - site["fn"].event_dim
    return part.movedim(depth - 1, 0).reshape(size, -1) if depth else part.reshape(size, -1)


def _log_density(trace: Any, points: Sequence[str], plate: str, size: int) -> Tensor:
    """Returns the log density that a guide gives to its points, with its factors."""
    factors = [n for n, s in trace.nodes.items() if is_observation(s) and in_plate(s, plate)]
    counted = [*points, *factors]
    trace.compute_log_prob(lambda name, _: name in counted)
    parts = []
    for n in counted:
        site = trace.nodes[n]
        part = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).detach().double()
        part = part.expand(torch.broadcast_shapes(part.shape, (size,)))
        parts.append(part.reshape(-1, size).sum(0)[:_MEMBERS])
    return torch.stack(parts).sum(0)
