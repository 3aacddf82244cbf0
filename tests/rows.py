"""A linear-Gaussian table of rows (B, 3), as plain functions, whose evidence is known exactly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -1.2]]).double()
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()


def linear(x: Tensor) -> None:
    """z ~ N(0, I) and x = W z + noise of standard deviation 0.5; in float64 by default."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.mT, 0.5).to_event(1), obs=x)


def evidence_of_linear(x: Tensor) -> Tensor:
    """log p(x), (B,)."""
    covariance = WEIGHT @ WEIGHT.mT + 0.25 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
