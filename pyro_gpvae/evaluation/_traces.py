"""Log densities of each sample and image, from the traces of a model and a guide."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.distributions import constraints

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._plates import DATA_PLATE, in_data_plate, is_global
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.model.guide import posterior_of

__all__ = [
    "Sites",
    "local_programs",
    "local_sites",
    "log_joint_of",
    "simulate",
    "weights_of_traces",
]


def local_programs(
    model: PyroProgram, guide: PyroProgram, x: Tensor
) -> tuple[PyroProgram, PyroProgram]:
    """Returns model and guide without the global sites, which never enter an image's weight.

    A guide with ``posterior(x)`` is replaced by its q(z|x), computed once; W and U are integrated
    out in it, by eq. (7) for the GPVAE, and are not sampled at all. Any other guide samples its
    global sites for every particle.
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
    is unbiased, and dividing by their density as well would not be. A site that the guide does not
    propose is drawn from its prior, which cancels.
    """
    _, model_trace, guide_trace = vectorized_importance_weights(
        model, guide, x, num_samples=count, max_plate_nesting=1
    )
    _check_support(model_trace)
    shape, proposed = (count, len(x)), {*model_trace} & {*guide_trace}
    log_joint = _site_sum(model_trace, proposed | _observed(model_trace), shape)
    return log_joint - _site_sum(guide_trace, proposed, shape)


def log_joint_of(model: PyroProgram, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns log p(x, z) in nats, (C, B), as a function of z (C, B, p), without global sites."""
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
    """Runs a model once, and returns its sites in the data plate, without factors.

    Arguments:
        model: A Pyro model.
        x: Images (B, ...).
        z: The value of the site ``"z"``; drawn if not given.
        simulate: Whether observed sites are drawn as well.
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


def simulate(model: PyroProgram, like: Tensor, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Draws one image (1, C, H, W) and its z (1, p) from the model."""
    with seeded(image_seed(seed, index, "simulation"), like.device):
        try:
            with nonfinite_as_error():
                sites = local_sites(model, like, simulate=True)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"image {index} cannot be simulated: {error}", images=[index]
            ) from error
    if len(sites.observed) != 1 or "z" not in sites.latent:
        raise ValueError(
            "images can be simulated from a model with the site 'z' and one observed site, "
            f"found {len(sites.observed)} of them"
        )
    (image,) = sites.observed.values()
    return image["value"], sites.latent["z"]["value"]


def _site_sum(trace: Any, names: Container[str], shape: tuple[int, int]) -> Tensor:
    """Sums log densities over the sites of these names in the data plate, (particles, images).

    Masks count, scales do not.
    """
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
