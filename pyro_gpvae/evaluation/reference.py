r"""log p(x) of each image by the most reliable of several estimators, named image by image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation.annealing import annealed_evidence
from pyro_gpvae.evaluation.importance import (
    MAX_IMAGES,
    PARETO_LIMIT,
    Evidence,
    ParetoWarning,
    as_pixels,
    check_batch,
    log_weights,
)
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import make_guide

__all__ = ["Estimate", "ReferenceEvidence", "reference_evidence"]

#: log p(x), its standard error, and k̂ where there is one; each (B,).
Estimate = tuple[Tensor, Tensor, Tensor]

# by how many standard errors, and nats more for weights of heavy tail, a bound refutes another
_REFUTING_ERRORS, _REFUTING_NATS = 3.0, 3.0
#: Annealing with fewer chains is not trusted: their spread does not tell their error.
MIN_CHAINS = 8
# nor where fewer than this part of the chains carries the weight
_MIN_EFFECTIVE = 0.25


@dataclass(frozen=True, repr=False)
class ReferenceEvidence:
    """Reference estimates of log p(x) for B images, in nats; tensors have shape (B,).

    Attributes:
        log_evidence: log p(x).
        standard_error: Its Monte-Carlo standard error.
        estimator: Which estimator gave it, a name an image, a key of ``estimates``.
        pareto_k: Its Pareto k̂; not a number for annealing.
        trusted: Whether the estimator is reliable by rule 1 of :func:`reference_evidence`. Where
            it is not, ``log_evidence`` may be too low by any amount.
        estimates: What every estimator said of every image, by name.
    """

    log_evidence: Tensor
    standard_error: Tensor
    estimator: tuple[str, ...]
    pareto_k: Tensor
    trusted: Tensor
    estimates: Mapping[str, Estimate]

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.estimator.count(n)} by {n}" for n in self.estimates)
        return (
            f"ReferenceEvidence({len(self.log_evidence)} images, {counts}: mean log p(x) = "
            f"{float(self.log_evidence.mean()):.2f} nats, largest standard error "
            f"{float(self.standard_error.max()):.2g}, {int((~self.trusted).sum())} not reliable)"
        )


@with_own_parameters
@torch.no_grad()
def reference_evidence(
    model: PyroProgram,
    x: Tensor,
    guide: PyroProgram | None = None,
    *,
    num_samples: int = 5000,
    num_chains: int = 16,
    num_steps: int = 50,
    target_error: float | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    first_image: int = 0,
    progress: bool | str = False,
) -> ReferenceEvidence:
    r"""Estimates log p(x) of every image as well as it can, and says how.

    These estimators are run for every image, as far as they are possible:

    * ``IWAE(K)``: importance sampling from the guide;
    * ``IWAE(K), instance:full``: from the Gaussian of highest ELBO of each image, for an
      :class:`pyro_gpvae.ImageModel`; optimised once per image, from the guide's mean if any;
    * ``AIS(T)``: :func:`pyro_gpvae.evaluation.annealing.annealed_evidence` from that Gaussian, else from the
      guide, else from the prior;
    * ``AIS(T), prior``: from the prior as well, where ``AIS(T)`` starts from the guide. A guide
      that is too narrow leads all chains to too low a value, on which they agree.

    All are lower bounds in expectation: the *true* best is the highest. But the highest of noisy
    estimates is too high, the more so the noisier they are, so the choice is by reliability:

    1. An importance estimate is trusted if its Pareto k̂ is at most 0.7. Annealing is trusted if
       it has 8 chains or more and an effective number of at least a quarter of them; from the
       guide only if the guide's own k̂ is at most 0.7; and with T = 1, where no chain moves, only
       from a start whose k̂ is at most 0.7.
    2. An estimate is refuted by a trusted one that is more than three joint standard errors
       higher; such a gap is no noise but a tail or a mode that the lower one has not found. By
       Markov's inequality even weights of heavy tail overshoot p(x) by a factor :math:`e^t` with
       probability at most :math:`e^{-t}`, so that an untrusted estimate refutes others if it is
       higher by three nats more.
    3. Of the trusted ones left, the one of smallest standard error is taken; if none is left,
       the highest of the rest, with one warning for all such images.

    Trusted is not exact. The weights of 16 chains may all miss the same tail: of 200 images of a
    linear Gaussian model with p = 10, annealed in 50 steps from the prior, rule 1 trusts two
    thirds, and one in 20 of those is off by more than four of its standard errors, by 1.8 nats at
    worst; 200 steps do better (one in 200). Asking for more effective chains makes it worse, as
    that prefers weights that have missed their tail.

    **A limit.** All but the prior's chains start from one mode. Where the posterior has several,
    as for a decoder of z², importance sampling and annealing from the best Gaussian may all see
    that one only, agree, and be too low by -log of its share (log 2 for two equal modes), with a
    small standard error, a small k̂ and ``trusted``. Nothing that is computed here can tell.
    :func:`pyro_gpvae.evaluation.annealing.bidirectional` shows it by those images simulated from the model
    whose z lies in another mode, and a guide that covers the modes, with a large K, refutes it.

    The smallest of several estimated errors favours weights that have missed their tail, whose
    estimate is too low: the rule errs to the side of a lower bound. Rule 1 is there to limit that.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, 2024.
        Wu, Burda, Salakhutdinov and Grosse, *On the quantitative analysis of decoder-based
        generative models*, 2017.

    Arguments:
        model: A Pyro model with the site ``"z"`` and observations in ``plate("data", B)``.
        x: Images (B, C, H, W), uint8, or floats, which are taken as they are.
        guide: A guide for it; None leaves out what needs one.
        num_samples: K.
        num_chains: Chains of annealing; 0 leaves it out. The standard error of 2 to 7 chains is
            no use: their estimate is listed, but not trusted.
        num_steps: Its steps T.
        target_error: The standard error that is wanted, in nats. Warns of images that miss it,
            and says which K or number of chains would do.
        chunk_size: How many latent vectors are decoded at once; bounds the memory.
        seed: The same seed gives the same numbers; the global random state is left as it was.
        first_image: The index of the first image of x, where x is a part of a data set. Every
            image has random numbers of its own, in whatever batch it comes.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If a number is not positive, x is not a batch of images, or no estimator is
            possible: no guide, no ImageModel and no chains.
        NonFiniteError: If a density is NaN or +∞; names the images.

    Warns:
        ParetoWarning: If no estimate is trusted for some images.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> x = model.images(3)
        >>> result = reference_evidence(model, x, num_samples=200)
        >>> result.estimator[0]
        'IWAE(200), instance:full'
        >>> bool(((result.log_evidence - model.log_evidence(x)).abs() < 0.01).all())
        True
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    if num_chains < 0 or num_chains == 1:
        raise ValueError(f"num_chains must be 0 (no annealing) or at least 2, got {num_chains}")
    if target_error is not None and not target_error > 0:
        raise ValueError(f"target_error must be positive, got {target_error}")
    check_batch(model, x)
    can_optimise = hasattr(model, "log_joint") and hasattr(model, "likelihood")
    if guide is None and not can_optimise and not num_chains:
        raise ValueError(
            "without a guide, an ImageModel or chains there is no way to estimate log p(x)"
        )
    label = progress if isinstance(progress, str) else "reference"
    own, optimum = f"IWAE({num_samples})", f"IWAE({num_samples}), instance:full"
    parts: list[dict[str, Estimate]] = []
    trusts: list[dict[str, Tensor]] = []
    with tqdm(total=len(x), desc=label, unit="image", disable=not progress) as bar:
        for begin in range(0, len(x), MAX_IMAGES):
            images = as_pixels(model, x[begin : begin + MAX_IMAGES])
            first = first_image + begin
            start: Any = guide if hasattr(guide, "posterior") else None
            proposals: dict[str, Any] = {} if guide is None else {own: guide}
            if can_optimise:
                with seeded(image_seed(seed, first, "optimum"), images.device):
                    optimiser = make_guide("instance:full", model, warm_start=start)
                    start = PrecomputedPosterior(optimiser.posterior(images))
                proposals[optimum] = start
            columns: dict[str, list[Tensor]] = {name: [] for name in proposals}
            for n in range(len(images)):
                for name, q in proposals.items():
                    with seeded(image_seed(seed, first + n, name), images.device):
                        weights = log_weights(
                            model,
                            _of_image(q.q, n) if name == optimum else q,
                            images[n : n + 1],
                            num_samples,
                            chunk_size=chunk_size,
                        )
                    columns[name].append(weights)
                bar.update()
            part: dict[str, Estimate] = {}
            trust: dict[str, Tensor] = {}
            for name, column in columns.items():
                found = Evidence.from_log_weights(torch.cat(column, dim=1))
                part[name] = found.log_evidence, found.standard_error, found.pareto_k
                trust[name] = found.pareto_k <= PARETO_LIMIT
            starts = {f"AIS({num_steps})": start} if num_chains else {}
            if num_chains and start is not None and start is guide:
                starts[f"AIS({num_steps}), prior"] = None
            for name, q in starts.items():
                annealed = annealed_evidence(
                    model,
                    images,
                    q,
                    num_chains=num_chains,
                    num_steps=num_steps,
                    chunk_size=chunk_size,
                    seed=seed,
                    first_image=first,
                    progress=f"{label}: annealing" if progress else False,
                )
                no_k = torch.full_like(annealed.log_evidence, math.nan)
                part[name] = annealed.log_evidence, annealed.standard_error, no_k
                # from equal weights the number is all chains, but for rounding
                trust[name] = annealed.effective_sample_size >= _MIN_EFFECTIVE * num_chains
                trust[name] &= num_chains >= MIN_CHAINS
                if q is None:
                    trust[name] &= num_steps > 1  # else it is IWAE of few draws, without a k̂
                elif q is guide or num_steps == 1:
                    trust[name] &= trust[own if q is guide else optimum]
            parts.append(part)
            trusts.append(trust)
    estimates: dict[str, Estimate] = {}
    for name in parts[0]:
        value, error, k = (torch.cat(c) for c in zip(*(p[name] for p in parts), strict=True))
        estimates[name] = value, error, k
    result = _choose(estimates, {n: torch.cat([t[n] for t in trusts]) for n in trusts[0]})
    _warn_of_distrust(result)
    if target_error is not None:
        _check_target(result, target_error, num_samples, num_chains)
    return result


