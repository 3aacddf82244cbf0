r"""The mixture of Gaussians as a posterior, and the stratified ELBO that trains such a guide."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model.elbo import DifferentiableELBO, sample_sites

__all__ = ["StratifiedELBO", "gaussian_mixture"]


def gaussian_mixture(logits: Tensor, loc: Tensor, scale: Tensor) -> dist.MixtureSameFamily:
    r"""Returns :math:`Q(z) = \sum_k \alpha_k N(z; m_k, \mathrm{diag}\, s_k^2)`.

    Arguments:
        logits: :math:`\log \alpha_k` up to a constant, shape (..., M).
        loc: The means, shape (..., M, p).
        scale: The standard deviations, shape (..., M, p).
    """
    components = dist.Normal(loc, scale).to_event(1)
    # torch subtracts logsumexp, which loses the log 2 of two equal logits of 1e30
    return dist.MixtureSameFamily(dist.Categorical(logits=logits.log_softmax(-1)), components)


class StratifiedELBO(DifferentiableELBO):
    r"""The ELBO of a guide in which one site is a mixture, exact in the component index.

    .. math::
        \sum_k \alpha_k(x) \, \bigl[ \log p(x|z_k) + \log p(z_k) - \log Q(z_k|x) \bigr],
        \qquad z_k \sim q_k(z|x), \quad Q = \sum_k \alpha_k q_k .

    Every component contributes a reparametrised draw, weighted by its mass. All draws pass the
    model at once in a batch dimension to the left of all plates, over which it must broadcast. One
    site of the guide must be a :class:`pyro.distributions.MixtureSameFamily` with reparametrised
    components, and all others reparametrised. Sites in the mixture's plates are averaged over the
    components; sites outside, such as global weights, count once and must not depend on it.

    Arguments:
        num_particles: The number of draws from each component, for one draw of the global sites.
        max_plate_nesting: The number of dimensions of plates; by default it is found by a run.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_gpvae import ImageModel, PerImage, make_guide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> programs = PerImage(model, 60_000), PerImage(make_guide("me:3", model), 60_000)
        >>> svi = SVI(*programs, Adam({"lr": 5e-4}), StratifiedELBO())
        >>> loss = svi.step(torch.rand(8, 1, 28, 28))
    """

    def __init__(self, num_particles: int = 1, max_plate_nesting: float = math.inf) -> None:
        check_at_least(1, num_particles=num_particles)
        super().__init__(num_particles, max_plate_nesting)  # type: ignore[no-untyped-call]

    def unread_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns minus the ELBO; raises ValueError if the guide's sites are other ones."""
        if math.isinf(self.max_plate_nesting):
            self._guess_max_plate_nesting(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        strata = _Stratify(self.num_particles, int(self.max_plate_nesting))
        traces = self._get_trace(model, strata(guide), args, kwargs)
        if strata.site is None:
            raise ValueError(
                "the guide has no site whose distribution is a MixtureSameFamily: "
                "use Trace_ELBO or TraceMeanField_ELBO"
            )
        for site in sample_sites(traces[1]):
            if site["name"] != strata.site and not site["fn"].has_rsample:
                raise ValueError(f"the guide's site {site['name']!r} has no reparametrised samples")
        return strata.average(traces[1]) - strata.average(traces[0])


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
            raise ValueError(f"the guide's sites {self.site!r} and {name!r} are both mixtures")
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
        trace.compute_log_prob()
        total = self.mass.new_zeros(())
        for site in sample_sites(trace):
            log_prob = site["log_prob"]
            if self.plates <= {frame.name for frame in site["cond_indep_stack"]}:
                # a component without mass contributes zero, even if its log density is -inf
                log_prob = self.mass * torch.where(self.mass > 0, log_prob, 0.0)
            elif log_prob.dim() > self.max_plate_nesting:
                raise ValueError(
                    f"site {site['name']!r} depends on the mixture {self.site!r}, but is outside "
                    f"its plates {sorted(self.plates)}: there is no stratified estimate"
                )
            total = total + log_prob.sum()
        return total
