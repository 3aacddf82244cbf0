"""Exact float32 arithmetic, whatever the process allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switches an enclosing ``torch.autocast`` off inside the block."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switches TF32 and an enclosing autocast off inside the block, and restores both after it.

    By default torch computes convolutions in TF32 on NVIDIA GPUs, with 10 bits of mantissa.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    backends = (*matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    with without_autocast():
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
