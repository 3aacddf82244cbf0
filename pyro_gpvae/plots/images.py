r"""Images: mosaics, reconstructions, and the least and most uncertain ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pyro_gpvae.plots import _style

__all__ = ["image_grid", "image_table", "reconstructions", "uncertain_images"]


def image_grid(
    panels: Mapping[str, ArrayLike], columns: int = 8, caption: str = "", title: str = ""
) -> Figure:
    """Draws mosaics of images side by side.

    Arguments:
        panels: Images (N, C, H, W) by title, uint8 or floats in [0, 1]; C is 1 or 3.
        columns: The number of images in a row of a mosaic.
        caption, title: Text below and above the figure.
    """
    if not panels or columns < 1:
        raise ValueError("image_grid needs at least one panel and one column")
    mosaics = {name: tile(to_pixels(images), columns) for name, images in panels.items()}
    ratio = max(m.shape[0] / m.shape[1] for m in mosaics.values())
    figure, (row,) = _style.panels(4.4 * len(panels), 4.4 * ratio + 1.1, columns=len(panels))
    for axes, (name, mosaic) in zip(row, mosaics.items(), strict=True):
        show_pixels(axes, mosaic)
        axes.set_title(name, fontsize=10)
    return _style.finish(figure, caption, title)


def reconstructions(
    images: ArrayLike, decoded: Mapping[str, ArrayLike], caption: str = ""
) -> Figure:
    """Draws a row of images, and below it a row of reconstructions for each method.

    All images (N, C, H, W) are uint8 or floats, which are clipped to [0, 1].
    """
    rows = {"image": to_pixels(images)} | {name: to_pixels(x) for name, x in decoded.items()}
    for name, row in rows.items():
        if row.shape != rows["image"].shape:
            raise ValueError(f"{name!r} has shape {row.shape}, the images {rows['image'].shape}")
    table = np.stack([*rows.values()]).transpose(0, 1, 4, 2, 3)
    return image_table(table, [*rows], [""] * table.shape[1], caption=caption)


def image_table(
    images: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str] = ("", ""),
    caption: str = "",
) -> Figure:
    """Draws images (R, S, C, H, W) with labels of rows and columns, and names of both axes.

    The images are uint8 or floats, which are clipped to [0, 1].
    """
    table = np.asarray(images)
    if table.ndim != 5 or table.shape[:2] != (len(rows), len(columns)):
        raise ValueError(
            f"expected images of shape ({len(rows)}, {len(columns)}, C, H, W), one for each label, "
            f"got {table.shape}"
        )
    height, width = table.shape[3:]
    figure, ((axes,),) = _style.panels(
        max(0.55 * len(columns) + 1.1, 5), max(0.55 * height / width * len(rows), 1.0) + 1.1
    )
    show_pixels(axes, tile(to_pixels(table.reshape(-1, *table.shape[2:])), len(columns)))
    # at the centre of each row and column
    axes.set_yticks(np.arange(len(rows)) * (height + 2) + (height - 1) / 2, rows, fontsize=8)
    axes.set_xticks(np.arange(len(columns)) * (width + 2) + (width - 1) / 2, columns, fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel(names[0], fontsize=9)
    axes.set_xlabel(names[1], fontsize=9)
    return _style.finish(figure, caption)


def uncertain_images(
    images: ArrayLike, uncertainty: ArrayLike, count: int = 16, caption: str = ""
) -> Figure:
    """Draws the images with the least and with the most inference uncertainty.

    Arguments:
        images: Images (N, C, H, W), uint8 or floats in [0, 1].
        uncertainty: One number per image, as ``guide.uncertainty(x)`` returns them.
        count: The number of images in each of the two panels, at most half of all.
        caption: Text below the figure.
    """
    pixels, scores = np.asarray(images), np.asarray(uncertainty, dtype=float)
    if scores.shape != (len(pixels),) or len(pixels) < 2:
        raise ValueError(
            f"expected one uncertainty for each of at least two images, got shape {scores.shape} "
            f"for {len(pixels)} images"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} uncertainties are not finite")
    count = min(count, len(pixels) // 2)
    order = np.argsort(scores, kind="stable")
    least, most = order[:count], order[::-1][:count]
    panels = {
        f"{name} uncertain ({scores[index[0]]:.3g} to {scores[index[-1]]:.3g})": pixels[index]
        for name, index in (("least", least), ("most", most))
    }
    return image_grid(
        panels, columns=math.ceil(math.sqrt(count)), caption=caption, title="inference uncertainty"
    )


def to_pixels(images: ArrayLike) -> NDArray[np.floating[Any]]:
    """Returns images (N, C, H, W) as floats (N, H, W, C), clipped to [0, 1]."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not len(array):
        raise ValueError(f"expected images (N, C, H, W) with C = 1 or 3, got shape {array.shape}")
    scale = 255 if array.dtype == np.uint8 else 1
    return np.clip(array.astype(float) / scale, 0, 1).transpose(0, 2, 3, 1)


def tile(images: NDArray[np.floating[Any]], columns: int) -> NDArray[np.floating[Any]]:
    """Returns images (N, H, W, C) as one image (H', W', C), with white lines between them."""
    _, height, width, channels = images.shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    mosaic = np.ones((rows * (height + 2) - 2, columns * (width + 2) - 2, channels))
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def show_pixels(axes: Axes, mosaic: NDArray[np.floating[Any]]) -> None:
    """Draws one image (H, W, C) without ticks and frame."""
    grey = mosaic.shape[-1] == 1
    axes.imshow(mosaic[..., 0] if grey else mosaic, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