def _of_image(q: Any, n: int) -> PrecomputedPosterior:
    """The guide for one of the images that these normals with full covariance are for."""
    part = slice(n, n + 1)
    return PrecomputedPosterior(type(q)(q.loc[part], scale_tril=q.scale_tril[part]))


def _choose(estimates: Mapping[str, Estimate], trust: Mapping[str, Tensor]) -> ReferenceEvidence:
    """Applies the rule of :func:`reference_evidence`."""
    names = list(estimates)
    value, error, k = (torch.stack(rows) for rows in zip(*estimates.values(), strict=True))
    trusted = torch.stack([trust[name] for name in names])
    # [i, j]: how much higher estimate j is than i, and what would still be noise
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
    return ReferenceEvidence(taken[0], taken[1], chosen, taken[2], usable.any(0), estimates)


def _warn_of_distrust(result: ReferenceEvidence) -> None:
    count = int((~result.trusted).sum())
    if count:
        warnings.warn(
            f"no estimate of log p(x) is reliable for {count} of {len(result.trusted)} images: "
            f"Pareto k is above {PARETO_LIMIT} or not known (fewer than 25 samples), and annealing "
            f"has fewer than {MIN_CHAINS} chains, or under {_MIN_EFFECTIVE:.0%} of them carry the "
            "weight, or its start is a guide of such a k. The highest that nothing refutes is "
            "given, which may be too low by any amount; raise num_samples, num_chains and "
            "num_steps, or give a wider guide",
            ParetoWarning,
            stacklevel=5,
        )


