"""log p(x) of each image by the most reliable of several estimators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation._common import (
    batches,
    check_at_least,
    check_images,
    device_of,
    estimated_mean,
    evaluator,
    progress_bar,
)
from pyro_gpvae.evaluation.annealing import annealed_evidence
from pyro_gpvae.evaluation.importance import (
    PARETO_LIMIT,
    Evidence,
    ParetoWarning,
    evidence_curve,
    weights_in_chunks,
)
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import HasPosterior, posterior_of
from pyro_gpvae.model.image_model import ImageModel

__all__ = ["WIDTHS", "ReferenceEvidence", "reference_evidence"]

#: Width factors c for :func:`reference_evidence`.
WIDTHS = (0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
#: log p(x), its standard error, and k̂ where there is one; each (B,).
Estimate = tuple[Tensor, Tensor, Tensor]
#: Annealing with fewer chains is not trusted: their spread does not tell their error.
MIN_CHAINS = 8
# a bound refutes another one if it is higher by so many standard errors, and, if its own weights
# have a heavy tail, by so many nats more
_REFUTING_ERRORS, _REFUTING_NATS = 3.0, 3.0
#: Annealing is not trusted where a smaller share of the chains carries the weight.
MIN_EFFECTIVE = 0.25


@dataclass(frozen=True, repr=False)
class ReferenceEvidence:
    """Reference estimates of log p(x) for B images, in nats; tensors have shape (B,).

    Attributes:
        log_evidence: log p(x).
        standard_error: Its Monte-Carlo standard error.
        estimator: The estimator that gave it, one key of ``estimates`` per image.
        pareto_k: Its Pareto k̂; NaN for annealing.
        trusted: Whether it is reliable by rule 1 of :func:`pyro_gpvae.reference_evidence`. If not,
            ``log_evidence`` may be arbitrarily low.
        estimates: The estimates of every estimator, by name.
        width: The chosen width c of the row ``IWAE(K), width c``; NaN without one.
    """

    log_evidence: Tensor
    standard_error: Tensor
    estimator: tuple[str, ...]
    pareto_k: Tensor
    trusted: Tensor
    estimates: Mapping[str, Estimate]
    width: Tensor

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.estimator.count(n)} by {n}" for n in self.estimates)
        return (
            f"ReferenceEvidence({len(self.log_evidence)} images, {counts}: mean log p(x) = "
            f"{float(self.log_evidence.mean()):.2f}, {int((~self.trusted).sum())} not reliable)"
        )


@evaluator
def reference_evidence(
    model: PyroProgram,
    x: Tensor,
    guide: PyroProgram | None = None,
    *,
    num_samples: int = 5000,
    num_chains: int = 16,
    num_steps: int = 50,
    widths: Sequence[float] = (),
    chunk_size: int | None = None,
    seed: int = 0,
    first_image: int = 0,
    progress: bool | str = False,
) -> ReferenceEvidence:
    """Estimates log p(x) of every image by several estimators, and takes the most reliable one.

    The estimators, as far as model and guide allow them, are lower bounds in expectation:

    * ``IWAE(K)``: importance sampling from the guide;
    * ``IWAE(K), width c``, if ``widths`` are given and the guide has ``posterior(x)``: from q(z|x)
      widened about its mean by the factor c of highest IWAE(K/10), chosen for each image on other
      draws. What it gains over ``IWAE(K)`` is due to a better proposal, not to a better model;
    * ``IWAE(K), instance:full``: from the Gaussian of highest ELBO of each image, see
      :func:`pyro_gpvae.evaluation.optimum.optimise_gaussian`, for an ImageModel;
    * ``AIS(T)``: annealing from that Gaussian, else from the guide, else from the prior, see
      :func:`pyro_gpvae.annealed_evidence`;
    * ``AIS(T), prior``: from the prior as well, where ``AIS(T)`` starts from the guide. All chains
      from a guide that is too narrow agree on a value that is too low.

    The highest of noisy estimates is too high, so the choice is by reliability:

    1. Importance sampling is trusted if its Pareto k̂ is at most 0.7. Annealing is trusted if it
       has at least 8 chains, an effective number of at least a quarter of them, and, if it starts
       from the guide or has T = 1, a k̂ of its start of at most 0.7.
    2. An estimate is refuted by a trusted one that is more than three joint standard errors
       higher, and by an untrusted one that is higher by three nats more. (By Markov's inequality
       weights overshoot p(x) by a factor :math:`e^t` with probability at most :math:`e^{-t}`.)
    3. Of the trusted estimates that are left, the one of smallest standard error is taken. If none
       is left, the highest of the others is taken, with one ParetoWarning for all such images.

    Trusted does not mean exact: if the posterior has several modes, all estimators may miss the
    same ones. :func:`pyro_gpvae.bidirectional` shows such a case on simulated images.

    Arguments:
        model, x, chunk_size: See :func:`pyro_gpvae.log_weights`.
        guide: A guide for it; None leaves out what needs one.
        num_samples: K.
        num_chains: The number of chains of annealing; 0 leaves it out.
        num_steps: Its number T of steps.
        widths: The factors c to choose from, such as :data:`WIDTHS`; by default none.
        seed, first_image, progress: See :func:`pyro_gpvae.annealed_evidence`.

    Raises:
        ValueError: If a number is not positive, x is not a batch of images, or no estimator is
            possible: no guide, no ImageModel and no chains.
        NonFiniteError: If a density is NaN or +∞; names the images.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> result = reference_evidence(model, model.images(3), num_samples=200)
        >>> result.estimator[0]
        'IWAE(200), instance:full'
    """
    check_at_least(2, num_samples=num_samples)
    if num_chains < 0 or num_chains == 1:
        raise ValueError(f"num_chains must be 0 (no annealing) or at least 2, got {num_chains}")
    check_images(model, x)
    if guide is None and not isinstance(model, ImageModel) and not num_chains:
        raise ValueError(
            "log p(x) cannot be estimated without a guide, an ImageModel or chains: give one"
        )
    label = progress if isinstance(progress, str) else "reference"

    def work(size: int) -> list[_Part]:
        options = {"num_chains": num_chains, "num_steps": num_steps, "chunk_size": size}
        parts, index = [], first_image
        with progress_bar(progress, label, len(x), unit="image") as bar:
            for images in batches(x, model, guide):
                part = _Part(model, images, guide, num_samples, seed, index)
                part.sample(widths, size, bar)
                if num_chains:
                    part.anneal(f"{label}: annealing" if progress else False, **options)
                parts.append(part)
                index += len(images)
        return parts

    parts = halving_chunks(work, chunk_size, device_of(x, model, guide))
    estimates: dict[str, Estimate] = {}
    for name in parts[0].estimates:
        columns = zip(*(part.estimates[name] for part in parts), strict=True)
        value, error, k = (torch.cat(column) for column in columns)
        estimates[name] = value, error, k
    trust = {name: torch.cat([part.trust[name] for part in parts]) for name in estimates}
    result = choose(estimates, trust, torch.cat([part.width for part in parts]))
    warn_of_distrust(result)
    return result


class _Part:
    """The estimates of images that are refined together, and whether each one is trusted."""

    def __init__(
        self,
        model: PyroProgram,
        images: Tensor,
        guide: Any,
        num_samples: int,
        seed: int,
        first_image: int,
    ) -> None:
        self.model, self.images, self.guide = model, images, guide
        self.num_samples, self.seed, self.first_image = num_samples, seed, first_image
        self.own, self.full = f"IWAE({num_samples})", f"IWAE({num_samples}), instance:full"
        self.start: Any = guide if isinstance(guide, HasPosterior) else None
        self.best: Any = None
        if isinstance(model, ImageModel):
            with seeded(image_seed(seed, first_image, "optimum"), images.device):
                optimum = optimise_gaussian(model, images, "full", start=self.start)
            optimum.warn_unless_converged(stacklevel=6)
            self.best = optimum.posterior
            self.start = PrecomputedPosterior(self.best)
        self.estimates: dict[str, Estimate] = {}
        self.trust: dict[str, Tensor] = {}
        self.width = images.new_full((len(images),), math.nan)

    def sample(self, widths: Sequence[float], chunk_size: int, bar: tqdm) -> None:
        """Adds the estimates by importance sampling, which take one image at a time."""
        columns: dict[str, list[Tensor]] = {}

        def sampled(n: int, q: Any, noise: str) -> Tensor:
            """Log weights (K, 1) of the n-th image, with random numbers that the noise names."""
            first, image = self.first_image + n, self.images[n : n + 1]
            with seeded(image_seed(self.seed, first, noise), image.device):
                return weights_in_chunks(self.model, q, image, self.num_samples, chunk_size, first)

        for n in range(len(self.images)):
            proposals = {} if self.guide is None else {self.own: self.guide}
            if widths and isinstance(self.guide, HasPosterior):
                wider = self._widened(n, widths)
                scores = {c: sampled(n, q, "choice of width") for c, q in wider.items()}
                # one estimate from all draws may be high by chance: the mean of ten is safer
                count = max(1, self.num_samples // 10)
                c = max(scores, key=lambda c: float(evidence_curve(scores[c], [count])[count]))
                proposals[f"{self.own}, width c"], self.width[n] = wider[c], c
            if self.best is not None:
                proposals[self.full] = self._optimum(n)
            for name, q in proposals.items():
                columns.setdefault(name, []).append(sampled(n, q, name))
            bar.update()
        for name, column in columns.items():
            found = Evidence.from_log_weights(torch.cat(column, dim=1))
            self.estimates[name] = found.log_evidence, found.standard_error, found.pareto_k
            self.trust[name] = found.pareto_k <= PARETO_LIMIT

    def _optimum(self, n: int) -> PrecomputedPosterior:
        loc, scale = (t[n : n + 1] for t in (self.best.loc, self.best.scale_tril))
        return PrecomputedPosterior(type(self.best)(loc, scale_tril=scale))

    def _widened(self, n: int, widths: Sequence[float]) -> dict[float, PrecomputedPosterior]:
        """q(z|x) of the n-th image, widened about its mean, for each width."""
        image = self.images[n : n + 1]
        with seeded(image_seed(self.seed, self.first_image + n, "widened"), image.device):
            q: Any = posterior_of(self.guide, image)
            mean = estimated_mean(q)[0]
        return {c: PrecomputedPosterior(Widened(q, mean, c)) for c in widths}

    def anneal(self, progress: bool | str, **options: int) -> None:
        """Adds the estimates by annealing from the optimum, the guide and the prior."""
        name = f"AIS({options['num_steps']})"
        starts = {name: self.start}
        if self.start is not None and self.start is self.guide:
            starts[f"{name}, prior"] = None
        seed = {"seed": self.seed, "first_image": self.first_image}
        for name, q in starts.items():
            found = annealed_evidence(
                self.model, self.images, q, progress=progress, **seed, **options
            )
            no_k = torch.full_like(found.log_evidence, math.nan)
            self.estimates[name] = found.log_evidence, found.standard_error, no_k
            trust = found.effective_sample_size >= MIN_EFFECTIVE * found.num_chains
            trust &= found.num_chains >= MIN_CHAINS
            if q is None:
                trust &= found.num_steps > 1  # else it is IWAE with few draws, and without k̂
            elif q is self.guide or found.num_steps == 1:
                trust &= self.trust[self.own if q is self.guide else self.full]
            self.trust[name] = trust


def choose(
    estimates: Mapping[str, Estimate], trust: Mapping[str, Tensor], width: Tensor
) -> ReferenceEvidence:
    """Applies the rules of :func:`pyro_gpvae.reference_evidence`."""
    names = list(estimates)
    value, error, k = (torch.stack(rows) for rows in zip(*estimates.values(), strict=True))
    trusted = torch.stack([trust[name] for name in names])
    # [i, j]: how much higher estimate j is than i, and how much would be noise
    excess = value.unsqueeze(0) - value.unsqueeze(1)
    noise = _REFUTING_ERRORS * torch.hypot(error.unsqueeze(0), error.unsqueeze(1))
    noise = noise + _REFUTING_NATS * (~trusted).unsqueeze(0)
    standing = ~(excess > noise).any(dim=1)
    usable = standing & trusted
    by_error = torch.where(usable, error, math.inf).argmin(0)
    by_value = torch.where(standing, value, -math.inf).argmax(0)
    best = torch.where(usable.any(0), by_error, by_value)
    taken = [rows.gather(0, best.unsqueeze(0))[0] for rows in (value, error, k)]
    chosen = tuple(names[index] for index in best.tolist())
    return ReferenceEvidence(taken[0], taken[1], chosen, taken[2], usable.any(0), estimates, width)


def warn_of_distrust(result: ReferenceEvidence) -> None:
    count = int((~result.trusted).sum())
    if count:
        warnings.warn(
            f"no estimate of log p(x) is reliable for {count} of {len(result.trusted)} images, "
            "so that it may be arbitrarily low (see rule 1 of reference_evidence). Raise "
            "num_samples, num_chains and num_steps, or give a wider guide",
            ParetoWarning,
            stacklevel=5,
        )


class Widened(TorchDistribution):
    r"""Distribution of :math:`m + c (z - m)` with :math:`z \sim q`: q widened about its mean m.

    .. math:: q_c(z') = q\bigl(m + (z' - m) / c\bigr) \, c^{-p}

    The density is exact for any q with batch shape (B,) and any m (B, p). The last sample is scored
    by the draw of q that it came from, so that an autoregressive flow does not have to invert it.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, base: Any, mean: Tensor, factor: float) -> None:
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"the width must be positive and finite, got {factor}")
        self.base, self.centre, self.factor = base, mean, factor
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Widened:
        shape = torch.Size(batch_shape)
        mean = self.centre.expand(shape + self.event_shape)
        return Widened(self.base.expand(shape), mean, self.factor)

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        z = self.base.sample(torch.Size(sample_shape))
        value: Tensor = self.centre + self.factor * (z - self.centre)
        self._last = value, z
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is value:
            z = self._last[1]
        else:
            z = self.centre + (value - self.centre) / self.factor
        density: Tensor = self.base.log_prob(z)
        return density - self.event_shape.numel() * math.log(self.factor)
