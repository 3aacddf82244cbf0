"""Counts the latent dimensions that depend on the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.evaluation._common import (
    batches,
    check_at_least,
    device_of,
    evaluator,
    posterior_mean,
    progress_bar,
    seeded_if,
)
from pyro_gpvae.model.guide import check_program_data

__all__ = ["ActiveUnits", "active_units"]


@dataclass(frozen=True)
class ActiveUnits:
    """How much the posterior means move with the image.

    Attributes:
        variances: Var_x(E_q[z_j|x]) of each latent dimension, (p,), float64: 0 where a dimension
            is ignored, and at most about 1 where it is used.
        threshold: The variance above which a dimension is active.
        num_images: The number of images.
    """

    variances: Tensor
    threshold: float
    num_images: int

    @property
    def count(self) -> int:
        """The number of active units."""
        return int((self.variances > self.threshold).sum())


@evaluator
def active_units(
    model: PyroProgram,
    guide: PyroProgram,
    images: Tensor,
    *,
    threshold: float = 0.01,
    seed: int | None = None,
    progress: bool | str = False,
) -> ActiveUnits:
    r"""Counts latent dimensions whose posterior mean varies: :math:`Var_x(E_q[z_j|x]) > 0.01`.

    Where the posterior mean is not known, it is estimated from 100 draws. The variance over
    images that this adds is subtracted: for an inactive unit it is 1/100, as large as the
    threshold. The result is the covariance between the means of two halves of the draws, in which
    random weights that move all images at once cancel.

    References:
        Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016, section 5.2.
        https://arxiv.org/abs/1509.00519

    Arguments:
        model, guide, seed: See :func:`reconstruct`.
        images: At least two images (N, C, H, W), uint8 or floats.
        threshold: See above.
        progress: Whether to show a progress bar; a text is its label.

    Raises:
        ValueError: If there are fewer than two images, or the threshold is negative.
    """
    check_program_data(model, images)
    check_at_least(2, num_images=len(images))
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    means, errors = [], []
    device = device_of(images, model, guide)
    with seeded_if(seed, device), progress_bar(progress, "active units", len(images)) as bar:
        for x in batches(images, model, guide):
            mean, error = posterior_mean(guide, x)
            means.append(mean.double())
            errors.append(error.double())
            bar.update(len(x))
    variances = torch.cat(means).var(0) - torch.cat(errors).var(0)
    return ActiveUnits(variances.clamp(min=0).cpu(), threshold, len(images))
