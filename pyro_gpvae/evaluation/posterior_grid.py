"""The true posterior on a grid, for two latent dimensions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gpvae.core._chunks import default_chunk_size
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import evaluator
from pyro_gpvae.evaluation.uncertainty import moments_of
from pyro_gpvae.model._local import name_of
from pyro_gpvae.model.guide import HasPosterior, check_program_data
from pyro_gpvae.model.image_model import ImageModel

__all__ = ["PosteriorGrid", "posterior_grid", "posterior_record"]

# the grid holds all points whose log p(x, z) is within so many nats of the highest
_DEPTH = 16


class PosteriorGrid(NamedTuple):
    """The true posteriors of B images, each on a grid of its own, for p = 2.

    Attributes:
        axes: The values of z₁ and z₂, (B, 2, G).
        density: p(z|x) at (axes[b, 0, i], axes[b, 1, j]), (B, G, G); its sum times the area of a
            cell is 1.
        log_evidence: log p(x) in nats, by the same sum, (B,).
    """

    axes: Tensor
    density: Tensor
    log_evidence: Tensor


@evaluator
def posterior_grid(model: ImageModel, x: Tensor, *, num_points: int = 81) -> PosteriorGrid:
    """Computes the true posterior p(z|x) of each image on its own grid, for p = 2.

    A grid over the prior, twice as fine, locates the posterior. Then the grid shrinks to the points
    within 16 nats of the highest. A mode between the points of the first grid is missed.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel` with two latent dimensions.
        x: Images (B, C, H, W), uint8 or floats.
        num_points: The number G of points in each direction, at least 16.
    """
    if model.latent_dim != 2:
        raise ValueError(f"a posterior on a grid needs latent_dim = 2, got {model.latent_dim}")
    check_at_least(16, num_points=num_points)
    check_program_data(model, x)
    parts = [_grid(model, image, num_points) for image in to_batch(x, model)[0].split(1)]
    return PosteriorGrid(*map(torch.stack, zip(*parts, strict=True)))


def _grid(model: ImageModel, image: Tensor, num_points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns axes (2, G), density (G, G) and log p(x) of one image (1, C, H, W)."""
    ends = image.new_tensor([[-6.0, 6.0], [-6.0, 6.0]])
    for count in (2 * num_points, *[num_points] * 8):
        steps = torch.linspace(0, 1, count, dtype=image.dtype, device=image.device)
        axes = ends[:, :1] + ends.diff() * steps
        cell = axes[:, 1] - axes[:, 0]
        z = torch.cartesian_prod(*axes).unsqueeze(1)
        rows = [model.log_joint(image, part) for part in z.split(default_chunk_size(z.device))]
        log_joint = torch.cat(rows).reshape(count, count).double()
        inside = log_joint > log_joint.max() - _DEPTH
        held = [axis[inside.any(1 - n)] for n, axis in enumerate(axes)]
        closer = torch.stack([values[[0, -1]] for values in held])
        closer = closer + cell.unsqueeze(1) * cell.new_tensor([-2.0, 2.0])
        if count == num_points and bool((closer.diff() > 0.8 * ends.diff()).all()):
            break
        ends = closer
    log_evidence = log_joint.logsumexp((0, 1)) + cell.double().log().sum()
    return axes, (log_joint - log_evidence).exp(), log_evidence


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
    if not isinstance(guide, HasPosterior):
        raise ValueError(f"the guide {name_of(guide)} has no posterior(x), whose density is drawn")
    true = posterior_grid(model, x, num_points=num_points)
    x = to_batch(x, model, guide)[0]
    a, v, b, r = moments_of(guide, x)
    with seeded(seed, x.device):
        noise = torch.randn(2, num_draws, *a.shape, dtype=a.dtype, device=a.device)
    q: Any = guide.posterior(x)
    steps = torch.linspace(-4, 4, num_points, dtype=x.dtype, device=x.device)
    axes = q.mean.unsqueeze(-1) + q.variance.sqrt().unsqueeze(-1) * steps  # (B, 2, G)
    z = torch.stack([torch.cartesian_prod(*pair) for pair in axes], dim=1)  # (G², B, 2)
    columns = {
        "z1": true.axes[:, 0],
        "z2": true.axes[:, 1],
        "density": true.density,
        "log_evidence": true.log_evidence,
        "q1": axes[:, 0],
        "q2": axes[:, 1],
        "q": q.log_prob(z).exp().mT.unflatten(-1, (num_points, num_points)),
        "f": (a + v.sqrt() * noise[0]).movedim(0, 1),
        "h": (b + r.sqrt() * noise[1]).exp().movedim(0, 1),
    }
    return {name: value.double().cpu().numpy() for name, value in columns.items()}
