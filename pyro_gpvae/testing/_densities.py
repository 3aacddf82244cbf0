r"""Promises about draws and densities: noise, importance weights, and the guide's own trace."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from scipy import stats

from pyro_gpvae.data.batch import take
from pyro_gpvae.model._local import is_point
from pyro_gpvae.model.guide import HasPosterior, posterior_of
from pyro_gpvae.testing._kit import (
    FAILURE_RATE,
    MAX_Z,
    NUM_DRAWS,
    Finding,
    Kit,
    largest_gap,
    not_checked,
    within,
)


@torch.no_grad()
def check_noise(kit: Kit) -> Finding:
    same = tuple(tensor[:1].expand_as(tensor).clone() for tensor in kit.batch)
    size = len(same[0])
    torch.manual_seed(kit.seed)
    # global weights of many particles may be large
    traces = torch.cat([kit.draw(kit.guide, same, 20).u for _ in range(3)])
    draws = kit.sample(kit.guide, same, 1000).u
    single = kit.draw(kit.guide, same).u[None]
    for what, vectors in (("guide's trace", traces), ("posterior", draws), ("program", single)):
        if repeated := vectors[..., 0].numel() - len(vectors.flatten(0, 1).unique(dim=0)):
            seen = f"Of samples of the {what} for members that are all the same, {repeated} repeat."
            return Finding(f"{repeated} equal z", "0", False, seen)
    exact = isinstance(kit.guide, HasPosterior)
    if not exact and not (finding := _noise_outside_sites(kit)).kept:
        return finding
    # given global weights, members are dependent
    z = draws if exact else traces
    rows, columns = torch.triu_indices(size, size, 1)
    r = torch.stack([torch.corrcoef(row.mT)[rows, columns] for row in z.unbind(-1)])
    largest = float(r.abs().nan_to_num(1.0).max())
    bound = stats.norm.isf(FAILURE_RATE / 2 / r.numel()) / math.sqrt(len(z)) if exact else 0.99
    seen = f"Samples of different rows have a correlation of {largest:.3f}."
    return Finding(f"|r| = {largest:.3f}", f"< {bound:.3f}", largest < bound, seen)


def _noise_outside_sites(kit: Kit) -> Finding:
    """Tests whether a guide's densities at given values of all sites change with the seed."""
    torch.manual_seed(kit.seed)
    trace = kit.trace(kit.guide, kit.batch)
    torch.manual_seed(kit.seed + 1)
    again = kit.trace(poutine.replay(kit.guide, trace=trace), kit.batch)
    shape = (len(kit.batch[0]),)
    gap = largest_gap(*(kit.log_q_of(each, shape) for each in (again, trace)))
    seen = "With the values of all sites given, the density changes with the seed, by {gap:.1e}."
    cause = "torch.randn outside pyro.sample, which all particles share: sample it with "
    cause += 'infer={"is_auxiliary": True} under poutine.mask(mask=False), or define posterior(x)'
    return within(gap, kit.tolerance, seen, cause)


@torch.no_grad()
def check_evidence(kit: Kit) -> Finding:
    r"""Tests E[weight] = p(x) by an identity of bridge sampling, for all members in one χ² test.

    It holds for every model, so the posterior p of this one is a Gaussian where q has its mass.
    With r = p(z) / q(z|x) the plain mean E_q[r] = 1 may have an infinite variance. Both sides of
    E_q[r / (1 + r)] = E_p[1 / (1 + r)] are bounded instead.
    """
    batch = take(kit.batch, slice(4))
    torch.manual_seed(kit.seed)
    q = posterior_of(kit.guide, *batch)  # computed once, as in evaluation
    if q is None:
        nodes = kit.trace(kit.guide, batch).nodes
        if any(is_point(nodes[name]["fn"]) for name in kit.sites):
            return not_checked("latent sites are functions of auxiliary ones, which are scored")
    draws = kit.sample(kit.guide, batch, NUM_DRAWS, q)
    loc = draws.u.mean(0)
    centred = (draws.u - loc).movedim(0, -1)
    covariance = centred @ centred.mT / NUM_DRAWS
    p = MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(covariance))
    draws = kit.sample(kit.guide, batch, NUM_DRAWS, q)
    log_r = p.log_prob(draws.u) - draws.log_q
    u = p.sample((NUM_DRAWS,))
    left = log_r.sigmoid()
    right = (kit.log_density(kit.guide, batch, u, q) - p.log_prob(u)).sigmoid()
    gap = left.mean(0) - right.mean(0)
    scores = gap / ((left.var(0) + right.var(0)) / NUM_DRAWS).sqrt()
    scores = scores.masked_fill(gap.abs() < 1e-9, 0)[~(left.mean(0) + right.mean(0) < 0.05)]
    if not len(scores):
        return not_checked("q and the Gaussian of its moments do not overlap")
    p_value = max(float(stats.chi2.sf(float(scores.square().sum()), len(scores))), 1e-300)
    score = float(stats.norm.isf(p_value / 2)) if math.isfinite(p_value) else math.nan
    seen = f"The mean of weight / p(x) is not one: {score:.1f} standard errors from it."
    return Finding(f"|z| = {score:.2f}", f"< {MAX_Z:.0f}", score < MAX_Z, seen)


@torch.no_grad()
def check_traced(kit: Kit) -> Finding:
    """Tests q(z|x) = E[q(z|x, auxiliary)] at samples of the posterior, over traces of the guide."""
    batch = take(kit.batch, slice(4))
    torch.manual_seed(kit.seed)
    if (q := posterior_of(kit.guide, *batch)) is None:
        return not_checked("the guide has no posterior")
    (name,) = kit.sites
    points = q.sample((64,))
    # in the middle of q, densities given auxiliary sites vary least
    central = q.log_prob(points).topk(4, dim=0).indices
    points = points[central, torch.arange(len(batch[0]), device=central.device)]
    log_q = []
    for seed in (kit.seed, kit.seed + 1):
        torch.manual_seed(seed)
        again: Any = posterior_of(kit.guide, *batch)
        log_q.append(again.log_prob(points.clone()))
        torch.manual_seed(seed)
        site = kit.trace(kit.guide, batch, 1).nodes[name]
        log_traced = torch.cat([site["fn"].log_prob(point[None]) for point in points])
        gap = largest_gap(log_traced, log_q[-1])
    if gap <= kit.tolerance:  # the trace samples this very density
        return within(gap, kit.tolerance, "")
    if not largest_gap(*log_q) <= kit.tolerance:
        return not_checked("posterior(x) is random, and the trace does not sample it")
    # global weights or auxiliary sites: densities are averaged over particles
    site = kit.trace(kit.guide, batch, NUM_DRAWS).nodes[name]
    ratios = torch.stack([site["fn"].log_prob(point[None]) for point in points])
    ratios = (ratios - log_q[0].unsqueeze(1)).exp()
    gaps, variance = ratios.mean(1) - 1, ratios.var(1)
    scores = gaps / (variance / NUM_DRAWS).sqrt()
    # the mean of densities that vary very much is not normally distributed
    scores[(gaps.abs() < kit.tolerance) | (variance > 3)] = 0
    p_value = float(2 * stats.norm.sf(float(scores.abs().max()))) * scores.numel()
    seen = f"The guide's own trace draws z from another density: p = {p_value:.1e}."
    kept = p_value > FAILURE_RATE
    return Finding(f"p = {min(p_value, 1.0):.1e}", f"> {FAILURE_RATE:.0e}", kept, seen)
