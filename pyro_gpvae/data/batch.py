"""Batches of data: the one conversion of what users pass to tensors of floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Data", "batch_of", "check_data", "split_batch", "take", "to_batch"]

#: What users pass: a tensor, or several with the same first dimension.
Data = Tensor | Sequence[Tensor]
#: What programs are called with, ``model(*batch)``.
Batch = tuple[Tensor, ...]


def batch_of(data: Data) -> Batch:
    """Returns data as a tuple of tensors, without a copy."""
    return (data,) if isinstance(data, Tensor) else tuple(data)


def check_data(data: Any, name: str = "data") -> None:
    """Checks that data are a tensor, or a tuple of tensors, of at least one member.

    Raises:
        TypeError: If they are something else.
        ValueError: If there is no member, or the tensors differ in their first dimension.
    """
    if not isinstance(data, Tensor | tuple) or not all(isinstance(t, Tensor) for t in data):
        kind = type(data).__name__
        raise TypeError(
            f"{name} must be a tensor, or a tuple of tensors with the same first dimension, got "
            f"{kind}"
        )
    shapes = [tuple(tensor.shape) for tensor in batch_of(data)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or sizes & {0, None}:
        raise ValueError(
            f"{name} must have at least one member, and tensors with the same first dimension, got "
            f"the shapes {shapes}"
        )


def to_batch(data: Data, *programs: Any) -> Batch:
    """Returns data as tensors on the device and in the dtype of the programs' parameters.

    This is the one conversion of data in the library: uint8 values 0 to 255 become floats in
    [0, 1], floats get the dtype of the parameters, and other integers and booleans stay what they
    are, as counts, labels or masks.

    Arguments:
        data: A tensor (B, ...), or a tuple of them.
        programs: Models and guides; the first floating parameter of a module among them decides,
            also that of a bound method's module. Without one, tensors stay on their device, and
            floats get the default dtype.

    Example:
        >>> to_batch(torch.tensor([[0, 51, 255]], dtype=torch.uint8))
        (tensor([[0.0000, 0.2000, 1.0000]]),)
        >>> to_batch((torch.ones(2, 3), torch.tensor([4, 5])))[1]
        tensor([4, 5])
    """
    modules = (getattr(program, "__self__", program) for program in programs)
    parameters = (p for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters())
    like = next((p for p in parameters if p.is_floating_point()), None)
    return tuple(_convert(tensor, like) for tensor in batch_of(data))


def _convert(tensor: Tensor, like: Tensor | None) -> Tensor:
    device = tensor.device if like is None else like.device
    dtype = torch.get_default_dtype() if like is None else like.dtype
    tensor = tensor.to(device, non_blocking=True)
    if tensor.dtype == torch.uint8:
        return tensor.to(dtype) / 255
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def take(data: Data, index: slice | Tensor) -> Batch:
    """Returns some members of data, by a slice or by their numbers."""
    return tuple(tensor[index] for tensor in batch_of(data))


def split_batch(data: Data, size: int) -> Iterator[Batch]:
    """Yields the members of data, at most ``size`` at once."""
    for start in range(0, len(batch_of(data)[0]), size):
        yield take(data, slice(start, start + size))
