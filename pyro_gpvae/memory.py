"""How many bytes of tensors a piece of code holds at once, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory", "free_memory"]


class PeakMemory(TorchDispatchMode):
    """Counts the tensors that are made inside it, while they live.

    What an operator allocates and frees for itself, such as the workspace of a convolution, is
    not seen.

    Attributes:
        bytes: What lives now.
        peak: The most that lived at once.
        largest: The number of elements of the largest tensor.

    Example:
        >>> with PeakMemory() as memory:
        ...     total = (torch.zeros(1000, dtype=torch.float64) + 1).sum()
        >>> memory.peak, memory.largest
        (16000, 1000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        self.largest = max(self.largest, size // tensor.element_size())
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that a program may still take: free, or kept by torch and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
