"""The true posterior on a grid, for two latent dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import check_at_least, check_posterior, evaluator
from pyro_gpvae.evaluation.uncertainty import moments_of
from pyro_gpvae.model.guide import check_program_data, posterior_of
from pyro_gpvae.model.image_model import ImageModel

__all__ = ["PosteriorGrid", "posterior_grid", "posterior_record"]

# the grid holds all points whose log p(x, z) is within so many nats of the highest
_DEPTH = 16


@dataclass(frozen=True)
class PosteriorGrid:
    """The true posterior of one image on a grid, for p = 2.

    Attributes:
        first: Values of z₁, (G,).
        second: Values of z₂, (G,).
        density: p(z|x) at (first[i], second[j]), (G, G); its sum times the area of a cell is 1.
        log_evidence: log p(x) in nats, by the same sum.
    """

    first: Tensor
    second: Tensor
    density: Tensor
    log_evidence: float


@evaluator
def posterior_grid(
    model: ImageModel, x: Tensor, *, num_points: int = 81, chunk_size: int | None = None
) -> list[PosteriorGrid]:
    """Computes the true posterior p(z|x) of each image on its own grid, for p = 2.

    A grid over the prior, twice as fine, locates the posterior. Then each image's grid shrinks to
    the points within 16 nats of the highest. A mode between the points of the first grid is missed.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel` with two latent dimensions.
        x: Images (B, C, H, W), uint8 or floats.
        num_points: The number G of points in each direction, at least 16.
        chunk_size: See :func:`pyro_gpvae.log_weights`.
    """
    if model.latent_dim != 2:
        raise ValueError(f"a posterior on a grid needs latent_dim = 2, got {model.latent_dim}")
    check_at_least(16, num_points=num_points)
    check_program_data(model, x)
    images = to_batch(x, model)[0]

    def work(size: int) -> list[PosteriorGrid]:
        wide = images.new_tensor([[-6.0, 6.0], [-6.0, 6.0]])
        # decoded once for all images
        axes, log_joint = _on_grid(model, images, wide, 2 * num_points, size)
        return [
            _zoom(model, image, _box(axes, surface), num_points, size)
            for image, surface in zip(images.split(1), log_joint.unbind(-1), strict=True)
        ]

    return halving_chunks(work, chunk_size, images.device)


@evaluator
def posterior_record(
    model: ImageModel,
    guide: Any,
    x: Tensor,
    *,
    num_draws: int = 12,
    num_points: int = 81,
    seed: int = 0,
) -> dict[str, NDArray[np.floating[Any]]]:
    """Computes the data of a figure of inference in two dimensions.

    Arguments:
        model, x, num_points: See :func:`posterior_grid`.
        guide: A random encoder with ``moments(x)`` and ``posterior(x)``; any other is a ValueError.
        num_draws: The number of draws of q(z|x, f, h).
        seed: The seed of the draws.

    Returns:
        Arrays with one row per image: ``z1``, ``z2`` (G) and ``density`` (G, G) of the
        true posterior; ``q1``, ``q2``, ``q`` likewise of the marginal q(z|x); ``f`` and ``h``
        (draws, 2); ``log_evidence`` ().
    """
    check_posterior(guide, "the figure shows the density q(z|x)")
    grids = posterior_grid(model, x, num_points=num_points)
    x = to_batch(x, model, guide)[0]
    a, v, b, r = moments_of(guide, x)
    with seeded(seed, x.device):
        noise = torch.randn(2, num_draws, *a.shape, dtype=a.dtype, device=a.device)
    q = cast(Any, posterior_of(guide, x))
    steps = torch.linspace(-4, 4, num_points, dtype=x.dtype, device=x.device)
    axes = q.mean.unsqueeze(-1) + q.variance.sqrt().unsqueeze(-1) * steps  # (B, 2, G)
    first, second = axes.unbind(1)
    z = torch.stack(torch.broadcast_tensors(first[:, :, None], second[:, None, :]), dim=-1)
    flat = q.log_prob(z.flatten(1, 2).movedim(1, 0))  # (G², B)
    columns = {
        "z1": torch.stack([grid.first for grid in grids]),
        "z2": torch.stack([grid.second for grid in grids]),
        "density": torch.stack([grid.density for grid in grids]),
        "log_evidence": torch.tensor([grid.log_evidence for grid in grids]),
        "q1": first,
        "q2": second,
        "q": flat.exp().mT.unflatten(-1, (num_points, num_points)),
        "f": (a + v.sqrt() * noise[0]).movedim(0, 1),
        "h": (b + r.sqrt() * noise[1]).exp().movedim(0, 1),
    }
    return {name: value.double().cpu().numpy() for name, value in columns.items()}


def _zoom(
    model: ImageModel, image: Tensor, box: Tensor, num_points: int, chunk_size: int
) -> PosteriorGrid:
    for _ in range(8):
        axes, surface = _on_grid(model, image, box, num_points, chunk_size)
        smaller = _box(axes, surface[..., 0])
        if bool((smaller.diff(dim=1) > 0.8 * box.diff(dim=1)).all()):
            break
        box = smaller
    area = math.prod(float(axis[1] - axis[0]) for axis in axes)
    log_evidence = surface.double().logsumexp((0, 1)) + math.log(area)
    density = (surface[..., 0].double() - log_evidence).exp()
    return PosteriorGrid(*axes, density, float(log_evidence))


def _on_grid(
    model: ImageModel, x: Tensor, box: Tensor, count: int, chunk_size: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The two axes of a box (2, 2), and log p(x, z) at their products: (count, count, B)."""
    steps = torch.linspace(0, 1, count, dtype=x.dtype, device=x.device)
    first, second = (low + (high - low) * steps for low, high in box)
    z = torch.cartesian_prod(first, second)
    rows = [model.log_joint(x, part) for part in z.unsqueeze(1).split(chunk_size)]
    return (first, second), torch.cat(rows).reshape(count, count, len(x))


def _box(axes: tuple[Tensor, Tensor], log_joint: Tensor) -> Tensor:
    """The box around the points within _DEPTH nats of the highest, two cells wider: (2, 2)."""
    inside = log_joint > log_joint.max() - _DEPTH
    bounds = []
    for axis, other in zip(axes, (1, 0), strict=True):
        values = axis[inside.any(other)]
        margin = 2 * (axis[1] - axis[0])
        bounds.append(torch.stack([values.min() - margin, values.max() + margin]))
    return torch.stack(bounds)
