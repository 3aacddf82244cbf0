r"""Not a number: find the term, the images and the parameters where it began."""

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
    """A loss or gradient is NaN or infinite; the message names the step, the term and the images.

    Attributes:
        step: The optimiser step.
        images: The images, as numbers among the training images, that are not finite alone; all
            of the minibatch if that cannot be told.
    """

    def __init__(self, message: str, step: int = 0, images: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.images = tuple(images)


def name_images(numbers: Sequence[int]) -> str:
    """The numbers of images, for a message: the first five.

    Example:
        >>> name_images([3, 7]), name_images(range(100))
        ('3, 7', '0, 1, 2, 3, 4, ...')
    """
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def finite(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Whether the loss and every gradient is finite: a boolean scalar on the device."""
    # a norm is finite only if all its terms are; float64, so that it cannot overflow
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float64) if gradients else []
    return torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())


@contextmanager
def nonfinite_as_error() -> Iterator[None]:
    """Turns torch's complaint about the parameters of a distribution into a NonFiniteError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")  # the error says more
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Expected parameter"):
                raise
            raise NonFiniteError(str(error).partition(", but found")[0]) from error


class UnsupportedError(ValueError):
    """A program cannot be made a pure function; the message says why."""


@contextmanager
def unvalidated() -> Iterator[None]:
    """No checks of distributions and of programs inside: each makes a GPU wait for the host."""
    with pyro.validation_enabled(False):
        yield


def check_finite(what: str, value: Tensor, images: Tensor | None = None) -> None:
    """Raises NonFiniteError, which names the images, unless all of value (..., B, p) is finite.

    ``images`` are their numbers, by default 0 to B - 1. Only checks where distributions check
    their arguments, because it makes a GPU wait.
    """
    # a sum is one pass; it may overflow, which needs a closer look
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
