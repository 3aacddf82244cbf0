"""Inference uncertainty of a random encoder: scores of each image, and what they are worth."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import batches, evaluator
from pyro_gpvae.model._local import name_of
from pyro_gpvae.model.guide import HasMoments, HasUncertainty, check_program_data
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.marginal_posterior import MarginalPosterior

__all__ = [
    "RankCorrelation", "bhattacharyya_uncertainty", "moments_of", "rank_correlation",
    "uncertainty_scores", "weight_information",
]  # fmt: skip

#: The smallest number of images whose rank correlation is computed.
MIN_IMAGES = 8

Floats = NDArray[np.floating[Any]]


@evaluator
def bhattacharyya_uncertainty(guide: Any, x: Tensor, *, num_nodes: int = 64) -> Tensor:
    r"""Returns how much two draws of a random encoder disagree about each image, in nats, (B,).

    The expected Bhattacharyya distance between :math:`N(f, h^2)` and :math:`N(f', h'^2)` for
    independent draws of the encoder. With :math:`f_j \sim N(a_j, v_j)` and
    :math:`\log h_j \sim N(b_j, r_j)` it is

    .. math::
        \sum_j \tfrac14 v_j e^{r_j - 2 b_j} E[\operatorname{sech} d_j]
        + \tfrac12 E[\log\cosh d_j], \qquad d_j = \log h_j - \log h'_j \sim N(0, 2 r_j),

    and close to :math:`\frac14 \sum_j v_j / h_j^2 + 2 r_j` for small variances.

    Arguments:
        guide: A guide with ``moments(x) -> (a, v, b, r)``, each (B, p), such as
            :class:`guides.GPGuide`; any other is a ValueError.
        x: Images (B, C, H, W), uint8 or floats.
        num_nodes: The number of nodes of the Gauss-Hermite quadrature over d.
    """
    _, v, b, r = moments_of(guide, to_batch(x, guide)[0])
    nodes, weights = _gauss_hermite(num_nodes, b)
    d = ((2 * r).sqrt() * nodes.reshape(-1, 1, 1)).abs()
    log_cosh = d + torch.log1p((-2 * d).exp()) - math.log(2)
    sech = torch.einsum("n,nbp->bp", weights, (-log_cosh).exp())
    terms = v * (r - 2 * b).exp() * sech / 4 + torch.einsum("n,nbp->bp", weights, log_cosh) / 2
    return terms.sum(-1)


@evaluator
def weight_information(guide: Any, x: Tensor, *, num_nodes: int = 32) -> Tensor:
    r"""Returns the information :math:`I(z; (W, U) \mid x)` of a random encoder in nats, (B,).

    Eq. (2) of the supplement subtracts it from the ELBO of the marginal :math:`q(z|x)`, eq. (7):

    .. math::
        E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))] = KL(q(z|x) \| p(z)) + I(z; (W, U) | x), \qquad
        I = \sum_j H[q(z_j|x)] - \tfrac12 \log(2 \pi e) - b_j .

    Arguments:
        guide, x: See :func:`bhattacharyya_uncertainty`.
        num_nodes: The number of Gauss-Hermite nodes for z and for log h.
    """
    _, v, b, r = moments_of(guide, to_batch(x, guide)[0])
    nodes, weights = _gauss_hermite(num_nodes, b)
    pairs = weights[:, None, None] * weights[:, None]
    columns = []
    # in units of exp(b), in which only the two ratios matter; a few at a time to limit the memory
    for ratio, spread in zip(
        (v / (2 * b).exp()).flatten().split(256), r.sqrt().flatten().split(256), strict=True
    ):
        q = MarginalPosterior(0.0, ratio.sqrt(), 0.0, spread)
        deviation = (ratio + (2 * spread * nodes[:, None]).exp()).sqrt()
        z = deviation * nodes[:, None, None]  # (n of z, n of log h, columns)
        columns.append(-(pairs * q.log_prob(z)).sum((0, 1)))
    entropy = torch.cat(columns).reshape(b.shape)
    return (entropy - 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


@evaluator
def uncertainty_scores(model: ImageModel, guide: Any, x: Tensor) -> pd.DataFrame:
    r"""Returns both scores of inference uncertainty, and three scores that any encoder has.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        guide: A random encoder with ``uncertainty(x)`` and ``moments(x)``; any other is a
        ValueError.
        x: Images (B, C, H, W), uint8 or floats.

    Returns:
        One row per image: ``uncertainty`` (:math:`\sum_j v_j / h_j^2 + r_j`), ``bhattacharyya``,
        and, from the mean a and log-scale b of the encoder alone, ``log_width``
        (:math:`\sum_j b_j`), ``distance`` (:math:`\|a\|^2`) and ``reconstruction``
        (:math:`-\log p(x|z=a)`, nats).
    """
    check_program_data(model, x)
    if not isinstance(guide, HasUncertainty):
        raise ValueError(
            f"the guide {name_of(guide)} has no uncertainty(x): only a random encoder, such as "
            "'gp', has an inference uncertainty"
        )
    parts = []
    for (images,) in batches(x, model, guide):
        a, _, b, _ = moments_of(guide, images)
        columns = {
            "uncertainty": guide.uncertainty(images),
            "bhattacharyya": bhattacharyya_uncertainty(guide, images),
            "log_width": b.sum(-1),
            "distance": a.square().sum(-1),
            "reconstruction": -model.likelihood(a.to(images)).log_prob(images),
        }
        parts.append(pd.DataFrame({n: c.double().cpu().numpy() for n, c in columns.items()}))
    return pd.concat(parts, ignore_index=True)


class RankCorrelation(NamedTuple):
    """Spearman's ρ between two scores, its confidence interval, and the number of images."""

    rho: float
    low: float
    high: float
    num_images: int


