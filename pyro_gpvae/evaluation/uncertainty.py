r"""Inference uncertainty: scores of a random encoder, what they are worth, and a picture in 2-D."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from pyro_gpvae.core._programs import with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import default_chunk_size
from pyro_gpvae.model.marginal_posterior import MarginalPosterior

__all__ = [
    "PosteriorGrid",
    "RankCorrelation",
    "bhattacharyya_uncertainty",
    "posterior_grid",
    "rank_correlation",
    "weight_information",
]

#: A rank correlation of fewer images says nothing.
MIN_IMAGES = 8

Floats = NDArray[np.floating[Any]]


@with_own_parameters
@torch.no_grad()
def bhattacharyya_uncertainty(guide: Any, x: Tensor, *, num_nodes: int = 64) -> Tensor:
    r"""Returns how much two draws of a random encoder disagree about each image, in nats, (B,).

    The expected Bhattacharyya distance between :math:`N(f, h^2)` and :math:`N(f', h'^2)`, where
    (f, h) and (f', h') are independent draws of the encoder at x. With
    :math:`f_j \sim N(a_j, v_j)` and :math:`\log h_j \sim N(b_j, r_j)` it is

    .. math::
        \sum_j \tfrac14 v_j e^{r_j - 2 b_j} E[\operatorname{sech} d_j]
        + \tfrac12 E[\log\cosh d_j], \qquad d_j = \log h_j - \log h'_j \sim N(0, 2 r_j),

    close to :math:`\frac14 \sum_j v_j / h_j^2 + 2 r_j` where the spread is small.

    Arguments:
        guide: A guide with ``moments(x) -> (a, v, b, r)``, each (B, p), such as
            :class:`guides.GPGuide`.
        x: Images (B, C, H, W), floats in [0, 1].
        num_nodes: Nodes of the Gauss-Hermite quadrature over d.

    Raises:
        ValueError: If the guide has no ``moments``: only a random encoder has this score.
    """
    _, v, b, r = _moments(guide, x)
    nodes, weights = _gauss_hermite(num_nodes, b)
    d = ((2 * r).sqrt() * nodes.reshape(-1, 1, 1)).abs()
    log_cosh = d + torch.log1p((-2 * d).exp()) - math.log(2)
    sech = torch.einsum("n,nbp->bp", weights, (-log_cosh).exp())
    terms = v * (r - 2 * b).exp() * sech / 4 + torch.einsum("n,nbp->bp", weights, log_cosh) / 2
    return terms.sum(-1)


@with_own_parameters
@torch.no_grad()
def weight_information(guide: Any, x: Tensor, *, num_nodes: int = 32) -> Tensor:
    r"""Returns :math:`I(z; (W, U) \mid x)` of a random encoder, in nats, (B,).

    The price that eq. (2) of the supplement pays for the encoder's spread: with the marginal
    :math:`q(z|x)` of its eq. (7),

    .. math::
        E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))] = KL(q(z|x) \| p(z)) + I(z; (W, U) | x), \qquad
        I = \sum_j H[q(z_j|x)] - \tfrac12 \log(2 \pi e) - b_j .

    By quadrature over one dimension at a time, in double precision: no sampling noise.

    Arguments:
        guide, x: See :func:`bhattacharyya_uncertainty`.
        num_nodes: Gauss-Hermite nodes for z and for log h.

    Raises:
        ValueError: If the guide has no ``moments``.
    """
    _, v, b, r = _moments(guide, x)
    nodes, weights = _gauss_hermite(num_nodes, b)
    pairs = weights[:, None, None] * weights[:, None]
    columns = []
    # in units of exp(b), where only the two ratios matter; few at a time bound the memory
    for ratio, spread in zip(
        (v / (2 * b).exp()).flatten().split(256), r.sqrt().flatten().split(256), strict=True
    ):
        q = MarginalPosterior(0.0, ratio.sqrt(), 0.0, spread)
        deviation = (ratio + (2 * spread * nodes[:, None]).exp()).sqrt()
        z = deviation * nodes[:, None, None]  # (n of z, n of log h, columns)
        columns.append(-(pairs * q.log_prob(z)).sum((0, 1)))
    entropy = torch.cat(columns).reshape(b.shape)
    return (entropy - 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


@with_own_parameters
@torch.no_grad()
def uncertainty_scores(model: Any, guide: Any, x: Tensor) -> pd.DataFrame:
    r"""Returns both scores of inference uncertainty, and what any encoder could offer instead.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        guide: A random encoder with ``uncertainty(x)``, ``moments(x)`` and ``posterior(x)``.
        x: Images (B, C, H, W), floats in [0, 1].

    Returns:
        A row an image: ``uncertainty`` (:math:`\sum_j v_j / h_j^2 + r_j`), ``bhattacharyya`` (see
        :func:`bhattacharyya_uncertainty`), and for comparison, from the mean a and log-scale b of
        the encoder alone, ``log_width`` (:math:`\sum_j b_j`), ``distance`` (:math:`\|a\|^2`) and
        ``reconstruction`` (:math:`-\log p(x|z=a)`, nats).

    Raises:
        ValueError: If the guide lacks one of the scores.
    """
    if not hasattr(guide, "uncertainty"):
        raise ValueError(
            f"the guide {type(guide).__name__} has no uncertainty(x): inference uncertainty is the "
            "spread of a random encoder, such as 'gp'"
        )
    a, _, b, _ = _moments(guide, x)
    columns = {
        "uncertainty": guide.uncertainty(x),
        "bhattacharyya": bhattacharyya_uncertainty(guide, x),
        "log_width": b.sum(-1),
        "distance": a.square().sum(-1),
        "reconstruction": -model.likelihood(a.to(x)).log_prob(x),
    }
    return pd.DataFrame({name: value.double().cpu().numpy() for name, value in columns.items()})


class RankCorrelation(NamedTuple):
    """Spearman's ρ between two scores, its interval, and the number of images behind it."""

    rho: float
    low: float
    high: float
    num_images: int

    def __str__(self) -> str:
        return f"ρ = {self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rank_correlation(
    uncertainty: ArrayLike,
    gap: ArrayLike,
    *,
    num_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    r"""Returns Spearman's ρ of two scores with a bootstrap interval over the images.

    Pairs are resampled with replacement; the interval is Efron's BCa, which corrects the
    percentile interval for bias and skewness. It is about other images from the same source,
    not about other seeds of training.

    Arguments:
        uncertainty: One number for each image, (B,).
        gap: What it should predict, (B,), such as log p(x) - ELBO(x) in nats.
        num_bootstrap: Resamples.
        confidence: Of the interval.
        seed: Of the resamples.

    Raises:
        ValueError: If there are fewer than 8 images, not one finite number for each, or all
            numbers of a score are equal, so that they have no ranks.

    Example:
        >>> result = rank_correlation(range(20), [i * i for i in range(20)])
        >>> result.rho
        1.0
    """
    pair = [np.asarray(score, dtype=float) for score in (uncertainty, gap)]
    for name, score in zip(("uncertainty", "gap"), pair, strict=True):
        if score.ndim != 1 or score.shape != pair[0].shape or len(score) < MIN_IMAGES:
            raise ValueError(
                f"a rank correlation needs one number for each of at least {MIN_IMAGES} images, "
                f"got shapes {pair[0].shape} and {pair[1].shape}"
            )
        if not np.isfinite(score).all():
            raise ValueError(f"{(~np.isfinite(score)).sum()} values of the {name} are not finite")
        if np.ptp(score) == 0:
            raise ValueError(
                f"all values of the {name} are {score[0]:.4g}: they have no ranks to correlate"
            )
    rho = float(_spearman(pair[0], pair[1]))
    if abs(rho) > 1 - 1e-12:
        return RankCorrelation(rho, rho, rho, len(pair[0]))  # every resample has the same
    found = stats.bootstrap(
        pair,
        _spearman,
        paired=True,
        vectorized=True,
        n_resamples=num_bootstrap,
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    low, high = (float(bound) for bound in found.confidence_interval)
    return RankCorrelation(rho, low, high, len(pair[0]))


def _spearman(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    ranks = [stats.rankdata(values, axis=axis) for values in (first, second)]
    a, b = (values - values.mean(axis=axis, keepdims=True) for values in ranks)
    covariance = (a * b).sum(axis=axis)
    return np.asarray(covariance / np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis)))


