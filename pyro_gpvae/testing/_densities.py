r"""Promises about densities: normalised, sampled from, and unbiased as a proposal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import MultivariateNormal
from scipy import stats
from torch import Tensor

from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing import _kit
from pyro_gpvae.testing._kit import Finding, Kit, likely, not_checked, sample, within, z_site
from pyro_gpvae.testing.linear_gaussian import LinearGaussian, linear_gaussian


@torch.no_grad()
def _quadrature(kit: Kit) -> tuple[Tensor, float] | Finding:
    """Returns the integral of q(z|x) of the first two images, and the p-value of samples' fit.

    The grid is uniform in asinh of the whitened z, so that its nodes are dense in the middle and
    reach far. It is refined until the integral no longer changes.
    """
    guide, x = kit.guide, kit.x[:2]
    p = z_site(guide, x)["value"].shape[-1]
    if p > 2 and kit.build is not None:
        p, guide = 2, kit.make(_linear(kit))
    torch.manual_seed(kit.seed)
    if (q := posterior_of(guide, x)) is None:
        return not_checked("the guide has no posterior")
    if p > 2:
        return not_checked(f"p = {p}: pass make= to check by quadrature at p = 2")
    z = q.sample((_kit.NUM_DRAWS,))
    loc, tril = _kit.sample_moments(z)
    white = torch.linalg.solve_triangular(tril, (z - loc).movedim(0, -1), upper=False).mT
    end = math.asinh(max(8.0, 1.5 * float(white.abs().max())))
    previous = math.inf
    for num_nodes in (1001, 2001, 4001, 8001) if p == 1 else (81, 161, 321, 641):
        axis = torch.linspace(-end, end, num_nodes, dtype=loc.dtype).to(loc)
        nodes = torch.cartesian_prod(*[axis] * p).reshape(-1, 1, p)
        points = (
            loc + (tril @ part.unsqueeze(-1)).squeeze(-1) for part in nodes.sinh().split(16384)
        )
        area = tril.diagonal(dim1=-2, dim2=-1).prod(-1) * (axis[1] - axis[0]) ** p
        mass = torch.cat([*map(q.log_prob, points)]).exp() * nodes.cosh().prod(-1) * area
        integral = mass.sum(0)
        # less precision is enough if the integral is far from 1
        enough = (0.1 * (integral - 1).abs()).clamp(min=2e-4)
        if bool(((integral - previous).abs() < enough).all()):
            break
        previous = integral
    else:
        return not_checked("the quadrature does not converge: q is too rough, or too narrow")
    place = ((white.asinh() + end) / (axis[1] - axis[0])).round().long().cpu().numpy()
    grid = mass.mT.reshape(-1, *[num_nodes] * p).cpu().numpy()
    return integral, min(1.0, 2 * min(map(_fit, grid, place)))


def _linear(kit: Kit) -> LinearGaussian:
    channels, height, width = kit.x.shape[1:]
    return linear_gaussian((channels, height, width), 2).to(kit.x)


def _fit(mass: np.ndarray, place: np.ndarray) -> float:
    """Returns the p-value of Pearson's χ² of samples in cells (K, p), made uniform by the mass."""
    p, uniform = mass.ndim, np.random.default_rng(0).uniform(size=place.shape)
    rest, at = mass[None], np.arange(len(place))
    for axis, cell in enumerate(place.T):  # the distribution of each coordinate given those before
        share = rest.sum(tuple(range(2, rest.ndim)))
        below = share.cumsum(1) - share
        rows = at if len(share) > 1 else 0 * at
        value = below[rows, cell] + uniform[:, axis] * share[rows, cell]
        uniform[:, axis] = value / np.maximum(share.sum(1)[rows], 1e-300)
        rest = rest[rows, cell]
    count, _ = np.histogramdd(uniform, bins=32 if p == 1 else 8, range=[(0, 1)] * p)
    return float(stats.chisquare(count.ravel()).pvalue)


def check_normalised(kit: Kit) -> Finding:
    kit.quadrature = _quadrature(kit)
    if isinstance(kit.quadrature, Finding):
        return kit.quadrature
    integral, p_value = kit.quadrature
    values = ", ".join(f"{value:.4f}" for value in integral.tolist())
    cause = "the sign of the log-determinant, or another error in the change of variables"
    if p_value > _kit.FAILURE_RATE:  # samples fit the density up to a factor
        cause = "a constant factor, such as mixture weights that do not sum to one"
    error = float((integral - 1).abs().max())
    return within(error, 1e-3, f"∫ q(z|x) dz = {values} for the first images.", cause)


