"""AIS and BDMC: log p(x) by annealed importance sampling, and bounds on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import (
    MAX_IMAGES,
    batches,
    check_at_least,
    check_images,
    check_log_weights,
    device_of,
    evaluator,
    local_sites,
    progress_bar,
)
from pyro_gpvae.evaluation._hmc import (
    AnnealingPath,
    Forward,
    chains_with_pilots,
    start_distributions,
)
from pyro_gpvae.evaluation.importance import Evidence
from pyro_gpvae.model.image_model import ImageModel

__all__ = [
    "AnnealedEvidence", "Sandwich", "annealed_evidence", "bidirectional", "sigmoidal_schedule",
]  # fmt: skip

_Result = TypeVar("_Result")
_WEIGHT = "a log p(x, z) or log q(z|x) in annealing"


@dataclass(frozen=True)
class AnnealedEvidence:
    """Annealed estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: log of the mean weight of the chains; a lower bound in expectation.
        standard_error: Its Monte-Carlo standard error. It is too small if few chains carry the
            weight, and does not see a mode that no chain has found.
        effective_sample_size: (Σ w)² / Σ w² over chains, between 1 and ``num_chains``.
        acceptance_rate: The mean acceptance probability of the HMC moves.
        num_chains: The number of chains per image.
        num_steps: The number of steps of the schedule.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance_rate: Tensor
    num_chains: int
    num_steps: int


