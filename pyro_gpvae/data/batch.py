"""Batches of data: the one conversion of what users pass to tensors of floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_gpvae.core._programs import modules_of

__all__ = ["Data", "batch_of", "check_data", "size_of", "split_batch", "take", "to_batch"]

#: What users pass: a tensor, or several with the same first dimension.
Data = Tensor | Sequence[Tensor]
#: What programs are called with, ``model(*batch)``.
Batch = tuple[Tensor, ...]


def batch_of(data: Data) -> Batch:
    """Returns data as a tuple of tensors, without a copy."""
    return (data,) if isinstance(data, Tensor) else tuple(data)


def size_of(data: Data) -> int:
    """Returns the number of members of data."""
    return len(batch_of(data)[0])


def check_data(data: Any, name: str = "data") -> None:
    """Checks that data are a tensor, or a tuple of tensors, of at least one member.

    Raises:
        TypeError: If they are something else.
        ValueError: If there is no member, or the tensors differ in their first dimension.
    """
    # a tensor has no members that need a look, and a sparse one no iterator
    if not isinstance(data, Tensor) and not (
        isinstance(data, tuple) and data and all(isinstance(member, Tensor) for member in data)
    ):
        kind, hint = type(data).__name__, ""
        if isinstance(data, list):
            hint = ": stack images with torch.stack, and give several tensors as a tuple"
        elif isinstance(data, Dataset):
            hint = ": fit takes a torch.utils.data.DataLoader of it"
        raise TypeError(
            f"{name} must be a tensor, or a tuple of tensors with the same first dimension, got "
            f"{kind}{hint}"
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
        programs: Models and guides; the first floating parameter of their modules decides, see
            :func:`~pyro_gpvae.core._programs.modules_of`. Without one, tensors stay on their
            device, and floats get the default dtype.

    Example:
        >>> to_batch(torch.tensor([[0, 51, 255]], dtype=torch.uint8))
        (tensor([[0.0000, 0.2000, 1.0000]]),)
        >>> to_batch((torch.ones(2, 3), torch.tensor([4, 5])))[1]
        tensor([4, 5])
    """
    modules = (module for program in programs for module in modules_of(program).values())
    parameters = (parameter for module in modules for parameter in module.parameters())
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
    for start in range(0, size_of(data), size):
        yield take(data, slice(start, start + size))
