r"""Modules whose parameters Pyro finds without its global parameter store."""

from __future__ import annotations

import dis
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial, wraps
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: A Pyro model or guide: any callable of a batch that has sample statements.
PyroProgram = Callable[..., Any]
#: In these dtypes log densities are wrong by whole nats.
HALF = (torch.float16, torch.bfloat16)
#: Pyro's handlers, its parameter store and torch's global random state belong to all threads of a
#: process. What relies on them holds this lock, so that threads take turns.
pyro_lock = threading.RLock()


class Program(nn.Module):
    r"""An ``nn.Module`` that owns its parameters and that :class:`pyro.infer.SVI` can train.

    ``pyro.module`` and :class:`pyro.nn.PyroModule` keep parameters in a store that is global to the
    process, where a second module of the same name gets the parameters of the first one. A Program
    names its parameters to SVI itself, uniquely, and leaves the store empty. Optimisers of
    :mod:`pyro.optim` therefore know no names: if you need groups of parameters or the optimiser's
    state, train ``Trace_ELBO()(model, guide)``, a module, with an optimiser of torch.

    Example:
        >>> import torch
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
                # Pyro's renderer reads the constraint
                effectful(lambda value=value, **_: value, type="param")(
                    name=f"{type(self).__name__}-{id(self):x}.{name}", constraint=constraints.real
                )
        return super().__call__(*args, **kwargs)


class BorrowedModules(tuple[Any, ...]):
    """Modules that another module uses but does not own, such as the decoder in a refining guide.

    A deep copy of the holder refers to the same modules, unless the same call copies them first:
    ``copy.deepcopy((model, guide))``.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> BorrowedModules:
        return BorrowedModules(memo.get(id(module), module) for module in self)


def modules_of(program: Any) -> dict[str, nn.Module]:
    """Returns the outermost modules of a program by name.

    They are the program itself or the owner of a bound method, under the name "", or the modules to
    which a function, a ``functools.partial`` or an object with ``__call__`` refers. Parameters,
    buffers, mode and device of a program are those of its modules.
    """
    owner = getattr(program, "__self__", program)
    if isinstance(owner, nn.Module):
        return {"": owner}
    if isinstance(owner, partial):  # such as functools.partial and Pyro's handlers around functions
        parts = (owner.func, *owner.args, *owner.keywords.values())
        named = [pair for part in parts for pair in modules_of(part).items()]
    elif inspect.isfunction(owner):
        named = _referred(inspect.unwrap(owner))
    else:
        named = [*getattr(owner, "__dict__", {}).items()] if callable(program) else []
    found: dict[str, nn.Module] = {}
    for name, module in named:
        if isinstance(module, nn.Module) and not any(module is each for each in found.values()):
            found[name if name not in found else f"{name}{len(found)}"] = module
    return found


def autoguides_of(program: Any) -> list[Any]:
    """Returns Pyro's autoguides in a program, which have parameters for each member of a batch."""
    return [m for m in _modules_of([program]) if isinstance(m, AutoGuide | AutoMessenger)]


def _referred(function: Any) -> list[tuple[str, Any]]:
    """Returns what a function refers to outside of itself, by name, in the order of its code."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    outer = [(name, function.__globals__.get(name)) for name in _global_names(function.__code__)]
    for name, cell in cells:
        with suppress(ValueError):  # a variable that has no value yet
            outer.append((name, cell.cell_contents))
    return outer


@cache
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Returns the global names that code loads; ``co_names`` has those of attributes as well."""
    loaded = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    inner = [_global_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return tuple(dict.fromkeys(itertools.chain(loaded, *inner)))


def check_precision(*programs: Any) -> None:
    """Raises ValueError, which names the parameter, if one is in half precision."""
    for role, program in zip(("model", "guide"), programs, strict=False):
        for prefix, module in modules_of(program).items():
            for name, parameter in module.named_parameters():
                if parameter.dtype in HALF:
                    where = ".".join(filter(None, (role, prefix, name)))
                    raise ValueError(
                        f"{where} is {parameter.dtype}, in which log densities are wrong by whole "
                        "nats: call float() on the model and the guide"
                    )
    if torch.get_default_dtype() in HALF:
        raise ValueError(
            f"the default dtype is {torch.get_default_dtype()}, in which log densities are wrong "
            "by whole nats: call torch.set_default_dtype(torch.float32)"
        )


@contextmanager
def own_parameters(*programs: Any) -> Iterator[None]:
    """Makes every PyroModule among the programs use its own parameters inside the block.

    A PyroModule takes the values that Pyro's global store holds under the names of its attributes,
    even if another module put them there. The block runs in a scope of the store without the
    parameters of other modules. Parameters of ``pyro.param`` and ``pyro.module`` statements stay
    visible, and those made inside the block are kept. Other threads that use Pyro wait.
    """
    modules = _modules_of(programs)
    with pyro_lock:
        if not any(isinstance(module, PyroModule) for module in modules):
            yield
            return
        store = pyro.get_param_store()
        after: Any = _visible_state(modules)
        try:
            with store.scope(after):
                try:
                    yield
                finally:
                    after = store.get_state()
        finally:
            store.set_state(after)  # adds to what the scope has restored


def with_own_parameters(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates an evaluator with :func:`own_parameters`, but leaves the store as it was."""

    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        modules = _modules_of((*args, *kwargs.values()))
        with pyro_lock, pyro.get_param_store().scope(_visible_state(modules)):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def kept_values(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the values of tensors on exit."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):  # expanded tensors cannot be written to
                    tensor.copy_(value)


def kept_buffers(programs: Iterable[Any]) -> AbstractContextManager[None]:
    """Restores the buffers of the modules among the programs on exit, such as running averages."""
    buffers = (b for m in _modules_of(programs) for b in m.buffers(recurse=False))
    return kept_values(buffer for buffer in buffers if not is_lazy(buffer))


@contextmanager
def evaluation_mode(programs: Iterable[Any]) -> Iterator[None]:
    """Sets all modules of programs to evaluation mode, and restores modes and buffers on exit."""
    programs = list(programs)
    modes = [(module, module.training) for module in _modules_of(programs)]
    try:
        with kept_buffers(programs):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _modules_of(programs: Iterable[Any]) -> list[nn.Module]:
    outermost = [module for program in programs for module in modules_of(program).values()]
    return list(dict.fromkeys(inner for module in outermost for inner in module.modules()))


def _visible_state(modules: Sequence[nn.Module]) -> Any:
    """Returns the state of the store without the parameters of other modules than these."""
    state: Any = pyro.get_param_store().get_state()
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    names = _names_in_store(modules)
    hidden = {
        name
        for name, parameter in state["params"].items()
        if isinstance(parameter, nn.Parameter) and id(parameter) not in own
        if "$$$" not in name  # of a pyro.module statement
        if names is None or name in names
    }
    return {
        key: {name: value for name, value in part.items() if name not in hidden}
        for key, part in state.items()
    }


def _names_in_store(modules: Sequence[nn.Module]) -> set[str] | None:
    """Returns the names that PyroModules look up; None if an autoguide has not chosen them yet."""
    names = set()
    for module in modules:
        if not isinstance(module, PyroModule):
            continue
        if isinstance(module, AutoMessenger) or getattr(module, "prototype_trace", True) is None:
            return None
        classes = type(module).__mro__
        lazy = [n for c in classes for n, v in vars(c).items() if isinstance(v, PyroParam)]
        for own in (*module._parameters, *module._pyro_params, *lazy):
            names.add(f"{module._pyro_name}.{own.removesuffix('_unconstrained')}".lstrip("."))
    return names
