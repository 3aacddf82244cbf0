r"""Promises about densities: normalised, sampled from, and unbiased as a proposal."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.testing.kit import Kit, fixed_noise
from pyro_gpvae.testing.linear_gaussian import linear_gaussian
from pyro_gpvae.testing.tools import (
    FAILURE_RATE,
    MAX_Z,
    NUM_DRAWS,
    Finding,
    disturb,
    sample_moments,
    within,
)

__all__ = [
    "check_evidence",
    "check_fits",
    "check_linear",
    "check_monotone",
    "check_normalised",
]


def check_normalised(kit: Kit) -> Finding:
    quadrature = kit.quadrature()
    if quadrature.note:
        return Finding("-", "-", None, quadrature.note)
    error = float((quadrature.integral - 1).abs().max())
    cause = (
        "a constant factor, such as mixture weights that do not sum to one, a missing "
        "normaliser, or a log-determinant that does not depend on z: samples do fit the density "
        "up to a factor"
        if quadrature.fits
        else "the sign of the log-determinant, or another error in the change of variables: "
        "samples do not fit the density up to a factor either"
    )
    integrals = ", ".join(f"{value:.4f}" for value in quadrature.integral.tolist())
    account = f"∫ q(z|x) dz = {integrals} for the first images.\nLikely cause: {cause}."
    return within(error, 1e-3, account)


def check_fits(kit: Kit) -> Finding:
    quadrature = kit.quadrature()
    if quadrature.note:
        return Finding("-", "-", None, quadrature.note)
    p_value = min(1.0, min(quadrature.p_values) * len(quadrature.p_values))
    account = (
        f"{NUM_DRAWS} samples of the posterior do not fit its log_prob: p = {p_value:.1e}.\n"
        "Likely cause: a variance taken for a standard deviation, the sign of the "
        "log-determinant, other mixture weights in one than in the other, or a stale cache."
    )
    return Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", quadrature.fits, account)


class _Target(nn.Module):
    r"""A model whose posteriors are given Gaussians, and whose log p(x) is given."""

    def __init__(self, loc: Tensor, tril: Tensor, log_evidence: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc, requires_grad=False)
        self.tril, self.log_p = tril, log_evidence

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.tril)

    def log_evidence(self, x: Tensor) -> Tensor:
        return self.log_p

    def forward(self, x: Tensor) -> None:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", self.posterior(x))
            pyro.factor("x", self.log_p)


@torch.no_grad()
def check_evidence(kit: Kit) -> Finding:
    # E[weight] = p(x) whatever the model; with this one the weights have a finite variance
    # though the guide be untrained: its posterior is a Gaussian where q has mass
    x = kit.x[:4]
    torch.manual_seed(kit.seed)
    proposal = fixed_noise(kit.guide, x)
    return _mean_weight(kit, proposal, _fitted_target(kit, proposal, x), x, "a Gaussian target")


@torch.no_grad()
def check_linear(kit: Kit) -> Finding:
    if kit.build is None:
        return Finding("-", "-", None, "pass make= to check over a linear-Gaussian model")
    model = linear_gaussian(kit.image_shape, 2).to(kit.x)
    guide = kit.make(model)
    disturb(guide, kit.seed)
    # halfway to the mean image: an untrained guide has its mass around zero, and weights have a
    # finite variance where the posterior is narrower
    x = (model.images(4, kit.seed) + 0.5) / 2
    torch.manual_seed(kit.seed)
    proposal = fixed_noise(guide, x)
    return _mean_weight(kit, proposal, model, x, "a linear-Gaussian model")


def _fitted_target(kit: Kit, proposal: Any, x: Tensor) -> _Target:
    """Gaussians where q has mass: fitted to all samples, or to those nearest to a mode."""
    z, log_q = kit.draws(proposal, x, NUM_DRAWS)
    _, size, p = z.shape
    # narrower by δ: weights have the second moment (1 - δ²)^(-p/2), here 2 at most
    shrink = 1 - min(0.5, math.sqrt(1 - 4 ** (-1 / p)))
    candidates = [(1.0, shrink), (1.0, shrink / 2), (1.0, shrink / 4)]
    # the covariance of the nearest alone is too narrow
    candidates += itertools.product((0.5, 0.25), (1.0, 2.0, 3.0))
    mode = z[log_q.argmax(0), torch.arange(size, device=z.device)]
    order = ((z - mode) / z.std(0)).square().sum(-1).argsort(0)
    # another p(x) for every image, so that exchanged images would show
    log_evidence = torch.arange(size).to(z)
    targets, efficiencies = [], []
    for share, width in candidates:
        near = order[: max(int(share * len(z)), 4 * p)].unsqueeze(-1).expand(-1, -1, p)
        loc, tril = sample_moments(z.gather(0, near))
        targets.append(_Target(loc, tril * math.sqrt(width), log_evidence))
        efficiencies.append(_efficiency(kit, proposal, targets[-1], x))
    best = torch.stack(efficiencies).argmax(0)
    loc, tril = (
        torch.stack([getattr(targets[k], name)[i] for i, k in enumerate(best.tolist())])
        for name in ("loc", "tril")
    )
    return _Target(loc, tril, log_evidence)


def _efficiency(kit: Kit, proposal: Any, model: Any, x: Tensor) -> Tensor:
    r"""The effective sample size (B,) of weights, as a share of K, for a known posterior p.

    :math:`1 / E_p[p(z|x) / q(z|x)]`, by draws of p, which see where q is missing. Without a
    density of q it is estimated by its own draws.
    """
    p = model.posterior(x)
    if isinstance(proposal, PrecomputedPosterior):
        z = p.sample((500,))
        moment: Tensor = (p.log_prob(z) - proposal.q.log_prob(z)).exp().mean(0)
    else:
        z, log_q = kit.draws(proposal, x, NUM_DRAWS // 4)
        moment = (p.log_prob(z) - log_q).softmax(0).square().sum(0) * len(z)
    return 1 / moment


def _mean_weight(kit: Kit, proposal: Any, model: Any, x: Tensor, where: str) -> Finding:
    """Whether weights have the mean p(x), all images in one χ² test."""
    # an estimate by draws of q alone tends to be too good
    enough = 0.1 if isinstance(proposal, PrecomputedPosterior) else 0.2
    reliable = _efficiency(kit, proposal, model, x) > enough
    weights = log_weights(model, proposal, x, NUM_DRAWS // 2)
    relative = (weights - model.log_evidence(x)).exp()
    if not bool(reliable.any()) and bool(relative.isfinite().all()):
        return Finding("-", "-", None, "the weights vary too much for a test: q is too narrow")
    mean = relative.mean(0)
    error = relative.std(0) / math.sqrt(len(weights))
    z = torch.where((mean - 1).abs() < 1e-9, torch.zeros_like(mean), (mean - 1) / error)
    z = z[reliable | ~mean.isfinite()]
    p_value = max(float(stats.chi2.sf(float(z.square().sum()), len(z))), 1e-300)
    score = float(stats.norm.isf(p_value / 2)) if math.isfinite(p_value) else math.nan
    means = ", ".join(f"{value:.3f}" for value in mean.tolist())
    account = (
        f"On {where}, the mean of weight / p(x) is {means} (expected 1), {score:.1f} standard "
        "errors away.\nLikely cause: samples do not fit the density, as by the sign of the "
        "log-determinant, a density that is not normalised, images in another order, or tile "
        "and interleave swapped."
    )
    return Finding(f"|z| = {score:.2f}", f"< {MAX_Z:.0f}", score < MAX_Z, account)


@torch.no_grad()
def check_monotone(kit: Kit) -> Finding:
    x, repeats, counts = kit.x[:2], 16, (1, 16)
    torch.manual_seed(kit.seed)
    proposal = fixed_noise(kit.guide, x)
    means, errors = [], []
    for count in counts:  # independent draws: within one set, a larger K is never lower
        estimates = torch.stack(
            [
                log_weights(kit.model, proposal, x, count).logsumexp(0) - math.log(count)
                for _ in range(repeats)
            ]
        ).mean(1)
        means.append(float(estimates.mean()))
        errors.append(float(estimates.std()) / math.sqrt(repeats))
    gain, error = means[1] - means[0], math.hypot(*errors)
    score = 0.0 if abs(gain) < 1e-9 * (1 + abs(means[0])) else gain / error
    account = (
        f"log p(x) by K = {counts} samples: {', '.join(f'{mean:.2f}' for mean in means)}.\n"
        "Likely cause: samples or their density depend on how many are drawn."
    )
    return Finding(f"z = {score:.1f}", f"> {-MAX_Z:.0f}", score > -MAX_Z, account)
