r"""log p(x) of each image by importance sampling, on Pyro's vectorised importance sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.data import to_float
from pyro_gpvae.elbo import in_data_plate
from pyro_gpvae.model import DATA_PLATE
from pyro_gpvae.randomness import seeded

__all__ = ["Evidence", "default_chunk_size", "evidence_curve", "log_evidence", "log_weights"]

Program = Callable[[Tensor], Any]


@torch.no_grad()
def log_weights(
    model: Program,
    guide: Program,
    x: Tensor,
    num_samples: int,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Returns :math:`\log p(x, z_i) - \log q(z_i | x)` with :math:`z_i \sim q(z|x)`.

    A guide with ``posterior(x)`` is asked once per image, however many samples are drawn, and
    scored by its exact density. Any other guide is replayed: then global random weights and
    auxiliary variables are drawn anew for every sample, and z is scored given them, which is
    also unbiased but looser. Terms of global sites (W, U) never enter the weights.

    Arguments:
        model: A Pyro model with the site ``"z"`` and observations in ``plate("data", B)``.
        guide: A Pyro guide for it.
        x: Images (B, C, H, W), uint8 or floats in [0, 1].
        num_samples: The number K of samples per image.
        chunk_size: How many latent vectors are decoded at once; bounds the memory. It changes
            the order of random numbers, nothing else.

    Returns:
        Log weights in nats, shape (K, B).

    Raises:
        ValueError: If x is not a batch of images, or K or chunk_size is less than 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not isinstance(x, Tensor) or len(x) == 0:
        raise ValueError(f"x must be a tensor with at least one image, got {type(x).__name__}")
    device, dtype = _device_and_dtype(model, x)
    if chunk_size is None:
        chunk_size = default_chunk_size(device)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if hasattr(model, "check_shape"):  # before the guide's encoder stumbles over it
        model.check_shape(x)
    columns = []
    size = min(chunk_size, _MAX_IMAGES)
    for start in range(0, len(x), size):
        batch = to_float(x[start : start + size].to(device), dtype)
        try:
            weights = _log_weights_of_batch(model, guide, batch, num_samples, chunk_size)
        except LinAlgError as error:
            if start == 0:
                raise
            where = f"{error} (images are counted from image {start} of the batch)"
            raise LinAlgError(where) from error
        columns.append(weights)
    return torch.cat(columns, dim=1)


@dataclass(frozen=True, repr=False)
class Evidence:
    """Estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: log (1/K) Σ wᵢ, the importance-weighted bound of Burda et al. (2016).
        standard_error: Its Monte-Carlo standard error, sd(w) / (√K mean(w)) (delta method);
            not a number for K = 1.
        effective_sample_size: (Σ wᵢ)² / Σ wᵢ², between 1 and K. Where it is small, the bound is
            loose, and its standard error is too small as well.
        elbo: The mean of the log weights: the ELBO of the guide's marginal q(z|x).
        num_samples: K.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    elbo: Tensor
    num_samples: int

    @staticmethod
    def from_log_weights(log_weights: Tensor) -> Evidence:
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
            num_samples=num_samples,
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


def log_evidence(
    model: Program,
    guide: Program,
    x: Tensor,
    num_samples: int = 100,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
) -> Evidence:
    r"""Estimates log p(x) of every image: :math:`\log \frac1K \sum_i p(x, z_i) / q(z_i|x)`.

    Supplement, section 4. A lower bound in expectation, and tighter the larger K.

    Arguments:
        model, guide, x, num_samples, chunk_size: See :func:`log_weights`.
        seed: If given, the same seed gives the same numbers, and the global random state is
            left as it was.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> from guides import GaussianGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> result = log_evidence(model, GaussianGuide(model), torch.rand(3, 1, 28, 28), seed=0)
        >>> result.log_evidence.shape
        torch.Size([3])
    """
    device, _ = _device_and_dtype(model, x)
    with nullcontext() if seed is None else seeded(seed, device):
        weights = log_weights(model, guide, x, num_samples, chunk_size=chunk_size)
    return Evidence.from_log_weights(weights)


def evidence_curve(log_weights: Tensor, num_samples: Sequence[int]) -> dict[int, Tensor]:
    """Returns the evidence (B,) for each K, from log weights (L, B) with L at least every K.

    The L weights are cut into ⌊L/K⌋ disjoint groups whose estimates are averaged: unbiased for
    each K, and as precise as L draws allow.

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


def default_chunk_size(device: torch.device) -> int:
    """How many latent vectors to decode at once on a device, if nobody says."""
    # a CPU is fastest while the activations fit its cache
    return 65_536 if device.type == "cuda" else 640


# images refined or encoded at once by guides that do much work per image
_MAX_IMAGES = 512


def _log_weights_of_batch(
    model: Program, guide: Program, x: Tensor, num_samples: int, chunk_size: int
) -> Tensor:
    """Log weights (K, B) of images that share one call of the guide's posterior."""
    if hasattr(guide, "posterior"):
        q = guide.posterior(x)

        def proposal(x: Tensor) -> None:
            with pyro.plate(DATA_PLATE, len(x), dim=-1):
                pyro.sample("z", q)

        # W and U are not even sampled for many particles: q(z|x) has them integrated out
        local_model: Program = poutine.block(model, hide_fn=_is_global)
        local_guide: Program = proposal
    else:
        # drawn for every particle, but no business of an image's weight
        local_model = poutine.infer_config(model, _untraced_if_global)
        local_guide = poutine.infer_config(guide, _untraced_if_global)
    particles = max(1, chunk_size // len(x))
    rows = []
    for start in range(0, num_samples, particles):
        count = min(particles, num_samples - start)
        _, model_trace, guide_trace = vectorized_importance_weights(
            local_model, local_guide, x, num_samples=count, max_plate_nesting=1
        )
        rows.append(_site_sum(model_trace, model_trace, (count, len(x))))
        # a guide's auxiliary sites are absent from the model: p(x, z) / q(z | x, auxiliary)
        # is unbiased, dividing by their density as well would not be
        rows[-1] = rows[-1] - _site_sum(guide_trace, model_trace, (count, len(x)))
    return torch.cat(rows)


def _is_global(site: Any) -> bool:
    return site["type"] == "sample" and not (in_data_plate(site) or site_is_subsample(site))


def _untraced_if_global(site: Any) -> Any:
    return {"is_auxiliary": True, "_do_not_trace": True} if _is_global(site) else {}


def _site_sum(trace: Any, model_trace: Any, shape: tuple[int, int]) -> Tensor:
    """Σ of log densities per particle and image, over sites that the model has too."""
    terms = [
        site["unscaled_log_prob"].expand(shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and in_data_plate(site) and name in model_trace
    ]
    return torch.stack(terms).sum(0) if terms else torch.zeros(shape)


def _device_and_dtype(model: Any, x: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and how precisely to evaluate: as the model's parameters, if it is a module."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return (x.device, torch.get_default_dtype()) if first is None else (first.device, first.dtype)
