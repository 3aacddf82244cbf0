"""How many bytes of tensors a piece of code holds at once, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory", "bytes_each", "free_memory"]


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


def bytes_each(begin: Callable[[int], Callable[[], object]]) -> int:
    """Bytes that work on many alike holds for each of them, found by doing it for two and four.

    Arguments:
        begin: Given a number of them, returns the work, which is counted; what it does itself is
            not.

    Example:
        >>> bytes_each(lambda count: lambda: torch.zeros(count, 100, dtype=torch.float64).exp())
        1600
    """
    peaks = []
    for count in (2, 4):
        work = begin(count)
        with PeakMemory() as memory:
            work()
        peaks.append(memory.peak)
    return max(1, (peaks[1] - peaks[0]) // 2)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that a program may still take: free, or kept by torch and unused.

    None for other devices, whose memory is not counted.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
