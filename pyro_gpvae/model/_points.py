r"""Latent sites of a guide that are points, as functions of its auxiliary draws."""

from __future__ import annotations

from collections.abc import Mapping
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
from pyro_gpvae.model._local import complete, is_point, name_of

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
    Nothing is checked if z and u are discrete or of different dimensions, if gradients do not pass
    from u to z, or if an auxiliary site belongs to several members of the batch.

    Arguments:
        guide: A guide, which is run once more.
        batch: The batch of the traces.
        q: A trace of the guide, without a plate of particles.
        p: A trace of the model with the draws of the guide.
        plate: The data plate of the guide.

    Raises:
        ValueError: If the density is another one, or z is no invertible function of u.
    """
    drawn = {n: s for n, s in q.nodes.items() if is_sampled(s) and not s["is_observed"]}
    points = [
        n for n, s in drawn.items() if n in p.nodes and in_plate(s, plate) and is_point(s["fn"])
    ]
    own = [n for n, s in drawn.items() if n not in p.nodes and s["mask"] is not False]
    size = len(batch[0])
    if not points or not own or any(not in_plate(drawn[n], plate) for n in own if size > 1):
        return
    to_u = {n: complete(drawn[n]["fn"]).support for n in own}
    to_z = {n: complete(p.nodes[n]["fn"]).support for n in points}
    if any(support.is_discrete for support in (*to_u.values(), *to_z.values())):
        return

    def rows(site: Any, part: Tensor) -> Tensor:
        """A tensor (..., B, event) of a site as (B, its other numbers)."""
        depth = site["value"].dim() - site["fn"].event_dim
        return part.movedim(depth - 1, 0).reshape(size, -1) if depth else part.reshape(size, -1)

    fixed = {n: s["value"].detach() for n, s in drawn.items() if n not in points}
    with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
        free = {n: biject_to(to_u[n]).inv(fixed[n]).detach().requires_grad_() for n in own}
        fixed |= {n: biject_to(to_u[n])(free[n]) for n in own}
        with FixedDraws(fixed):
            trace: Any = poutine.trace(hide_observations(guide)).get_trace(*batch)
        ends = {n: biject_to(to_z[n]).inv(trace.nodes[n]["value"]) for n in points}
        end = torch.cat([rows(trace.nodes[n], ends[n]) for n in points], 1)
        numbers = sum(rows(drawn[n], free[n]).shape[1] for n in own)
        if numbers != end.shape[1] or not end.requires_grad:
            return
        jacobian = []
        for column in end.unbind(1):
            found = torch.autograd.grad(
                column.sum(), [*free.values()], retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            parts = [rows(drawn[n], part) for n, part in zip(free, found, strict=True)]
            jacobian.append(torch.cat(parts, 1)[:_MEMBERS].double())
    expected = -torch.linalg.slogdet(torch.stack(jacobian, 1)).logabsdet
    for n in own:
        log_det = biject_to(to_u[n]).log_abs_det_jacobian(free[n], fixed[n])
        expected += rows(drawn[n], log_det).sum(1).detach()[:_MEMBERS]
    for n in points:
        log_det = biject_to(to_z[n]).log_abs_det_jacobian(ends[n], trace.nodes[n]["value"])
        expected -= rows(trace.nodes[n], log_det).sum(1).detach()[:_MEMBERS]
    factors = [n for n, s in trace.nodes.items() if is_observation(s) and in_plate(s, plate)]
    counted = points + factors
    trace.compute_log_prob(lambda name, _: name in counted)
    given = torch.zeros_like(expected)
    for n in counted:
        site = trace.nodes[n]
        part = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).detach()
        part = part.expand(torch.broadcast_shapes(part.shape, (size,)))
        given += part.reshape(-1, size).sum(0)[:_MEMBERS]
    gap = (given - expected)[expected.isfinite() & given.isfinite()]
    what = f"the sites {points} of the guide {name_of(guide)} are points"
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
