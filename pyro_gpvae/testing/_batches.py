r"""Promises about batches and objectives: a member's own result, and scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_gpvae.data.batch import take
from pyro_gpvae.model.guide import HasGlobalPrior
from pyro_gpvae.testing._kit import (
    Finding,
    Kit,
    guide_losses,
    largest_gap,
    log_weights,
    not_checked,
    within,
)
from pyro_gpvae.testing._noise import ConstantNoise


def check_batch(kit: Kit) -> Finding:
    size = len(kit.batch[0])
    rows = kit.rows(kit.guide, kit.batch)
    new = {what: value.clone() for what, value in rows.items()}
    for i in {0, size // 2, size - 1}:
        others = tuple(tensor.clone() for tensor in kit.other)
        for tensor, value in zip(others, kit.batch, strict=True):
            tensor[i] = value[i]
        for what, value in kit.rows(kit.guide, others).items():
            new[what][i] = value[i]
    seen = "With others around it, a member of the batch has another {what}, by {gap:.1e}."
    return kit.all_equal(new, rows, seen)


def check_chunks(kit: Kit) -> Finding:
    def weights(index: slice | Tensor, chunk_size: int | None = None) -> Tensor:
        part = take(kit.batch, index)
        return log_weights(kit.model, kit.guide, part, 4, chunk_size=chunk_size)

    members = torch.arange(len(kit.batch[0]))
    with ConstantNoise() as noise:
        others = {
            "in chunks": weights(members, 3),
            "one at a time": torch.cat([*map(weights, members.split(1))], 1),
            "in reverse order": weights(members.flip(0)).flip(1),
        }
        whole = dict.fromkeys(others, weights(members))
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    return kit.all_equal(others, whole, "Evaluated {what}, log weights differ by {gap:.1e}.")


@torch.no_grad()
def check_scale(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    doubled = tuple(torch.cat([tensor, tensor]) for tensor in kit.batch)
    with ConstantNoise() as noise:
        few, _ = guide_losses(model, guide, kit.batch, 1000)
        many, _ = guide_losses(model, guide, kit.batch, 2000)
        twice, _ = guide_losses(model, guide, doubled, 1000)
        expected = _global_divergences(kit, guide)
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    if not (gap := largest_gap(twice, few)) <= kit.tolerance:
        seen = "With every member twice in the batch the loss changes by {gap:.1e} (relative)."
        cause = "a sum over the batch where its mean is due, or 1/B instead of 1/N"
        return within(gap, kit.tolerance, seen, cause)
    # the loss is local + KL / N: what does its dependence on N say about KL?
    found = float((few - many).max()) * 2000
    gap, nearest = min((abs(found - kl) / (1 + abs(kl)), kl) for kl in expected)
    seen = (
        f"The loss depends on N as if KL(q(W) ‖ p(W)) were {found:.4g}; it is {nearest:.4g} nats."
    )
    return within(gap, kit.tolerance, seen)


def _global_divergences(kit: Kit, guide: Any) -> list[float]:
    """Returns KL(q(W) ‖ p(W)) of the global sites: its value if known, and an estimate."""
    trace = poutine.trace(guide).get_trace(*kit.batch)
    own = poutine.trace(poutine.replay(kit.model, trace=trace)).get_trace(*kit.batch).nodes
    priors: dict[str, Any] = {
        n: own[n]["fn"] for n in trace.nodes if n in own and kit.structure.is_global(own[n])
    }
    priors |= guide.global_prior() if isinstance(guide, HasGlobalPrior) else {}
    analytic, sampled = 0.0, 0.0
    for name, prior in priors.items():
        site = trace.nodes[name]
        sampled += float((site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])).sum())
        try:
            analytic += float(kl_divergence(site["fn"], prior).sum())
        except NotImplementedError:
            analytic = math.nan
    return [value for value in (analytic, sampled) if not math.isnan(value)]
