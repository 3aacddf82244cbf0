r"""log p(x) of each image by annealed importance sampling, with bounds from both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.core._errors import NonFiniteError, name_images, nonfinite_as_error
from pyro_gpvae.core._memory import bytes_each
from pyro_gpvae.core._plates import is_global
from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation._hmc import (
    AnnealingPath,
    log_joint_of,
    num_pilots_for,
    start_distributions,
)
from pyro_gpvae.evaluation.importance import (
    MAX_IMAGES,
    Evidence,
    as_pixels,
    check_batch,
    default_chunk_size,
    device_and_dtype,
)

__all__ = [
    "AnnealedEvidence",
    "Sandwich",
    "annealed_evidence",
    "bidirectional",
    "sigmoidal_schedule",
]


@dataclass(frozen=True, repr=False)
class AnnealedEvidence:
    """Annealed estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: log of the mean weight of the chains; a lower bound in expectation.
        standard_error: Its Monte-Carlo standard error from the spread of the weights (delta
            method). Too small where few chains carry the weight, and blind to a mode that no
            chain has found.
        effective_sample_size: (Σ w)² / Σ w² over chains, between 1 and ``num_chains``.
        acceptance_rate: The mean acceptance probability of the HMC moves.
        num_chains: Chains per image.
        num_steps: Steps of the schedule.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance_rate: Tensor
    num_chains: int
    num_steps: int

    def __repr__(self) -> str:
        return (
            f"AnnealedEvidence({len(self.log_evidence)} images, {self.num_chains} chains, "
            f"{self.num_steps} steps: mean log p(x) = {float(self.log_evidence.mean()):.2f} nats)"
        )


