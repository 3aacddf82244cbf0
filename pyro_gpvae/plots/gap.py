r"""The inference gap: its components, and its relation to scores of an image."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pyro_gpvae.plots._style import COLOURS, finish, tidy

__all__ = ["gap_ladder", "uncertainty_scatter"]

_STEPS = {
    "beyond_gaussian": "beyond Gaussian",
    "independence": "independence",
    "encoder": "encoder",
    "weight_information": "I(z; (W, U) | x)",
    "kl_global": "KL(q(W, U) ‖ p) / N",
}


def gap_ladder(table: pd.DataFrame, caption: str = "") -> Figure:
    """Draws the components of each guide's gap, and the distribution of the gap over images.

    The left panel shows the mean of each component as a stacked bar. Runs with the same label are
    seeds; the error bar is the standard deviation of the sum over seeds. The right panel shows the
    gap log p(x) - ELBO of the images: the box holds the middle half of them, the whiskers 90 %.

    Arguments:
        table: One row per image, as :func:`pyro_gpvae.runs.gap_chunks.measure_gaps` returns it;
            images that have not converged are left out.
        caption: Text below the figure, such as budget and seeds.

    Raises:
        ValueError: If a column is missing, or no image has converged.
    """
    needed = {"label", "run", "converged", "gap", *_STEPS}
    if needed - set(table.columns):
        raise ValueError(f"gap_ladder needs the columns {sorted(needed - set(table.columns))}")
    table = table[table["converged"]]
    if table.empty:
        raise ValueError("gap_ladder needs at least one image whose optimum has converged")
    labels = list(dict.fromkeys(table["label"]))
    places = np.arange(len(labels))[::-1]
    figure = Figure(figsize=(9.5, 0.42 * len(labels) + 2.4), dpi=150)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    by_run = table.groupby(["label", "run"], sort=False)[list(_STEPS)].mean()
    # the costs of a random encoder are not drawn where they are unknown
    means = by_run.groupby("label", sort=False).mean().loc[labels].fillna(0.0)
    above, below = np.zeros(len(labels)), np.zeros(len(labels))
    for colour, (name, step) in zip(COLOURS, _STEPS.items(), strict=False):
        width = means[name].to_numpy(float)
        if not np.any(width):
            continue  # such as the costs of random weights where no encoder is random
        start = np.where(width >= 0, above, below)
        left.barh(
            places, width, left=start, height=0.62, color=colour, label=step,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        above += np.maximum(width, 0)
        below += np.minimum(width, 0)
    totals = by_run.sum(axis=1).groupby("label", sort=False)
    mean, deviation = totals.mean().loc[labels], totals.std().loc[labels]
    if deviation.notna().any():
        left.errorbar(
            mean, places, xerr=deviation, fmt="none", ecolor="black", capsize=3, linewidth=1.2,
            label="sum, ± sd over seeds",
        )  # fmt: skip
    ends = np.maximum(above, mean + deviation.fillna(0.0))  # to the right of bar and error bar
    for place, end, value in zip(places, ends, mean, strict=True):
        left.annotate(
            f"{value:.1f}", (end, place), (6, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    left.set_yticks(places, labels)
    left.set_xlabel("mean over images (nats per image)")
    left.set_xlim(min(1.1 * below.min(), 0.0), 1.15 * ends.max())  # room for the numbers
    left.axvline(0, color="black", linewidth=0.8)
    gaps = [table.loc[table["label"] == label, "gap"].clip(lower=1e-2) for label in labels]
    right.boxplot(
        gaps, positions=places, orientation="horizontal", whis=(5, 95), showfliers=False,
        widths=0.5, manage_ticks=False, medianprops={"color": COLOURS[1], "linewidth": 1.5},
    )  # fmt: skip
    right.set_xscale("log")
    _plain_ticks(right.xaxis)
    right.set_xlabel("log p(x) - ELBO of each image (nats)")
    right.tick_params(left=False)
    for axes in (left, right):
        tidy(axes, "x")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return finish(figure, caption)


def uncertainty_scatter(
    table: pd.DataFrame, scores: dict[str, str], titles: dict[str, str], caption: str = ""
) -> Figure:
    """Draws the gap of each image against scores that may predict it, one panel per score.

    Arguments:
        table: One row per image, with the column ``gap`` (nats) and a column for each score.
        scores: The axis label of each score, by column.
        titles: The title of each panel, such as the rank correlation, by column.
        caption: Text below the figure.

    Raises:
        ValueError: If there is no score, or a column is missing.
    """
    missing = {"gap", *scores} - set(table.columns)
    if not scores or missing:
        raise ValueError(f"uncertainty_scatter needs scores and the columns {sorted(missing)}")
    figure = Figure(figsize=(3.6 * len(scores) + 0.6, 3.9), dpi=150)
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    gap = table["gap"].clip(lower=1e-2)
    for axes, (name, label) in zip(panels, scores.items(), strict=True):
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
        axes.set_xlabel(label)
        axes.set_title(titles.get(name, ""), fontsize=10)
        tidy(axes)
    panels[0].set_ylabel("gap log p(x) - ELBO (nats)")
    return finish(figure, caption)


def _plain_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis 1, 2, 5, 10, 20 ... instead of with powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
