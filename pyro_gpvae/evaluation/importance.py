r"""IWAE: log p(x) of each image by importance sampling, :math:`\log \frac1K \sum_i w_i`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import NonFiniteError, name_images, nonfinite_as_error, unvalidated
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.evaluation._evaluator import (
    MAX_IMAGES,
    batches,
    check_at_least,
    check_images,
    device_of,
    evaluator,
    seeded_if,
)
from pyro_gpvae.evaluation._pareto import PARETO_LIMIT, ParetoWarning, pareto_k
from pyro_gpvae.evaluation._traces import local_programs, weights_of_traces

__all__ = [
    "PARETO_LIMIT",
    "Evidence",
    "ParetoWarning",
    "evidence_curve",
    "log_evidence",
    "log_weights",
    "pareto_k",
    "weights_in_chunks",
]


@evaluator
def log_weights(
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    num_samples: int,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Returns :math:`\log w_i = \log p(x, z_i) - \log q(z_i | x)` with :math:`z_i \sim q(z|x)`.

    A guide with ``posterior(x)`` is called once per image, however many samples are drawn, and
    scored by its exact density, which is eq. (7) for the GPVAE. Any other guide is replayed: its
    global weights and auxiliary variables are drawn anew for every sample, and z is scored given
    them, which is also unbiased but looser. Global sites (W, U) never enter the weights.

    Arguments:
        model: A Pyro model with the site ``"z"`` and observations in ``plate("data", B)``.
        guide: A Pyro guide for it.
        x: Images (B, C, H, W): uint8, which are divided by 255, or floats.
        num_samples: The number K of samples per image.
        chunk_size: The number of latent vectors decoded at once. It limits the memory of decoding
            and density evaluation; encoding and refinement need additional memory. It also
            changes the order of random numbers. The default is 640 on a CPU and 65,536 on a GPU,
            halved until it fits.

    Returns:
        Log weights in nats, shape (K, B), in the dtype of the model's parameters.

    Raises:
        ValueError: If x is not a batch of the model's images, or K or chunk_size is less than 1.
        NonFiniteError: If a log weight is NaN or +∞; names the images. -∞ is an impossible draw.
    """
    return _weights_and_chunk_size(model, guide, x, num_samples, chunk_size)[0]


@dataclass(frozen=True, repr=False)
class Evidence:
    """Estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: IWAE, log 1/K Σ wᵢ (Burda et al. 2016): a lower bound in expectation.
        standard_error: Its Monte-Carlo standard error, sd(w) / (√K mean(w)); NaN for K = 1.
        effective_sample_size: (Σ wᵢ)² / Σ wᵢ², between 1 and K. If it is small, the bound is
            loose, and its standard error is too small as well.
        elbo: The mean of the log weights: the ELBO of the guide's marginal q(z|x).
        pareto_k: The shape k̂ of the weights' tail, see :func:`pareto_k`. Above 0.7 neither the
            estimate nor its standard error can be trusted. NaN for K < 25.
        num_samples: K.
        chunk_size: The chunk size that was used, which is what fitted into the memory; None if
            it is not known.
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
    x: Tensor,
    num_samples: int = 100,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
) -> Evidence:
    r"""Estimates log p(x) of every image by IWAE: :math:`\log \frac1K \sum_i p(x,z_i)/q(z_i|x)`.

    This is the score of the paper (supplement, section 4): a lower bound in expectation, which is
    tighter the larger K. Warns of images whose weights have a Pareto k̂ above 0.7.

    Arguments:
        model, guide, x, num_samples, chunk_size: See :func:`log_weights`.
        seed: If given, the same seed gives the same numbers, and the global random state is
            left as it was.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> from guides import GaussianGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> result = log_evidence(model, GaussianGuide(model), torch.rand(3, 1, 28, 28), 10, seed=0)
        >>> result.log_evidence.shape
        torch.Size([3])
    """
    check_images(model, x)
    with seeded_if(seed, device_of(x, model, guide)):
        weights, used = _weights_and_chunk_size(model, guide, x, num_samples, chunk_size)
    evidence = Evidence.from_log_weights(weights, used)
    heavy = int((evidence.pareto_k > PARETO_LIMIT).sum())
    if heavy:
        warnings.warn(
            f"Pareto k above {PARETO_LIMIT} for {heavy} of {len(x)} images: their log p(x) by "
            f"importance sampling (K = {num_samples}) is too low by an unknown amount, and so is "
            "its standard error. Use the optimum of each image as the proposal "
            '(make_guide("instance:full", model, warm_start=guide), or --guide instance:full), '
            "or more samples",
            ParetoWarning,
            stacklevel=3,
        )
    return evidence


def evidence_curve(log_weights: Tensor, num_samples: Sequence[int]) -> dict[int, Tensor]:
    """Returns the evidence (B,) for each K, from log weights (L, B) with L at least every K.

    The L weights are cut into ⌊L/K⌋ disjoint groups, whose estimates log 1/K Σ wᵢ are averaged.

    Raises:
        ValueError: If a K is not between 1 and L.

    Example:
        >>> curve = evidence_curve(torch.zeros(1000, 4), [1, 10, 100, 1000])
        >>> curve[100]
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
    model: PyroProgram, guide: PyroProgram, x: Tensor, num_samples: int, chunk_size: int | None
) -> tuple[Tensor, int]:
    """The log weights (K, B), and the chunk size that fitted into the memory."""
    check_at_least(1, num_samples=num_samples)
    check_images(model, x)
    return halving_chunks(
        lambda size: (weights_in_chunks(model, guide, x, num_samples, size), size),
        chunk_size,
        device_of(x, model, guide),
    )


