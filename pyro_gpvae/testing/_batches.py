r"""Promises about batches and objectives: a member's own result, gradients, and scales."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_gpvae.data.batch import Batch, take
from pyro_gpvae.evaluation import importance
from pyro_gpvae.model.guide import HasGlobalPrior
from pyro_gpvae.testing import _kit
from pyro_gpvae.testing._gradients import gradients, without_gradient
from pyro_gpvae.testing._kit import Finding, Kit, module_of, not_checked, within
from pyro_gpvae.testing._noise import ConstantNoise

# a bug in a vectorised guide must show, so nothing falls back to a loop
log_weights = partial(importance.log_weights, vectorized=True)


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
        data = _kit.data_of(take(kit.batch, index))
        return log_weights(kit.model, kit.guide, data, 4, chunk_size=chunk_size)

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


def check_gradient(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    named = {f"guide.{name}": parameter for name, parameter in _kit.trainable(guide).items()}
    named |= {f"model.{name}": parameter for name, parameter in _kit.trainable(model).items()}
    for program in (model, guide):
        if (module := module_of(program)) is not None:
            module.train()
    seeds = (kit.seed, kit.seed + 1)  # a draw may, by bad luck, leave one out
    total: dict[str, Tensor] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        with poutine.trace(param_only=True) as statements:
            losses, blocks = _kit.guide_losses(model, guide, kit.batch, 100)
        known = {id(parameter) for parameter in named.values()}
        for name, site in statements.trace.nodes.items():  # of pyro.param and pyro.module
            value: Any = site["value"]
            if site["type"] != "param" or not (leaf := value.unconstrained()).requires_grad:
                continue
            if id(leaf) not in known:
                named[name] = leaf
        for loss, block in zip(losses, blocks, strict=True):
            trained = {id(p) for p in block.parameters or named.values()}
            own = {name: p for name, p in named.items() if id(p) in trained}
            for name, gradient in gradients(loss, own).items():
                total[name] = total.get(name, 0) + gradient.abs()
    if not named:
        return not_checked("neither guide nor model has parameters")
    total |= {name: torch.zeros_like(p) for name, p in named.items() if name not in total}

    def result() -> Tensor:
        values = []
        for seed in seeds:
            torch.manual_seed(seed)
            values.append(_kit.guide_losses(model, guide, kit.batch, 100)[0])
        return torch.cat(values)

    lost = without_gradient(named, total, result)
    seen = f"No gradient, zero, NaN or an infinite one: {', '.join(lost)}."
    return Finding(f"{len(named) - len(lost)} of {len(named)}", "all", not lost, seen)


def check_pathwise(kit: Kit) -> Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    nodes = kit.trace(guide, kit.batch).nodes
    sites = [nodes[name] for name in kit.sites]
    if not all(getattr(site["fn"], "has_rsample", False) for site in sites):
        return not_checked("a latent site has no reparametrised samples (has_rsample)")
    named = _kit.trainable(guide)
    log_q = torch.stack([site["fn"].log_prob(site["value"].detach()).sum() for site in sites]).sum()
    if not named or not log_q.requires_grad:
        return not_checked("the density of the latent sites depends on no trainable parameter")
    density = gradients(log_q, named)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    projected = [(torch.randn_like(site["value"]) * site["value"]).sum() for site in sites]
    moved = gradients(torch.stack(projected).sum(), named)
    lost = [n for n in named if bool(((density[n] != 0) & (moved[n] == 0)).any())]
    names = ", ".join(f"guide.{name}" for name in lost)
    seen = f"Elements of {names} shape the density, but z has no gradient with respect to them."
    return Finding(f"{len(lost)} detached", "0", not lost, seen)


@torch.no_grad()
def check_scale(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    with ConstantNoise() as noise:
        few, _ = _kit.guide_losses(model, guide, kit.batch, 1000)
        many, _ = _kit.guide_losses(model, guide, kit.batch, 2000)
        twice, _ = _kit.guide_losses(model, guide, _kit.doubled(kit.batch), 1000)
        expected = _global_divergences(guide, kit.batch)
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    if not (gap := _kit.largest_gap(twice, few)) <= kit.tolerance:
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


def _global_divergences(guide: Any, batch: Batch) -> list[float]:
    """Returns KL(q(W) ‖ p(W)) of the global sites: its value if known, and an estimate."""
    priors = guide.global_prior() if isinstance(guide, HasGlobalPrior) else {}
    trace = poutine.trace(guide).get_trace(*batch)
    analytic, sampled = 0.0, 0.0
    for name, prior in priors.items():
        site = trace.nodes[name]
        sampled += float((site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])).sum())
        try:
            analytic += float(kl_divergence(site["fn"], prior).sum())
        except NotImplementedError:
            analytic = math.nan
    return [value for value in (analytic, sampled) if not math.isnan(value)]
