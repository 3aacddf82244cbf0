r"""Pictures: pure functions from arrays and tables to a matplotlib figure.

Every figure is built without pyplot, so that nothing global changes and no display is needed;
``figure.savefig("name.png")`` writes it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

__all__ = ["gap_against_time", "image_grid", "loss_curves", "reconstructions", "uncertain_images"]

#: Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":")


def loss_curves(histories: Mapping[str, pd.DataFrame], caption: str = "") -> Figure:
    """Draws the ELBO and the learned σ of each run against the epochs.

    Arguments:
        histories: Tables as :meth:`pyro_gpvae.History.frame` returns them, by label.
        caption: A line below: the budget, the seed.

    Raises:
        ValueError: If there is no table, or one lacks the columns ``epoch`` and ``loss``.
    """
    if not histories:
        raise ValueError("loss_curves needs at least one history")
    for label, frame in histories.items():
        missing = {"epoch", "loss"} - set(frame.columns)
        if missing:
            raise ValueError(f"the history {label!r} lacks the column {sorted(missing)[0]!r}")
    figure = Figure(figsize=(9, 4.2), dpi=150)
    left, right = figure.subplots(1, 2)
    for index, (label, frame) in enumerate(histories.items()):
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": _STYLES[index % len(_STYLES)],
            "marker": "o" if len(frame) == 1 else None,  # a line of one point is invisible
        }
        left.plot(frame["epoch"], -frame["loss"], label=label, **style)
        if "validation_elbo" in frame:
            style["alpha"] = 0.5
            left.plot(frame["epoch"], frame["validation_elbo"], label=f"{label}, held out", **style)
            style["alpha"] = 1.0
        if "sigma" in frame:
            right.plot(frame["epoch"], frame["sigma"], label=label, **style)
    left.set_ylabel("ELBO on training images (nats per image)")
    right.set_ylabel("noise σ (pixels in [0, 1])")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # the first epochs are far below: let them leave the picture rather than flatten the rest
    elbos = np.concatenate([-frame["loss"].to_numpy(float) for frame in histories.values()])
    low, high = float(np.quantile(elbos, 0.1)), float(elbos.max())
    if high > low and len(elbos) > 10:
        left.set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    left.legend(frameon=False)
    return _finish(figure, caption)


def gap_against_time(table: pd.DataFrame, caption: str = "") -> Figure:
    """Draws the share of the amortisation gap that each guide closes against its inference time.

    Arguments:
        table: A row for each guide and decoder, with the columns ``guide`` (the number after
            its colon is written beside the point), ``decoder`` (a panel each), ``share`` (0 is the
            VAE's encoder, 1 the instance-wise optimum), ``share_sd`` (over seeds, or NaN), and
            ``ms``, ``ms_low``, ``ms_high`` (milliseconds a batch).
        caption: A line below: the budget, the seeds, the device.

    Raises:
        ValueError: If the table is empty or lacks a column.
    """
    needed = {"guide", "decoder", "share", "share_sd", "ms", "ms_low", "ms_high"}
    if table.empty or needed - set(table.columns):
        raise ValueError(f"gap_against_time needs rows with the columns {sorted(needed)}")
    decoders = list(dict.fromkeys(table["decoder"]))
    families = list(dict.fromkeys(str(guide).partition(":")[0] for guide in table["guide"]))
    figure = Figure(figsize=(5.2 * len(decoders), 4.8), dpi=150)
    panels = figure.subplots(1, len(decoders), sharey=True, squeeze=False)[0]
    floor = max(min(0.0, float(table["share"].min())), -1.0)
    for axes, decoder in zip(panels, decoders, strict=True):
        for row in table[table["decoder"] == decoder].itertuples():
            name, _, options = str(row.guide).partition(":")
            family = families.index(name)
            share, below = max(row.share, floor), row.share < floor
            axes.errorbar(
                row.ms,
                100 * share,
                xerr=[[row.ms - row.ms_low], [row.ms_high - row.ms]],
                yerr=None if math.isnan(row.share_sd) or below else 100 * row.share_sd,
                # colours repeat after seven families, the pairs of colour and marker do not
                fmt=_MARKERS[(family + family // len(COLOURS)) % len(_MARKERS)],
                color=COLOURS[family % len(COLOURS)],
                capsize=2,
                label=None if name in axes.get_legend_handles_labels()[1] else name,
            )
            number = options.partition(",")[0]
            label = f"{number} ({100 * row.share:.0f} %)" if below else number
            axes.annotate(
                label, (row.ms, 100 * share), (5, 4), textcoords="offset points", fontsize=8
            )
        for level, name, side in (
            (0, "the VAE's encoder", "right"),
            (100, "optimum for each image", "left"),
        ):
            axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
            axes.annotate(
                name,
                (0.99 if side == "right" else 0.01, level),
                (0, -10),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha=side,
                fontsize=7,
                color="0.4",
            )
        axes.set_xscale("log")
        axes.set_title(decoder)
        axes.set_xlabel("inference time (ms per batch)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the amortisation gap closed (%)")
    panels[0].set_ylim(100 * floor - 8, 112)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[-1].legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    return _finish(figure, caption)


def image_grid(
    panels: Mapping[str, ArrayLike], columns: int = 8, caption: str = "", title: str = ""
) -> Figure:
    """Draws titled panels side by side, each a mosaic of images.

    Arguments:
        panels: Images (N, C, H, W) by title, uint8 or floats in [0, 1]; C is 1 or 3.
        columns: Images in a row of a mosaic.
        caption: A line below.
        title: A line above.

    Raises:
        ValueError: If there is nothing to draw, or the shapes are not those of images.
    """
    if not panels or columns < 1:
        raise ValueError("image_grid needs at least one panel and one column")
    mosaics = {name: _mosaic(_pixels(images), columns) for name, images in panels.items()}
    ratio = max(m.shape[0] / m.shape[1] for m in mosaics.values())
    width = 4.4
    figure = Figure(figsize=(width * len(mosaics), width * ratio + 1.1), dpi=150)
    for axes, (name, mosaic) in zip(
        figure.subplots(1, len(mosaics), squeeze=False)[0], mosaics.items(), strict=True
    ):
        _show(axes, mosaic)
        axes.set_title(name, fontsize=10)
    return _finish(figure, caption, title)


def reconstructions(
    images: ArrayLike, decoded: Mapping[str, ArrayLike], caption: str = ""
) -> Figure:
    """Draws images in a row, and below them what each method decodes from their latents.

    Arguments:
        images: Images (N, C, H, W), uint8 or floats in [0, 1].
        decoded: Images of the same shape by method; values outside [0, 1] are clipped.
        caption: A line below.

    Raises:
        ValueError: If the shapes differ or are not those of images.
    """
    rows = {"image": _pixels(images)} | {name: _pixels(x) for name, x in decoded.items()}
    for name, row in rows.items():
        if row.shape != rows["image"].shape:
            raise ValueError(f"{name!r} has shape {row.shape}, the images {rows['image'].shape}")
    count = len(rows["image"])
    figure = Figure(figsize=(0.75 * count + 1.2, 0.8 * len(rows) + 0.6), dpi=150)
    all_axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (name, row) in zip(all_axes, rows.items(), strict=True):
        _show(axes, _mosaic(row, count))
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    return _finish(figure, caption)


def uncertain_images(
    images: ArrayLike, uncertainty: ArrayLike, count: int = 16, caption: str = ""
) -> Figure:
    """Draws the images with the least and with the most inference uncertainty.

    Arguments:
        images: Images (N, C, H, W), uint8 or floats in [0, 1].
        uncertainty: One number for each, as ``guide.uncertainty(x)`` returns it.
        count: How many to show on each side, at most half of the images.
        caption: A line below.

    Raises:
        ValueError: If there are fewer than two images, or not one number for each.
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


def _pixels(images: ArrayLike) -> NDArray[np.floating[Any]]:
    """Images (N, C, H, W) as floats (N, H, W, C) in [0, 1]."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not len(array):
        raise ValueError(f"expected images (N, C, H, W) with C = 1 or 3, got shape {array.shape}")
    scale = 255 if array.dtype == np.uint8 else 1
    return np.clip(array.astype(float) / scale, 0, 1).transpose(0, 2, 3, 1)


def _mosaic(images: NDArray[np.floating[Any]], columns: int) -> NDArray[np.floating[Any]]:
    """Images (N, H, W, C) as one (H', W', C), with white lines between them."""
    _, height, width, channels = images.shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    mosaic = np.ones((rows * (height + 2) - 2, columns * (width + 2) - 2, channels))
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def _show(axes: Axes, mosaic: NDArray[np.floating[Any]]) -> None:
    grey = mosaic.shape[-1] == 1
    axes.imshow(mosaic[..., 0] if grey else mosaic, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _finish(figure: Figure, caption: str, title: str = "") -> Figure:
    """Lays the figure out between a title and a caption."""
    width, height = figure.get_size_inches()
    # "K = 100" stays on one line: textwrap does not break at a non-breaking space
    lines = textwrap.wrap(
        caption.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"), int(width * 15)
    )
    bottom = (0.16 * len(lines) + 0.1) / height if lines else 0.0
    figure.text(
        0.5, 0.06 / height, "\n".join(lines), ha="center", va="bottom", fontsize=8, color="0.3"
    )
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return figure
