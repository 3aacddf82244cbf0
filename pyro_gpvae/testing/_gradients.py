r"""Promises about objectives: gradients of all parameters, and the scale of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_gpvae.model.guide import HasGlobalPrior
from pyro_gpvae.testing._kit import (
    ConstantNoise,
    Finding,
    Kit,
    guide_losses,
    largest_gap,
    not_checked,
    within,
    z_site,
)


def check_gradient(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    named = {
        f"{owner}.{name}": parameter
        for owner, program in (("guide", guide), ("model", model))
        if isinstance(program, nn.Module)
        for name, parameter in program.train().named_parameters()
        if parameter.requires_grad
    }
    if not named:
        return not_checked("neither guide nor model has parameters in a module")
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for round_ in range(2):  # a draw may, by bad luck, leave one out
        torch.manual_seed(kit.seed + round_)
        losses, blocks = guide_losses(model, guide, kit.x, 100)
        for loss, block in zip(losses, blocks, strict=True):
            trained = {id(p) for p in block.parameters} if block.parameters else None
            names = [n for n, p in named.items() if trained is None or id(p) in trained]
            gradients = (
                torch.autograd.grad(
                    loss, [named[n] for n in names], allow_unused=True, retain_graph=True
                )
                if names and loss.requires_grad
                else ()
            )
            for name, gradient in zip(names, gradients, strict=False):
                if gradient is not None:
                    total[name] += gradient.abs()
    infinite = [name for name, value in total.items() if not bool(value.isfinite().all())]
    missing = [name for name, value in total.items() if not bool(value.any())]
    figure = f"{len(named) - len(infinite + missing)} of {len(named)}"
    account = (
        f"NaN or infinite gradient: {', '.join(infinite)}.\nLikely cause: a square root or norm "
        "at zero, or an overflow."
        if infinite
        else f"No gradient, or exactly zero: {', '.join(missing)}.\nLikely cause: the context "
        "does not reach the flow, a detached tensor, a layer that is never used, or a block that "
        "leaves it out. Parameters to be left alone need requires_grad_(False)."
    )
    return Finding(figure, "all", not infinite and not missing, account)


def check_pathwise(kit: Kit) -> Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    site = z_site(guide, kit.x)
    z, q = site["value"], site["fn"]
    if not getattr(q, "has_rsample", False):
        return not_checked("z has no reparametrised samples (has_rsample)")
    named = dict(guide.named_parameters()) if isinstance(guide, nn.Module) else {}
    named = {name: p for name, p in named.items() if p.requires_grad}
    log_q = q.log_prob(z.detach()).sum()
    if not named or not log_q.requires_grad:
        return not_checked("the density of z depends on no trainable parameter")
    density = torch.autograd.grad(log_q, list(named.values()), allow_unused=True, retain_graph=True)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    moved: Sequence[Tensor | None] = [None] * len(named)
    if z.requires_grad:
        direction = torch.randn_like(z)
        moved = torch.autograd.grad((direction * z).sum(), list(named.values()), allow_unused=True)
    lost = []
    for name, by_density, by_sample in zip(named, density, moved, strict=True):
        shaping = by_density is not None and by_density != 0
        still = shaping if by_sample is None else shaping & (by_sample == 0)
        if torch.is_tensor(still) and bool(still.any()):
            lost.append(f"guide.{name}")
    account = (
        f"Elements of {', '.join(lost)} shape the density, but z has no gradient with respect to "
        "them, although it claims reparametrised samples.\nLikely cause: the sample is detached "
        "(sample for rsample, detach, no_grad)."
    )
    return Finding(f"{len(lost)} detached", "0", not lost, account)


@torch.no_grad()
def check_scale(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    with ConstantNoise() as noise:
        few, _ = guide_losses(model, guide, kit.x, 1000)
        many, _ = guide_losses(model, guide, kit.x, 2000)
        twice, _ = guide_losses(model, guide, torch.cat([kit.x, kit.x]), 1000)
        expected = _global_divergences(guide, kit.x)
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    if not (gap := largest_gap(twice, few)) <= kit.tolerance:
        account = (
            f"With every image twice in the batch the loss changes by {gap:.1e} (relative).\n"
            "Likely cause: a sum over the batch where its mean is due, or 1/B where 1/N is due (N "
            "is the number of training images)."
        )
        return within(gap, kit.tolerance, account)
    # the loss is local + KL / N: what does its dependence on N say about KL?
    found = float((few - many).max()) * 2000
    gap, nearest = min(((abs(found - kl) / (1 + abs(kl))), kl) for kl in expected)
    account = (
        f"loss(N = 1000) − loss(N = 2000) belongs to a global divergence of {found:.4g} nats, but "
        f"KL(q(W) ‖ p(W)) = {nearest:.4g}.\nLikely cause: a missing 1/N: global sites inside the "
        "plate, a divergence added to the terms of every image, or an objective that ignores "
        "the scale of the sites."
        if nearest
        else f"The guide has no global sites, but its loss depends on N, as by a divergence of "
        f"{found:.4g} nats.\nLikely cause: a term of each image outside the plate."
    )
    # KL / N is what is left of a loss of thousands of nats
    return within(gap, kit.tolerance, account)


def _global_divergences(guide: Any, x: Tensor) -> list[float]:
    """Returns KL(q(W) ‖ p(W)) of the global sites: its value if known, and an estimate."""
    priors = guide.global_prior() if isinstance(guide, HasGlobalPrior) else {}
    trace = poutine.trace(guide).get_trace(x)
    analytic, sampled = 0.0, 0.0
    for name, prior in priors.items():
        site = trace.nodes[name]
        sampled += float((site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])).sum())
        try:
            analytic += float(kl_divergence(site["fn"], prior).sum())
        except NotImplementedError:
            analytic = math.nan
    return [value for value in (analytic, sampled) if not math.isnan(value)]