@dataclass(frozen=True, repr=False)
class Sandwich:
    """Bounds of log p(x) from both sides, for B simulated images, in nats.

    Attributes:
        lower: Annealed from the start to the posterior, (B,): at most log p(x) in expectation.
        upper: Annealed back from the posterior, (B,): at least log p(x) in expectation.
        lower_error: Monte-Carlo standard error of ``lower``, (B,).
        upper_error: Monte-Carlo standard error of ``upper`` for this z, (B,).
        x: The simulated images, (B, C, H, W): not confined to [0, 1].
        z: The latent vectors that they were simulated from, (B, p).
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor
    x: Tensor
    z: Tensor

    @property
    def gap(self) -> float:
        """The mean of upper - lower over the images."""
        return float((self.upper - self.lower).mean())

    def __repr__(self) -> str:
        return (
            f"Sandwich({len(self.lower)} simulated images: mean log p(x) between "
            f"{float(self.lower.mean()):.2f} and {float(self.upper.mean()):.2f} nats)"
        )


@with_own_parameters
def annealed_evidence(
    model: PyroProgram,
    x: Tensor,
    guide: PyroProgram | None = None,
    *,
    num_chains: int = 16,
    num_steps: int = 100,
    num_leapfrog: int = 3,
    chunk_size: int | None = None,
    seed: int | None = None,
    first_image: int = 0,
    progress: bool | str = False,
) -> AnnealedEvidence:
    r"""Estimates log p(x) of every image by annealed importance sampling (Neal 2001).

    .. math::
        \log f_\beta(z) = (1 - \beta) \log q_0(z) + \beta \log p(x, z), \qquad
        \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
                 [\log p(x, z_{t-1}) - \log q_0(z_{t-1})]

    from :math:`z_0 \sim q_0`, the prior or the guide's q(z|x), along a sigmoidal schedule β, with
    one HMC move after each step. The mean of w is p(x) exactly, whatever the moves do.

    The step size of a chain follows a pilot chain, which is run beside it and then forgotten, and
    which adapts it to 65 % acceptance as it goes. Chains that adapt to their own past are no
    longer Markov chains that keep :math:`f_\beta`, and their weights are slightly biased; the
    pilots cost a quarter more, and keep the estimate exact. Momenta have the inverse covariance
    of the start as their own, estimated from draws: from a good guide, chains move as in a
    standard normal.

    Every image has a stream of random numbers of its own, which depends on the seed and the
    image's index only: results do not depend on how images are split into batches or chunks
    (beyond rounding, and but for guides whose posterior(x) itself draws random numbers).

    References:
        Neal, *Annealed importance sampling*, 2001.
        Wu, Burda, Salakhutdinov and Grosse, *On the quantitative analysis of decoder-based
        generative models*, 2017. https://arxiv.org/abs/1611.04273

    Arguments:
        model: A Pyro model with the site ``"z"`` and observations in ``plate("data", B)``.
            Global sites, such as the weights W and U of a GPVAE, never enter.
        x: Images (B, C, H, W), uint8, or floats, which are taken as they are.
        guide: A guide with ``posterior(x)`` to start from; None starts from the model's prior.
        num_chains: Chains per image.
        num_steps: Steps T of the schedule.
        num_leapfrog: Gradients per HMC move.
        chunk_size: How many chains, pilots included, are moved at once; bounds the memory. By
            default 640 on a CPU; on a GPU 65,536, or as many as fit half of its free memory.
        seed: The same seed gives the same numbers; the global random state is left as it was.
            None draws a seed.
        first_image: The index of the first image of x, where x is a part of a data set.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If a number is not positive, x is not a batch of images, the guide has no
            density, or the model has latent sites besides z.
        NonFiniteError: If log p(x, z) or log q(z|x) is NaN or +∞ where a chain stands; names the
            images. Moves to such a z are rejected, but a chain may start there.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> x = model.images(3)
        >>> result = annealed_evidence(model, x, seed=0)
        >>> bool(((result.log_evidence - model.log_evidence(x)).abs() < 0.2).all())
        True
    """
    check_batch(model, x)
    schedule = sigmoidal_schedule(num_steps)
    seed = _seed(seed)
    device, _ = device_and_dtype(model, x)
    size = _images_at_once(model, x, num_chains, num_leapfrog, chunk_size)
    found: list[tuple[Tensor, Tensor]] = []
    with seeded(seed, device), _progress(len(x), size, num_steps, progress) as bar:
        for path in _paths(model, x, guide, seed, first_image, num_chains, size):
            run = path.forward(schedule, num_leapfrog, bar)
            _check_finite(run.log_weights, first_image + sum(w.shape[1] for w, _ in found))
            found.append((run.log_weights, run.acceptance))
    log_weights, acceptance = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    evidence = Evidence.from_log_weights(log_weights)
    return AnnealedEvidence(
        evidence.log_evidence,
        evidence.standard_error,
        evidence.effective_sample_size,
        acceptance.mean(0),
        num_chains,
        num_steps,
    )


@with_own_parameters
def bidirectional(
    model: PyroProgram,
    guide: PyroProgram | None = None,
    *,
    num_images: int,
    num_chains: int = 16,
    num_steps: int = 100,
    num_leapfrog: int = 3,
    chunk_size: int | None = None,
    seed: int | None = None,
    first_image: int = 0,
    like: Tensor | None = None,
    progress: bool | str = False,
) -> Sandwich:
    r"""Bounds log p(x) from both sides for images simulated from the model (Grosse et al. 2016).

    The z that an image x was simulated from is an exact draw of p(z|x). Chains from it back to
    the start :math:`q_0` have weights with :math:`E[1/w] = 1/p(x)`, so that

    .. math::
        \log \tfrac1M \sum_m w_m^{\text{forward}}
        \;\lesssim\; \log p(x) \;\lesssim\;
        -\log \tfrac1M \sum_m 1 / w_m^{\text{back}},

    each in expectation. Where they meet, annealing has converged, modes included, for images like
    those of the model. The way back takes the step sizes of the pilots on the way forward.

    References:
        Grosse, Ancha and Roy, *Measuring the reliability of MCMC inference with bidirectional
        Monte Carlo*, 2016. https://arxiv.org/abs/1606.02275

    Arguments:
        model: As in :func:`annealed_evidence`; its observations must be one site.
        guide: A guide with ``posterior(x)`` to start from; None starts from the model's prior.
        num_images: How many images to simulate.
        num_chains, num_steps, num_leapfrog, chunk_size, seed, progress: As in
            :func:`annealed_evidence`.
        first_image: The index of the first image: image n of a seed is the same in every call.
        like: Images (1, C, H, W) to call the model with, for their shape; by default zeros of
            ``model.image_shape``.

    Raises:
        ValueError: As :func:`annealed_evidence`, or if the model's observations are not one site.
        NonFiniteError: As :func:`annealed_evidence`.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> bidirectional(model, num_images=8, seed=0).gap < 0.2
        True
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    schedule = sigmoidal_schedule(num_steps)
    seed = _seed(seed)
    if like is None:
        if not hasattr(model, "image_shape"):
            raise ValueError("the model has no image_shape: pass an image of its shape as like=")
        like = torch.zeros(1, *model.image_shape)
    like = as_pixels(model, like[:1])
    size = _images_at_once(model, like, num_chains, num_leapfrog, chunk_size)
    found: list[tuple[Tensor, Tensor]] = []
    with seeded(seed, like.device), _progress(num_images, size, 2 * num_steps, progress) as bar:
        indices = range(first_image, first_image + num_images)
        pairs = [_simulate(model, like, seed, n) for n in indices]
        x, z = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        paths = _paths(model, x, guide, seed, first_image, num_chains, size)
        for path, end in zip(paths, z.split(size), strict=True):
            forward = path.forward(schedule, num_leapfrog, bar)
            back = path.back(end, forward.steps, schedule, num_leapfrog, bar)
            image = first_image + sum(w.shape[1] for w, _ in found)
            _check_finite(forward.log_weights, image)
            _check_finite(back, image)
            found.append((forward.log_weights, -back))
    bounds = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    lower, upper = map(Evidence.from_log_weights, bounds)
    return Sandwich(
        lower.log_evidence, -upper.log_evidence, lower.standard_error, upper.standard_error, x, z
    )


