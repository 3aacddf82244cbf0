r"""IWAE: log p(x) of each image by importance sampling, :math:`\log \frac1K \sum_i w_i`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import NonFiniteError, check_at_least, unvalidated
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._progress import progress_bar
from pyro_gpvae.data.batch import Batch, Data, size_of
from pyro_gpvae.evaluation._common import (
    MAX_IMAGES,
    batches,
    check_log_weights,
    device_of,
    evaluator,
    seeded_if,
)
from pyro_gpvae.evaluation._weights import Weights
from pyro_gpvae.model.guide import check_program_data

__all__ = [
    "PARETO_LIMIT", "Evidence", "ParetoWarning", "evidence_curve", "log_evidence", "log_weights",
    "pareto_k",
]  # fmt: skip

#: Above this k̂, importance sampling does not converge at any practical rate.
PARETO_LIMIT = 0.7


class ParetoWarning(UserWarning):
    """The weights of some images have a tail too heavy for their estimate to be trusted."""


@evaluator
def log_weights(
    model: PyroProgram,
    guide: PyroProgram,
    data: Data,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    vectorized: bool | None = None,
) -> Tensor:
    r"""Returns :math:`\log w_i = \log p(x, z_i) - \log q(z_i|x)`, :math:`z_i \sim q(z|x)`: (K, B).

    A guide with ``posterior(x)`` is scored by this density, which is eq. (7) for the GPVAE. Any
    other guide is replayed: its global and auxiliary variables are drawn anew for every sample,
    which is unbiased but looser. Global sites (W, U) never enter the weights.

    Latent sites may have any names and supports, continuous or discrete. Those that the guide does
    not sample are summed out if they are marked ``infer={"enumerate": "parallel"}``, and otherwise
    drawn from their prior. If the guide's latents are functions of auxiliary sites, as in Pyro's
    autoguides, the density of these sites is used; the ``log_density`` of each ``Delta`` must be
    minus the log-Jacobian of the function, which is checked where gradients pass through it.

    Arguments:
        model: A Pyro model, called as ``model(*data)``, with observations in its data plate.
        guide: A Pyro guide for it.
        data: A tensor (B, ...), such as images, or a tuple of them; uint8 is divided by 255.
        num_samples: The number K of samples of each member of the data.
        chunk_size: The number of latent vectors decoded at once; by default 640 on a CPU and 65,536
            on a GPU, halved until it fits. It limits the memory of decoding and density evaluation,
            and changes the order of random numbers.
        vectorized: Whether samples are drawn at once, under a plate. By default this is tried, and
            programs that give another weight to a single draw run in a loop, with a warning.

    Raises:
        ValueError: If the data do not fit the model, the model observes nothing, the guide's
            latents are points without a density or with a wrong one, or K or chunk_size is less
            than 1.
        TypeError: If data are no tensors.
        NonFiniteError: If a log weight is NaN or +∞; names the images. -∞ is an impossible draw.
    """
    return _weights_and_chunk_size(model, guide, data, num_samples, chunk_size, vectorized)[0]


@dataclass(frozen=True, repr=False)
class Evidence:
    """Estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: IWAE, log 1/K Σ wᵢ (Burda et al. 2016): a lower bound in expectation.
        standard_error: Its Monte-Carlo standard error, sd(w) / (√K mean(w)); NaN for K = 1.
        effective_sample_size: (Σ wᵢ)² / Σ wᵢ², between 1 and K.
        elbo: The mean of the log weights: the ELBO of q(z|x).
        pareto_k: The tail k̂ of the weights, see :func:`pareto_k`. Above 0.7 neither the estimate
            nor its standard error can be trusted.
        num_samples: The number K of samples.
        chunk_size: The chunk size that fitted into the memory; None if it is not known.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    elbo: Tensor
    pareto_k: Tensor
    num_samples: int
    chunk_size: int | None = None

    @staticmethod
    def from_log_weights(log_weights: Tensor, chunk_size: int | None = None) -> Evidence:
        """Summarises log weights (K, B)."""
        num_samples = len(log_weights)
        log_total = log_weights.logsumexp(0)
        weights = (log_weights - log_total).exp()  # sum to one
        ess = 1 / weights.square().sum(0)
        # sd(w)² / (K mean(w)²) = (K/ess - 1) / (K - 1), with the unbiased variance
        error = ((num_samples / ess - 1).clamp(min=0) / max(num_samples - 1, 1)).sqrt()
        if num_samples == 1:
            error = torch.full_like(error, math.nan)
        return Evidence(
            log_evidence=log_total - math.log(num_samples),
            standard_error=error,
            effective_sample_size=ess,
            elbo=log_weights.mean(0),
            pareto_k=pareto_k(log_weights),
            num_samples=num_samples,
            chunk_size=chunk_size,
        )

    def __repr__(self) -> str:
        return (
            f"Evidence({len(self.log_evidence)} images, K = {self.num_samples}: "
            f"mean log p(x) = {self.mean:.2f} nats, Monte-Carlo error {self.monte_carlo_error:.2g})"
        )

    @property
    def mean(self) -> float:
        """The average of log p(x) over the images."""
        return float(self.log_evidence.mean())

    @property
    def monte_carlo_error(self) -> float:
        """The standard error of :attr:`mean` due to the K samples; the images are fixed."""
        return float(self.standard_error.square().sum().sqrt() / len(self.standard_error))

    @property
    def sampling_error(self) -> float:
        """The standard error of :attr:`mean` due to the choice of images."""
        return float(self.log_evidence.std() / math.sqrt(len(self.log_evidence)))


