r"""Modules whose parameters Pyro finds, without Pyro's global parameter store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyro
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["BorrowedModules", "Program", "PyroProgram", "own_parameters", "with_own_parameters"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

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

    An optimiser of :mod:`pyro.optim` looks for the names of parameters in that store. Of those of
    a Program it finds none: a function of the name, as in ``Adam(lambda name: ...)``, fails, and
    ``get_state`` and ``save`` keep the moments of one parameter only. Where that matters, train
    the ELBO as a module, whose optimiser is torch's, with groups of parameters, and save state
    dicts::

        model, guide = PerImage(model, N), PerImage(guide, N)
        bound = Trace_ELBO()(model, guide)
        groups = [{"params": guide.parameters(), "lr": 1e-3}, {"params": model.parameters()}]
        optimizer = torch.optim.Adam(groups, lr=5e-4)
        bound(x).backward()
        optimizer.step()
        state = [part.state_dict() for part in (model, guide, optimizer)]

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


class BorrowedModules(tuple[Any, ...]):
    """Modules that a module uses and does not own, such as the decoder that a guide refines with.

    In a tuple, they are neither among its parameters nor in its state dict. They are not copied
    with it either, unless they are copied before it: ``copy.deepcopy((model, guide))``.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> BorrowedModules:
        return BorrowedModules(memo.get(id(module), module) for module in self)


@contextmanager
def own_parameters(*programs: Any) -> Iterator[None]:
    """Inside, every PyroModule in these programs has its own parameters, and keeps them.

    A PyroModule that is called takes for its own what Pyro's global store holds by the names of
    its attributes, be it another module's. Inside, the store is without the parameters of other
    modules; afterwards it has them again, unless their names are taken. What statements of
    ``pyro.param`` and ``pyro.module`` made stays in it. A module that is to take over what was
    loaded into the store must be called before.

    Example:
        >>> import torch
        >>> class Scale(PyroModule):
        ...     def __init__(self, value):
        ...         super().__init__()
        ...         self.scale = pyro.nn.PyroParam(torch.tensor(value))
        ...     def forward(self):
        ...         return self.scale.item()
        >>> first, second = Scale(1.0), Scale(2.0)
        >>> with own_parameters(first):
        ...     first()
        1.0
        >>> with own_parameters(second):
        ...     second()
        2.0
    """
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    if not any(isinstance(module, PyroModule) for module in modules):
        yield
        return
    store = pyro.get_param_store()
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    names = _names_in_store(modules)
    before = store.get_state()
    others = {
        name
        for name, parameter in before["params"].items()
        if isinstance(parameter, nn.Parameter) and id(parameter) not in own
        if "$$$" not in name  # of a pyro.module statement
        if names is None or name in names
    }

    def replace(names: set[str], state: Any) -> None:
        part: Any = {key: {n: v[n] for n in v if n in names} for key, v in state.items()}
        store.clear()
        store.set_state(part)

    replace(before["params"].keys() - others, before)
    try:
        yield
    finally:
        after = store.get_state()
        replace(others, before)
        store.set_state(after)


def _names_in_store(modules: Sequence[nn.Module]) -> set[str] | None:
    """The names by which PyroModules look for their parameters in the store; None if they will
    be known after the first call of an autoguide."""
    names = set()
    for module in modules:
        if not isinstance(module, PyroModule):
            continue
        if getattr(module, "prototype_trace", True) is None:
            return None
        classes = type(module).__mro__
        lazy = [n for c in classes for n, v in vars(c).items() if isinstance(v, PyroParam)]
        for own in (*module._parameters, *module._pyro_params, *lazy):
            names.add(f"{module._pyro_name}.{own.removesuffix('_unconstrained')}".lstrip("."))
    return names


def with_own_parameters(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """The function, called within :func:`own_parameters` of all modules among its arguments."""

    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with own_parameters(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return wrapped
