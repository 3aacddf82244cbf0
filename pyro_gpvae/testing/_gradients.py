r"""Promises about gradients of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_gpvae.testing._kit import (
    Finding,
    Kit,
    guide_losses,
    largest_gap,
    module_of,
    not_checked,
    trainable,
)

#: A value, and the parameters by name whose gradients it should give.
Losses = list[tuple[Tensor, Mapping[str, Tensor]]]


def check_gradient(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    named = trainable(guide, "guide") | trainable(model, "model")
    for program in (model, guide):
        if (module := module_of(program)) is not None:
            module.train()

    def losses(seed: int) -> Losses:
        torch.manual_seed(seed)
        found = zip(*guide_losses(model, guide, kit.batch, 100), strict=True)
        trained = [(loss, {id(p) for p in block.parameters}) for loss, block in found]
        return [
            (loss, {n: p for n, p in named.items() if id(p) in own} if own else named)
            for loss, own in trained
        ]

    with poutine.trace(param_only=True) as statements:  # of pyro.param and pyro.module
        losses(kit.seed)
    known = {id(parameter) for parameter in named.values()}
    for name, site in statements.trace.nodes.items():
        if site["type"] == "param":
            value: Any = site["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if leaf.requires_grad and id(leaf) not in known:
                named[name] = leaf
    if not named:
        return not_checked("neither guide nor model has parameters")
    lost = without_gradient(named, losses, kit.seed)
    seen = f"No gradient, zero, NaN or an infinite one: {', '.join(lost)}."
    return Finding(f"{len(named) - len(lost)} of {len(named)}", "all", not lost, seen)


def check_pathwise(kit: Kit) -> Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    nodes = kit.trace(guide, kit.batch).nodes
    sites = [nodes[name] for name in kit.sites]
    if not all(getattr(site["fn"], "has_rsample", False) for site in sites):
        return not_checked("a latent site has no reparametrised samples (has_rsample)")
    named = trainable(guide, "guide")
    log_q = torch.stack([site["fn"].log_prob(site["value"].detach()).sum() for site in sites]).sum()
    if not named or not log_q.requires_grad:
        return not_checked("the density of the latent sites depends on no trainable parameter")
    density = _gradients(log_q, named)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    projected = [(torch.randn_like(site["value"]) * site["value"]).sum() for site in sites]
    moved = _gradients(torch.stack(projected).sum(), named)
    lost = [n for n in named if bool(((density[n] != 0) & (moved[n] == 0)).any())]
    seen = f"Elements of {', '.join(lost)} shape the density, but z has no gradient for them."
    return Finding(f"{len(lost)} detached", "0", not lost, seen)


def without_gradient(
    named: Mapping[str, Tensor], losses: Callable[[int], Losses], seed: int
) -> list[str]:
    """Names the parameters that do not train, from their gradients under two seeds.

    These are parameters without any finite gradient, and parameters of which some elements get
    none although the losses change with them. Elements of inactive units or masked connections
    change nothing. A guide may use the model's parameters without training them.
    """
    seeds = (seed, seed + 1)  # a draw may, by bad luck, leave a parameter out
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for loss, own in (pair for each in seeds for pair in losses(each)):
        for name, gradient in _gradients(loss, own).items():
            total[name] += gradient.abs()
    lost = {n: n for n, value in total.items() if not (value.any() and value.isfinite().all())}

    def values() -> Tensor:
        return torch.stack([loss for each in seeds for loss, _ in losses(each)])

    with torch.no_grad():
        before = values()
        step = math.sqrt(torch.finfo(before.dtype).eps)

        def moves(names: list[str]) -> bool:
            kept = {name: named[name].clone() for name in names}
            for name in names:
                named[name].add_((total[name] == 0) * step)
            after = values()
            for name, value in kept.items():
                named[name].copy_(value)
            return largest_gap(after, before) > 1e3 * step**2

        partly = [n for n in named if n not in lost and not n.startswith("model.")]
        partly = [name for name in partly if bool((total[name] == 0).any())]
        if partly and moves(partly):
            for name in filter(lambda name: moves([name]), partly):
                zero = int((total[name] == 0).sum())
                lost[name] = f"{name} ({zero} of {total[name].numel()} elements)"
    return [*lost.values()]


def _gradients(value: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients with respect to parameters, zero where there are none."""
    if not named or not value.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    found = torch.autograd.grad(value, [*named.values()], retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))
