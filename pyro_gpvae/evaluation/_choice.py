"""The choice of the most reliable estimate of log p(x), and what to do where there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_gpvae.evaluation._pareto import PARETO_LIMIT, ParetoWarning

__all__ = [
    "MIN_CHAINS",
    "MIN_EFFECTIVE",
    "Estimate",
    "ReferenceEvidence",
    "check_target",
    "choose",
    "warn_of_distrust",
]

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
        trusted: Whether the estimator is reliable by rule 1 of
            :func:`pyro_gpvae.reference_evidence`. Where it is not, ``log_evidence`` may be
            arbitrarily low.
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
            f"{float(self.log_evidence.mean()):.2f} nats, largest standard error "
            f"{float(self.standard_error.max()):.2g}, {int((~self.trusted).sum())} not reliable)"
        )


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
            "and the highest that no other refutes is taken, which may be arbitrarily low: Pareto "
            f"k is above {PARETO_LIMIT} or not known (fewer than 25 samples), and annealing has "
            f"fewer than {MIN_CHAINS} chains, or under {MIN_EFFECTIVE:.0%} of them carry the "
            "weight, or it starts from a guide of such a k. Raise num_samples, num_chains and "
            "num_steps, or give a wider guide",
            ParetoWarning,
            stacklevel=5,
        )


def check_target(
    result: ReferenceEvidence, target: float, num_samples: int, num_chains: int
) -> None:
    """Warns of images whose error is above the target, and says what is needed."""
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
            # the error of a mean falls as 1/√K for k̂ < 1/2, and as K^(k̂ - 1) above
            k = float(result.pareto_k[n])
            if not k <= PARETO_LIMIT:
                unknown += 1
                continue
            name, count = "num_samples", num_samples * ratio ** (1 / (1 - max(k, 0.5)))
        needs[name] = max(needs.get(name, 0.0), count)
    advice = [f"{name} = {_rounded_up(count):,} is enough" for name, count in needs.items()]
    if unknown:
        advice.append(
            f"no num_samples is known to be enough for {unknown} (Pareto k above {PARETO_LIMIT}): "
            "anneal (num_chains, num_steps), or give a guide"
        )
    warnings.warn(
        f"the standard error of log p(x) is above target_error = {target} nats for "
        f"{int(missed.sum())} of {len(missed)} images, {float(result.standard_error.max()):.2g} "
        f"at most: {'; '.join(advice)}",
        stacklevel=5,
    )


def _rounded_up(count: float) -> int:
    """Rounds up to two digits."""
    if not math.isfinite(count):
        return 0
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / unit) * unit
