r"""Errors of the library, and checks that locate the images with NaN or infinite values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
from torch import Tensor
from torch.distributions import Distribution


class NonFiniteError(ArithmeticError):
    """Raised if a loss, gradient or density is NaN or infinite.

    Attributes:
        step: The optimiser step.
        images: The indices of the images concerned, of the whole minibatch if they are not known.
    """

    def __init__(self, message: str, step: int = 0, images: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.images = tuple(images)


class UnsupportedError(ValueError):
    """Raised if a training step cannot be traced or compiled; the message gives the reason."""


def check_at_least(minimum: int, **values: int) -> None:
    """Raises ValueError, which names the argument, if a value is no int or below the minimum."""
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def name_images(numbers: Sequence[int]) -> str:
    """Returns the indices of images as text for a message, at most the first five."""
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


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
        except RuntimeError as error:  # of torch.multinomial, for draws of a mixture
            if not str(error).startswith("probability tensor contains"):
                raise
            raise NonFiniteError("the weights of a mixture are not finite") from error


@contextmanager
def unvalidated() -> Iterator[None]:
    """Disables the validation of Pyro and torch, because every check makes a GPU wait."""
    with pyro.validation_enabled(False):
        yield


def check_finite(what: str, value: Tensor, images: Tensor | None = None) -> None:
    """Raises NonFiniteError, which names the images, unless a tensor (..., B, p) is finite.

    This is a part of the validation of distributions, and is disabled with it.
    """
    # the sum takes one pass; it may overflow, so that an infinite one needs the full check
    if not Distribution._validate_args or math.isfinite(float(value.detach().sum())):
        return
    wrong = (~value.isfinite().all(-1)).reshape(-1, value.shape[-2]).any(0)
    numbers = (wrong.nonzero().flatten() if images is None else images[wrong]).tolist()
    if numbers:
        raise NonFiniteError(
            f"{what} is not finite for image {name_images(numbers)} of the batch: a weight is not "
            f"finite, or a product overflows {value.dtype}",
            images=numbers,
        )
