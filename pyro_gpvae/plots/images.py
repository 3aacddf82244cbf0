r"""Images: mosaics, reconstructions, and the most poorly encoded and most uncertain ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pyro_gpvae.plots import _style

__all__ = ["image_grid", "missed_images", "reconstructions", "uncertain_images"]


def image_grid(
    panels: Mapping[str, ArrayLike], columns: int = 8, caption: str = "", title: str = ""
) -> Figure:
    """Draws mosaics of images side by side.

    Arguments:
        panels: Images (N, C, H, W) by title, uint8 or floats in [0, 1]; C is 1 or 3.
        columns: The number of images in a row of a mosaic.
        caption, title: Text below and above the figure.
    """
    mosaics = {name: tile(to_pixels(images), columns) for name, images in panels.items()}
    ratio = max(m.shape[0] / m.shape[1] for m in mosaics.values())
    figure, (row,) = _style.panels(4.4 * len(panels), 4.4 * ratio + 1.1, columns=len(panels))
    for axes, (name, mosaic) in zip(row, mosaics.items(), strict=True):
        show_pixels(axes, mosaic)
        axes.set_title(name, fontsize=10)
    return _style.on_any_page(_style.finish(figure, caption, title))


def reconstructions(
    images: ArrayLike, decoded: Mapping[str, ArrayLike], caption: str = ""
) -> Figure:
    """Draws a row of images, and below it a row of reconstructions for each method.

    All images (N, C, H, W) are uint8 or floats, which are clipped to [0, 1].
    """
    rows = {"image": to_pixels(images)} | {name: to_pixels(x) for name, x in decoded.items()}
    count, height, width, _ = rows["image"].shape
    figure, ((axes,),) = _style.panels(
        max(0.55 * count + 1.1, 5), max(0.55 * height / width * len(rows), 1.0) + 1.1
    )
    table = np.stack([*rows.values()])
    show_pixels(axes, tile(table.reshape(-1, *table.shape[2:]), count))
    centres = np.arange(len(rows)) * (height + 2) + (height - 1) / 2
    axes.set_yticks(centres, [*rows], fontsize=8)
    axes.tick_params(length=0)
    return _style.on_any_page(_style.finish(figure, caption))


def missed_images(
    images: ArrayLike, decoded: Mapping[str, tuple[ArrayLike, Iterable[Any]]], caption: str = ""
) -> Figure:
    """Draws images, and below each what several q(z|x) of it decode to, with the nats they lose.

    Arguments:
        images: Images (N, C, H, W), uint8 or floats in [0, 1].
        decoded: For the label of each row, decoded images of the same shape, and the gap
            log p(x) - ELBO of each image in nats, (N,).
        caption: Text below the figure.
    """
    count = len(np.asarray(images))
    rows = {"image": (images, [None] * count), **decoded}
    figure, grid = _style.panels(
        0.78 * count + 1.6, 0.98 * len(rows) + 0.5, rows=len(rows), columns=count
    )
    for line, (name, (row, gaps)) in zip(grid, rows.items(), strict=True):
        for axes, image, gap in zip(line, to_pixels(row), gaps, strict=True):
            show_pixels(axes, image)
            if gap is not None:
                axes.set_xlabel(_loss(gap), fontsize=10, labelpad=2)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return _style.on_any_page(_style.finish(figure, caption))


def _loss(gap: Any) -> str:
    """Returns minus a gap in nats, with a digit after the point if it is below 10."""
    return f"{-max(float(gap), 0.0):z.{int(gap < 10)}f}".replace("-", "−")


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
    """Returns images (N, H, W, C) as one RGBA image (H', W', 4), transparent between them."""
    _, height, width, _ = images.shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    mosaic = np.ones((rows * (height + 2) - 2, columns * (width + 2) - 2, 4))
    mosaic[..., 3] = 0
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        mosaic[top : top + height, left : left + width, :3] = image
        mosaic[top : top + height, left : left + width, 3] = 1
    return mosaic


def show_pixels(axes: Axes, mosaic: NDArray[np.floating[Any]]) -> None:
    """Draws one image (H, W, C) without ticks and frame."""
    grey = mosaic.shape[-1] == 1
    axes.imshow(mosaic[..., 0] if grey else mosaic, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
