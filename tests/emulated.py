"""A device that is none of the CPU's, on any machine: what a GPU would refuse fails here as well.

Its tensors hold tensors of the CPU, and its operators call the CPU's, so that results are those of
the CPU to the bit. What makes it a device:

* Two tensors of one operator must be on it both, unless the other one is a number.
* :func:`unread` refuses operators for which a GPU would make the host wait: those that look at a
  value, and copies from and to the CPU.
* :func:`stand_in_for_cuda` lets graphs be captured there. What is captured is a list of operators
  on places in memory, and a replay repeats them, without a line of Python of the program.

It cannot show what a GPU computes, nor how fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pyro_gpvae.training._cuda_graph import CudaGraph

_setup_privateuseone_for_python_backend("emulated")
DEVICE = torch.device("emulated", 0)

aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
# numbers of rows may be on the CPU, from where they are copied
_COPY_NUMBERS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_MAY_COPY = _COPIES | _COPY_NUMBERS
_TO_PYTHON = {aten._local_scalar_dense.default, aten.equal.default}
_ALL_THERE = {aten.cat.default, aten.stack.default}
# multinomial and linalg look at their arguments in C++, nonzero at the size of its result
_WAITS = _TO_PYTHON | {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.multinomial.default,
    aten._linalg_check_errors.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}


class Emulated(Tensor):
    """A tensor there; ``here`` is what it holds."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> Emulated:
        made: Emulated = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = value.here

    # the two for which torch does not ask a tensor's type
    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **options})

    def __repr__(self) -> str:
        return f"Emulated({self.here})"


# make_fx traces operators on tensors of these types as they are
proxy_tensor.HANDLED_TYPES += (Emulated,)


class Graph:
    """What was captured; stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._generators.append((generator, generator.get_state()))

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Makes a call that is captured."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                self._before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        out = func(*args, **kwargs)
        # a view stays one: its memory is written to by other calls
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Capturing computes nothing."""
        for memory, before in self._before.values():
            memory.copy_(before)
        for generator, state in self._generators:
            generator.set_state(state)
        self._before.clear()

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place is not value:
                    place.copy_(value)


_waiting_is_refused = False
_captured: Graph | None = None


def _is_there(device: Any) -> bool:
    return torch.device(device).type == DEVICE.type


def _unwrap(value: Any) -> Any:
    return value.here if isinstance(value, Emulated) else value


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on tensors of either device."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Emulated)]
    others = [t for t in tensors if not isinstance(t, Emulated)]
    named = kwargs.get("device")
    result_is_there = bool(there) if named is None else _is_there(named)
    if func in _MAY_COPY:
        crosses = bool(there and others) or (bool(tensors) and result_is_there != bool(there))
        # where a mask is true decides the size of the result
        crosses |= func in _COPY_NUMBERS and any(t.dtype == torch.bool for t in there[1:])
        if crosses and _waiting_is_refused:
            raise AssertionError(f"{func} copies between the devices, and waits")
    elif there and others and (func in _ALL_THERE or any(t.dim() for t in others)):
        devices = [(t.device.type, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device: {devices}")
    if there and func in _WAITS and _waiting_is_refused:
        raise AssertionError(f"{func} reads the device")
    if named is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    here_args, here_kwargs = tree_map(_unwrap, (args, kwargs))
    note = _captured.note if _captured and result_is_there else lambda f, a, k: f(*a, **k)
    out = note(func, here_args, here_kwargs)
    if not result_is_there or func in _TO_PYTHON:
        return out
    wrapped = tree_map(lambda t: Emulated(t) if isinstance(t, Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


# factories of tensors that are there; what has such a tensor for an argument comes by its type
_any_operator = torch.library.Library("_", "IMPL")
_any_operator.fallback(lambda func, *args, **kwargs: _call(func, args, kwargs), "PrivateUse1")
# those that would make an empty one and resize it
_resizing = torch.library.Library("aten", "IMPL")
for _name in ("arange.start_step", "arange.start", "arange", "eye.m", "eye", "linspace"):
    _packet, _, _overload = _name.partition(".")
    _func = getattr(getattr(aten, _packet), _overload or "default")
    _resizing.impl(_name, lambda *a, _func=_func, **k: _call(_func, a, k), "PrivateUse1")


def _refuse_waiting(mode: bool | str) -> None:
    global _waiting_is_refused
    _waiting_is_refused = bool(mode)


@contextmanager
def unread() -> Iterator[None]:
    """Refuses what makes the host wait."""
    before = _waiting_is_refused
    _refuse_waiting(True)
    try:
        yield
    finally:
        _refuse_waiting(before)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        """Nothing here runs on its own."""


@contextmanager
def _capturing(graph: Graph, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
    global _captured
    _captured = graph
    try:
        with unread(), torch.random.fork_rng([]):
            yield
    finally:
        _captured = None
        graph.undo()


class _Generator(torch.Generator):
    """Random numbers are those of the CPU."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of torch that name a device take this one; graphs can be captured there."""
    tensor = torch.tensor

    def tensor_there(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch, "tensor", tensor_there)
    monkeypatch.setattr(CudaGraph, "supports", staticmethod(lambda device: True))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: _waiting_is_refused)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", _refuse_waiting)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _capturing)
    # what Module.to needs for tensors of another type
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