def weights_in_chunks(
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    num_samples: int,
    chunk_size: int,
    first_image: int = 0,
) -> Tensor:
    """Computes :func:`log_weights` with one chunk size, without its checks of arguments: (K, B).

    Errors count images from ``first_image``.
    """
    columns: list[Tensor] = []
    for batch in batches(x, model, guide, size=min(chunk_size, MAX_IMAGES)):
        start = first_image + sum(column.shape[1] for column in columns)
        try:
            with nonfinite_as_error():
                weights = _weights_of_batch(model, guide, batch, num_samples, chunk_size)
            _check_weights(weights, start)
        except LinAlgError as error:
            if start == 0:
                raise
            where = f"{error} (images are counted from image {start} of the batch)"
            raise LinAlgError(where) from error
        except NonFiniteError as error:
            if error.images:
                raise
            # A distribution has refused its parameters. Without validation the same work shows in
            # the weights which images these belong to.
            with unvalidated():
                weights = _weights_of_batch(model, guide, batch, num_samples, chunk_size)
            _check_weights(weights, start, f": {error}")
            raise
        columns.append(weights)
    return torch.cat(columns, dim=1)


def _weights_of_batch(
    model: PyroProgram, guide: PyroProgram, x: Tensor, num_samples: int, chunk_size: int
) -> Tensor:
    """Log weights (K, B) of images that share one call of the guide's posterior."""
    programs = local_programs(model, guide, x)
    particles = max(1, chunk_size // len(x))
    counts = [min(particles, num_samples - k) for k in range(0, num_samples, particles)]
    first = weights_of_traces(*programs, x, counts[0])
    with unvalidated():  # the programs have been checked; the log weights are checked at the end
        rest = [weights_of_traces(*programs, x, count) for count in counts[1:]]
    return torch.cat([first, *rest])


def _check_weights(log_weights: Tensor, start: int, reason: str = "") -> None:
    """Names the images, counted from ``start``, with weights that are NaN or +∞."""
    wrong = (~(log_weights < math.inf)).any(0).nonzero().flatten() + start
    if len(wrong):
        images = wrong.tolist()
        default = (
            f": a density of the guide or of the model is NaN or overflows {log_weights.dtype}"
        )
        raise NonFiniteError(
            f"log p(x, z) - log q(z|x) is not finite for image {name_images(images)}"
            f"{reason or default}",
            images=images,
        )