@evaluator
def log_evidence(
    model: PyroProgram,
    guide: PyroProgram,
    data: Data,
    num_samples: int = 100,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
    vectorized: bool | None = None,
    progress: bool | str = False,
) -> Evidence:
    r"""Estimates log p(x) of every image by IWAE: :math:`\log \frac1K \sum_i p(x,z_i)/q(z_i|x)`.

    This is the score of the paper (supplement, section 4). Warns of images with a Pareto k̂ above
    0.7, and of those whose estimate is not finite.

    Arguments:
        model, guide, data, num_samples, chunk_size, vectorized: See :func:`log_weights`, also for
            the errors.
        seed: The same seed gives the same numbers, and leaves the global random state as it was.
        progress: Whether to show a progress bar; a text is its label.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> from guides import GaussianGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> result = log_evidence(model, GaussianGuide(model), torch.rand(3, 1, 28, 28), 10, seed=0)
        >>> result.log_evidence.shape
        torch.Size([3])
    """
    check_program_data(model, data)
    with seeded_if(seed, device_of(data, model, guide)):
        weights, used = _weights_and_chunk_size(
            model, guide, data, num_samples, chunk_size, vectorized, progress
        )
    evidence = Evidence.from_log_weights(weights, used)
    if lost := int((~evidence.log_evidence.isfinite()).sum()):
        warnings.warn(
            f"log p(x) of {lost} of {len(evidence.elbo)} images is not finite: the training has "
            "diverged, or the model gives them no density. This is no score",
            stacklevel=4,
        )
    heavy = int((evidence.pareto_k > PARETO_LIMIT).sum())
    if heavy:
        warnings.warn(
            f"Pareto k above {PARETO_LIMIT} for {heavy} of {len(evidence.elbo)} images: their log "
            f"p(x) by importance sampling (K = {num_samples}) is too low by an unknown amount, and "
            "so is its standard error. Use the optimum of each image as the proposal "
            '(make_guide("instance:full", model, warm_start=guide), or --guide instance:full), '
            "or more samples",
            ParetoWarning,
            stacklevel=4,
        )
    return evidence


