"""How much z depends on the image: active units and mutual information."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.core._chunks import check_chunk_size, default_chunk_size, halving_chunks
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.evaluation._evaluator import (
    batches,
    check_at_least,
    check_images,
    check_posterior,
    device_of,
    evaluator,
    progress_bar,
    seeded_if,
)
from pyro_gpvae.evaluation._posteriors import posterior_mean
from pyro_gpvae.evaluation.generation import prior_and_likelihood
from pyro_gpvae.model.guide import posterior_of

__all__ = ["ActiveUnits", "LatentInformation", "active_units", "mutual_information"]


@dataclass(frozen=True)
class ActiveUnits:
    """How much the posterior means move with the image.

    Attributes:
        variances: Var_x(E_q[z_j|x]) of each latent dimension, (p,), float64: 0 where a dimension
            is ignored, and at most about 1 where it is used.
        threshold: The variance above which a dimension is active.
        num_images: The number of images.
    """

    variances: Tensor
    threshold: float
    num_images: int

    @property
    def count(self) -> int:
        """The number of active units."""
        return int((self.variances > self.threshold).sum())


@evaluator
def active_units(
    model: PyroProgram,
    guide: PyroProgram,
    images: Tensor,
    *,
    threshold: float = 0.01,
    seed: int | None = None,
    progress: bool | str = False,
) -> ActiveUnits:
    r"""Counts latent dimensions whose posterior mean varies: :math:`Var_x(E_q[z_j|x]) > 0.01`.

    Where the posterior mean is not known, it is estimated from 100 draws. The variance over
    images that this adds is subtracted: for an inactive unit it is 1/100, as large as the
    threshold. The result is the covariance between the means of two halves of the draws, in which
    random weights that move all images at once cancel.

    References:
        Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016, section 5.2.
        https://arxiv.org/abs/1509.00519

    Arguments:
        model, guide, seed: See :func:`reconstruct`.
        images: At least two images (N, C, H, W), uint8 or floats.
        threshold: See above.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If there are fewer than two images, or the threshold is negative.
    """
    check_images(model, images)
    check_at_least(2, num_images=len(images))
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    means, errors = [], []
    device = device_of(images, model, guide)
    with seeded_if(seed, device), progress_bar(progress, "active units", len(images)) as bar:
        for x in batches(images, model, guide):
            mean, error = posterior_mean(guide, x)
            means.append(mean.double())
            errors.append(error.double())
            bar.update(len(x))
    variances = torch.cat(means).var(0) - torch.cat(errors).var(0)
    return ActiveUnits(variances.clamp(min=0).cpu(), threshold, len(images))


@dataclass(frozen=True)
class LatentInformation:
    """How much z depends on the image, in nats; see :func:`mutual_information`.

    Attributes:
        mutual_information: I_q(x; z) of the N images, at most log N.
        marginal_kl: KL(q(z) ‖ p(z)) of the aggregate posterior.
        kl: The mean of KL(q(z|x) ‖ p(z)): the sum of the two.
        mutual_information_error, marginal_kl_error, kl_error: Their standard errors due to the
            draws, for fixed images; NaN for one draw per image.
        num_images: N.
        num_samples: The number of draws per image.
    """

    mutual_information: float
    marginal_kl: float
    kl: float
    mutual_information_error: float
    marginal_kl_error: float
    kl_error: float
    num_images: int
    num_samples: int

    @property
    def bound(self) -> float:
        """log N, which the mutual information of N images cannot exceed."""
        return math.log(self.num_images)


@evaluator
def mutual_information(
    model: PyroProgram,
    guide: PyroProgram,
    images: Tensor,
    num_samples: int = 2,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    progress: bool | str = False,
) -> LatentInformation:
    r"""Splits the KL of the ELBO into mutual information and the KL of the aggregate posterior.

    .. math::
        \frac1N \sum_n KL(q(z|x_n) \| p(z)) &= I_q(x; z) + KL(q(z) \| p(z)) \\
        I_q(x; z) &= \frac1N \sum_n E_{q(z|x_n)} \Bigl[\log \frac{q(z|x_n)}{q(z)}\Bigr],
        \qquad q(z) = \frac1N \sum_m q(z|x_m)

    Expectations are over draws of z, and unbiased for these N images. The sum over m includes n,
    so that no draw contributes more than log N. For the distribution that the images come from,
    :math:`I_q(x; z)` is a lower bound in expectation, which is uninformative near log N, and the
    mean KL is an upper bound.

    References:
        Hoffman and Johnson, *ELBO surgery: yet another way to carve up the variational evidence
        lower bound*, 2016.
        Poole et al., *On Variational Bounds of Mutual Information*, 2019.
        https://arxiv.org/abs/1905.06922

    Arguments:
        model: A Pyro model, whose site ``"z"`` has the prior.
        guide: A guide with ``posterior(x)``.
        images: The N images (N, C, H, W), uint8 or floats.
        num_samples: The number S of draws per image; at least 2 for standard errors.
        chunk_size: How many of the S N² densities are evaluated at once, which limits the memory;
            by default four times that of :func:`pyro_gpvae.log_weights`.
        seed: As in :func:`sample_images`.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If the guide has no ``posterior(x)``, a number is less than 1, or a density is
            not finite.
    """
    check_posterior(guide, "mutual_information needs the density q(z|x)")
    check_at_least(1, num_samples=num_samples)
    check_chunk_size(chunk_size)
    check_images(model, images)
    device, count = device_of(images, model, guide), len(images)
    with seeded_if(seed, device):
        # some posteriors are random: the same one serves the draws and the densities of an image
        posteriors: list[Any] = []
        columns, priors = [], []
        for x in batches(images, model, guide):
            q = cast(Any, posterior_of(guide, x))
            z = q.sample((num_samples,))
            posteriors.append(q)
            columns.append(z)
            priors.append(prior_and_likelihood(model, x)[0].log_prob(z).double())
    draws = torch.cat(columns, 1).flatten(0, 1)  # (S N, p); row s N + n is of image n

    def work(size: int) -> tuple[Tensor, Tensor]:
        total = num_samples * count * count
        with progress_bar(progress, "mutual information", total) as bar:
            return _densities(posteriors, draws, count, size, bar)

    own, total = halving_chunks(work, chunk_size or 4 * default_chunk_size(device), device)
    log_q, log_total = (values.view(num_samples, count) for values in (own, total))
    return _summary(log_q, log_total - math.log(count), torch.cat(priors, 1))


def _summary(log_q: Tensor, log_marginal: Tensor, log_prior: Tensor) -> LatentInformation:
    """Averages log densities (S, N) of q(z|x), of the aggregate posterior, and of the prior."""
    information, marginal, kl = log_q - log_marginal, log_marginal - log_prior, log_q - log_prior
    if not (information.isfinite().all() and kl.isfinite().all()):
        raise ValueError(
            "a density of q(z|x) or p(z) is not finite: the guide's posteriors overflow, or "
            "training has diverged"
        )
    return LatentInformation(
        mutual_information=float(information.mean()),
        marginal_kl=float(marginal.mean()),
        kl=float(kl.mean()),
        mutual_information_error=_error(information),
        marginal_kl_error=_error(marginal),
        kl_error=_error(kl),
        num_images=log_q.shape[1],
        num_samples=log_q.shape[0],
    )


def _densities(
    posteriors: Sequence[Any], z: Tensor, num_images: int, chunk_size: int, bar: tqdm
) -> tuple[Tensor, Tensor]:
    """log q(z|x_n) of the image that z (S N, p) was drawn for, and log Σ_m q(z|x_m): (S N,)."""
    image = torch.arange(len(z), device=z.device) % num_images
    own = torch.full(image.shape, math.nan, dtype=torch.float64, device=z.device)
    total = torch.full_like(own, -math.inf)
    first = 0
    for q in posteriors:
        (size,) = q.batch_shape
        for rows in torch.arange(len(z), device=z.device).split(max(1, chunk_size // size)):
            with pyro.validation_enabled(False):
                density = q.log_prob(z[rows].unsqueeze(1).expand(-1, size, -1)).double()
            # where the inverse of a flow overflows, z is infinitely far from that image's q
            density = density.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
            total[rows] = torch.logaddexp(total[rows], density.logsumexp(1))
            column = image[rows] - first
            mine = (column >= 0) & (column < size)
            own[rows[mine]] = density[mine, column[mine]]
            bar.update(density.numel())
        first += size
    return own, total


def _error(terms: Tensor) -> float:
    """The standard error of the mean of terms (S, N), due to the S draws of each image."""
    if len(terms) == 1:
        return math.nan
    return float((terms.var(0) / len(terms)).sum().sqrt()) / terms.shape[1]
