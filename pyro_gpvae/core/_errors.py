r"""Errors of the library, and checks that locate the images with NaN or infinite values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "NonFiniteError",
    "UnsupportedError",
    "check_finite",
    "finite",
    "name_images",
    "nonfinite_as_error",
    "unvalidated",
]


class NonFiniteError(ArithmeticError):
    """Raised if a loss, gradient or density is NaN or infinite.

    The message names the step, the term and the images, as far as they are known.

    Attributes:
        step: The optimiser step.
        images: The indices of the images whose own values are not finite, or of the whole
            minibatch if they cannot be separated.
    """

    def __init__(self, message: str, step: int = 0, images: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.images = tuple(images)


def name_images(numbers: Sequence[int]) -> str:
    """Returns the indices of images as text for a message, at most the first five.

    Example:
        >>> name_images([3, 7]), name_images(range(100))
        ('3, 7', '0, 1, 2, 3, 4, ...')
    """
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def finite(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Returns a boolean scalar on the device: whether the loss and all gradients are finite."""
    # a norm is finite only if all its terms are; in float64 it does not overflow
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float64) if gradients else []
    return torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())


@contextmanager
def nonfinite_as_error() -> Iterator[None]:
    """Converts torch's error about the parameters of a distribution to a NonFiniteError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")  # the error has the details
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Expected parameter"):
                raise
            raise NonFiniteError(str(error).partition(", but found")[0]) from error


class UnsupportedError(ValueError):
    """Raised if a training step cannot be traced or compiled; the message gives the reason."""


@contextmanager
def unvalidated() -> Iterator[None]:
    """Disables the validation of Pyro and torch, because every check makes a GPU wait."""
    with pyro.validation_enabled(False):
        yield


def check_finite(what: str, value: Tensor, images: Tensor | None = None) -> None:
    """Checks that a tensor is finite, if the validation of distributions is enabled.

    Arguments:
        what: The name of the tensor in the message.
        value: The tensor, (..., B, p).
        images: The indices of the B images, by default 0 to B - 1.

    Raises:
        NonFiniteError: If a value is NaN or infinite; names the images.
    """
    # the sum takes one pass; it may overflow, so that an infinite one needs the full check
    if not Distribution._validate_args or math.isfinite(float(value.detach().sum())):
        return
    wrong = (~value.isfinite().all(-1)).reshape(-1, value.shape[-2]).any(0)
    if not bool(wrong.any()):
        return
    numbers = (wrong.nonzero().flatten() if images is None else images[wrong]).tolist()
    names = name_images(numbers)
    raise NonFiniteError(
        f"{what} is not finite for image {names} of the batch: a weight is not finite, or a "
        f"product overflows {value.dtype}",
        images=numbers,
    )
