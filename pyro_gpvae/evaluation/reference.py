"""log p(x) of each image by the most reliable of several estimators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import pyro.distributions as dist
import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import AffineTransform
from torch import Tensor

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._progress import progress_bar, tqdm
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.batch import Batch, Data, size_of
from pyro_gpvae.evaluation._common import (
    Settings,
    Work,
    batches,
    check_amortised,
    check_log_weights,
    device_of,
    estimated_mean,
    evaluator,
    find_posterior,
)
from pyro_gpvae.evaluation._hmc import split_gaussian
from pyro_gpvae.evaluation._weights import Weights
from pyro_gpvae.evaluation.annealing import annealed_evidence
from pyro_gpvae.evaluation.importance import (
    PARETO_LIMIT,
    Evidence,
    ParetoWarning,
    checked_weights,
    evidence_curve,
)
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.density import base_of
from pyro_gpvae.model.guide import check_program_data
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
#: Above this k̂ the weights have no variance, and a standard error is too small.
_FINITE_VARIANCE = 0.5
#: The degrees of freedom of the Student t that covers what has heavier tails than a Gaussian.
_DEFENSIVE_DF = 4.0
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
    data: Data,
    guide: PyroProgram | None = None,
    *,
    num_samples: int = 5000,
    num_chains: int = 16,
    num_steps: int = 50,
    widths: Sequence[float] = (),
    **work: Unpack[Work],
) -> ReferenceEvidence:
    """Estimates log p(x) of every image by several estimators, and takes the most reliable one.

    The estimators are lower bounds in expectation:

    * ``IWAE(K)``, if there is a guide: importance sampling from it;
    * ``IWAE(K), width c``, if ``widths`` are given and the guide's q(z|x) is known: from q(z|x)
      widened about its mean by the factor c of highest IWAE(K/10), chosen for each image on other
      draws. What it gains over ``IWAE(K)`` is due to a better proposal, not to a better model;
    * ``IWAE(K), instance:full``: from the Gaussian of highest ELBO of each image, see
      :func:`pyro_gpvae.evaluation.optimum.optimise_gaussian`;
    * ``IWAE(K), instance:full and prior``, if the model is no ImageModel: two fifths of the draws
      are from that Gaussian, two fifths from a Student t of its location and scale with 4 degrees
      of freedom, and one fifth from the prior. With few latents these find what the Gaussian
      misses, such as another mode or a tail;
    * ``AIS(T)``: annealing from the Gaussian, see :func:`pyro_gpvae.annealed_evidence`.

    The highest of noisy estimates is too high, so the choice is by reliability:

    1. Importance sampling is trusted if its Pareto k̂ is at most 0.7, or 0.5 beside the estimate
       that draws from the prior. Annealing is trusted if it
       has at least 8 chains, an effective number of at least a quarter of them, and, if T = 1, a k̂
       of its start of at most 0.7.
    2. An estimate is refuted by a trusted one that is more than three joint standard errors
       higher, and by an untrusted one that is higher by three nats more. (By Markov's inequality
       weights overshoot p(x) by a factor :math:`e^t` with probability at most :math:`e^{-t}`.)
    3. Of the trusted estimates that are left, the one of smallest standard error is taken. If none
       is left, the one of the others that is highest less two standard errors is taken, with one
       ParetoWarning for all such images.

    Trusted does not mean exact: if the posterior has several modes, all estimators may miss the
    same ones. :func:`pyro_gpvae.bidirectional` shows such a case on simulated images.

    Arguments:
        model, data: See :func:`pyro_gpvae.log_weights`. All latents must be continuous.
        guide: A guide for it; None leaves out what needs one.
        num_samples: The number K of samples.
        num_chains: The number of chains of annealing; 0 leaves it out.
        num_steps: Its number T of steps.
        widths: The factors c to choose from, such as :data:`WIDTHS`; by default none.
        work: See :class:`pyro_gpvae.evaluation._common.Work`; the seed is 0 by default.

    Raises:
        ValueError: If a number is not positive, or the data do not fit the model.
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
    if not all(0 < width < math.inf for width in widths):
        raise ValueError(f"widths must be positive and finite, got {list(widths)}")
    check_program_data(model, data)
    check_amortised(guide)
    settings = Settings(**work)
    progress = settings.progress
    label = progress if isinstance(progress, str) else "reference"

    def run(size: int) -> list[_Part]:
        parts, index = [], settings.first_image
        with progress_bar(progress, label, size_of(data), unit="image") as bar:
            for batch in batches(data, model, guide):
                part = _Part(model, batch, guide, num_samples, settings, index)
                part.sample(widths, size, bar)
                if num_chains:
                    shown = f"{label}: annealing" if progress else False
                    part.anneal(num_chains, num_steps, chunk_size=size, progress=shown)
                parts.append(part)
                index += len(batch[0])
        return parts

    parts = halving_chunks(run, settings.chunk_size, device_of(data, model, guide))
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
        batch: Batch,
        guide: Any,
        num_samples: int,
        settings: Settings,
        first_image: int,
    ) -> None:
        self.model, self.guide, self.num_samples = model, guide, num_samples
        self.seed, self.first_image = settings.seed or 0, first_image
        self.device = batch[0].device
        self.own, self.full = f"IWAE({num_samples})", f"IWAE({num_samples}), instance:full"
        with seeded(image_seed(self.seed, first_image, "optimum"), self.device):
            optimum = optimise_gaussian(model, batch, start=guide, vectorized=settings.vectorized)
        optimum.warn_unless_converged(stacklevel=6)
        self.density, self.best = optimum.density, optimum.posterior
        # a guide may fail in particles where the model does not
        self.vectorized = None if self.density.vectorized else False
        self.estimates: dict[str, Estimate] = {}
        self.trust: dict[str, Tensor] = {}
        self.width = self.density.origin.new_full((len(self.density),), math.nan)

    def sample(self, widths: Sequence[float], chunk_size: int, bar: tqdm) -> None:
        """Adds the estimates by importance sampling, which take one image at a time."""
        columns: dict[str, list[Tensor]] = {}

        def sampled(n: int, q: Any, noise: str) -> Tensor:
            """Log weights (K, 1) of the n-th image, with random numbers that the noise names."""
            first, batch = self.first_image + n, self.density[n : n + 1].batch
            with seeded(image_seed(self.seed, first, noise), self.device):
                weights = Weights(self.model, q, batch, self.vectorized)
                found = checked_weights(weights, batch, self.num_samples, chunk_size, first)
            if q is self.guide:
                self.vectorized = weights.vectorized
            return found

        mixed = f"{self.full} and prior"
        parts: list[Any] = split_gaussian(base_of(self.best))
        for n in range(len(self.density)):
            proposals = {} if self.guide is None else {self.own: self.guide}
            if widths and (wider := self._widened(n, widths)):
                scores = {c: sampled(n, q, "choice of width") for c, q in wider.items()}
                # one estimate from all draws may be high by chance: the mean of ten is safer
                count = max(1, self.num_samples // 10)
                c = max(scores, key=lambda c: float(evidence_curve(scores[c], [count])[count]))
                proposals[f"{self.own}, width c"], self.width[n] = wider[c], c
            proposals[self.full] = PrecomputedPosterior(self.density[n : n + 1].posterior(parts[n]))
            for name, q in proposals.items():
                columns.setdefault(name, []).append(sampled(n, q, name))
            if not isinstance(self.model, ImageModel):
                found = self._defensive(n, parts[n], chunk_size, mixed)
                columns.setdefault(mixed, []).append(found)
            bar.update()
        for name, column in columns.items():
            evidence = Evidence.from_log_weights(torch.cat(column, dim=1))
            self.estimates[name] = evidence.log_evidence, evidence.standard_error, evidence.pareto_k
            limit = PARETO_LIMIT if name == mixed or mixed not in columns else _FINITE_VARIANCE
            self.trust[name] = evidence.pareto_k <= limit

    def _widened(self, n: int, widths: Sequence[float]) -> dict[float, PrecomputedPosterior]:
        """q(z|x) of the n-th image, widened about its mean m by c: z' = m + c (z - m)."""
        density = self.density[n : n + 1]
        if self.guide is None or not density.is_plain:
            return {}
        with seeded(image_seed(self.seed, self.first_image + n, "widened"), self.device):
            q: Any = find_posterior(self.guide, density.batch)
            if q is None:
                return {}
            mean = estimated_mean(q)
        # the cache scores a draw at its own z, so that a flow does not have to invert it
        wider = {c: AffineTransform(mean - c * mean, c, event_dim=1, cache_size=1) for c in widths}
        return {
            c: PrecomputedPosterior(TransformedDistribution(q, [map], validate_args=False))
            for c, map in wider.items()
        }

    def _defensive(self, n: int, q: Any, chunk_size: int, noise: str) -> Tensor:
        """Log weights (K, 1) of the n-th image, of draws from its Gaussian, a Student t, p(z)."""
        density, count = self.density[n : n + 1], self.num_samples // 5
        wide = dist.MultivariateStudentT(q.loc.new_tensor(_DEFENSIVE_DF), q.loc, q.scale_tril)
        counts = [self.num_samples - 3 * count, 2 * count, count]
        with seeded(image_seed(self.seed, self.first_image + n, noise), self.device):
            u = [part.sample((k,)) for part, k in zip((q, wide), counts, strict=False)]
            if count:
                u.append(density.sample_prior(count))
        log_shares = [math.log(k / self.num_samples) if k else -math.inf for k in counts]
        found = []
        for part in torch.cat(u).split(chunk_size):
            logs = [q.log_prob(part), wide.log_prob(part), density.log_prior(part)]
            parts = [log_q + share for log_q, share in zip(logs, log_shares, strict=True)]
            found.append(density.log_prob(part) - torch.stack(parts).logsumexp(0))
        log_weights = torch.cat(found)
        check_log_weights(log_weights, self.first_image + n, "log p(x, z) - log q(z|x)")
        return log_weights

    def anneal(self, num_chains: int, num_steps: int, **work: Any) -> None:
        """Adds the estimate by annealing from the optimum."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)  # the trust tells it of each image
            found = annealed_evidence(
                self.model, self.density.batch, PrecomputedPosterior(self.best),
                num_chains=num_chains, num_steps=num_steps, seed=self.seed,
                first_image=self.first_image, vectorized=self.density.vectorized, **work,
            )  # fmt: skip
        name, no_k = f"AIS({num_steps})", torch.full_like(found.log_evidence, math.nan)
        self.estimates[name] = found.log_evidence, found.standard_error, no_k
        trust = found.effective_sample_size >= MIN_EFFECTIVE * num_chains
        trust &= num_chains >= MIN_CHAINS
        if num_steps == 1:  # then it is importance sampling with few draws, and without k̂
            trust &= self.trust[self.full]
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
    by_value = torch.where(standing, value - 2 * error.nan_to_num(), -math.inf).argmax(0)
    best = torch.where(usable.any(0), by_error, by_value)
    taken = [rows.gather(0, best.unsqueeze(0))[0] for rows in (value, error, k)]
    chosen = tuple(names[index] for index in best.tolist())
    return ReferenceEvidence(taken[0], taken[1], chosen, taken[2], usable.any(0), estimates, width)


def warn_of_distrust(result: ReferenceEvidence) -> None:
    if count := int((~result.trusted).sum()):
        warnings.warn(
            f"no estimate of log p(x) is reliable for {count} of {len(result.trusted)} images, "
            "so that it may be arbitrarily low (see rule 1 of reference_evidence). Raise "
            "num_samples, num_chains and num_steps, or give a wider guide",
            ParetoWarning,
            stacklevel=5,
        )
