"""What evaluators share: checks, random state, no side effects, posteriors and log densities."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.distributions import Distribution, constraints
from tqdm.auto import tqdm

from pyro_gpvae.core._errors import NonFiniteError, name_images
from pyro_gpvae.core._float32 import exact_float32
from pyro_gpvae.core._plates import DATA_PLATE, in_data_plate, is_global
from pyro_gpvae.core._programs import PyroProgram, kept_buffers, with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.model.guide import HasPosterior, posterior_of
from pyro_gpvae.model.image_model import ImageModel

#: Images that are encoded or refined at once by guides that do much work for each image.
MAX_IMAGES = 512
#: The number of draws whose mean stands for that of a distribution without ``mean``.
_MEAN_DRAWS = 100
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def evaluator(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function of models and guides leave no trace in them.

    Inside it there are no gradients and no TF32, and every PyroModule uses its own parameters.
    After it, Pyro's store and the buffers of all modules among its arguments are what they were.
    """

    @with_own_parameters
    @wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        programs = (*args, *kwargs.values())
        with kept_buffers(programs), torch.no_grad(), exact_float32():
            return function(*args, **kwargs)

    return wrapped


def check_images(model: Any, x: Any) -> None:
    """Raises ValueError unless x holds at least one image, which the model accepts."""
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor with at least one image, got {found}")
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
    return to_batch(x[:1], *programs)[0].device


def batches(x: Tensor, *programs: Any, size: int = MAX_IMAGES) -> Iterator[Tensor]:
    """Yields images as floats where the programs are, at most so many at once."""
    for part in x.split(size):
        yield to_batch(part, *programs)[0]


def seeded_if(seed: int | None, device: torch.device) -> AbstractContextManager[None]:
    """Seeds the work inside the block if there is a seed, and restores the random state."""
    return nullcontext() if seed is None else seeded(seed, device)


def progress_bar(progress: bool | str, label: str, total: int, unit: str = "it") -> tqdm:
    """Returns a progress bar, shown if ``progress`` is True or its label."""
    text = progress if isinstance(progress, str) else label
    return tqdm(total=total, desc=text, disable=not progress, unit=unit, unit_scale=total > 10**5)


