r"""log p(x) of each image by importance sampling, on Pyro's vectorised importance sampler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.distributions import constraints
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._errors import NonFiniteError, name_images, nonfinite_as_error, unvalidated
from pyro_gpvae.core._memory import bytes_each, free_memory
from pyro_gpvae.core._plates import DATA_PLATE, in_data_plate, is_global
from pyro_gpvae.core._precision import Precision, autocast, lowered
from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.model._precomputed import PrecomputedPosterior

__all__ = [
    "Evidence",
    "ParetoWarning",
    "as_pixels",
    "bytes_per_latent",
    "chunk_size_for",
    "default_chunk_size",
    "evidence_curve",
    "log_evidence",
    "log_weights",
    "pareto_k",
]

#: Above it, importance sampling does not converge at any practical rate (Vehtari et al. 2024).
PARETO_LIMIT = 0.7


class ParetoWarning(UserWarning):
    """The weights of some images have so heavy a tail that their estimate cannot be trusted."""


@with_own_parameters
@torch.no_grad()
def log_weights(
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    memory: int | None = None,
    precision: Precision | None = "float32",
) -> Tensor:
    r"""Returns :math:`\log p(x, z_i) - \log q(z_i | x)` with :math:`z_i \sim q(z|x)`.

    A guide with ``posterior(x)`` is asked once per image, however many samples are drawn, and
    scored by its exact density. Any other guide is replayed: then global random weights and
    auxiliary variables are drawn anew for every sample, and z is scored given them, which is
    also unbiased but looser. Terms of global sites (W, U) never enter the weights.

    Arguments:
        model: A Pyro model with the site ``"z"`` and observations in ``plate("data", B)``.
        guide: A Pyro guide for it.
        x: Images (B, C, H, W), uint8, or floats (see :func:`as_pixels`).
        num_samples: The number K of samples per image.
        chunk_size: How many latent vectors are decoded at once; bounds the memory. It changes
            the order of random numbers, nothing else. By default 640 on a CPU; on a GPU 65,536, or
            as many as fit half of its free memory, halved until they do.
        memory: Instead of chunk_size, how many bytes decoding and densities may take beside the
            images, the networks and the log weights. See :func:`bytes_per_latent`. Like
            chunk_size it changes the order of random numbers. What ``posterior(x)`` takes to
            encode and refine up to 512 images is not bounded by it: where that is much, as for
            "vlae" or "instance", give fewer images at a time.
        precision: Of the decoder where p(x|z) is scored; densities, the encoder and refinement
            are computed in full. "tf32" and "bf16" are approximations, so that the result is
            no longer a bound; None leaves torch's settings alone, which allow TF32 in the
            convolutions of GPUs.

    Returns:
        Log weights in nats, shape (K, B).

    Raises:
        ValueError: If x is not a batch of images, K or chunk_size is less than 1, the memory is
            too small for one latent vector, or the model has no decoder to lower.
        NonFiniteError: If a log weight is NaN or +∞; names the images. -∞ is an impossible draw.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    check_batch(model, x)
    _check_pixels(x)
    device, _ = device_and_dtype(model, x, guide)
    scored = _lower_decoder(model, precision)
    if chunk_size is None:
        chunk_size = chunk_size_for(model, guide, x, memory)
    elif memory is not None:
        raise ValueError(f"give chunk_size or memory, not both: got {chunk_size} and {memory}")
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size must be at least 1, got {chunk_size}: with 1, one latent vector of one "
            "image is decoded at a time"
        )
    columns = []
    size = min(chunk_size, MAX_IMAGES)
    for start in range(0, len(x), size):
        batch = _to_pixels(model, x[start : start + size], guide)
        with autocast(precision and "float32", device.type):
            try:
                with nonfinite_as_error():
                    weights = _log_weights_of_batch(scored, guide, batch, num_samples, chunk_size)
                _check_weights(weights, start)
            except LinAlgError as error:
                if start == 0:
                    raise
                where = f"{error} (images are counted from image {start} of the batch)"
                raise LinAlgError(where) from error
            except NonFiniteError as error:
                if error.images:
                    raise
                # a parameter was refused: without checks it shows in the weights of its images
                with unvalidated():
                    weights = _log_weights_of_batch(scored, guide, batch, num_samples, chunk_size)
                _check_weights(weights, start, f": {error}")
                raise
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
        pareto_k: The shape k̂ of the weights' tail, see :func:`pareto_k`. Above 0.7 neither the
            estimate nor its standard error can be trusted. Not a number for K < 25.
        num_samples: K.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    elbo: Tensor
    pareto_k: Tensor
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
            pareto_k=pareto_k(log_weights),
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
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    num_samples: int = 100,
    *,
    chunk_size: int | None = None,
    memory: int | None = None,
    precision: Precision | None = "float32",
    seed: int | None = None,
) -> Evidence:
    r"""Estimates log p(x) of every image: :math:`\log \frac1K \sum_i p(x, z_i) / q(z_i|x)`.

    Supplement, section 4. A lower bound in expectation, and tighter the larger K. Warns of images
    whose weights have a Pareto k̂ above 0.7.

    Arguments:
        model, guide, x, num_samples, chunk_size, memory, precision: See :func:`log_weights`.
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
    device, _ = device_and_dtype(model, x, guide)
    with nullcontext() if seed is None else seeded(seed, device):
        weights = log_weights(
            model,
            guide,
            x,
            num_samples,
            chunk_size=chunk_size,
            memory=memory,
            precision=precision,
        )
    evidence = Evidence.from_log_weights(weights)
    heavy = int((evidence.pareto_k > PARETO_LIMIT).sum())
    if heavy:
        warnings.warn(
            f"Pareto k above {PARETO_LIMIT} for {heavy} of {len(x)} images: their log p(x) by "
            f"importance sampling (K = {num_samples}) is too low by an unknown amount, and so is "
            "its standard error",
            ParetoWarning,
            stacklevel=2,
        )
    return evidence


@torch.no_grad()
def pareto_k(log_weights: Tensor) -> Tensor:
    """Returns the shape k̂ of the generalised Pareto tail of each image's weights, (B,).

    Weights have about 1/k finite moments: below 0.5 the central limit theorem holds, up to 0.7
    estimates still converge at a practical rate. An image whose five largest weights are equal has
    k̂ = 0; one where they span more than the exponential function can, or all are zero, k̂ = ∞.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, 2024.
        https://arxiv.org/abs/1507.02646

    Arguments:
        log_weights: Log weights (K, B) in nats.

    Returns:
        k̂, (B,); not a number for K < 25, where a tail has fewer than five weights, or for
        weights that are not numbers.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> exponential = -torch.rand(10_000, 1, generator=generator).log()
        >>> k = pareto_k(0.9 * exponential)  # Pareto with shape 0.9
        >>> bool((k - 0.9).abs() < 0.1)
        True
    """
    k = torch.full_like(log_weights[0], math.nan)
    if len(log_weights) < 25:
        return k
    import arviz_stats.base  # a second to import

    statistics: Any = arviz_stats.base.array_stats  # type: ignore[attr-defined]

    top = log_weights.topk(5, dim=0).values
    impossible = top[0] == -math.inf
    same, far = (top[0] == top[-1]) & ~impossible, (top[0] - top[-1] > 700) | impossible
    k[same], k[far] = 0.0, math.inf
    rest = ~(log_weights.isnan().any(0) | same | far)
    if not rest.any():
        return k
    with np.errstate(all="ignore"):
        # of the logarithm of 1/w, as in leave-one-out cross-validation
        found = statistics.psislw(-log_weights[:, rest].double().cpu().numpy(), axis=0)[1]
    k[rest] = torch.from_numpy(np.nan_to_num(found, nan=np.inf)).to(k)
    return k


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


def default_chunk_size(device: torch.device, need: Callable[[], int] | None = None) -> int:
    """How many latent vectors to work on at once on a device, if nobody says.

    Arguments:
        device: Where.
        need: Tells how many bytes one of them takes, see :func:`pyro_gpvae.core._memory.bytes_each`.
            Asked on a GPU only: as many are taken as fit half of its free memory.
    """
    # a CPU is fastest while the activations fit its cache
    size = 65_536 if device.type == "cuda" else 640
    free = free_memory(device)
    if need is not None and free is not None:
        each = need()
        # halved, so that a little more or less free memory does not change the random numbers
        while size > 1 and size * each > free // 2:
            size //= 2
    return size


# images refined or encoded at once by guides that do much work per image
MAX_IMAGES = 512


@with_own_parameters
def bytes_per_latent(model: PyroProgram, guide: PyroProgram, x: Tensor) -> int:
    """Returns how many bytes decoding and scoring one latent vector of one image takes at most.

    Found by scoring two and four of them; any model and guide will do. The encoder, refinement,
    and workspaces inside operators are not in it.

    Arguments:
        model, guide, x: See :func:`log_weights`.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> from guides import GaussianGuide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> need = bytes_per_latent(model, GaussianGuide(model), torch.zeros(1, 1, 28, 28))
        >>> 4 * 32 * 14 * 14 < need < 8 * 4 * 32 * 14 * 14  # the largest activation of the decoder
        True
    """
    device, _ = device_and_dtype(model, x, guide)
    only_these = isinstance(guide, PrecomputedPosterior)  # knows no other images, nor fewer of them

    def begin(count: int) -> Callable[[], Tensor]:
        if only_these:
            images, particles = _to_pixels(model, x, guide), count
        else:
            images = _to_pixels(model, x[:1], guide).expand(count, *x.shape[1:])
            particles = 1
        programs = _local_programs(model, guide, images)
        return lambda: _log_weights_of_chunk(*programs, images, particles)

    with torch.no_grad(), seeded(0, device):
        return max(1, bytes_each(begin) // (len(x) if only_these else 1))


def chunk_size_for(
    model: PyroProgram, guide: PyroProgram, x: Tensor, memory: int | None = None
) -> int:
    """How many latent vectors :func:`log_weights` decodes at once, if nobody says.

    Arguments:
        model, guide, x, memory: See :func:`log_weights`.

    Raises:
        ValueError: If the memory is too small for one latent vector.
        NonFiniteError: If a density cannot be computed.
    """
    device, _ = device_and_dtype(model, x, guide)
    need = partial(bytes_per_latent, model, guide, x)
    with nonfinite_as_error():
        if memory is None:
            return default_chunk_size(device, need)
        each = need()
    if memory < each:
        raise ValueError(
            f"a memory of {memory} bytes is too small to decode one latent vector of one "
            f"image, which takes {each}: give memory={each} or more, or chunk_size=1, which "
            "decodes one at a time whatever it takes"
        )
    return min(default_chunk_size(device), memory // each)


def _lower_decoder(model: PyroProgram, precision: Precision | None) -> PyroProgram:
    """The model, whose decoder runs in a lower precision if so asked."""
    if precision is None or precision == "float32":
        return model
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        raise ValueError(
            f"precision {precision!r} lowers model.decoder, which the model "
            f"{type(model).__name__} does not have: give precision=None, and lower what you mean "
            "inside the model"
        )
    with lowered(decoder, precision):  # refuses what it cannot do before anything is computed
        pass

    def program(x: Tensor) -> Any:
        with lowered(decoder, precision):
            return model(x)

    return program


def _log_weights_of_batch(
    model: PyroProgram, guide: PyroProgram, x: Tensor, num_samples: int, chunk_size: int
) -> Tensor:
    """Log weights (K, B) of images that share one call of the guide's posterior."""
    programs = _local_programs(model, guide, x)
    particles = max(1, chunk_size // len(x))
    counts = [min(particles, num_samples - k) for k in range(0, num_samples, particles)]
    first = _log_weights_of_chunk(*programs, x, counts[0])
    with unvalidated():  # the programs have been checked; log weights are, when all are there
        rest = [_log_weights_of_chunk(*programs, x, count) for count in counts[1:]]
    return torch.cat([first, *rest])


def _local_programs(
    model: PyroProgram, guide: PyroProgram, x: Tensor
) -> tuple[PyroProgram, PyroProgram]:
    """Model and guide of the sites of an image, the guide's posterior computed once."""
    if not hasattr(guide, "posterior"):
        # global sites are drawn for every particle, but no business of an image's weight
        return (
            poutine.infer_config(model, _untraced_if_global),
            poutine.infer_config(guide, _untraced_if_global),
        )
    q = guide.posterior(x)

    def proposal(x: Tensor) -> None:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", q)

    # W and U are not even sampled for many particles: q(z|x) has them integrated out
    return poutine.block(model, hide_fn=is_global), proposal


def _log_weights_of_chunk(model: PyroProgram, guide: PyroProgram, x: Tensor, count: int) -> Tensor:
    """Log weights of ``count`` samples, (count, B)."""
    _, model_trace, guide_trace = vectorized_importance_weights(
        model, guide, x, num_samples=count, max_plate_nesting=1
    )
    _check_support(model_trace)
    # a guide's auxiliary sites are absent from the model: p(x, z) / q(z | x, auxiliary)
    # is unbiased, dividing by their density as well would not be; and what the guide does not
    # propose is drawn from its prior, which it would have to be divided by again
    shape, proposed = (count, len(x)), {*model_trace} & {*guide_trace}
    log_joint = site_sum(model_trace, proposed | observed_sites(model_trace), shape)
    return log_joint - site_sum(guide_trace, proposed, shape)


def _check_support(model_trace: Any) -> None:
    """Refuses draws of z that the prior cannot make, whether or not Pyro looks."""
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or not in_data_plate(site):
            continue
        support = site["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real and not bool(support.check(site["value"]).all()):
            raise ValueError(
                f"the guide's draws of {name!r} lie outside the support {support} of the model's "
                f"{type(site['fn']).__name__}: give both the same support"
            )


def as_pixels(model: Any, x: Tensor) -> Tensor:
    """Returns images as floats on the model's device, in the dtype of its parameters.

    Arguments:
        model: The model, which may be any callable.
        x: Images (B, C, H, W): uint8, which are divided by 255, or floats, which are taken as they
            are: images simulated from a model of Gaussian pixels lie in no interval.

    Raises:
        ValueError: If x is another type of number, not finite, or obviously not on the scale of
            pixels/255: beyond ±100, or above 2 with no value below zero.
    """
    _check_pixels(x)
    return _to_pixels(model, x)


def _to_pixels(model: Any, x: Tensor, guide: Any = None) -> Tensor:
    device, dtype = device_and_dtype(model, x, guide)
    return x.to(device).to(dtype) / 255 if x.dtype == torch.uint8 else x.to(device, dtype)


def _check_pixels(x: Tensor) -> None:
    """See :func:`as_pixels`; of all images at once, whose scale is one."""
    if x.dtype == torch.uint8:
        return
    if not x.dtype.is_floating_point:
        raise ValueError(f"images must be uint8 values or floats in [0, 1], got {x.dtype}")
    low, high = float(x.min()), float(x.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"images must be finite, found {high if math.isfinite(low) else low}")
    if max(-low, high) > 100 or (high > 2 and low >= 0):
        raise ValueError(
            f"images must be uint8, or floats on the scale [0, 1], got floats between {low:g} and "
            f"{high:g}: divide values 0 to 255 by 255"
        )


def check_batch(model: Any, x: Any) -> None:
    """Refuses what is no batch of images, before a guide's encoder stumbles over it."""
    if not isinstance(x, Tensor) or len(x) == 0:
        raise ValueError(f"x must be a tensor with at least one image, got {type(x).__name__}")
    if hasattr(model, "check_images"):
        model.check_images(x)


def _check_weights(log_weights: Tensor, start: int, reason: str = "") -> None:
    """Names images with weights that are not finite; the first one has the number ``start``."""
    bad = (~(log_weights < math.inf)).any(0).nonzero().flatten()
    wrong = [start + int(i) for i in bad]
    if wrong:
        names = name_images(wrong)
        default = (
            f": a density of the guide or of the model is NaN or overflows {log_weights.dtype}"
        )
        raise NonFiniteError(
            f"log p(x, z) - log q(z|x) is not finite for image {names}{reason or default}",
            images=wrong,
        )


def _untraced_if_global(site: Any) -> Any:
    drawn = is_global(site) and not site["is_observed"]
    return {"is_auxiliary": True, "_do_not_trace": True} if drawn else {}


def site_sum(trace: Any, names: Container[str], shape: tuple[int, int]) -> Tensor:
    """Σ of log densities per particle and image, over sites of these names and in the data plate.

    Masks count, scales do not.
    """
    terms = [
        scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).expand(shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and in_data_plate(site) and name in names
    ]
    return torch.stack(terms).sum(0) if terms else torch.zeros(shape)


def observed_sites(trace: Any) -> set[str]:
    return {
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"]
    }


def device_and_dtype(model: Any, x: Tensor, guide: Any = None) -> tuple[torch.device, torch.dtype]:
    """Where and how precisely to evaluate: as the parameters of the model, or else of the guide.

    If neither is a module with parameters, where the images are, in the default dtype.
    """
    for program in (model, guide):
        if isinstance(program, torch.nn.Module):
            for parameter in program.parameters():
                return parameter.device, parameter.dtype
    return x.device, torch.get_default_dtype()