def sigmoidal_schedule(num_steps: int, steepness: float = 4.0) -> list[float]:
    r"""Returns :math:`\beta_0 = 0, \dots, \beta_T = 1`, equally spaced through a sigmoid.

    Example:
        >>> [round(beta, 3) for beta in sigmoidal_schedule(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    s = torch.linspace(-steepness, steepness, num_steps + 1, dtype=torch.float64).sigmoid()
    return cast(list[float], ((s - s[0]) / (s[-1] - s[0])).tolist())


def _paths(
    model: PyroProgram,
    x: Tensor,
    guide: PyroProgram | None,
    seed: int,
    first_image: int,
    num_chains: int,
    size: int,
) -> Iterator[AnnealingPath]:
    """The paths of all images, so many images at a time; the guide is asked for more at once."""
    outer = -(-MAX_IMAGES // size) * size  # whole parts, at least MAX_IMAGES
    for begin in range(0, len(x), outer):
        images = as_pixels(model, x[begin : begin + outer])
        indices = range(first_image + begin, first_image + begin + len(images))
        starts = start_distributions(model, images, guide, seed, indices)
        for at in range(0, len(images), size):
            part = slice(at, at + size)
            yield AnnealingPath.start(
                model, images[part], starts[part], seed, indices[part], num_chains
            )


def _simulate(model: PyroProgram, like: Tensor, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """One image (1, C, H, W) and its z (1, p), drawn from the model."""
    local = poutine.block(model, hide_fn=is_global)
    with seeded(image_seed(seed, index, "simulation"), like.device), torch.no_grad():
        try:
            with nonfinite_as_error():
                trace = poutine.trace(poutine.uncondition(local)).get_trace(like)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"image {index} cannot be simulated: {error}", images=[index]
            ) from error
    images = [
        site["value"]
        for site in cast(Any, trace.nodes.values())
        if site["type"] == "sample" and site["infer"].get("was_observed")
    ]
    if len(images) != 1 or "z" not in trace:
        raise ValueError(
            "images can be simulated from a model with the site 'z' and one observed site, "
            f"found {len(images)} of them"
        )
    return images[0], cast(Any, trace.nodes["z"])["value"]


def _check_finite(log_weights: Tensor, first: int) -> None:
    wrong = (~(log_weights < torch.inf)).any(0).nonzero().flatten() + first
    if len(wrong):
        images = wrong.tolist()
        names = name_images(images)
        raise NonFiniteError(
            f"annealing meets a log p(x, z) or log q(z|x) that is NaN or overflows "
            f"{log_weights.dtype}, for image {names}: is the decoder finite for every z that its "
            "start may draw?",
            images=images,
        )


def _images_at_once(
    model: PyroProgram, x: Tensor, num_chains: int, num_leapfrog: int, chunk_size: int | None
) -> int:
    if chunk_size is None:
        device, _ = device_and_dtype(model, x)
        chunk_size = default_chunk_size(device, partial(_bytes_per_chain, model, x))
    for name, value in (
        ("num_chains", num_chains),
        ("num_leapfrog", num_leapfrog),
        ("chunk_size", chunk_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return max(1, chunk_size // (num_chains + num_pilots_for(num_chains)))


def _bytes_per_chain(model: PyroProgram, x: Tensor) -> int:
    """What log p(x, z) and its gradient take for a chain; the density of the start is not in it."""
    device, dtype = device_and_dtype(model, x)
    image = torch.zeros_like(x[:1], device=device, dtype=dtype)
    log_joint = log_joint_of(model, image)
    with torch.enable_grad(), seeded(0, device):
        (prior,) = start_distributions(model, image, None, 0, [0])

        def begin(count: int) -> Callable[[], Any]:
            z = prior.sample(torch.Size([count])).requires_grad_()
            return lambda: torch.autograd.grad(log_joint(z).sum(), z)

        return bytes_each(begin)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**31, ())) if seed is None else seed


@contextmanager
def _progress(num_images: int, size: int, num_steps: int, progress: bool | str) -> Iterator[tqdm]:
    label = progress if isinstance(progress, str) else "annealing"
    total = -(-num_images // size) * num_steps
    with tqdm(total=total, desc=label, disable=not progress) as bar:
        yield bar
