r"""The search for the highest mode of each image, where the Gaussian of highest ELBO begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import take
from pyro_gpvae.evaluation._common import estimated_mean, find_posterior, known_mean
from pyro_gpvae.model.curvature import STEP_SIZES, inverse_cholesky, line_search, linearize
from pyro_gpvae.model.density import JointDensity, LatentPosterior
from pyro_gpvae.model.image_model import ImageModel

_STEPS, _TOLERANCE = 20, 0.5
#: The likeliest draw of each group is a start. (With two latents, the mode near the encoder may be
#: hundreds of nats below the highest one.)
_GROUPS, _PRIOR_DRAWS = 2, 256
# far from the mode of an exponential function of u, the Newton step is much too long
_SHORT_STEPS = (0.03, 0.01, 3e-3, 1e-3, 1e-4)


def laplace_start(
    density: JointDensity, covariance: str, start: Any, num_starts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the mode of highest Laplace evidence, (B, n), S with S Sᵀ = Λ⁻¹, and the jitter."""
    origin = _origin(density, start)
    generator = torch.Generator("cpu").manual_seed(0)
    starts = [origin]
    for _ in range(1, num_starts):
        shift = torch.randn(density.dim, generator=generator, dtype=torch.float64, device="cpu") / 2
        starts.append(origin + shift.to(origin))
    if num_starts > 1:
        starts += [u.to(origin) for u in _likeliest(density)]
    best: list[Tensor] = []
    for u in starts:
        mode, precision = _mode(density, u)
        factor, jitter = inverse_cholesky(precision)
        evidence = density.log_prob(mode[None])[0] + log_volume(factor)
        if covariance == "diagonal":
            # the mean-field optimum for a Gaussian posterior: variances 1 / Λ_jj
            factor = torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1).rsqrt())
        found = [evidence, mode, factor, jitter]
        if not best:
            best = found
        better = evidence > best[0]
        best = [
            torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(found, best, strict=True)
        ]
    return best[1], best[2].to(origin.dtype), best[3]


def log_volume(factor: Tensor) -> Tensor:
    """log det S of the factors S, (B,)."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _mode(density: JointDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """A mode of log p(x, u), (B, n), by Newton steps, and the precision there."""
    u = u.clone()
    precision = u.new_zeros(*u.shape, u.shape[-1], dtype=torch.float64)
    active = torch.arange(len(u), device=u.device)
    sizes = STEP_SIZES if isinstance(density.model, ImageModel) else (*STEP_SIZES, *_SHORT_STEPS)
    for _ in range(_STEPS):
        part = density[active]
        gradient, precision[active] = _curvature(part, u[active])
        factor, _ = inverse_cholesky(precision[active], active)
        whitened = (factor.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        direction = (factor @ whitened.unsqueeze(-1)).squeeze(-1).to(u.dtype)
        new = line_search(part.log_prob, u[active], direction, sizes)
        # an image stops where the Newton decrement is small, or no shorter step helps
        move = (whitened.square().sum(-1) / 2 > _TOLERANCE) & (new != u[active]).any(-1)
        active = active[move]
        u[active] = new[move]
        if len(active) == 0:
            break
    return u, precision


def _curvature(density: JointDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of log p(x, u), (B, n), and a positive precision, (B, n, n), in float64."""
    if isinstance(density.model, ImageModel):  # p products with the Jacobian of its decoder
        return linearize(density.model, density.batch[0], u)
    return density.curvature(u)


def _origin(density: JointDensity, guide: Any) -> Tensor:
    """The mean of a guide's posterior, (B, n), from draws where it is not known, or zero."""
    batch = density.batch
    if guide is None:
        return density.origin
    q = find_posterior(guide, batch)
    if q is None or (len(density.sites) > 1 and not isinstance(q, LatentPosterior)):
        return density.origin
    mean = known_mean(q)
    means = []
    for n in range(len(density)) if mean is None else ():
        with seeded(0, batch[0].device):  # the same draws for every image, in any batch
            means.append(estimated_mean(find_posterior(guide, take(batch, slice(n, n + 1)))))
    mean = torch.cat(means) if mean is None else mean
    if density.is_plain or isinstance(q, LatentPosterior):
        return mean.clone()
    (name,) = density.sites
    return density.unconstrain({name: mean}).u


def _likeliest(density: JointDensity) -> Tensor:
    """The draws of highest log p(x, u) in groups of draws from the prior, (groups, B, n)."""
    found = []
    for n in range(len(density)):
        part = density[n : n + 1]
        u = _prior_draws(part)
        # a few at a time: this is not bounded by chunk_size
        value = torch.cat([part.log_prob(some) for some in u.split(64)])
        best = value.nan_to_num(-torch.inf).reshape(_GROUPS, -1).argmax(-1).tolist()
        size = len(u) // _GROUPS
        found.append(torch.stack([u[size * k + index, 0] for k, index in enumerate(best)]))
    return torch.stack(found, 1)


def _prior_draws(density: JointDensity) -> Tensor:
    """The same draws from the prior, (K, 1, n), for a member of any batch."""
    origin, count = density.origin, _GROUPS * _PRIOR_DRAWS
    if isinstance(density.model, ImageModel):  # N(0, I), without a plate in a guide's particles
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (count, 1, density.dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(origin)
    with seeded(0, origin.device):
        return density.sample_prior(count if density.vectorized else count // 8)  # else in a loop
