r"""Eq. (2) of the supplement, the objective of training, and ELBO estimators that compute it.

:func:`pyro_gpvae.fit` wraps model and guide in :class:`PerImage` and minimises the guide's
objective, or :class:`TraceELBO` by default.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_gpvae.core._plates import data_plate, find_data_plate, in_plate, is_sampled
from pyro_gpvae.core._programs import Program, PyroProgram, kept_buffers, with_own_parameters
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.model._pairing import pair

__all__ = [
    "Block",
    "DifferentiableELBO",
    "MeanFieldELBO",
    "Objective",
    "PerImage",
    "TraceELBO",
    "elbo_terms",
    "sample_sites",
    "without_host_sync",
]


class Objective(Protocol):
    """The part of :class:`pyro.infer.ELBO` that training calls: minus the ELBO, a scalar."""

    def differentiable_loss(self, model: Any, guide: Any, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """An objective and the parameters that it trains, with an Adam optimiser of their own.

    Its model and guide are by default those of :func:`pyro_gpvae.fit`.
    """

    elbo: Objective
    parameters: Sequence[Tensor]
    model: PyroProgram | None = None
    guide: PyroProgram | None = None


class DifferentiableELBO(ELBO):
    """An ELBO whose other methods follow from ``differentiable_loss``, which reads no device."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        for traces in self._get_traces(model, guide, args, kwargs):  # type: ignore[no-untyped-call]
            loss = loss - self._elbo_of(*traces) / self.num_particles
        return cast(Tensor, loss)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns traces of both; densities are computed only if the validation is enabled."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        traces = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            for trace in traces:
                trace.compute_log_prob()
                for site in sample_sites(trace):
                    check_site_shape(site, self.max_plate_nesting)
        return traces

    def _elbo_of(self, model_trace: Any, guide_trace: Any) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        warn_if_nan(loss, "loss")
        return loss.item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss.item()


class TraceELBO(DifferentiableELBO, Trace_ELBO):
    """:class:`pyro.infer.Trace_ELBO` with a ``differentiable_loss`` that never reads the device.

    Value and gradient are those of Pyro's on the same traces, including score-function terms.
    """

    _get_trace = Trace_ELBO._get_trace

    def _elbo_of(self, model_trace: Any, guide_trace: Any) -> Tensor:
        elbo: Any = 0.0
        surrogate: Any = 0.0  # its gradient is the contribution of the guide's sites
        log_r = None
        for site in sample_sites(model_trace):
            elbo = elbo + site["log_prob_sum"]
        for site in sample_sites(guide_trace):
            _, score_term, entropy_term = site["score_parts"]
            elbo = elbo - site["log_prob_sum"].detach()
            if not is_identically_zero(entropy_term):
                surrogate = surrogate - entropy_term.sum()
            if not is_identically_zero(score_term):
                if log_r is None:
                    log_r = _compute_log_r(model_trace, guide_trace)
                surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score_term).sum()
        if isinstance(surrogate, Tensor):
            elbo = elbo + (surrogate - surrogate.detach())
        return cast(Tensor, elbo)


