r"""The integral of a density over one or two dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_gpvae.testing.linear_gaussian import linear_gaussian
from pyro_gpvae.testing.tools import FAILURE_RATE, NUM_DRAWS, disturb, sample_moments

if TYPE_CHECKING:
    from pyro_gpvae.testing.kit import Kit

__all__ = [
    "Quadrature",
]


class Quadrature:
    r"""Mass of q on a grid, for the first two images, and cells of about equal mass.

    The grid is uniform in asinh of the whitened z, so that its nodes are dense in the middle and
    reach far; the trapezoid rule then converges faster than any power of the spacing. It is
    refined until the integral stands.
    """

    def __init__(self, kit: Kit) -> None:
        self.note = ""
        guide, p = kit.guide, kit.latent_dim
        if not hasattr(guide, "posterior"):
            self.note = "the guide has no posterior"
            return
        x = kit.x[:2]
        if p > 2:
            if kit.build is None:
                self.note = f"p = {p}: pass make= to check by quadrature at p = 2"
                return
            p = 2
            guide = kit.make(linear_gaussian(kit.image_shape, p).to(x))
            disturb(guide, kit.seed)
        torch.manual_seed(kit.seed)
        with torch.no_grad():
            q = guide.posterior(x)
            z = q.sample((NUM_DRAWS,))
            loc, tril = sample_moments(z)
            white = torch.linalg.solve_triangular(tril, (z - loc).movedim(0, -1), upper=False)
            self.radius = max(8.0, 1.5 * float(white.abs().max()))
            previous = None
            for num_nodes in (1001, 2001, 4001, 8001) if p == 1 else (81, 161, 321, 641):
                self.mass = self._masses(q, loc, tril, p, num_nodes)
                self.integral = self.mass.flatten(1).sum(1)
                # good enough where it is far from 1
                enough = (0.1 * (self.integral - 1).abs()).clamp(min=2e-4)
                if previous is not None and bool(((self.integral - previous).abs() < enough).all()):
                    break
                previous = self.integral
            else:
                self.note = "the quadrature does not converge: q is too rough, or too narrow"
        self.p_values = [
            _fit(mass.numpy(), w.mT.numpy(), self.radius)
            for mass, w in zip(self.mass.cpu(), white.cpu(), strict=True)
        ]
        self.fits = min(self.p_values) * len(x) > FAILURE_RATE

    def _masses(self, q: Any, loc: Tensor, tril: Tensor, p: int, num_nodes: int) -> Tensor:
        end = math.asinh(self.radius)
        axis = torch.linspace(-end, end, num_nodes, dtype=loc.dtype).to(loc)
        nodes = torch.cartesian_prod(*[axis] * p).reshape(-1, 1, p)
        white, stretch = nodes.sinh(), nodes.cosh().prod(-1)
        area = (axis[1] - axis[0]).pow(p) * tril.diagonal(dim1=-2, dim2=-1).prod(-1)
        log_q = [
            q.log_prob(loc + (tril @ part.unsqueeze(-1)).squeeze(-1)) for part in white.split(16384)
        ]
        return (torch.cat(log_q).exp() * stretch * area).mT.reshape(-1, *[num_nodes] * p)


def _fit(mass: np.ndarray, white: np.ndarray, radius: float) -> float:
    """The p-value of Pearson's χ² of samples (K, p) in groups of grid cells."""
    num_nodes, p = mass.shape[0], mass.ndim
    mass = mass / mass.sum()
    place = (np.arcsinh(white) / math.asinh(radius) + 1) / 2
    index = np.rint(place * (num_nodes - 1)).astype(int)
    expected, observed, num_bins = mass, tuple(index.T), 32 if p == 1 else 8
    cells = []
    for axis in range(p):
        marginal = mass.sum(axis=tuple(a for a in range(p) if a != axis))
        cells.append(np.minimum(marginal.cumsum() * num_bins, num_bins - 1).astype(int))
    count = np.zeros([num_bins] * p)
    np.add.at(count, tuple(c[i] for c, i in zip(cells, observed, strict=True)), 1)
    total = np.zeros([num_bins] * p)
    np.add.at(total, np.ix_(*cells), expected * len(white))
    few = total < 5  # too few for χ²: pooled
    count = np.append(count[~few], count[few].sum())
    total = np.append(total[~few], total[few].sum())
    count, total = count[total > 1], total[total > 1]
    return float(stats.chi2.sf(((count - total) ** 2 / total).sum(), len(total) - 1))
