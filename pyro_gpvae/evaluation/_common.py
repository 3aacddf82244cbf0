"""What evaluators share: checks, random state, no side effects, batches and posteriors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypedDict, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_gpvae.core._errors import NonFiniteError, name_images
from pyro_gpvae.core._float32 import exact_float32
from pyro_gpvae.core._plates import is_sampled
from pyro_gpvae.core._programs import (
    PyroProgram,
    check_precision,
    evaluation_mode,
    modules_of,
    with_own_parameters,
)
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Batch, Data, split_batch, take, to_batch
from pyro_gpvae.model._local import agree, complete, name_of
from pyro_gpvae.model.guide import posterior_of

#: Members of a batch that are encoded or refined at once by guides that do much work for each.
MAX_IMAGES = 512
_MEAN_DRAWS = 100
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def evaluator(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function of models and guides leave no trace in them.

    Inside it all modules among its arguments are in evaluation mode, also those that a bound
    method or a function uses. There are no gradients and no TF32, an enclosing
    ``torch.inference_mode`` has no effect, and other threads wait. After it, Pyro's store and the
    modes and buffers of the modules are what they were. Modules in half precision are refused.
    """

    @with_own_parameters
    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        programs = [value for value in (*args, *kwargs.values()) if modules_of(value)]
        check_precision(*programs)
        with (
            evaluation_mode(programs), torch.inference_mode(False), torch.no_grad(),
            exact_float32(),
        ):  # fmt: skip
            return function(*map(_usable, args), **{k: _usable(v) for k, v in kwargs.items()})

    return wrapped


def _usable(value: Any) -> Any:
    """Copies tensors of an inference mode, which could not take part in gradients."""
    if isinstance(value, tuple):
        return tuple(map(_usable, value)) if type(value) is tuple else value
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class Work(TypedDict, total=False):
    """How an evaluation is run.

    Attributes:
        chunk_size: The number of latent vectors that are evaluated at once; by default 640 on a CPU
            and 65,536 on a GPU, halved until it fits.
        seed: The same seed gives the same numbers. None draws a seed.
        first_image: The index of the first member of the data, if they are a part of a data set.
        progress: Whether to show a progress bar; a text is its label.
        vectorized: Whether several samples are evaluated at once, under a plate. By default this
            is tried, see :class:`pyro_gpvae.model.density.JointDensity`.
    """

    chunk_size: int | None
    seed: int | None
    first_image: int
    progress: bool | str
    vectorized: bool | None


@dataclass
class Settings:
    """The values of :class:`Work`."""

    chunk_size: int | None = None
    seed: int | None = None
    first_image: int = 0
    progress: bool | str = False
    vectorized: bool | None = None


def check_amortised(guide: Any) -> None:
    """Raises ValueError for Pyro's autoguides, which know only the data they were fitted to."""
    if isinstance(guide, AutoGuide | AutoMessenger):
        name = name_of(guide)
        raise ValueError(
            f"{name} is not amortised: it holds the posteriors of the data that it was fitted to. "
            f'Use make_guide("instance:autoguide={name}", model), which fits it to every image'
        )


def check_log_weights(log_weights: Tensor, start: int, what: str, reason: str = "") -> None:
    """Names the images, counted from ``start``, whose log weights (K, B) are NaN or +∞."""
    images = ((~(log_weights < torch.inf)).any(0).nonzero().flatten() + start).tolist()
    if images:
        reason = reason or f": a density is NaN or overflows {log_weights.dtype}"
        where = f"is not finite for image {name_images(images)}"
        raise NonFiniteError(f"{what} {where}{reason}", images=images)


def device_of(data: Data, *programs: Any) -> torch.device:
    """Returns the device where data are evaluated: see :func:`to_batch`."""
    return to_batch(take(data, slice(1)), *programs)[0].device


def batches(data: Data, *programs: Any, size: int = MAX_IMAGES) -> Iterator[Batch]:
    """Yields batches where the programs are, of at most so many members."""
    for part in split_batch(data, size):
        yield to_batch(part, *programs)


def seeded_if(seed: int | None, device: torch.device) -> AbstractContextManager[None]:
    """Seeds the work inside the block if there is a seed, and restores the random state."""
    return nullcontext() if seed is None else seeded(seed, device)


def find_posterior(guide: PyroProgram, batch: Batch) -> Any:
    """Returns q(z|x) of a guide: its ``posterior``, or the distribution of its only site.

    It is None for other guides, whose site depends on further draws.
    """
    q = posterior_of(guide, *batch)
    if q is not None or not callable(guide):
        return q
    found: list[Any] = []
    for seed in (0, 1):
        with seeded(seed, batch[0].device):
            nodes: Any = poutine.trace(guide).get_trace(*batch).nodes
        found.append([site for site in nodes.values() if is_sampled(site)])
    if len(found[0]) != 1 or len(found[0][0]["cond_indep_stack"]) != 1:
        return None
    (first,), (second,) = found
    scores = [site["fn"].log_prob(first["value"]) for site in (first, second)]
    return complete(first["fn"]) if agree(*scores) else None


def posterior_mean(guide: PyroProgram, batch: Batch) -> Tensor:
    """Returns E_q[z|x], (B, p): the mean of 100 draws where it is not known."""
    q = posterior_of(guide, *batch)
    return draws(guide, batch, _MEAN_DRAWS).mean(0) if q is None else estimated_mean(q)


def estimated_mean(q: Distribution) -> Tensor:
    """Returns the mean of a distribution, or of 100 draws where it is not known."""
    mean = known_mean(q)
    return q.sample(torch.Size((_MEAN_DRAWS,))).mean(0) if mean is None else mean


def known_mean(q: Distribution) -> Tensor | None:
    """Returns the mean of a distribution, or None where it has none, such as a flow."""
    try:
        return q.mean
    except (AttributeError, NotImplementedError):
        return None


def draws(guide: PyroProgram, batch: Batch, count: int) -> Tensor:
    """Returns draws of the site "z" from q(z|x), (count, B, p)."""
    q = posterior_of(guide, *batch)
    if q is not None:
        z: Tensor = q.sample(torch.Size((count,)))
        return z
    values: list[Any] = []
    for _ in range(count):
        trace = poutine.trace(guide).get_trace(*batch)
        if "z" not in trace:
            raise ValueError("the guide must have a site 'z' in plate('data')")
        values.append(trace.nodes["z"]["value"])
    return torch.stack(values)
