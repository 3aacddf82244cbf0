r"""Latent dimensions: what each of them changes, and how many are used."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyro_gpvae.plots._style import COLOURS, finish, panels, tidy
from pyro_gpvae.plots.images import image_table

__all__ = ["active_units_chart", "traversals"]

#: The largest number of dimensions in a figure of traversals.
_MAX_ROWS = 20


def traversals(
    images: ArrayLike, values: ArrayLike, variances: ArrayLike, caption: str = ""
) -> Figure:
    """Draws the effect of each latent dimension, the 20 most active ones first to last.

    Arguments:
        images: Decoded images (p, S, C, H, W), floats in [0, 1].
        values: The S values of a dimension, in standard deviations of the prior.
        variances: Var_x(E_q[z_j|x]) of each dimension, (p,); it orders and labels the rows.
        caption: Text below the figure.
    """
    variance = np.asarray(variances, dtype=float)
    order = np.argsort(-variance, kind="stable")[:_MAX_ROWS]
    if len(order) < len(variance):
        caption = f"The {len(order)} most active of {len(variance)} dimensions. {caption}"
    return image_table(
        np.asarray(images)[order],
        [f"$z_{{{j}}}$  ({variance[j]:.2f})" for j in order],
        [f"{value:.3g}" for value in np.asarray(values)],
        (
            "dimension (variance of its posterior mean)",
            "value of the dimension (standard deviations of the prior)",
        ),
        caption,
    )


def active_units_chart(variances: ArrayLike, threshold: float, caption: str = "") -> Figure:
    """Draws the variance over images of the posterior mean of each latent dimension.

    Dimensions above the threshold are active.
    """
    variance = np.asarray(variances, dtype=float)
    if variance.ndim != 1 or not len(variance) or not (variance >= 0).all():
        raise ValueError(
            f"expected a variance of at least 0 for each dimension, got {variance.shape}"
        )
    order = np.argsort(-variance, kind="stable")
    active = variance[order] > threshold
    figure, ((axes,),) = panels(max(6.0, 0.22 * len(order) + 2.5), 3.6)
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
    height = "variance of $E_q[z_j|x]$\n(prior variance = 1)"
    tidy(axes, "latent dimension, the most active first", height, grid="y")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finish(figure, caption)
