r"""The inference gap: its components, and its relation to scores of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from pyro_gpvae.plots._style import COLOURS, finish, panels, tidy

__all__ = ["gap_ladder", "uncertainty_scatter"]

Vector = NDArray[np.floating[Any]]

_STEPS = {
    "beyond_gaussian": "beyond Gaussian",
    "independence": "independence",
    "encoder": "encoder",
    "weight_information": "I(z; (W, U) | x)",
    "kl_global": "KL(q(W, U) ‖ p) / N",
}


def gap_ladder(table: pd.DataFrame, caption: str = "") -> Figure:
    """Draws the components of each guide's gap, and the distribution of the gap over images.

    Bars are means over images, and error bars the standard deviation of the sum over seeds, which
    are runs with the same label. Boxes hold the middle half of the images, and whiskers 90 %.

    The table is that of :func:`pyro_gpvae.runs.gap_report.measure_gaps`; images that have not
    converged are left out.
    """
    table = table[table["converged"]]
    if table.empty:
        raise ValueError("gap_ladder needs at least one image whose optimum has converged")
    labels = list(dict.fromkeys(table["label"]))
    places = np.arange(len(labels), dtype=float)[::-1]
    height = 0.42 * len(labels) + 2.4
    figure, ((left, right),) = panels(9.5, height, columns=2, sharey=True, width_ratios=(3, 2))
    by_run = table.groupby(["label", "run"], sort=False)[list(_STEPS)].mean()
    totals = by_run.sum(axis=1).groupby("label", sort=False)
    mean, deviation = totals.mean().loc[labels], totals.std().loc[labels]
    # the costs of a random encoder are not drawn where they are unknown
    steps = by_run.groupby("label", sort=False).mean().loc[labels].fillna(0.0)
    low, high = _bars(left, places, steps)
    if deviation.notna().any():
        left.errorbar(
            mean, places, xerr=deviation, fmt="none", ecolor="black", capsize=3, linewidth=1.2,
            label="sum, ± sd over seeds",
        )  # fmt: skip
    ends = np.maximum(high, mean + deviation.fillna(0.0))  # to the right of bar and error bar
    for place, end, value in zip(places, ends, mean, strict=True):
        left.annotate(
            f"{value:.1f}", (end, place), (6, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    left.set_yticks(places, labels)
    left.set_xlim(min(1.1 * low.min(), 0.0), 1.15 * ends.max())  # room for the numbers
    left.axvline(0, color="black", linewidth=0.8)
    gaps = [table.loc[table["label"] == label, "gap"].clip(lower=1e-2) for label in labels]
    right.boxplot(
        gaps, positions=places, orientation="horizontal", whis=(5, 95), showfliers=False,
        widths=0.5, manage_ticks=False, medianprops={"color": COLOURS[1], "linewidth": 1.5},
    )  # fmt: skip
    right.set_xscale("log")
    _plain_ticks(right.xaxis)
    right.tick_params(left=False)
    tidy(left, "mean over images (nats per image)", grid="x")
    tidy(right, "log p(x) - ELBO of each image (nats)", grid="x")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return finish(figure, caption)


def _bars(axes: Axes, places: Vector, steps: pd.DataFrame) -> tuple[Vector, Vector]:
    """Stacks positive steps to the right and negative ones to the left; returns both ends."""
    low, high = np.zeros(len(steps)), np.zeros(len(steps))
    for colour, (name, label) in zip(COLOURS, _STEPS.items(), strict=False):
        width = steps[name].to_numpy(float)
        if np.any(width):  # no costs of random weights where no encoder is random
            axes.barh(
                places, width, left=np.where(width >= 0, high, low), height=0.62, color=colour,
                label=label, edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        high += np.maximum(width, 0)
        low += np.minimum(width, 0)
    return low, high


def uncertainty_scatter(
    table: pd.DataFrame, scores: dict[str, str], titles: dict[str, str], caption: str = ""
) -> Figure:
    """Draws the gap of each image against scores that may predict it, one panel per score.

    The table has the column ``gap`` (nats) and a column for each score; ``scores`` and ``titles``
    hold the label of the axis and the title of the panel by column.
    """
    width = 3.6 * len(scores) + 0.6
    figure, (row,) = panels(width, 3.9, columns=len(scores), sharey=True)
    gap = table["gap"].clip(lower=1e-2)
    for axes, (name, label) in zip(row, scores.items(), strict=True):
        axes.plot(
            table[name], gap, linestyle="none", marker="o", markersize=4, alpha=0.6,
            color=COLOURS[0], markeredgewidth=0,
        )  # fmt: skip
        if float(table[name].min()) > 0 and float(table[name].max() / table[name].min()) > 20:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            axes.locator_params(axis="x", nbins=4)  # long numbers would overlap
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        axes.set_title(titles.get(name, ""), fontsize=10)
        tidy(axes, label, "gap log p(x) - ELBO (nats)" if axes is row[0] else "")
    return finish(figure, caption)


def _plain_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis 1, 2, 5, 10 ... instead of with powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