@dataclass(frozen=True)
class PosteriorGrid:
    """The true posterior of one image on a grid, for p = 2.

    Attributes:
        first: Values of z₁, (G,).
        second: Values of z₂, (G,).
        density: p(z|x) at (first[i], second[j]), (G, G); its sum times the cell's area is 1.
        log_evidence: log p(x) in nats, by the same sum.
    """

    first: Tensor
    second: Tensor
    density: Tensor
    log_evidence: float


@with_own_parameters
@torch.no_grad()
def posterior_grid(
    model: Any, x: Tensor, *, num_points: int = 81, chunk_size: int | None = None
) -> list[PosteriorGrid]:
    r"""Computes the true posterior :math:`p(z|x)` of each image on a grid of its own, for p = 2.

    A grid over the prior, twice as fine, finds where the posterior is; then each image's grid
    shrinks until it just holds the points within 16 nats of the highest. A mode that falls
    between the points of the first grid is missed.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel` with two latent dimensions.
        x: Images (B, C, H, W), floats in [0, 1].
        num_points: The number G of points in each direction.
        chunk_size: How many latent vectors are decoded at once.

    Raises:
        ValueError: If p is not 2, or G is less than 16.
    """
    if model.latent_dim != 2:
        raise ValueError(f"a posterior on a grid needs latent_dim = 2, got {model.latent_dim}")
    if num_points < 16:
        raise ValueError(f"num_points must be at least 16, got {num_points}")
    chunk_size = chunk_size or default_chunk_size(x.device)
    wide = x.new_tensor([[-6.0, 6.0], [-6.0, 6.0]])
    # decoded once for all images
    axes, log_joint = _on_grid(model, x, wide, 2 * num_points, chunk_size)
    return [
        _zoom(model, image, _box(axes, surface), num_points, chunk_size)
        for image, surface in zip(x.split(1), log_joint.unbind(-1), strict=True)
    ]


