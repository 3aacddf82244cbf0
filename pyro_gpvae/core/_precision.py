"""Lower precision for a network, and for nothing else: bf16 autocast, and TF32 on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["Precision", "autocast", "lowered"]

#: "float32" is exact arithmetic; "tf32" rounds the factors of matrix products and convolutions to
#: 10 bits of mantissa on NVIDIA GPUs from Ampere on, and changes nothing elsewhere; "bf16" computes
#: those products in bfloat16, with 7 bits.
Precision = Literal["float32", "tf32", "bf16"]


@contextmanager
def autocast(precision: Precision | None, device_type: str) -> Iterator[None]:
    """Runs matrix products and convolutions in a precision; puts torch's flags back afterwards.

    torch itself computes convolutions in TF32 on NVIDIA GPUs unless told not to: "float32" tells
    it. Networks in float64 are not affected.

    Arguments:
        precision: "float32", "tf32", "bf16", or None, which changes nothing.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: If there is no such precision.

    Example:
        >>> with autocast("bf16", "cpu"):
        ...     nn.Linear(2, 3)(torch.zeros(1, 2)).dtype
        torch.bfloat16
    """
    _check(precision)
    if precision is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_tf32(precision == "tf32"))
        if precision == "bf16":
            stack.enter_context(torch.autocast(device_type, dtype=torch.bfloat16))
        elif torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def lowered(module: nn.Module, precision: Precision | None) -> Iterator[None]:
    """Runs one module, wherever it is called, under :func:`autocast`; what it returns is cast back.

    Arguments:
        module: The module, such as a model's decoder.
        precision: See :func:`autocast`.

    Raises:
        ValueError: If there is no such precision, or it is "bf16" and the module is in float64,
            which autocast leaves alone.
    """
    _check(precision)
    if precision is None:
        yield
        return
    if precision == "bf16" and any(p.dtype == torch.float64 for p in module.parameters()):
        raise ValueError(
            "precision 'bf16' has no effect on a module in float64: convert the model with "
            ".float() first, or leave the precision out"
        )
    contexts: list[Any] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tensors = (t for t in (*inputs, *module.parameters()) if isinstance(t, Tensor))
        first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        context = autocast(precision, first.device.type)
        context.__enter__()
        contexts.append((context, first.dtype))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        context, dtype = contexts.pop()
        context.__exit__(None, None, None)
        return tree_map(
            lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, output
        )

    with ExitStack() as stack:
        # also if the module fails: its context is left, and the error goes on
        stack.enter_context(module.register_forward_pre_hook(enter))
        stack.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def _check(precision: str | None) -> None:
    if precision is not None and precision not in get_args(Precision):
        names = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"precision must be one of {names}, or None, got {precision!r}")


@contextmanager
def _tf32(enabled: bool) -> Iterator[None]:
    """Allows or forbids TF32."""
    cudnn: Any = torch.backends.cudnn
    cublas: Any = torch.backends.cuda.matmul
    # torch has two sets of names for one state, and refuses to read the older ones once the newer
    # ones say something that the older cannot
    newer = (cublas, cudnn.conv, cudnn.rnn)
    every: tuple[Any, ...] = (*newer, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    strings = [backend.fp32_precision for backend in every]
    try:
        older = torch.get_float32_matmul_precision(), cublas.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older is None:
            for backend in newer:
                backend.fp32_precision = "tf32" if enabled else "ieee"
        else:
            cublas.allow_tf32 = cudnn.allow_tf32 = enabled
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[2]
        for backend, string in zip(every, strings, strict=True):
            backend.fp32_precision = string
