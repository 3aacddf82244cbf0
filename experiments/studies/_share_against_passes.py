"""The picture of ``newton.py``: what a guide gains for the decoder passes that it takes."""

from __future__ import annotations

import statistics
from itertools import accumulate, pairwise
from typing import Any

import pyro_gpvae.plots  # before matplotlib, without settings of the working directory  # noqa: F401

# isort: split
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pyro_gpvae.plots._style import COLOURS, MARKERS, finish, tidy

__all__ = ["share_against_passes"]


def share_against_passes(rows: list[dict[str, Any]], caption: str = "") -> Figure:
    """Draws the share of the amortisation gap that each guide closes against its cost.

    The frontier connects the guides that no other guide surpasses at the same or a lower cost.

    Arguments:
        rows: For each guide and seed "guide", "share" and "decoder_passes"; rows without passes
            are left out.
        caption: A line below: the budget, the seeds, the device.
    """
    rows = [row for row in rows if row.get("decoder_passes") is not None]
    points = []
    for name in dict.fromkeys(row["guide"] for row in rows):
        group = [row for row in rows if row["guide"] == name]
        shares = [100 * row["share"] for row in group]
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        passes = statistics.mean(row["decoder_passes"] for row in group)
        points.append((passes, statistics.mean(shares), spread, name))
    points.sort()
    figure = Figure(figsize=(7.5, 4.8), dpi=150)
    axes = figure.subplots()
    highest = [*accumulate((share for _, share, *_ in points), max)]
    axes.step([point[0] for point in points], highest, where="post", color="0.6", zorder=1)
    for number, (passes, share, spread, _) in enumerate(points):
        # colours repeat after seven guides, the pairs of colour and marker do not
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        axes.errorbar(passes, share, spread or None, capsize=2, fmt=marker, color=_colour(number))
    axes.axhline(0, color="0.6", linewidth=0.8, linestyle="--")
    axes.axhline(100, color="0.6", linewidth=0.8, linestyle="--")
    axes.annotate("optimum for each image", (0.01, 100), (0, -9), fontsize=7, color="0.4",
                  xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-8, 106)
    axes.set_xlim(right=1.7 * points[-1][0])  # room for the last name
    tidy(axes, "decoder passes", "share of the amortisation gap closed (%)")
    finish(figure, caption.replace("`", ""))
    _label(axes, points)
    return figure


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _label(axes: Axes, points: list[tuple[float, float, float, str]]) -> None:
    """Writes the name of each point beside it, or at the nearest height that is free."""
    at = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in at]
    for line in axes.lines:  # the frontier, the error bars and the lines at 0 and 100 %
        corners = line.get_transform().transform(line.get_path().interpolated(50).vertices)
        taken += [Bbox([low, high]) for low, high in pairwise(corners)]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            taken += [Bbox(axes.transData.transform(ends)) for ends in bars.get_segments()]
    heights = sorted(range(-90, 91, 3), key=abs)  # in points
    for number, (passes, share, _, name) in enumerate(points):
        for height in heights:
            text = axes.annotate(
                name, (passes, share), (7, height), textcoords="offset points", va="center",
                fontsize=8, color=_colour(number),
            )  # fmt: skip
            box = text.get_window_extent()
            if not box.count_overlaps(taken):
                break
            text.remove()
        taken.append(box)