@with_own_parameters
@torch.no_grad()
def posterior_record(
    model: Any, guide: Any, x: Tensor, *, num_draws: int = 12, num_points: int = 81, seed: int = 0
) -> dict[str, Floats]:
    """Computes what a picture of inference in two dimensions shows of each image.

    Arguments:
        model, x, num_points: See :func:`posterior_grid`.
        guide: A random encoder with ``moments(x)`` and ``posterior(x)``.
        num_draws: How many q(z|x, f, h) to draw.
        seed: Of the draws.

    Returns:
        Arrays whose first dimension is the image: ``z1``, ``z2`` (G) and ``density`` (G, G) of the
        true posterior; ``q1``, ``q2``, ``q`` likewise of the marginal q(z|x); ``f`` and ``h``
        (draws, 2); ``log_evidence`` ().

    Raises:
        ValueError: If p is not 2, or the guide is not a random encoder.
    """
    grids = posterior_grid(model, x, num_points=num_points)
    a, v, b, r = _moments(guide, x)
    with seeded(seed, x.device):
        noise = torch.randn(2, num_draws, *a.shape, dtype=a.dtype, device=a.device)
    q = guide.posterior(x)
    steps = torch.linspace(-4, 4, num_points, dtype=x.dtype, device=x.device)
    axes = q.mean.unsqueeze(-1) + q.variance.sqrt().unsqueeze(-1) * steps  # (B, 2, G)
    first, second = axes.unbind(1)
    z = torch.stack(torch.broadcast_tensors(first[:, :, None], second[:, None, :]), dim=-1)
    flat = q.log_prob(z.flatten(1, 2).movedim(1, 0))  # (G², B)
    columns = {
        "z1": torch.stack([grid.first for grid in grids]),
        "z2": torch.stack([grid.second for grid in grids]),
        "density": torch.stack([grid.density for grid in grids]),
        "log_evidence": torch.tensor([grid.log_evidence for grid in grids]),
        "q1": first,
        "q2": second,
        "q": flat.exp().mT.unflatten(-1, (num_points, num_points)),
        "f": (a + v.sqrt() * noise[0]).movedim(0, 1),
        "h": (b + r.sqrt() * noise[1]).exp().movedim(0, 1),
    }
    return {name: value.double().cpu().numpy() for name, value in columns.items()}


