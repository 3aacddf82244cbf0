r"""Promises about draws and densities: noise, importance weights, and the guide's own trace."""

from __future__ import annotations

import math

import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from scipy import stats
from torch import Tensor

from pyro_gpvae.data.batch import take
from pyro_gpvae.testing import _kit
from pyro_gpvae.testing._kit import Finding, Kit, likely, not_checked, posterior, within


@torch.no_grad()
def check_noise(kit: Kit) -> Finding:
    same = tuple(tensor[:1].expand_as(tensor).clone() for tensor in kit.batch)
    size = len(same[0])
    torch.manual_seed(kit.seed)
    # global weights of many particles may be large
    traces = torch.cat([kit.draw(kit.guide, same, 20).z for _ in range(3)])
    draws = kit.sample(kit.guide, same, 1000).z
    single = kit.draw(kit.guide, same).z
    for what, vectors in (("guide's trace", traces), ("posterior", draws), ("program", single)):
        if repeated := vectors[..., 0].numel() - len(vectors.flatten(0, 1).unique(dim=0)):
            seen = f"Of samples of the {what} for members that are all the same, {repeated} repeat."
            return Finding(f"{repeated} equal z", "0", False, seen)
    exact = posterior(kit.guide, same) is not None
    if not exact and not (finding := _noise_outside_sites(kit)).kept:
        return finding
    # given global weights, members are dependent
    z = draws if exact else traces
    rows, columns = torch.triu_indices(size, size, 1)
    r = torch.stack([torch.corrcoef(row.mT)[rows, columns] for row in z.unbind(-1)])
    largest = float(r.abs().nan_to_num(1.0).max())
    bound = stats.norm.isf(_kit.FAILURE_RATE / 2 / r.numel()) / math.sqrt(len(z)) if exact else 0.99
    seen = f"Samples of different rows have a correlation of {largest:.3f}."
    return Finding(f"|r| = {largest:.3f}", f"< {bound:.3f}", largest < bound, seen)


def _noise_outside_sites(kit: Kit) -> Finding:
    """Tests whether a guide's densities at given values of all sites change with the seed."""
    torch.manual_seed(kit.seed)
    trace = kit.trace(kit.guide, kit.batch)
    torch.manual_seed(kit.seed + 1)
    again = kit.trace(poutine.replay(kit.guide, trace=trace), kit.batch)
    shape = (1, len(kit.batch[0]))
    gap = _kit.largest_gap(*(kit.log_q_of(t.nodes, shape) for t in (again, trace)))
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
    if reason := kit.unscored(kit.guide):
        return not_checked(reason)
    batch = take(kit.batch, slice(4))
    torch.manual_seed(kit.seed)
    q = posterior(kit.guide, batch)  # computed once, as in evaluation
    loc, tril = _moments(kit.sample(kit.guide, batch, _kit.NUM_DRAWS, q).z)
    p = MultivariateNormal(loc, scale_tril=tril)
    draws = kit.sample(kit.guide, batch, _kit.NUM_DRAWS, q)
    log_r = p.log_prob(draws.z) - draws.log_q
    z = p.sample((_kit.NUM_DRAWS,))
    values, log_det = kit.at(z, draws)
    log_q = kit.log_density(kit.guide, batch, values, q) + log_det
    left, right = log_r.sigmoid(), (log_q - p.log_prob(z)).sigmoid()
    gap = left.mean(0) - right.mean(0)
    scores = gap / ((left.var(0) + right.var(0)) / len(z)).sqrt()
    scores = scores.masked_fill(gap.abs() < 1e-9, 0)[~(left.mean(0) + right.mean(0) < 0.05)]
    if not len(scores):
        return not_checked("q and the Gaussian of its moments do not overlap")
    p_value = max(float(stats.chi2.sf(float(scores.square().sum()), len(scores))), 1e-300)
    score = float(stats.norm.isf(p_value / 2)) if math.isfinite(p_value) else math.nan
    seen = f"The mean of weight / p(x) is not one: {score:.1f} standard errors from it."
    return Finding(f"|z| = {score:.2f}", f"< {_kit.MAX_Z:.0f}", score < _kit.MAX_Z, seen)


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (B, n) and the Cholesky factor of the covariance of samples (K, B, n)."""
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -1)
    return loc, torch.linalg.cholesky(centred @ centred.mT / z.shape[0])


@torch.no_grad()
def check_traced(kit: Kit) -> Finding:
    """Tests q(z|x) = E[q(z|x, auxiliary)] at samples of the posterior, over traces of the guide."""
    batch, num_traces = take(kit.batch, slice(4)), 120
    torch.manual_seed(kit.seed)
    if (q := posterior(kit.guide, batch)) is None:
        return not_checked("the guide has no posterior")
    (name,) = kit.sites
    points = q.sample((64,))
    # in the middle of q, densities given auxiliary sites vary least
    central = q.log_prob(points).topk(4, dim=0).indices
    points = points[central, torch.arange(len(batch[0]), device=central.device)]
    log_q, log_traced, traced = [], [], []
    for seed in range(num_traces):
        torch.manual_seed(kit.seed + seed)
        q = posterior(kit.guide, batch)
        log_q.append(q.log_prob(points.clone()))
        torch.manual_seed(kit.seed + seed)
        site = kit.trace(kit.guide, batch, 1).nodes[name]
        traced.append(site["value"][0])
        log_traced.append(torch.cat([site["fn"].log_prob(point[None]) for point in points]))
        if seed == 1:
            gap = _kit.largest_gap(torch.stack(log_traced), torch.stack(log_q))
            if gap <= kit.tolerance:  # the trace samples this very density
                return within(gap, kit.tolerance, "")
    # global weights, auxiliary sites or a random posterior: densities are averaged
    left, right = torch.stack(log_q), torch.stack(log_traced)
    left, right = (left - left[0]).exp(), (right - left[0]).exp()
    random = float((left - left[0]).abs().max()) > kit.tolerance
    right, left = right / left.mean(0), left / left.mean(0)
    gaps = right.mean(0) - left.mean(0)
    variance = right.var(0) + left.var(0)
    scores = gaps / (variance / num_traces).sqrt()
    # the mean of densities that vary much is not normally distributed
    scores[(gaps.abs() < kit.tolerance) | (variance > 0.1)] = 0
    tests = (2 * stats.norm.sf(scores.abs().flatten().cpu().numpy())).tolist()
    if not random:
        a, b = (v.cpu().flatten(1) for v in (torch.stack(traced), q.sample((_kit.NUM_DRAWS,))))
        tests += stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue.tolist()
    seen = "The guide's own trace draws z from another density than posterior(x): p = {p:.1e}."
    return likely(min(1.0, min(tests) * len(tests)), seen)
