r"""Constants in the place of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ConstantNoise(TorchDispatchMode):
    """Replaces every random number by a constant, so that results do not depend on its order."""

    NORMAL, UNIFORM = 0.6, 0.3

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.complete = True  # whether a constant could replace all of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
            return out  # no noise, or a stream of its own
        name = func.overloadpacket.__name__
        # arguments of normal(mean, std), z.normal_(mean, std) and z.uniform_(low, high)
        values = [0.0, 1.0]  # mean and standard deviation, or the ends of an interval
        if name in ("normal", "normal_", "uniform_"):
            given = args[name.endswith("_") :][:2]  # without defaults
            values[: len(given)] = given
        a, b = values
        if name in ("randn", "randn_like", "normal", "normal_"):
            return out.copy_(torch.as_tensor(a + self.NORMAL * b))
        if name in ("rand", "rand_like", "uniform_"):
            return out.fill_(a + self.UNIFORM * (b - a))
        if name in ("_standard_gamma", "_sample_dirichlet"):  # their means
            total = args[0].sum(-1, keepdim=True) if name == "_sample_dirichlet" else 1.0
            return out.copy_(args[0] / total)
        if name == "multinomial":
            mass = args[0]
            # the last category is not counted: rounding may keep the sum below one
            below = mass.cumsum(-1)[..., :-1] < self.UNIFORM * mass.sum(-1, keepdim=True)
            return out.copy_(below.sum(-1, keepdim=True))
        self.complete = False
        return out