def _zoom(
    model: Any, image: Tensor, box: Tensor, num_points: int, chunk_size: int
) -> PosteriorGrid:
    for _ in range(8):
        axes, surface = _on_grid(model, image, box, num_points, chunk_size)
        smaller = _box(axes, surface[..., 0])
        # the margins keep it from shrinking for ever
        settled = bool((smaller.diff(dim=1) > 0.8 * box.diff(dim=1)).all())
        if settled:
            break
        box = smaller
    area = math.prod(float(axis[1] - axis[0]) for axis in axes)
    log_evidence = surface.double().logsumexp((0, 1)) + math.log(area)
    density = (surface[..., 0].double() - log_evidence).exp()
    return PosteriorGrid(*axes, density, float(log_evidence))


def _on_grid(
    model: Any, x: Tensor, box: Tensor, count: int, chunk_size: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The two axes of a box (2, 2), and log p(x, z) at their products: (count, count, B)."""
    steps = torch.linspace(0, 1, count, dtype=x.dtype, device=x.device)
    first, second = (low + (high - low) * steps for low, high in box)
    z = torch.cartesian_prod(first, second)
    rows = [
        model.likelihood(part).log_prob(x) + model.prior().log_prob(part)
        for part in z.unsqueeze(1).split(chunk_size)
    ]
    return (first, second), torch.cat(rows).reshape(count, count, len(x))


def _box(axes: tuple[Tensor, Tensor], log_joint: Tensor) -> Tensor:
    """The box around the points within 16 nats of the highest, two cells wider: (2, 2)."""
    inside = log_joint > log_joint.max() - 16
    bounds = []
    for axis, other in zip(axes, (1, 0), strict=True):
        values = axis[inside.any(other)]
        margin = 2 * (axis[1] - axis[0])
        bounds.append(torch.stack([values.min() - margin, values.max() + margin]))
    return torch.stack(bounds)


def _moments(guide: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not hasattr(guide, "moments"):
        raise ValueError(
            f"the guide {type(guide).__name__} has no moments(x): this score is the spread of a "
            "random encoder, such as 'gp'"
        )
    found = guide.moments(x)
    parts = tuple(found) if isinstance(found, tuple | list) else ()
    shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
    is_right = len(shapes) == len(parts) == 4 and len(set(shapes)) == 1 and len(shapes[0]) == 2
    if not is_right or shapes[0][0] != len(x):
        raise ValueError(
            f"moments(x) of the guide {type(guide).__name__} must be four tensors ({len(x)}, p), "
            "the means and variances of f(x) and of log h(x), got "
            + (f"{len(parts)} parts, tensors of shapes {shapes}" if parts else type(found).__name__)
        )
    a, v, b, r = (moment.double() for moment in found)
    return a, v, b, r


def _gauss_hermite(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights with Σ w g(t) ≈ E[g(t)], t ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return like.new_tensor(nodes), like.new_tensor(weights / weights.sum())
