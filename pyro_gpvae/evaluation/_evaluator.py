"""What all evaluators share: checks, conversion of images, random state, and no side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm.auto import tqdm

from pyro_gpvae.core._float32 import exact_float32
from pyro_gpvae.core._programs import with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import to_batch
from pyro_gpvae.model.guide import HasPosterior
from pyro_gpvae.model.image_model import ImageModel

__all__ = [
    "MAX_IMAGES",
    "batches",
    "check_at_least",
    "check_images",
    "check_posterior",
    "device_of",
    "evaluator",
    "name_of",
    "progress_bar",
    "seeded_if",
]

#: Images that are encoded or refined at once by guides that do much work for each image.
MAX_IMAGES = 512

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def evaluator(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function of models and guides one that leaves no trace in them.

    Inside the function there are no gradients and no TF32, and every PyroModule uses its own
    parameters. After it, Pyro's store and the buffers of all modules among its arguments are what
    they were.
    """

    @with_own_parameters
    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        programs = (*args, *kwargs.values())
        with _kept_buffers(programs), torch.no_grad(), exact_float32():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _kept_buffers(programs: tuple[Any, ...]) -> Iterator[None]:
    modules = [program for program in programs if isinstance(program, nn.Module)]
    buffers = [buffer for module in modules for buffer in module.buffers() if not is_lazy(buffer)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def check_images(model: Any, x: Any, name: str = "x") -> None:
    """Raises ValueError unless x holds at least one image, which the model accepts."""
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor with at least one image, got {found}")
    if isinstance(model, ImageModel):
        model.check_images(x)


def check_at_least(minimum: int, **values: int) -> None:
    """Raises ValueError, which names the argument, if a value is less than the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_posterior(guide: Any, purpose: str) -> None:
    """Raises ValueError unless the guide has ``posterior(x)``; the purpose ends the sentence."""
    if not isinstance(guide, HasPosterior):
        raise ValueError(f"the guide {name_of(guide)} has no posterior(x): {purpose}")


def name_of(guide: Any) -> str:
    """Returns the name of a function, or of the class of a guide."""
    return str(getattr(guide, "__name__", type(guide).__name__))


def device_of(x: Tensor, *programs: Any) -> torch.device:
    """Returns the device where images are evaluated: see :func:`to_batch`."""
    return to_batch(x[:1], *programs).device


def batches(x: Tensor, *programs: Any, size: int = MAX_IMAGES) -> Iterator[Tensor]:
    """Yields images as floats where the programs are, at most so many at once."""
    for part in x.split(size):
        yield to_batch(part, *programs)


def seeded_if(seed: int | None, device: torch.device) -> AbstractContextManager[None]:
    """Seeds the work inside the block if there is a seed, and restores the random state."""
    return nullcontext() if seed is None else seeded(seed, device)


def progress_bar(progress: bool | str, label: str, total: int, unit: str = "it") -> tqdm:
    """Returns a progress bar, shown if ``progress`` is True or its label."""
    text = progress if isinstance(progress, str) else label
    return tqdm(total=total, desc=text, disable=not progress, unit=unit, unit_scale=total > 10**5)
