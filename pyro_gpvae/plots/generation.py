r"""Generated images: samples, reconstructions, interpolations and traversals."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pyro_gpvae.plots._style import COLOURS, finish, tidy
from pyro_gpvae.plots.images import image_grid, reconstructions, show_pixels, tile, to_pixels

__all__ = ["active_units_chart", "generated_figures", "image_table", "traversals"]

#: The largest number of dimensions in a figure of traversals.
_MAX_ROWS = 20


def generated_figures(
    arrays: Mapping[str, ArrayLike], record: Mapping[str, Any]
) -> dict[str, Figure]:
    """Returns the figures of ``pyro-gpvae generate`` by file name.

    Arguments:
        arrays: The content of its ``arrays.npz``, as :func:`numpy.load` reads it.
        record: The content of its ``latent.json``.
    """
    run, shown = record["run"], np.asarray(arrays["image_index"])
    caption = (
        f"{run['data']}, guide {run['guide']}, p = {run['latent_dim']}, {run['epochs']} epochs, "
        f"trained with seed\N{NO-BREAK SPACE}{run['seed']}, "
        f"drawn with seed\N{NO-BREAK SPACE}{record['seed']}."
    )
    mean = "means of p(x|z)" if run["likelihood"] == "gaussian" else "probabilities of p(x|z)"
    images = np.asarray(arrays["images"])
    paths = np.asarray(arrays["interpolations"])
    t = np.linspace(0, 1, paths.shape[1])
    variances = np.asarray(arrays["active_variances"])
    return {
        "samples.png": image_grid(
            {mean: arrays["samples"], "draws from p(x|z), same z": arrays["samples_noise"]},
            caption=f"z from the prior N(0, I). {caption}",
            title="samples",
        ),
        "reconstructions.png": reconstructions(
            images,
            {
                "from the mean": arrays["reconstructions"],
                "from a draw": arrays["reconstructions_draw"],
            },
            f"Test images, and the {mean} with z the mean of q(z|x), or one draw from it. "
            f"{caption}",
        ),
        "interpolations.png": image_table(
            np.concatenate(
                [to_pixels(images[:-1])[:, None], _table(paths), to_pixels(images[1:])[:, None]],
                axis=1,
            ),
            [f"{a} → {b}" for a, b in pairwise(shown)],
            ["image", *(f"{value:.3g}" for value in t), "image"],
            "test images",
            "position t on the path",
            f"The {mean} on {record['path']} paths between posterior means; t = 0 and t = 1 are "
            f"the reconstructions. {caption}",
        ),
        "traversals.png": traversals(
            arrays["traversals"],
            arrays["traversal_values"],
            np.asarray(arrays["reconstructions_z"])[0],
            variances,
            f"The {mean} where one dimension varies and the others stay at the posterior mean of "
            f"test image {shown[0]}; triangles mark the values of the image itself. {caption}",
        ),
        "active_units.png": active_units_chart(
            variances,
            record["active_units"]["threshold"],
            f"N = {record['active_units']['num_images']} test images. {caption}",
        ),
    }


def image_table(
    images: ArrayLike,
    rows: list[str],
    columns: list[str],
    row_name: str,
    column_name: str,
    caption: str = "",
) -> Figure:
    """Draws images in labelled rows and columns.

    Arguments:
        images: Floats in [0, 1], (R, S, H, W, C).
        rows, columns: The R and S labels.
        row_name, column_name: The labels of the axes.
        caption: Text below the figure.

    Raises:
        ValueError: If the number of labels is not that of rows or columns.
    """
    table = np.asarray(images)
    if table.ndim != 5 or table.shape[:2] != (len(rows), len(columns)):
        raise ValueError(
            f"expected images of shape ({len(rows)}, {len(columns)}, H, W, C), one for each label, "
            f"got {table.shape}"
        )
    height, width = table.shape[2:4]
    cell = 0.55
    figure = Figure(
        figsize=(
            max(cell * len(columns) + 1.1, 5),
            max(cell * height / width * len(rows), 1.0) + 1.1,  # room for the label
        ),
        dpi=150,
    )
    axes = figure.subplots()
    show_pixels(axes, tile(table.reshape(-1, *table.shape[2:]), len(columns)))
    # at the centre of each row and column
    axes.set_yticks(np.arange(len(rows)) * (height + 2) + (height - 1) / 2, rows, fontsize=8)
    axes.set_xticks(np.arange(len(columns)) * (width + 2) + (width - 1) / 2, columns, fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel(row_name, fontsize=9)
    axes.set_xlabel(column_name, fontsize=9)
    return finish(figure, caption)


def traversals(
    images: ArrayLike,
    values: ArrayLike,
    own: ArrayLike,
    variances: ArrayLike,
    caption: str = "",
) -> Figure:
    """Draws the effect of each latent dimension, the 20 most active ones first to last.

    Arguments:
        images: Decoded images (p, S, C, H, W), floats in [0, 1].
        values: The S evenly spaced values of a dimension, in standard deviations of the prior.
        own: The latent vector of the image itself, (p,); values within the range are marked.
        variances: Var_x(E_q[z_j|x]) of each dimension, (p,); it orders and labels the rows.
        caption: Text below the figure.

    Raises:
        ValueError: If the shapes do not fit.
    """
    z, mean, variance = (np.asarray(v, dtype=float) for v in (values, own, variances))
    table = np.asarray(images)
    if table.ndim != 5 or table.shape[:2] != (len(mean), len(z)) or variance.shape != mean.shape:
        raise ValueError(
            f"expected images (p, S, C, H, W) with S = {len(z)} values and p = {len(mean)} = "
            f"{len(variance)} dimensions, got shape {table.shape}"
        )
    order = np.argsort(-variance, kind="stable")[:_MAX_ROWS]
    if len(order) < len(mean):
        caption = f"The {len(order)} most active of {len(mean)} dimensions. {caption}"
    figure = image_table(
        _table(table[order]),
        [f"$z_{{{j}}}$  ({variance[j]:.2f})" for j in order],
        [f"{value:.3g}" for value in z],
        "dimension (variance of its posterior mean)",
        "value of the dimension (standard deviations of the prior)",
    )
    (axes,) = figure.axes
    axes.set_autoscale_on(False)  # markers at the edge must not move the limits
    height, width = table.shape[-2:]
    for row, j in enumerate(order):
        position = (mean[j] - z[0]) / (z[1] - z[0])
        if -0.5 <= position <= len(z) - 0.5:
            x = position * (width + 2) + (width - 1) / 2
            bottom = row * (height + 2) + height
            axes.plot(x, bottom, marker="^", markersize=5, color=COLOURS[1], clip_on=False)
    return finish(figure, caption)


def active_units_chart(variances: ArrayLike, threshold: float, caption: str = "") -> Figure:
    """Draws the variance over images of the posterior mean of each latent dimension.

    Arguments:
        variances: Var_x(E_q[z_j|x]) of each dimension, (p,).
        threshold: The variance above which a dimension is active.
        caption: Text below the figure.

    Raises:
        ValueError: If variances is not a vector of nonnegative numbers.
    """
    variance = np.asarray(variances, dtype=float)
    if variance.ndim != 1 or not len(variance) or not (variance >= 0).all():
        raise ValueError(
            f"expected a variance of at least 0 for each dimension, got {variance.shape}"
        )
    order = np.argsort(-variance, kind="stable")
    active = variance[order] > threshold
    figure = Figure(figsize=(max(6.0, 0.22 * len(order) + 2.5), 3.6), dpi=150)
    axes = figure.subplots()
    # zero has no logarithm: it is drawn at the lower end of the axis
    low = min(threshold, max(float(variance.min()), 1e-4)) / 3
    for chosen, colour, marker, label in (
        (active, COLOURS[0], "o", "active"),
        (~active, "0.5", "s", "inactive"),
    ):
        ranks = np.flatnonzero(chosen)
        if len(ranks):
            heights = np.maximum(variance[order][ranks], low)
            label = f"{label}: {len(ranks)}"
            axes.plot(ranks, heights, marker, color=colour, label=label, clip_on=False)
    axes.axhline(threshold, color=COLOURS[1], linestyle="--", label=f"threshold {threshold:g}")
    axes.set_yscale("log")
    axes.set_ylim(low, max(float(variance.max()), threshold) * 2)
    axes.set_xticks(range(len(order)), [str(j) for j in order], fontsize=8)
    tidy(axes, "y")
    axes.set_xlabel("latent dimension, the most active first")
    axes.set_ylabel("variance of $E_q[z_j|x]$\n(prior variance = 1)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finish(figure, caption)


def _table(images: ArrayLike) -> NDArray[np.floating[Any]]:
    """Returns images (R, S, C, H, W) as floats (R, S, H, W, C) in [0, 1]."""
    array = np.asarray(images)
    flat = to_pixels(array.reshape(-1, *array.shape[2:]))
    return flat.reshape(*array.shape[:2], *flat.shape[1:])