def _check_target(
    result: ReferenceEvidence, target: float, num_samples: int, num_chains: int
) -> None:
    """Warns of images whose error is above the target, and says what would do."""
    missed = ~(result.standard_error <= target)
    if not missed.any():
        return
    needs: dict[str, float] = {}
    unknown = 0
    for n in missed.nonzero()[:, 0].tolist():
        ratio = float(result.standard_error[n]) / target
        if result.estimator[n].startswith("AIS"):
            name, count = "num_chains", num_chains * ratio**2
        else:
            # the error of a mean falls as 1/√K for k̂ < 1/2, then as K^(k̂ - 1)
            k = float(result.pareto_k[n])
            if not k <= PARETO_LIMIT:
                unknown += 1
                continue
            name, count = "num_samples", num_samples * ratio ** (1 / (1 - max(k, 0.5)))
        needs[name] = max(needs.get(name, 0.0), count)
    advice = [f"{name} = {_rounded_up(count):,} would do" for name, count in needs.items()]
    if unknown:
        advice.append(
            f"no num_samples is known to do for {unknown} (Pareto k above {PARETO_LIMIT}): anneal "
            "(num_chains, num_steps), or give a guide"
        )
    warnings.warn(
        f"the standard error of log p(x) is above target_error = {target} nats for "
        f"{int(missed.sum())} of {len(missed)} images, {float(result.standard_error.max()):.2g} "
        f"at most: {'; '.join(advice)}",
        stacklevel=5,
    )


def _rounded_up(count: float) -> int:
    """To two digits."""
    if not math.isfinite(count):
        return 0
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / unit) * unit