def evidence_curve(log_weights: Tensor, num_samples: Sequence[int]) -> dict[int, Tensor]:
    """Returns the evidence (B,) for each K ≤ L, from log weights (L, B).

    The L weights are cut into ⌊L/K⌋ disjoint groups, whose estimates log 1/K Σ wᵢ are averaged.

    Example:
        >>> evidence_curve(torch.zeros(1000, 4), [1, 10, 100, 1000])[100]
        tensor([0., 0., 0., 0.])
    """
    curve = {}
    for k in num_samples:
        if not 1 <= k <= len(log_weights):
            raise ValueError(f"each K must be between 1 and {len(log_weights)}, got {k}")
        groups = log_weights[: len(log_weights) // k * k].unflatten(0, (-1, k))
        curve[k] = (groups.logsumexp(1) - math.log(k)).mean(0)
    return curve


def _weights_and_chunk_size(
    model: PyroProgram,
    guide: PyroProgram,
    data: Data,
    num_samples: int,
    chunk_size: int | None,
    vectorized: bool | None,
    progress: bool | str = False,
) -> tuple[Tensor, int]:
    check_at_least(1, num_samples=num_samples)
    check_program_data(model, data)
    first = next(batches(data, model, guide))
    weights = Weights(model, guide, first, vectorized)

    def work(size: int) -> tuple[Tensor, int]:
        columns, begin = [], 0
        total = size_of(data) * num_samples
        with progress_bar(progress, "log p(x)", total, unit="sample") as bar:
            for batch in batches(data, model, guide, size=min(size, MAX_IMAGES)):
                columns.append(
                    checked_weights(weights, batch, num_samples, size, begin, bar.update)
                )
                begin += len(batch[0])
        return torch.cat(columns, dim=1), size

    return halving_chunks(work, chunk_size, first[0].device)


def checked_weights(
    weights: Weights,
    batch: Batch,
    num_samples: int,
    chunk_size: int,
    first_image: int = 0,
    done: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Draws log weights (K, B) of a batch, and names images that are not finite."""
    what = "log p(x, z) - log q(z|x)"
    try:
        found = weights.draw(batch, num_samples, chunk_size, done)
        check_log_weights(found, first_image, what)
        return found
    except LinAlgError as error:
        if first_image == 0:
            raise
        where = f"{error} (images are counted from image {first_image} of the batch)"
        raise LinAlgError(where) from error
    except NonFiniteError as error:
        if error.images:
            raise
        # A distribution has refused its parameters. Without validation the same work shows in the
        # weights which images these belong to.
        with unvalidated():
            found = weights.draw(batch, num_samples, chunk_size)
        check_log_weights(found, first_image, what, f": {error}")
        raise


@torch.no_grad()
def pareto_k(log_weights: Tensor) -> Tensor:
    """Returns the shape k̂ of the generalised Pareto tail of each image's weights, (B,).

    Weights have about 1/k finite moments. Up to 0.7 estimates converge at a practical rate (Vehtari
    et al., *Pareto smoothed importance sampling*, 2024, https://arxiv.org/abs/1507.02646).

    Arguments:
        log_weights: Log weights (K, B) in nats.

    Returns:
        k̂, (B,): NaN for K < 25 or weights that are NaN; 0 if the five largest weights are equal;
        ∞ if they differ by more than 700 nats, or all weights are zero.

    Example:
        >>> exponential = -torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0)).log()
        >>> bool((pareto_k(0.9 * exponential) - 0.9).abs() < 0.1)  # Pareto with shape 0.9
        True
    """
    k = torch.full_like(log_weights[0], math.nan)
    if len(log_weights) < 25:
        return k
    import arviz_stats.base  # takes a second to import

    statistics: Any = arviz_stats.base.array_stats  # type: ignore[attr-defined]
    top = log_weights.topk(5, dim=0).values
    impossible = top[0] == -math.inf
    same, far = (top[0] == top[-1]) & ~impossible, (top[0] - top[-1] > 700) | impossible
    k[same], k[far] = 0.0, math.inf
    rest = ~(log_weights.isnan().any(0) | same | far)
    if rest.any():
        with np.errstate(all="ignore"):
            # psislw takes the logarithm of 1/w, as in leave-one-out cross-validation
            found = statistics.psislw(-log_weights[:, rest].double().cpu().numpy(), axis=0)[1]
        k[rest] = torch.from_numpy(np.nan_to_num(found, nan=np.inf)).to(k)
    return k