def check_fits(kit: Kit) -> Finding:
    if kit.quadrature is None or isinstance(kit.quadrature, Finding):
        return kit.quadrature or not_checked("there is no quadrature")
    seen = "Samples of the posterior do not fit its log_prob: p = {p:.1e}."
    return likely(kit.quadrature[1], seen)


@torch.no_grad()
def check_evidence(kit: Kit) -> Finding:
    # E[weight] = p(x) for every model, so the posterior of this one is a Gaussian where q has mass
    x, count = kit.x[:4], _kit.NUM_DRAWS
    torch.manual_seed(kit.seed)
    proposal = _kit.fixed_noise(kit.guide, x)
    loc, tril = _kit.sample_moments(sample(proposal, x, count)[0])
    p = MultivariateNormal(loc, scale_tril=tril)
    z, log_q = sample(proposal, x, count)
    return _mean_weight(p.log_prob(z) - log_q, proposal, p, x)


@torch.no_grad()
def check_linear(kit: Kit) -> Finding:
    if kit.build is None:
        return not_checked("pass make= to check over a linear-Gaussian model")
    model = _linear(kit)
    guide = kit.make(model)
    # halfway to the mean image: an untrained guide has its mass around zero
    x = (model.images(4, kit.seed) + 0.5) / 2
    torch.manual_seed(kit.seed)
    proposal = _kit.fixed_noise(guide, x)
    log_r = log_weights(model, proposal, x, _kit.NUM_DRAWS) - model.log_evidence(x)
    return _mean_weight(log_r, proposal, model.posterior(x), x)


def _mean_weight(log_r: Tensor, proposal: Any, p: MultivariateNormal, x: Tensor) -> Finding:
    r"""Tests E[weight] = p(x) by an identity of bridge sampling, for all images in one χ² test.

    With r = weight / p(x) = p(z|x) / q(z|x) the plain mean E_q[r] = 1 may have an infinite
    variance. Both sides of E_q[r / (1 + r)] = E_p[1 / (1 + r)] are bounded instead.
    """
    z = p.sample((len(log_r),))
    q = posterior_of(proposal, x) or z_site(proposal, x, len(z))["fn"]
    left, right = log_r.sigmoid(), (q.log_prob(z) - p.log_prob(z)).sigmoid()
    gap = left.mean(0) - right.mean(0)
    scores = gap / ((left.var(0) + right.var(0)) / len(z)).sqrt()
    scores = scores.masked_fill(gap.abs() < 1e-9, 0)[~(left.mean(0) + right.mean(0) < 0.05)]
    if not len(scores):
        return not_checked("q and the posterior do not overlap")
    p_value = max(float(stats.chi2.sf(float(scores.square().sum()), len(scores))), 1e-300)
    score = float(stats.norm.isf(p_value / 2)) if math.isfinite(p_value) else math.nan
    seen = f"The mean of weight / p(x) is not one: {score:.1f} standard errors from it."
    return Finding(f"|z| = {score:.2f}", f"< {_kit.MAX_Z:.0f}", score < _kit.MAX_Z, seen)


@torch.no_grad()
def check_monotone(kit: Kit) -> Finding:
    x, repeats = kit.x[:2], 16
    torch.manual_seed(kit.seed)
    proposal = _kit.fixed_noise(kit.guide, x)
    # independent draws: of the same draws, more never give less
    one, many = (
        torch.stack([log_weights(kit.model, proposal, x, k).logsumexp(0) for _ in range(repeats)])
        .sub(math.log(k))
        .mean(1)
        for k in (1, 16)
    )
    gain = float(many.mean() - one.mean())
    error = math.sqrt(float(one.var() + many.var()) / repeats)
    score = 0.0 if abs(gain) < 1e-9 * (1 + abs(float(one.mean()))) else gain / error
    seen = f"log p(x) by K = 1, 16 samples: {one.mean():.2f}, {many.mean():.2f}."
    return Finding(f"z = {score:.1f}", f"> {-_kit.MAX_Z:.0f}", score > -_kit.MAX_Z, seen)
