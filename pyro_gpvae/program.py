r"""Modules whose parameters Pyro finds, without Pyro's global parameter store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["Program", "PyroProgram", "References"]

#: A Pyro model or guide: any callable of the images, with sample statements.
PyroProgram = Callable[..., Any]


class Program(nn.Module):
    r"""An ``nn.Module`` that owns its parameters, and that :class:`pyro.infer.SVI` trains.

    SVI trains what ``param`` messages name. ``pyro.module`` and, by default,
    :class:`pyro.nn.PyroModule` send them through a parameter store that is global to the
    process, where a second module of the same name is taken for the first, and never trains.
    PyroModule's alternative, ``module_local_params=True``, does not work with SVI (Pyro 1.9.2:
    "'Parameter' object has no attribute 'unconstrained'"). A Program sends the messages itself,
    under a name of its own, and the store stays empty.

    Example:
        >>> import pyro, torch
        >>> from pyro import distributions as dist, infer, optim
        >>> class Guide(Program):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = nn.Parameter(torch.zeros(()))
        ...     def forward(self):
        ...         pyro.sample("z", dist.Normal(self.loc, 1.0))
        >>> guide = Guide()
        >>> model = lambda: pyro.sample("z", dist.Normal(5.0, 1.0))
        >>> loss = infer.SVI(model, guide, optim.Adam({"lr": 0.1}), infer.Trace_ELBO()).step()
        >>> round(guide.loc.item(), 3)
        0.1
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if am_i_wrapped():
            for name, parameter in self.named_parameters():
                if is_lazy(parameter):  # has no value before the first call
                    continue
                value = parameter.detach()
                value.unconstrained = lambda leaf=parameter: leaf  # type: ignore[attr-defined]
                effectful(lambda value=value: value, type="param")(
                    name=f"{type(self).__name__}-{id(self):x}.{name}"
                )
        return super().__call__(*args, **kwargs)


class References(tuple[Any, ...]):
    """Modules that a module uses and does not own, such as the decoder that a guide refines with.

    In a tuple, they are neither among its parameters nor in its state dict. They are not copied
    with it either, unless they are copied before it: ``copy.deepcopy((model, guide))``.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> References:
        return References(memo.get(id(module), module) for module in self)
