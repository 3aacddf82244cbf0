r"""The latent space: where the encoder puts images."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyro_gpvae.plots._style import finish, panels, tidy

__all__ = ["latent_map"]


def latent_map(means: ArrayLike, labels: ArrayLike | None = None, caption: str = "") -> Figure:
    """Draws posterior means (N, p) in the plane of their two largest principal components.

    With p = 2 the plane is that of z itself. The classes ``labels`` (N,) colour the points, and
    each stands at the median of its points.

    Raises:
        ValueError: If there are fewer than two images or dimensions.
    """
    z = np.asarray(means, dtype=float)
    if z.ndim != 2 or min(z.shape) < 2:
        raise ValueError(f"expected means (N, p) of at least 2 images with p >= 2, got {z.shape}")
    classes = np.zeros(len(z), dtype=int) if labels is None else np.asarray(labels)
    names = ("$z_1$", "$z_2$")
    if z.shape[1] > 2:
        centred = z - z.mean(0)
        _, scales, axes_of = np.linalg.svd(centred, full_matrices=False)
        z = centred @ axes_of[:2].T
        share = 100 * scales[:2] ** 2 / (scales**2).sum()
        first, second = (
            f"principal component {n} ({part:.0f} % of the variance)"
            for n, part in enumerate(share, 1)
        )
        names = first, second
    figure, ((axes,),) = panels(6.4, 5.6)
    kinds = np.unique(classes)
    axes.scatter(*z.T, s=9, c=np.searchsorted(kinds, classes), cmap="tab10", linewidths=0)
    for kind in kinds if labels is not None else ():
        at = np.median(z[classes == kind], axis=0)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "0.6"}
        axes.text(*at, str(kind), ha="center", va="center", fontsize=10, bbox=box)
    axes.set_aspect("equal", adjustable="datalim")
    tidy(axes, *names)
    return finish(figure, caption)
