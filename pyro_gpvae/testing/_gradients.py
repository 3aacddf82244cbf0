r"""Gradients of parameters, and parameters that get none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_gpvae.testing._kit import largest_gap


def gradients(value: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients with respect to parameters, zero where there are none."""
    if not named or not value.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    found = torch.autograd.grad(value, [*named.values()], retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@torch.no_grad()
def without_gradient(
    named: Mapping[str, Tensor], total: Mapping[str, Tensor], result: Callable[[], Tensor]
) -> list[str]:
    """Names the parameters that do not train, from the absolute gradients that they get.

    These are parameters without any finite gradient, and parameters of which some elements get
    none although the result changes with them. Elements of inactive units or masked connections
    change nothing. A guide may use the model's parameters without training them.
    """
    lost = {n: n for n, value in total.items() if not (value.any() and value.isfinite().all())}
    before = result()
    step = math.sqrt(torch.finfo(before.dtype).eps)

    def moves(names: list[str]) -> bool:
        kept = {name: named[name].clone() for name in names}
        for name in names:
            named[name].add_((total[name] == 0) * step)
        after = result()
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