def posterior_mean(guide: PyroProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E_q[z|x] and an error of its estimate, (B, p) each.

    Where the mean is not known, it is the mean of 100 draws with the global random state. The error
    is then half the difference between the means of both halves, which has the distribution of the
    estimate's own error and is uncorrelated with it. A known mean has the error zero.
    """
    q = posterior_of(guide, x)
    return _mean_of_draws(draws(guide, x, _MEAN_DRAWS)) if q is None else estimated_mean(q)


def estimated_mean(q: Distribution) -> tuple[Tensor, Tensor]:
    """Returns the mean of a distribution and its error, see :func:`posterior_mean`."""
    mean = known_mean(q)
    if mean is None:
        return _mean_of_draws(q.sample(torch.Size((_MEAN_DRAWS,))))
    return mean, torch.zeros_like(mean)


def known_mean(q: Distribution) -> Tensor | None:
    """Returns the mean of a distribution, or None where it has none, such as a flow."""
    try:
        return q.mean
    except (AttributeError, NotImplementedError):
        return None


def _mean_of_draws(z: Tensor) -> tuple[Tensor, Tensor]:
    first, last = (half.mean(0) for half in z.chunk(2))
    return (first + last) / 2, (first - last) / 2


def draws(guide: PyroProgram, x: Tensor, count: int) -> Tensor:
    """Returns draws from q(z|x), (count, B, p)."""
    q = posterior_of(guide, x)
    if q is not None:
        z: Tensor = q.sample(torch.Size((count,)))
        return z
    values: list[Any] = []
    for _ in range(count):
        trace = poutine.trace(guide).get_trace(x)
        if "z" not in trace:
            raise ValueError(f"the guide must have a site 'z' in plate({DATA_PLATE!r})")
        values.append(trace.nodes["z"]["value"])
    return torch.stack(values)


def local_programs(
    model: PyroProgram, guide: PyroProgram, x: Tensor
) -> tuple[PyroProgram, PyroProgram]:
    """Returns model and guide without the global sites, which never enter an image's weight.

    A guide with ``posterior(x)`` is replaced by its q(z|x), computed once, in which W and U are
    integrated out. Any other guide samples its global sites for every particle.
    """
    q = posterior_of(guide, x)
    if q is None:
        return (
            poutine.infer_config(model, _untraced_if_global),
            poutine.infer_config(guide, _untraced_if_global),
        )

    def proposal(x: Tensor) -> None:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", q)

    return poutine.block(model, hide_fn=is_global), proposal


def _untraced_if_global(site: Any) -> Any:
    drawn = is_global(site) and not site["is_observed"]
    return {"is_auxiliary": True, "_do_not_trace": True} if drawn else {}


def weights_of_traces(model: PyroProgram, guide: PyroProgram, x: Tensor, count: int) -> Tensor:
    """Returns log p(x, z) - log q(z|x) of ``count`` draws of each image, (count, B).

    Auxiliary sites of the guide, which the model lacks, are left out: p(x, z) / q(z|x, auxiliary)
    is unbiased. A site that the guide does not propose is drawn from its prior, which cancels.
    """
    _, model_trace, guide_trace = vectorized_importance_weights(
        model, guide, x, num_samples=count, max_plate_nesting=1
    )
    _check_support(model_trace)
    shape, proposed = (count, len(x)), {*model_trace} & {*guide_trace}
    log_joint = _site_sum(model_trace, proposed | _observed(model_trace), shape)
    return log_joint - _site_sum(guide_trace, proposed, shape)


def log_joint_of(model: PyroProgram, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns log p(x, z), (C, B), as a function of z (C, B, p), without global sites."""
    local = poutine.block(model, hide_fn=is_global)

    def log_joint(z: Tensor) -> Tensor:
        # validation would refuse the infinities of a step that is about to be rejected
        with pyro.validation_enabled(False), pyro.plate("chains", len(z), dim=-2):
            trace = poutine.trace(poutine.condition(local, data={"z": z})).get_trace(x)
            trace.compute_log_prob()
        return _site_sum(trace, {"z", *_observed(trace)}, (len(z), len(x)))

    return log_joint


class Sites(NamedTuple):
    """The latent and the observed sites of images in one run of a model, by name."""

    latent: dict[str, Any]
    observed: dict[str, Any]


def local_sites(
    model: PyroProgram, x: Tensor, z: Tensor | None = None, *, simulate: bool = False
) -> Sites:
    """Runs a model once for images (B, ...), and returns its sites in the data plate.

    ``z`` is drawn if it is not given; ``simulate`` draws observed sites as well.
    """
    program = poutine.block(model, hide_fn=is_global)
    if z is not None:
        program = poutine.condition(program, data={"z": z})
    if simulate:
        program = poutine.uncondition(program)
    nodes: dict[str, Any] = poutine.trace(program).get_trace(x).nodes
    sites = Sites({}, {})
    for name, site in nodes.items():
        if site["type"] != "sample" or not in_data_plate(site) or isinstance(site["fn"], dist.Unit):
            continue
        seen = site["infer"].get("was_observed") if simulate else site["is_observed"]
        is_latent = name == "z" or not seen
        (sites.latent if is_latent else sites.observed)[name] = site
    return sites


def _site_sum(trace: Any, names: Container[str], shape: tuple[int, int]) -> Tensor:
    """Sums log densities of these sites in the data plate, with masks, without scales: (K, B)."""
    terms = [
        scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).expand(shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and in_data_plate(site) and name in names
    ]
    return torch.stack(terms).sum(0) if terms else torch.zeros(shape)


def _observed(trace: Any) -> set[str]:
    nodes = trace.nodes.items()
    return {name for name, site in nodes if site["type"] == "sample" and site["is_observed"]}


def _check_support(model_trace: Any) -> None:
    """Refuses draws of z that the prior cannot make, also where Pyro's validation is off."""
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or not in_data_plate(site):
            continue
        support = site["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and not bool(support.check(site["value"]).all()):
            raise ValueError(
                f"the guide's draws of {name!r} lie outside the support {support} of the model's "
                f"{type(site['fn']).__name__}: give both the same support"
            )


def check_log_weights(log_weights: Tensor, start: int, what: str, reason: str = "") -> None:
    """Names the images, counted from ``start``, whose log weights (K, B) are NaN or +∞."""
    images = ((~(log_weights < torch.inf)).any(0).nonzero().flatten() + start).tolist()
    if images:
        reason = reason or f": a density is NaN or overflows {log_weights.dtype}"
        where = f"is not finite for image {name_images(images)}"
        raise NonFiniteError(f"{what} {where}{reason}", images=images)
