r"""Simulation-based calibration: is q(z|x) the posterior, on average over the model's images?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._plates import data_plate, in_plate, is_sampled
from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.model.guide import HasPosterior, posterior_of

__all__ = ["Calibration", "simulation_based_calibration"]


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of the true z among draws from q(z|x): uniform if q is the posterior.

    Attributes:
        ranks: The number of draws below the truth, from 0 to L, of N simulations: (N, p).
        num_draws: The number L of draws.
        p_value: For each coordinate, the p-value of a χ² test of uniform ranks: (p,).
    """

    ranks: Tensor
    num_draws: int
    p_value: Tensor

    def passed(self, level: float = 0.01) -> bool:
        """Whether no coordinate is refuted, at this level for all of them together."""
        return bool(self.p_value.min() * len(self.p_value) > level)

    def table(self) -> pd.DataFrame:
        """Returns a row for each coordinate that tells in what way q is wrong.

        ``centre``, the mean rank as a share of L, is 0.5 if q is right, and larger if q lies too
        low. ``spread``, the standard deviation of the ranks in units of that of uniform ranks, is
        1 if q is right, and larger if q is too narrow.
        """
        share = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        uniform = math.sqrt((1 - (self.num_draws + 1) ** -2) / 12)
        columns = torch.stack([share.mean(0), share.std(0) / uniform, self.p_value], -1).numpy()
        frame = pd.DataFrame(columns, columns=["centre", "spread", "p_value"])
        return frame.rename_axis("coordinate")

    def __repr__(self) -> str:
        verdict = "calibrated" if self.passed() else "not calibrated"
        return (
            f"Calibration({len(self.ranks)} simulations, {self.num_draws} draws: {verdict}, "
            f"smallest p-value of {len(self.p_value)} coordinates {float(self.p_value.min()):.2g})"
        )


@with_own_parameters
@torch.no_grad()
def simulation_based_calibration(
    model: PyroProgram,
    guide: PyroProgram | HasPosterior,
    num_simulations: int = 500,
    num_draws: int = 99,
    *,
    image_shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Calibration:
    r"""Tests a guide against the posterior of a model, on images that the model simulates.

    .. math::
        z \sim p(z), \quad x \sim p(x|z), \quad z_1, \dots, z_L \sim q(z|x), \qquad
        \mathrm{rank}_j = \#\{l : z_{lj} < z_j\} .

    If q(z|x) = p(z|x), then z, z₁ ... z_L are exchangeable and every rank is uniform on 0 ... L,
    which a χ² test checks. No amortised guide is exact, so with enough simulations each of them
    fails, and :meth:`Calibration.table` shows in what way. The prior as a guide passes, because
    the test is about averages over images.

    References:
        Talts et al., *Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration*, 2018. https://arxiv.org/abs/1804.06788

    Arguments:
        model: A Pyro model with the site ``"z"`` and one observed site in ``plate("data", B)``.
        guide: An object with ``posterior(x)``, or a Pyro guide of it.
        num_simulations: The number N of images, in one batch.
        num_draws: The number L of draws for each image. N and L + 1 of the same order detect most.
        image_shape: The shape of an image; by default ``model.image_shape``.
        seed: The same seed gives the same ranks.

    Raises:
        ValueError: If a number is less than 1, or the image shape or the observed site is unknown.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2)
        >>> simulation_based_calibration(model, model).passed()  # it knows its own posterior
        True
    """
    check_at_least(1, num_simulations=num_simulations, num_draws=num_draws)
    shape = getattr(model, "image_shape", None) if image_shape is None else image_shape
    if shape is None:
        raise ValueError("the model has no image_shape: pass image_shape=(C, H, W)")
    blank = to_batch(torch.zeros(num_simulations, *shape), model)[0]
    program: Any = guide
    with seeded(seed, blank.device):
        x, z = _simulate(model, blank)
        q: Any = posterior_of(guide, x)
        if q is not None:
            draws: Tensor = q.sample((num_draws,))
        else:
            with pyro.plate("num_particles_vectorized", num_draws, dim=-2):
                draws = poutine.trace(program).get_trace(x).nodes["z"]["value"]
    ranks = (draws < z).sum(0).cpu()
    return Calibration(ranks, num_draws, torch.from_numpy(_p_values(ranks.numpy(), num_draws)))


def _p_values(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Returns the p-values (p,) of Pearson's χ² test of uniform ranks (N, p), in up to 20 bins."""
    # at least five ranks are expected in each bin; fewer than ten in all refute nothing
    num_bins = min(20, num_draws + 1, len(ranks) // 5)
    if num_bins < 2:
        return np.ones(ranks.shape[1])
    bins = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = np.bincount(bins) * len(ranks) / (num_draws + 1)
    observed = [np.bincount(bins[column], minlength=num_bins) for column in ranks.T]
    return np.array([stats.chisquare(count, expected).pvalue for count in observed])


def _simulate(model: PyroProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and their z (N, p), drawn from the model; x tells only how many."""
    trace: Any = poutine.trace(poutine.uncondition(model)).get_trace(x)
    plate = data_plate(trace.nodes, len(x))
    sites = [
        name
        for name, site in trace.nodes.items()
        if is_sampled(site) and in_plate(site, plate) and "was_observed" in site["infer"]
    ]
    if len(sites) != 1 or "z" not in trace.nodes:
        raise ValueError(
            'the model must have the site "z" and one observed site in its data plate, found '
            f"{sorted(trace.nodes)} with {sites} observed there"
        )
    return trace.nodes[sites[0]]["value"], trace.nodes["z"]["value"]
