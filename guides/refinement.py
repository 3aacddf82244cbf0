r"""The training of guides whose Gaussian is refined by steps towards the mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.nn.functional import huber_loss

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.model.elbo import DifferentiableELBO, sample_sites

__all__ = ["RefinementELBO", "sample_refined"]

# what the site "z" carries for the objective
_STARTS = "starts"


def sample_refined(q: TorchDistribution, starts: Sequence[Tensor]) -> Tensor:
    """Samples the site "z" from q(z|x), with the points (B, p) where the steps to its mean start.

    Arguments:
        q: The refined Gaussian, batch shape (B,), event shape (p,).
        starts: The points z_0, ..., z_{T-1}, which :class:`RefinementELBO` moves towards the mean.

    Returns:
        z, (B, p).
    """
    infer: Any = {_STARTS: list(starts)}
    with pyro.plate(DATA_PLATE, len(q.mean), dim=-1):
        z: Tensor = pyro.sample("z", q, infer=infer)
    return z


class RefinementELBO(DifferentiableELBO):
    r"""The ELBO of a guide whose Gaussian is refined, with a gradient for each start of a step.

    The value is the ELBO of q(z|x). Its gradient differs from that of
    :class:`pyro.infer.Trace_ELBO` in two ways. First, log q(z|x) is differentiated only through
    the sample z, as its score has mean zero. The noise of the gradient then vanishes where q is
    the posterior. Second, a step that succeeds from any start leaves no gradient for the start.
    Therefore the gradient of

    .. math:: -\lambda \sum_{t < T} H\bigl(\| L^{-1} (z_t - z_T) \|\bigr), \qquad
        H(d) = \tfrac12 d^2 \text{ for } d \le 1, \text{ else } d - \tfrac12

    is added, with constant :math:`z_T` and L. Within one posterior standard deviation this is, to
    second order, what the ELBO of :math:`N(z_t, L L^\top)` loses against that of q, but it does not
    decode :math:`z_t`. (Without the bound on its slope, images far from their mode dominate all
    others, and training may diverge.) The next step then meets a start that is closer to the mode,
    where it converges quadratically.

    References:
        Roeder, Wu and Duvenaud, *Sticking the Landing*, 2017, for the first gradient.
        https://arxiv.org/abs/1703.09194

    Arguments:
        start_weight: The factor λ of the second gradient, at least 0.
        num_particles: The number of draws, each of which runs the whole guide.

    Raises:
        ValueError: If start_weight is negative, or from the loss, if the guide's site has no
            starts.
    """

    def __init__(self, start_weight: float = 1.0, num_particles: int = 1) -> None:
        if not start_weight >= 0:
            raise ValueError(f"start_weight must not be negative, got {start_weight}")
        super().__init__(num_particles)  # type: ignore[no-untyped-call]
        self.start_weight = start_weight

    def _elbo_of(self, model_trace: Any, guide_trace: Any) -> Tensor:
        model_trace.compute_log_prob()
        elbo: Any = sum(site["log_prob_sum"] for site in sample_sites(model_trace))
        for site in sample_sites(guide_trace):
            if _STARTS not in site["infer"]:
                raise ValueError(
                    f"the guide's site {site['name']!r} was not drawn by sample_refined: use "
                    "Trace_ELBO or TraceMeanField_ELBO"
                )
            q = _detached(site["fn"])
            log_q = scale_and_mask(q.log_prob(site["value"]), site["scale"], site["mask"]).sum()
            elbo = elbo - log_q
            for start in site["infer"][_STARTS]:
                distance = torch.linalg.vector_norm(_whitened(start - q.mean, q), dim=-1)
                loss = huber_loss(distance, torch.zeros_like(distance), reduction="none")
                loss = self.start_weight * scale_and_mask(loss, site["scale"], site["mask"]).sum()
                elbo = elbo - (loss - loss.detach())
        return cast(Tensor, elbo)


def _detached(q: TorchDistribution) -> TorchDistribution:
    """Returns a Gaussian with the parameters of q as constants."""
    if isinstance(q, dist.MultivariateNormal):
        return dist.MultivariateNormal(q.loc.detach(), scale_tril=q.scale_tril.detach())
    return dist.Normal(q.mean.detach(), q.stddev.detach()).to_event(1)


def _whitened(z: Tensor, q: TorchDistribution) -> Tensor:
    """Returns z (B, p) in standard deviations of q."""
    if isinstance(q, dist.MultivariateNormal):
        solve = torch.linalg.solve_triangular
        return solve(q.scale_tril, z.unsqueeze(-1), upper=False).squeeze(-1)
    return z / q.stddev
