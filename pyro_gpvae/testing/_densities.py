r"""Promises about densities: normalised, sampled from, and unbiased as a proposal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from scipy import stats
from torch import Tensor, nn

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing._kit import (
    FAILURE_RATE,
    MAX_Z,
    NUM_DRAWS,
    Finding,
    Kit,
    disturb,
    fixed_noise,
    not_checked,
    sample_moments,
    within,
    z_site,
)
from pyro_gpvae.testing.linear_gaussian import LinearGaussian, linear_gaussian


class Quadrature:
    r"""The mass of q(z|x) on a grid, for the first two images.

    The grid is uniform in asinh of the whitened z, so that its nodes are dense in the middle and
    reach far. The trapezoidal rule then converges faster than any power of the spacing. The grid
    is refined until the integral no longer changes.

    Attributes:
        note: Why there is no quadrature, or "".
        integral: The total mass for each image.
        p_values: Of the fit of samples to the density, one for each image.
        fits: Whether the samples fit.
    """

    def __init__(self, kit: Kit) -> None:
        self.note = ""
        guide, x = kit.guide, kit.x[:2]
        p = z_site(guide, x)["value"].shape[-1]
        if posterior_of(guide, x) is None:
            self.note = "the guide has no posterior"
            return
        if p > 2:
            if kit.build is None:
                self.note = f"p = {p}: pass make= to check by quadrature at p = 2"
                return
            p = 2
            guide = kit.make(linear_gaussian(kit.image_shape, p).to(x))
            disturb(guide, kit.seed)
        torch.manual_seed(kit.seed)
        with torch.no_grad():
            q = posterior_of(guide, x)
            assert q is not None
            z = q.sample((NUM_DRAWS,))
            loc, tril = sample_moments(z)
            white = torch.linalg.solve_triangular(tril, (z - loc).movedim(0, -1), upper=False)
            self.radius = max(8.0, 1.5 * float(white.abs().max()))
            previous = None
            for num_nodes in (1001, 2001, 4001, 8001) if p == 1 else (81, 161, 321, 641):
                self.mass = self._masses(q, loc, tril, p, num_nodes)
                self.integral = self.mass.flatten(1).sum(1)
                # less precision is enough if the integral is far from 1
                enough = (0.1 * (self.integral - 1).abs()).clamp(min=2e-4)
                if previous is not None and bool(((self.integral - previous).abs() < enough).all()):
                    break
                previous = self.integral
            else:
                self.note = "the quadrature does not converge: q is too rough, or too narrow"
        self.p_values = [
            _fit(mass.numpy(), w.mT.numpy(), self.radius)
            for mass, w in zip(self.mass.cpu(), white.cpu(), strict=True)
        ]
        self.fits = min(self.p_values) * len(x) > FAILURE_RATE

    def _masses(
        self, q: TorchDistribution, loc: Tensor, tril: Tensor, p: int, num_nodes: int
    ) -> Tensor:
        end = math.asinh(self.radius)
        axis = torch.linspace(-end, end, num_nodes, dtype=loc.dtype).to(loc)
        nodes = torch.cartesian_prod(*[axis] * p).reshape(-1, 1, p)
        white, stretch = nodes.sinh(), nodes.cosh().prod(-1)
        area = (axis[1] - axis[0]).pow(p) * tril.diagonal(dim1=-2, dim2=-1).prod(-1)
        log_q = [
            q.log_prob(loc + (tril @ part.unsqueeze(-1)).squeeze(-1)) for part in white.split(16384)
        ]
        return (torch.cat(log_q).exp() * stretch * area).mT.reshape(-1, *[num_nodes] * p)


def _fit(mass: np.ndarray, white: np.ndarray, radius: float) -> float:
    """Returns the p-value of Pearson's χ² of whitened samples (K, p) in groups of grid cells."""
    num_nodes, p = mass.shape[0], mass.ndim
    mass = mass / mass.sum()
    place = (np.arcsinh(white) / math.asinh(radius) + 1) / 2
    index = np.rint(place * (num_nodes - 1)).astype(int)
    expected, observed, num_bins = mass, tuple(index.T), 32 if p == 1 else 8
    cells = []
    for axis in range(p):
        marginal = mass.sum(axis=tuple(a for a in range(p) if a != axis))
        cells.append(np.minimum(marginal.cumsum() * num_bins, num_bins - 1).astype(int))
    count = np.zeros([num_bins] * p)
    np.add.at(count, tuple(c[i] for c, i in zip(cells, observed, strict=True)), 1)
    total = np.zeros([num_bins] * p)
    np.add.at(total, np.ix_(*cells), expected * len(white))
    few = total < 5  # too few for χ², so they are pooled
    count = np.append(count[~few], count[few].sum())
    total = np.append(total[~few], total[few].sum())
    count, total = count[total > 1], total[total > 1]
    return float(stats.chi2.sf(((count - total) ** 2 / total).sum(), len(total) - 1))