class MeanFieldELBO(DifferentiableELBO, TraceMeanField_ELBO):
    """:class:`pyro.infer.TraceMeanField_ELBO` without unused densities and reads of the device.

    Value and gradient are those of Pyro's on the same traces. The log density of a site is not
    computed if its KL divergence is analytic, or if the site is masked out.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        traces = super()._get_trace(model, guide, args, kwargs)
        if is_validation_enabled():
            _check_mean_field_requirement(*traces)
        return traces

    def _elbo_of(self, model_trace: Any, guide_trace: Any) -> Tensor:
        elbo: Any = 0.0
        scored = {s["name"] for s in sample_sites(model_trace) if s["is_observed"]}
        latent = {s["name"] for s in sample_sites(model_trace)} - scored
        sites = {s["name"]: s for s in sample_sites(guide_trace) if s["name"] not in scored}
        auxiliary = {n for n, site in sites.items() if site["infer"].get("is_auxiliary")} - latent
        if unmatched := latent ^ (sites.keys() - auxiliary):
            raise ValueError(
                f"the site {min(unmatched)!r} is in the model or in the guide only: add it to the "
                "other one, or mark a site of the guide infer={'is_auxiliary': True}"
            )
        for name, site in sites.items():
            if not site["fn"].has_rsample:
                raise NotImplementedError(
                    f"the guide's site {name!r} has no reparametrised samples: use Trace_ELBO"
                )
            if name in latent:
                try:
                    kl = kl_divergence(site["fn"], model_trace.nodes[name]["fn"])
                    elbo = elbo - scale_and_mask(kl, site["scale"], site["mask"]).sum()
                    continue
                except NotImplementedError:
                    scored.add(name)
            if site["mask"] is False:
                continue
            parts = site["fn"].score_parts(site["value"], *site["args"], **site["kwargs"])
            if not is_identically_zero(parts.score_function):
                raise NotImplementedError(
                    f"the guide's site {name!r} is not fully reparametrised: use Trace_ELBO"
                )
            parts = parts.scale_and_mask(site["scale"], site["mask"])
            elbo = elbo - parts.entropy_term.sum()
        model_trace.compute_log_prob(lambda name, _: name in scored)
        for name in sorted(scored):
            elbo = elbo + model_trace.nodes[name]["log_prob_sum"]
        return cast(Tensor, elbo)


def without_host_sync(objective: Objective) -> Objective:
    """Returns an equal objective of this module if there is one, and the objective otherwise.

    Raises:
        ValueError: If the objective has no ``differentiable_loss``, or enumerates sites.
    """
    name = type(objective).__name__
    if not hasattr(objective, "differentiable_loss"):
        raise ValueError(f"elbo must have differentiable_loss, as Trace_ELBO has; {name} has not")
    if isinstance(objective, TraceEnum_ELBO | TraceTMC_ELBO):
        raise ValueError(
            f"{name} enumerates sites that the guide does not have, and eq. (2) has no terms for "
            "them: use dist.MixtureSameFamily, or SVI(PerImage(model, N), PerImage(guide, N), ...)"
        )
    equals: dict[type, type] = {Trace_ELBO: TraceELBO, TraceMeanField_ELBO: MeanFieldELBO}
    if type(objective) not in equals:
        return objective
    twin = copy.copy(objective)
    twin.__class__ = equals[type(objective)]
    return twin


def sample_sites(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


class PerImage(Program):
    r"""A model or guide whose sites are scaled so that an ELBO estimates eq. (2) in nats per image.

    .. math::
        E_{q(z|x)}[\log p(x|z)] - E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))]
        - \tfrac{1}{N} KL(q(W,U) \| N(0, I)),

    averaged over the minibatch. Sites inside ``plate("data", B)`` are scaled by 1/B and global
    sites by 1/N. Wrap the model **and** the guide: if only one of them is scaled, Pyro trains a
    wrong objective without a warning.

    Arguments:
        program: A Pyro model or guide of images x (B, C, H, W).
        num_images: The number N of training images, never the batch size.

    Raises:
        ValueError: If num_images is not positive, if "z" or an observed site is in a plate of
            another name, or if ``plate("data")`` subsamples.

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> from pyro_gpvae import ImageModel, make_guide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> programs = PerImage(model, 60_000), PerImage(make_guide("vae", model), 60_000)
        >>> loss = SVI(*programs, Adam({"lr": 5e-4}), Trace_ELBO()).step(torch.rand(8, 1, 28, 28))
    """

    def __init__(self, program: PyroProgram, num_images: int) -> None:
        super().__init__()
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.program = program
        self.num_images = num_images
        self._plate: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _PerImageScale(self.find_plate(*args, **kwargs), len(args[0]), self.num_images):
            return self.program(*args, **kwargs)

    def find_plate(self, *args: Any, **kwargs: Any) -> str:
        """Returns the name of the data plate, for which the program is run once at the first call.

        This changes neither the random state nor buffers.
        """
        if self._plate is None:
            with preserve_rng(args[0].device), kept_buffers([self.program]):
                self._plate = find_data_plate(self.program, args, **kwargs)
        return self._plate


class _PerImageScale(Messenger):
    def __init__(self, plate: str, batch_size: int, num_images: int) -> None:
        super().__init__()
        self.plate = plate
        self.batch_size = batch_size
        self.num_images = num_images

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            size = self.batch_size if in_plate(msg, self.plate) else self.num_images
            msg["scale"] = msg["scale"] / size


@with_own_parameters
@torch.no_grad()
def elbo_terms(
    model: PyroProgram, guide: PyroProgram, x: Tensor, num_images: int
) -> dict[str, float]:
    """Estimates the terms of eq. (2) with one draw of the guide, in nats per image.

    The ELBO is ``log_likelihood`` minus ``kl_z`` and ``kl_global``. The programs must not be
    wrapped in :class:`PerImage`; x are images (B, C, H, W), uint8 or floats. Buffers of the
    programs, such as running statistics, are left as they were.

    Raises:
        ValueError: If x is not a batch of the model's images.
    """
    if hasattr(model, "check_images"):
        model.check_images(x)
    x = to_batch(x, model, guide)[0]
    with kept_buffers((model, guide)):
        guide_trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(
            poutine.replay(pair(model, guide), trace=guide_trace)
        ).get_trace(x)
    terms = dict.fromkeys(("log_likelihood", "kl_z", "kl_global"), 0.0)
    for trace, sign in ((model_trace, 1.0), (guide_trace, -1.0)):
        plate = data_plate(trace.nodes, len(x))
        trace.compute_log_prob()
        for site in filter(is_sampled, trace.nodes.values()):
            log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            is_local = in_plate(site, plate)
            value = sign * float(log_prob.sum()) / (len(x) if is_local else num_images)
            if site["is_observed"] and trace is model_trace:
                terms["log_likelihood"] += value
            else:
                terms["kl_z" if is_local else "kl_global"] -= value
    return terms
