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
    cublas: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    new = (cublas, cudnn.conv, cudnn.rnn)
    every: tuple[Any, ...] = (*new, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in every]
    # torch has two sets of names for these settings. It refuses to read the older names once the
    # newer ones hold a value that the older ones cannot express.
    try:
        old = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        old = None
    with without_autocast():
        try:
            if old is None:
                for backend in new:
                    backend.fp32_precision = "ieee"
            else:
                cublas.allow_tf32 = cudnn.allow_tf32 = False
            yield
        finally:
            if old is not None:
                torch.set_float32_matmul_precision(old[0])
                cudnn.allow_tf32 = old[1]
            for backend, value in zip(every, before, strict=True):
                backend.fp32_precision = value
