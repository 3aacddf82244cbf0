"""The tail of importance weights: whether their mean can be trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PARETO_LIMIT", "ParetoWarning", "pareto_k"]

#: Above this k̂, importance sampling does not converge at any practical rate.
PARETO_LIMIT = 0.7


class ParetoWarning(UserWarning):
    """The weights of some images have a tail too heavy for their estimate to be trusted."""


@torch.no_grad()
def pareto_k(log_weights: Tensor) -> Tensor:
    """Returns the shape k̂ of the generalised Pareto tail of each image's weights, (B,).

    Weights have about 1/k finite moments. Below 0.5 the central limit theorem holds; up to 0.7
    estimates converge at a practical rate.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, 2024.
        https://arxiv.org/abs/1507.02646

    Arguments:
        log_weights: Log weights (K, B) in nats.

    Returns:
        k̂, (B,): NaN for K < 25 or weights that are NaN; 0 if the five largest weights are equal;
        ∞ if they differ by more than 700 nats, or all weights are zero.

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