def rank_correlation(
    uncertainty: ArrayLike,
    gap: ArrayLike,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> RankCorrelation:
    """Returns Spearman's ρ of two scores with a 95 % BCa bootstrap interval over the images.

    The interval accounts for the choice of images, not for other seeds of training. A score that is
    the same for all images has the ρ NaN.

    Arguments:
        uncertainty: One number for each image, (B,).
        gap: What it should predict, (B,), such as log p(x) - ELBO(x) in nats.
        num_bootstrap: The number of resamples.
        seed: The seed of the resamples.

    Raises:
        ValueError: If there are fewer than 8 images, or a score is not finite.

    Example:
        >>> rank_correlation(range(20), [i * i for i in range(20)]).rho
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
    if any(np.ptp(score) == 0 for score in pair):
        return RankCorrelation(math.nan, math.nan, math.nan, len(pair[0]))
    from scipy import stats  # slow to import

    rho = float(_spearman(pair[0], pair[1]))
    if abs(rho) > 1 - 1e-12:
        return RankCorrelation(rho, rho, rho, len(pair[0]))  # as in every resample
    found = stats.bootstrap(
        pair,
        _spearman,
        paired=True,
        vectorized=True,
        n_resamples=num_bootstrap,
        rng=np.random.default_rng(seed),
    )
    low, high = (float(bound) for bound in found.confidence_interval)
    return RankCorrelation(rho, low, high, len(pair[0]))


def _spearman(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    from scipy import stats

    ranks = [stats.rankdata(values, axis=axis) for values in (first, second)]
    a, b = (values - values.mean(axis=axis, keepdims=True) for values in ranks)
    covariance = (a * b).sum(axis=axis)
    return np.asarray(covariance / np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis)))


def moments_of(guide: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns mean and variance of f(x) and of log h(x), (B, p) each, in float64."""
    name = name_of(guide)
    if not isinstance(guide, HasMoments):
        raise ValueError(
            f"the guide {name} has no moments(x): only a random encoder, such as 'gp', has this "
            "score"
        )
    found: Any = guide.moments(x)
    shapes = [getattr(part, "shape", type(part).__name__) for part in found]
    if len(shapes) != 4 or any(shape != (len(x), *shapes[0][1:2]) for shape in shapes):
        raise ValueError(
            f"moments(x) of the guide {name} must be four tensors ({len(x)}, p), the means and "
            f"variances of f(x) and of log h(x), got {[*map(str, shapes)]}"
        )
    a, v, b, r = (moment.double() for moment in found)
    return a, v, b, r


def _gauss_hermite(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes t and weights w with Σ w g(t) ≈ E[g(t)], t ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return like.new_tensor(nodes), like.new_tensor(weights / weights.sum())
