r"""The mixture of Gaussians as a posterior, and the stratified ELBO that trains such a guide."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.model.elbo import sampled_traces

__all__ = ["StratifiedELBO", "gaussian_mixture"]


def gaussian_mixture(logits: Tensor, loc: Tensor, scale: Tensor) -> dist.MixtureSameFamily:
    r"""Returns :math:`Q(z) = \sum_k \alpha_k N(z; m_k, \mathrm{diag}\, s_k^2)`.

    The weights are used as logarithms only, so that a component whose :math:`\alpha_k` underflows
    causes no error for any logits.

    Arguments:
        logits: :math:`\log \alpha_k` up to a constant, shape (..., M).
        loc: The means, shape (..., M, p).
        scale: The standard deviations, shape (..., M, p).

    Returns:
        A distribution of batch shape (...) and event shape (p,): exact ``log_prob``, i.i.d.
        ``sample``, no ``rsample``.

    Raises:
        ValueError: If the shapes do not match, a weight or mean is NaN, or a standard deviation is
            not positive.

    Example:
        >>> q = gaussian_mixture(torch.zeros(5, 3), torch.zeros(5, 3, 2), torch.ones(5, 3, 2))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """
    components = dist.Normal(loc, scale).to_event(1)
    # torch subtracts logsumexp, which loses the log 2 of two equal logits of 1e30
    return dist.MixtureSameFamily(dist.Categorical(logits=logits.log_softmax(-1)), components)


class StratifiedELBO(ELBO):
    r"""The ELBO of a guide in which one site is a mixture, exact in the component index.

    .. math::
        \sum_k \alpha_k(x) \, \bigl[ \log p(x|z_k) + \log p(z_k) - \log Q(z_k|x) \bigr],
        \qquad z_k \sim q_k(z|x), \quad Q = \sum_k \alpha_k q_k .

    Every component contributes a reparametrised draw, weighted by its mass. A draw from one random
    component would need a score-function term and would add the noise of the choice. All draws
    pass the model at once in a batch dimension to the left of all plates, as Pyro's vectorised
    particles do, so models must broadcast over such a dimension.

    The guide must have exactly one site whose distribution is a
    :class:`pyro.distributions.MixtureSameFamily` with reparametrised components. All other sites
    must be reparametrised. Sites in the plates of the mixture's site are averaged over the
    components; sites outside, such as global weights, count once. Scales and masks are respected.

    Arguments:
        num_particles: The number of draws from each component. They share one draw of the global
            sites.
        max_plate_nesting: The number of batch dimensions that plates use. By default, model and
            guide run once to find it.

    Raises:
        ValueError: If num_particles is less than 1.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_gpvae import ImageModel, PerImage
        >>> from guides.mixture import MixtureGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> programs = PerImage(model, 60_000), PerImage(MixtureGuide(model, 3), 60_000)
        >>> svi = SVI(*programs, Adam({"lr": 5e-4}), StratifiedELBO())
        >>> loss = svi.step(torch.rand(8, 1, 28, 28))
    """

    def __init__(self, num_particles: int = 1, max_plate_nesting: float = math.inf) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        super().__init__(num_particles, max_plate_nesting)  # type: ignore[no-untyped-call]

    def differentiable_loss(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns minus the ELBO.

        Raises:
            ValueError: If the guide does not have exactly one mixture site, if another site is not
                reparametrised, or if a site outside the mixture's plates depends on it.
        """
        if math.isinf(self.max_plate_nesting):
            self._guess_max_plate_nesting(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        strata = _Stratify(self.num_particles, int(self.max_plate_nesting))
        model_trace, guide_trace = self._get_trace(model, strata(guide), args, kwargs)
        if strata.site is None:
            raise ValueError(
                "the guide has no site whose distribution is a MixtureSameFamily: "
                "use Trace_ELBO or TraceMeanField_ELBO"
            )
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not (name == strata.site or site["fn"].has_rsample):
                raise ValueError(
                    f"the guide's site {name!r} has no reparametrised samples: use Trace_ELBO"
                )
        return strata.average(guide_trace) - strata.average(model_trace)

    @torch.no_grad()
    def loss(self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        warn_if_nan(loss, "loss")
        return float(loss)

    def loss_and_grads(
        self, model: PyroProgram, guide: PyroProgram, *args: Any, **kwargs: Any
    ) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        loss = loss.detach()
        warn_if_nan(loss, "loss")
        return float(loss)

    def _get_trace(self, model: PyroProgram, guide: PyroProgram, args: Any, kwargs: Any) -> Any:
        traces = sampled_traces(model, guide, args, kwargs, self.max_plate_nesting)
        for trace in traces:
            trace.compute_log_prob()
        return traces


class _Stratify(Messenger):
    """Draws the mixture site from every component, and weights log densities by the masses."""

    def __init__(self, num_draws: int, max_plate_nesting: int) -> None:
        super().__init__()
        self.num_draws = num_draws
        self.max_plate_nesting = max_plate_nesting
        self.site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        name, q = msg["name"], msg["fn"]
        if not isinstance(q, dist.MixtureSameFamily) or msg["is_observed"]:
            return
        if self.site is not None:
            raise ValueError(
                f"the guide's sites {self.site!r} and {name!r} are both mixtures; only one can be"
            )
        self.site = name
        self.plates = {frame.name for frame in msg["cond_indep_stack"]}
        batch_dim = len(q.batch_shape)
        # (S, ..., M, p) -> (S M, 1s, ..., p): draws to the left of every plate
        z = q.component_distribution.rsample((self.num_draws,)).movedim(batch_dim + 1, 1)
        ones = (1,) * (self.max_plate_nesting - batch_dim)
        msg["value"] = z.reshape(-1, *ones, *z.shape[2:])
        log_mass = q.mixture_distribution.logits.log_softmax(-1).movedim(-1, 0)
        mass = log_mass.exp() / self.num_draws
        mass = mass.expand(self.num_draws, *mass.shape)
        self.mass = mass.reshape(-1, *ones, *mass.shape[2:])

    def average(self, trace: Any) -> Tensor:
        """Returns the expected log density of all sites."""
        total = self.mass.new_zeros(())
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            log_prob = site["log_prob"]
            if self.plates <= {frame.name for frame in site["cond_indep_stack"]}:
                # a component without mass contributes zero, even if its log density is -inf
                log_prob = self.mass * torch.where(self.mass > 0, log_prob, 0.0)
            elif log_prob.dim() > self.max_plate_nesting:
                raise ValueError(
                    f"site {name!r} depends on the mixture {self.site!r}, but is outside its "
                    f"plates {sorted(self.plates)}: there is no stratified estimate"
                )
            total = total + log_prob.sum()
        return total