@dataclass(frozen=True)
class Sandwich:
    """Bounds of log p(x), in expectation, for B simulated images, in nats; each (B,).

    Attributes:
        lower, lower_error: From the start to the posterior, and its Monte-Carlo standard error.
        upper, upper_error: From the posterior back to the start, and its error for this z.
        x: The simulated images, (B, C, H, W), not confined to [0, 1].
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


@evaluator
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
    r"""Estimates log p(x) of every image by annealed importance sampling (AIS, Neal 2001).

    .. math::
        \log f_\beta(z) = (1 - \beta) \log q_0(z) + \beta \log p(x, z), \qquad
        \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
                 [\log p(x, z_{t-1}) - \log q_0(z_{t-1})]

    Chains start at :math:`z_0 \sim q_0`, the prior or the guide's q(z|x), and follow a sigmoidal
    schedule β with one HMC move after each step. The mean of w is p(x) exactly. For every four
    chains a pilot chain adapts the step size to 65 % acceptance and is then discarded: a chain that
    adapted to its own past would have a biased weight. Momenta have the inverse covariance of the
    start. Every image has its own random numbers, so results do not depend on batches or chunks,
    except for rounding and for guides whose ``posterior(x)`` draws random numbers.

    References:
        Wu, Burda, Salakhutdinov and Grosse, *On the quantitative analysis of decoder-based
        generative models*, 2017. https://arxiv.org/abs/1611.04273

    Arguments:
        model, x: See :func:`pyro_gpvae.log_weights`.
        guide: A guide with ``posterior(x)`` to start from; None starts from the model's prior.
        num_chains: The number of chains per image.
        num_steps: The number T of steps of the schedule.
        num_leapfrog: The number of gradients per HMC move.
        chunk_size: The number of chains, pilots included, that are moved at once.
        seed: The same seed gives the same numbers. None draws a seed.
        first_image: The index of the first image of x, if x is a part of a data set.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If a number is not positive, x is not a batch of images, the guide has no
            density, or the model has latent sites other than z.
        NonFiniteError: If log p(x, z) or log q(z|x) is NaN or +∞ where a chain starts; names the
            images. Moves to such a z are rejected.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> x = model.images(3)
        >>> result = annealed_evidence(model, x, seed=0)
        >>> bool(((result.log_evidence - model.log_evidence(x)).abs() < 0.2).all())
        True
    """
    check_images(model, x)
    annealing = _Annealing(model, guide, num_chains, num_steps, num_leapfrog, seed, first_image)

    def work(size: int) -> AnnealedEvidence:
        with progress_bar(progress, "annealing", -(-len(x) // size) * num_steps) as bar:
            parts = [chains for chains, _ in annealing.forward(x, size, bar)]
        evidence = Evidence.from_log_weights(torch.cat([part.log_weights for part in parts], 1))
        return AnnealedEvidence(
            evidence.log_evidence,
            evidence.standard_error,
            evidence.effective_sample_size,
            torch.cat([part.acceptance for part in parts], 1).mean(0),
            num_chains,
            num_steps,
        )

    return annealing.run(work, x, chunk_size)


@evaluator
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
    r"""Bounds log p(x) on both sides for images simulated from the model (BDMC).

    The z that an image x was simulated from is an exact draw of p(z|x). Chains from it back to
    the start :math:`q_0` have weights with :math:`E[1/w] = 1/p(x)`, so that, in expectation,

    .. math::
        \log \tfrac1M \sum_m w_m^{\text{forward}}
        \;\le\; \log p(x) \;\le\; -\log \tfrac1M \sum_m 1 / w_m^{\text{back}} .

    Where both bounds meet, annealing has converged, including all modes, for images like these.

    References:
        Grosse, Ancha and Roy, *Measuring the reliability of MCMC inference with bidirectional
        Monte Carlo*, 2016. https://arxiv.org/abs/1606.02275

    Arguments:
        model: As in :func:`annealed_evidence`; its observations must be one site.
        num_images: The number of images to simulate. An image of a seed is the same in every call.
        like: Images (1, C, H, W) that give the model the shape; by default zeros of the shape of
            an :class:`pyro_gpvae.ImageModel`.
        guide, num_chains, num_steps, num_leapfrog, chunk_size, seed, first_image, progress: As in
            :func:`annealed_evidence`, and so are the errors.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> bidirectional(model, num_images=8, seed=0).gap < 0.2
        True
    """
    check_at_least(1, num_images=num_images)
    if like is None:
        if not isinstance(model, ImageModel):
            raise ValueError("the model has no image_shape: pass an image of its shape as like=")
        like = torch.zeros(1, *model.image_shape)
    blank = to_batch(like[:1], model, guide)[0]
    annealing = _Annealing(model, guide, num_chains, num_steps, num_leapfrog, seed, first_image)

    def work(size: int) -> Sandwich:
        indices = range(first_image, first_image + num_images)
        pairs = [_simulate(model, blank, annealing.seed, index) for index in indices]
        x, z = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        lower: list[Tensor] = []
        upper: list[Tensor] = []
        with progress_bar(progress, "annealing", -(-num_images // size) * 2 * num_steps) as bar:
            for forward, path in annealing.forward(x, size, bar):
                image = sum(part.shape[1] for part in lower)
                end = z[image : image + forward.log_weights.shape[1]]
                back = path.back(end, forward.steps, annealing.schedule, num_leapfrog, bar)
                check_log_weights(back, first_image + image, _WEIGHT)
                lower.append(forward.log_weights)
                upper.append(-back)
        below, above = (Evidence.from_log_weights(torch.cat(part, 1)) for part in (lower, upper))
        errors = below.standard_error, above.standard_error
        return Sandwich(below.log_evidence, -above.log_evidence, *errors, x, z)

    return annealing.run(work, blank, chunk_size)


def sigmoidal_schedule(num_steps: int, steepness: float = 4.0) -> list[float]:
    r"""Returns :math:`\beta_0 = 0, \dots, \beta_T = 1`, equally spaced through a sigmoid.

    Example:
        >>> [round(beta, 3) for beta in sigmoidal_schedule(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    check_at_least(1, num_steps=num_steps)
    s = torch.linspace(-steepness, steepness, num_steps + 1, dtype=torch.float64).sigmoid()
    return cast(list[float], ((s - s[0]) / (s[-1] - s[0])).tolist())


class _Annealing:
    """The settings that both estimators share, and the forward chains."""

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram | None,
        num_chains: int,
        num_steps: int,
        num_leapfrog: int,
        seed: int | None,
        first_image: int,
    ) -> None:
        check_at_least(1, num_chains=num_chains, num_leapfrog=num_leapfrog)
        self.model, self.guide = model, guide
        self.num_chains, self.num_leapfrog = num_chains, num_leapfrog
        self.schedule = sigmoidal_schedule(num_steps)
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.first_image = first_image

    def run(self, work: Callable[[int], _Result], x: Tensor, chunk_size: int | None) -> _Result:
        """Calls the work with the number of images whose chains fit into a chunk."""
        device = device_of(x, self.model, self.guide)
        chains = chains_with_pilots(self.num_chains)
        with seeded(self.seed, device):
            return halving_chunks(lambda size: work(max(1, size // chains)), chunk_size, device)

    def forward(self, x: Tensor, size: int, bar: tqdm) -> Iterator[tuple[Forward, AnnealingPath]]:
        """Yields the forward chains and the paths of ``size`` images at a time."""
        index = self.first_image
        # the guide is asked for whole parts, of at least MAX_IMAGES images
        for images in batches(x, self.model, self.guide, size=-(-MAX_IMAGES // size) * size):
            indices = range(index, index + len(images))
            starts = start_distributions(self.model, images, self.guide, self.seed, indices)
            for at in range(0, len(images), size):
                part = slice(at, at + size)
                own = starts[part], self.seed, indices[part], self.num_chains
                path = AnnealingPath.start(self.model, images[part], *own)
                chains = path.forward(self.schedule, self.num_leapfrog, bar)
                check_log_weights(chains.log_weights, index + at, _WEIGHT)
                yield chains, path
            index += len(images)


def _simulate(model: PyroProgram, like: Tensor, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Draws one image (1, C, H, W) and its z (1, p) from the model."""
    with seeded(image_seed(seed, index, "simulation"), like.device):
        try:
            with nonfinite_as_error():
                sites = local_sites(model, like, simulate=True)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"image {index} cannot be simulated: {error}", images=[index]
            ) from error
    if len(sites.observed) != 1 or "z" not in sites.latent:
        raise ValueError(
            "images can be simulated from a model with the site 'z' and one observed site, "
            f"found {len(sites.observed)} of them"
        )
    (image,) = sites.observed.values()
    return image["value"], sites.latent["z"]["value"]
