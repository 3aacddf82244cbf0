"""The picture of ``newton.py``: what a guide gains for the decoder passes that it takes."""

from __future__ import annotations

import statistics
from itertools import accumulate
from typing import Any

import pyro_gpvae.plots  # before matplotlib, without settings of the working directory  # noqa: F401

# isort: split
from matplotlib.figure import Figure

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
    figure = Figure(figsize=(6.5, 4.8), dpi=150)
    axes = figure.subplots()
    highest = [*accumulate((share for _, share, *_ in points), max)]
    axes.step([point[0] for point in points], highest, where="post", color="0.6", label="frontier")
    for number, (passes, share, spread, name) in enumerate(points):
        # colours repeat after seven guides, the pairs of colour and marker do not
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        style: Any = {"fmt": marker, "color": COLOURS[number % len(COLOURS)]}
        axes.errorbar(passes, share, spread or None, capsize=2, label=name, **style)
    for level, name in ((0, "encoder of the VAE"), (100, "optimum for each image")):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(name, (0.99, level), (0, -9), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=7, color="0.4")  # fmt: skip
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-8, 106)
    tidy(axes, "decoder passes", "share of the amortisation gap closed (%)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(figure, caption)