def _quadrature(kit: Kit) -> Quadrature:
    if kit.quadrature is None:
        kit.quadrature = Quadrature(kit)
    return kit.quadrature


def check_normalised(kit: Kit) -> Finding:
    quadrature = _quadrature(kit)
    if quadrature.note:
        return not_checked(quadrature.note)
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
    quadrature = _quadrature(kit)
    if quadrature.note:
        return not_checked(quadrature.note)
    p_value = min(1.0, min(quadrature.p_values) * len(quadrature.p_values))
    account = (
        f"{NUM_DRAWS} samples of the posterior do not fit its log_prob: p = {p_value:.1e}.\n"
        "Likely cause: a variance taken for a standard deviation, the sign of the "
        "log-determinant, other mixture weights in one than in the other, or a stale cache."
    )
    return Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", quadrature.fits, account)


class _Target(nn.Module):
    """A model with given Gaussian posteriors and given log p(x)."""

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


#: A model that knows its posterior and its evidence.
_Known = _Target | LinearGaussian


@torch.no_grad()
def check_evidence(kit: Kit) -> Finding:
    # E[weight] = p(x) for every model. The posterior of this one is a Gaussian where q has mass,
    # so that the weights have a finite variance even if the guide is untrained.
    x = kit.x[:4]
    torch.manual_seed(kit.seed)
    proposal = fixed_noise(kit.guide, x)
    return _mean_weight(kit, proposal, _fitted_target(kit, proposal, x), x, "a Gaussian target")


@torch.no_grad()
def check_linear(kit: Kit) -> Finding:
    if kit.build is None:
        return not_checked("pass make= to check over a linear-Gaussian model")
    model = linear_gaussian(kit.image_shape, 2).to(kit.x)
    guide = kit.make(model)
    disturb(guide, kit.seed)
    # halfway to the mean image: an untrained guide has its mass around zero, and the weights have
    # a finite variance if the posterior is narrower
    x = (model.images(4, kit.seed) + 0.5) / 2
    torch.manual_seed(kit.seed)
    proposal = fixed_noise(guide, x)
    return _mean_weight(kit, proposal, model, x, "a linear-Gaussian model")


def _fitted_target(kit: Kit, proposal: PyroProgram, x: Tensor) -> _Target:
    """Returns Gaussians where q has mass, fitted to all samples or to those nearest to a mode."""
    z, log_q = kit.draws(proposal, x, NUM_DRAWS)
    _, size, p = z.shape
    # narrower by δ: the weights have the second moment (1 - δ²)^(-p/2), here at most 2
    shrink = 1 - min(0.5, math.sqrt(1 - 4 ** (-1 / p)))
    candidates = [(1.0, shrink), (1.0, shrink / 2), (1.0, shrink / 4)]
    # the covariance of the nearest samples alone is too narrow
    candidates += itertools.product((0.5, 0.25), (1.0, 2.0, 3.0))
    mode = z[log_q.argmax(0), torch.arange(size, device=z.device)]
    order = ((z - mode) / z.std(0)).square().sum(-1).argsort(0)
    # p(x) differs between images, so that exchanged images are noticed
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


def _efficiency(kit: Kit, proposal: PyroProgram, model: _Known, x: Tensor) -> Tensor:
    r"""Returns the effective sample size (B,) of weights as a share of K, for a known posterior p.

    It is :math:`1 / E_p[p(z|x) / q(z|x)]`, estimated by draws of p, which include where q has no
    mass; or by draws of q if q has no density.
    """
    p = model.posterior(x)
    if isinstance(proposal, PrecomputedPosterior):
        z = p.sample((500,))
        moment: Tensor = (p.log_prob(z) - proposal.q.log_prob(z)).exp().mean(0)
    else:
        z, log_q = kit.draws(proposal, x, NUM_DRAWS // 4)
        moment = (p.log_prob(z) - log_q).softmax(0).square().sum(0) * len(z)
    return 1 / moment


def _mean_weight(kit: Kit, proposal: PyroProgram, model: _Known, x: Tensor, where: str) -> Finding:
    """Tests that the weights have the mean p(x), for all images in one χ² test."""
    # an estimate by draws of q alone tends to be too large
    enough = 0.1 if isinstance(proposal, PrecomputedPosterior) else 0.2
    reliable = _efficiency(kit, proposal, model, x) > enough
    weights = log_weights(model, proposal, x, NUM_DRAWS // 2)
    relative = (weights - model.log_evidence(x)).exp()
    if not bool(reliable.any()) and bool(relative.isfinite().all()):
        return not_checked("the weights vary too much for a test: q is too narrow")
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
    for count in counts:  # independent draws: of the same draws, more never give less
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
