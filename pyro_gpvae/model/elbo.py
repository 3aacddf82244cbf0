r"""Eq. (2) of the supplement, the objective of training, and ELBO estimators that compute it.

:func:`pyro_gpvae.fit` wraps model and guide in :class:`PerImage` and minimises the guide's
objective, or :class:`TraceELBO` by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_gpvae.core._float32 import exact_float32
from pyro_gpvae.core._plates import (
    check_guide_sites,
    check_observes,
    check_separable,
    data_plate,
    find_data_plate,
    hide_observations,
    in_plate,
    is_sampled,
)
from pyro_gpvae.core._programs import (
    Program,
    PyroProgram,
    check_precision,
    evaluation_mode,
    kept_buffers,
    modules_of,
    with_own_parameters,
)
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.batch import Data, to_batch
from pyro_gpvae.model._local import check_kinds
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model._points import check_points
from pyro_gpvae.model.guide import check_program_data

__all__ = [
    "Block",
    "DifferentiableELBO",
    "MeanFieldELBO",
    "Objective",
    "PerImage",
    "TraceELBO",
    "elbo_terms",
    "sample_sites",
]


class Objective(Protocol):
    """The part of :class:`pyro.infer.ELBO` that training calls: minus the ELBO, a scalar."""

    def differentiable_loss(self, model: Any, guide: Any, /, *batch: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """An objective and the parameters that it trains, with an Adam optimiser of their own.

    All blocks are differentiated at the same parameters, and then updated. The model and the guide
    are by default those of :func:`pyro_gpvae.fit`.
    """

    elbo: Objective
    parameters: Sequence[Tensor]
    model: PyroProgram | None = None
    guide: PyroProgram | None = None


class DifferentiableELBO(ELBO):
    """An ELBO whose other methods follow from ``unread_loss``, which does not read the device."""

    def unread_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
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

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.unread_loss(model, guide, *args, **kwargs)
        warn_if_nan(loss.detach() if isinstance(loss, Tensor) else loss, "loss")
        return loss

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(torch_item(loss))


class TraceELBO(DifferentiableELBO, Trace_ELBO):
    """:class:`pyro.infer.Trace_ELBO` with a loss that does not read the device.

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
                    elbo = elbo - _kl(site, model_trace.nodes[name])
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


def _kl(guide_site: Any, model_site: Any) -> Any:
    """Returns the KL divergence of a latent site, summed over its batch shape."""
    batch_shape = torch.Size(guide_site["fn"].batch_shape)
    kl: Any = kl_divergence(guide_site["fn"], model_site["fn"])
    kl = scale_and_mask(kl, guide_site["scale"], guide_site["mask"])
    if not isinstance(kl, Tensor):  # of distributions that are masked out
        return kl * batch_shape.numel()
    if kl.shape != batch_shape:
        raise ValueError(
            f"the KL divergence of the site {guide_site['name']!r} has the shape "
            f"{tuple(kl.shape)}, but its distribution in the guide has the batch shape "
            f"{tuple(batch_shape)}: give it the same batch shape in both programs, with expand or "
            "to_event"
        )
    return kl.sum()


def sample_sites(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


class PerImage(Program):
    r"""A model or guide whose sites are scaled so that an ELBO estimates eq. (2) in nats per image.

    .. math::
        E_{q(z|x)}[\log p(x|z)] - E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))]
        - \tfrac{1}{N} KL(q(W,U) \| N(0, I)),

    averaged over the minibatch. Sites inside the data plate, the plate at dimension -1 with as many
    members as the batch, are scaled by 1/B, and global sites by 1/N. Wrap the model **and** the
    guide: if only one of them is scaled, Pyro trains a wrong objective without a warning.

    Arguments:
        program: A Pyro model or guide of a batch, one or several tensors (B, ...).
        num_images: The number N of training images or other members, never the batch size.

    Raises:
        ValueError: If num_images is not positive, or if there is no data plate, several of them, or
            one that subsamples.

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
        if not isinstance(program, nn.Module):  # a bound method trains its module
            self.owner = modules_of(program).get("")

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        with _PerImageScale(self.find_plate(*batch, **kwargs), len(batch[0]), self.num_images):
            return hide_observations(self.program)(*batch, **kwargs)

    def find_plate(self, *batch: Any, **kwargs: Any) -> str:
        """Returns the name of the data plate, for which the program is run once at the first call.

        This changes neither the random state nor buffers.
        """
        if self._plate is None:
            with preserve_rng(batch[0].device), kept_buffers([self.program]):
                self._plate = find_data_plate(self.program, batch, **kwargs)
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
    model: PyroProgram, guide: PyroProgram, data: Data, num_images: int
) -> dict[str, float]:
    """Estimates the terms of eq. (2) with one draw of the guide, in nats per image.

    The ELBO is ``log_likelihood`` minus ``kl_z`` and ``kl_global``. These are terms of the
    densities: weights that ``poutine.scale`` gives to sites of an objective do not count. The
    programs must not be wrapped in :class:`PerImage`. They are run in evaluation mode, and left as
    they were.

    Arguments:
        model: A Pyro model.
        guide: A Pyro guide.
        data: Images or other data: a tensor (B, ...), or a tuple of them.
        num_images: The number N of training images, by which ``kl_global`` is divided.

    Raises:
        ValueError: If the data are not a batch of the model, the model observes nothing, or a
            parameter is in half precision.
    """
    check_program_data(model, data)
    check_precision(model, guide)
    batch = to_batch(data, model, guide)
    terms = dict.fromkeys(("log_likelihood", "kl_z", "kl_global"), 0.0)
    with evaluation_mode((model, guide)), exact_float32():
        guide_trace: Any = poutine.trace(hide_observations(guide)).get_trace(*batch)
        check_guide_sites(guide_trace.nodes)
        replayed = poutine.replay(pair(model, guide), trace=guide_trace)
        model_trace: Any = poutine.trace(replayed).get_trace(*batch)
        check_observes(model_trace.nodes)
        traces = (guide_trace, model_trace)
        plates = [data_plate(trace.nodes, len(batch[0])) for trace in traces]
        if len(batch[0]) != num_images:
            check_separable(guide, guide_trace.nodes, plates[0])
        check_kinds(guide_trace.nodes, model_trace.nodes)
        check_points(guide, batch, guide_trace, model_trace, plates[0])
        for trace, plate, sign in zip(traces, plates, (-1.0, 1.0), strict=True):
            trace.compute_log_prob(lambda _, site: is_sampled(site))
            for name, site in trace.nodes.items():
                if not is_sampled(site) or (not site["is_observed"] and name not in guide_trace):
                    continue  # what the guide leaves out is drawn from its prior, which cancels
                log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
                is_local = in_plate(site, plate)
                value = sign * float(log_prob.sum()) / (len(batch[0]) if is_local else num_images)
                if site["is_observed"] and trace is model_trace:
                    terms["log_likelihood"] += value
                else:
                    terms["kl_z" if is_local else "kl_global"] -= value
    return terms
