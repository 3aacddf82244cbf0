r"""The picture of ``compare.py``: what a guide gains for its inference time."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from pyro_gpvae.plots._style import COLOURS, MARKERS, finish

__all__ = ["gap_against_time"]


def gap_against_time(table: pd.DataFrame, caption: str = "") -> Figure:
    """Draws the share of the amortisation gap that each guide closes against its inference time.

    Arguments:
        table: A row for each guide and decoder, as of ``compare.summarise``. Points of a family
            with several guides are labelled with the number after the colon.
        caption: A line below: the budget, the seeds, the device.
    """
    decoders = list(dict.fromkeys(table["decoder"]))
    families: dict[str, list[str]] = {}
    for guide in table["guide"].unique():
        name, _, options = guide.partition(":")
        families.setdefault(name, []).append(options.partition(",")[0])
    figure = Figure(figsize=(5.2 * len(decoders), 4.8), dpi=150)
    panels = figure.subplots(1, len(decoders), sharey=True, squeeze=False)[0]
    floor = max(min(0.0, float(table["share"].min())), -1.0)
    for axes, decoder in zip(panels, decoders, strict=True):
        for row in table[table["decoder"] == decoder].itertuples():
            name, _, options = str(row.guide).partition(":")
            family = [*families].index(name)
            numbers = sorted(families[name])
            legend = f"{name}:{', '.join(numbers)}" if any(numbers) else name
            share, below = max(row.share, floor), row.share < floor
            axes.errorbar(
                row.ms,
                100 * share,
                xerr=[[row.ms - row.ms_low], [row.ms_high - row.ms]],
                yerr=None if math.isnan(row.share_sd) or below else 100 * row.share_sd,
                # colours repeat after seven families, the pairs of colour and marker do not
                fmt=MARKERS[(family + family // len(COLOURS)) % len(MARKERS)],
                color=COLOURS[family % len(COLOURS)],
                capsize=2,
                label=None if legend in axes.get_legend_handles_labels()[1] else legend,
            )
            number = options.partition(",")[0] if len(numbers) > 1 else ""
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
    return finish(figure, caption)
