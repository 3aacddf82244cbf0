r"""Images whose encoding is poor: what the encoder sees in them, and what it could see."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyro_gpvae.plots import _style
from pyro_gpvae.plots.images import show_pixels, to_pixels

__all__ = ["missed_images"]


def missed_images(
    images: ArrayLike, decoded: Mapping[str, tuple[ArrayLike, ArrayLike]], caption: str = ""
) -> Figure:
    """Draws images, and below each what several q(z|x) of it decode to, with the nats they lose.

    Arguments:
        images: Images (N, C, H, W), uint8 or floats in [0, 1].
        decoded: For the label of each row, decoded images of the same shape, and the gap
            log p(x) - ELBO of each image in nats, (N,).
        caption: Text below the figure.

    Raises:
        ValueError: If the shapes of a row differ from those of the images.
    """
    pixels = to_pixels(images)
    rows = {"image": (pixels, None)} | {
        name: (to_pixels(x), np.asarray(gaps, dtype=float)) for name, (x, gaps) in decoded.items()
    }
    for name, (row, gaps) in rows.items():
        if row.shape != pixels.shape or (gaps is not None and gaps.shape != (len(pixels),)):
            raise ValueError(f"{name!r} must have {len(pixels)} images and as many gaps")
    figure, grid = _style.panels(
        0.78 * len(pixels) + 1.6, 0.98 * len(rows) + 0.5, rows=len(rows), columns=len(pixels)
    )
    for line, (name, (row, gaps)) in zip(grid, rows.items(), strict=True):
        for n, (axes, image) in enumerate(zip(line, row, strict=True)):
            show_pixels(axes, image)
            if gaps is not None:
                axes.set_xlabel(f"−{gaps[n]:.1f}" if gaps[n] > 0 else "0", fontsize=9, labelpad=2)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return _style.finish(figure, caption)
