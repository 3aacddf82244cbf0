r"""Tables as pictures: a dot and an interval for each method, the published value hollow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from pyro_gpvae.plots._style import COLOURS, MARKERS, finish

__all__ = ["companion_dots", "score_dots", "time_dots"]

# colour-blind-safe vermilion and blue for the red and the blue of the text; shapes tell as well
_MARKS = {
    "best": (COLOURS[1], "D", "best"),
    "no difference": (COLOURS[0], "s", "no evidence of a difference (p > 0.01)"),
    "different": ("0.25", "o", "different (p ≤ 0.01)"),
    "untested": ("0.25", "x", "not tested"),
}


def score_dots(table: pd.DataFrame, caption: str = "", title: str = "") -> Figure:
    """Draws every column of a score table: mean and standard deviation of each method.

    Scores are drawn relative to the VAE's in the same column, ours to ours and published to
    published, so that they can be compared where budgets differ; the VAE's own stand above. A
    column without a VAE of ours is drawn as it is, without published scores.

    Arguments:
        table: A row for each cell with ``panel``, ``column``, ``method``, ``mean``, ``sd``,
            ``mark``, ``difference_to_vae``, ``published``, ``published_sd`` and
            ``published_difference_to_vae``; methods are in the same order in all columns. A cell
            whose mean is not a number is marked "not run".
        caption: A line below.
        title: A line above.

    Raises:
        ValueError: If a column of the table is missing, or there is no row.
    """
    _check(
        table,
        "mark", "difference_to_vae", "published", "published_sd", "published_difference_to_vae",
    )  # fmt: skip
    figure, panels = _grid(table)
    for axes, rows in panels:
        has_vae = rows["difference_to_vae"].notna().any()
        x = rows["difference_to_vae"] if has_vae else rows["mean"]
        places = np.arange(len(rows))[::-1]
        for mark, (colour, marker, _) in _MARKS.items():
            chosen = (rows["mark"] == mark).to_numpy() & rows["mean"].notna().to_numpy()
            axes.errorbar(
                x[chosen], places[chosen], xerr=rows["sd"][chosen].fillna(0), fmt=marker,
                color=colour, markersize=4.5, capsize=2, linewidth=1.1, linestyle="none",
            )  # fmt: skip
        if has_vae or rows["mean"].isna().all():
            axes.errorbar(
                rows["published_difference_to_vae"], places + 0.3,
                xerr=rows["published_sd"].fillna(0), fmt="o", color="0.55", markerfacecolor="none",
                markersize=4.5, linewidth=0.7, linestyle="none",
            )  # fmt: skip
            axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            axes.set_xlabel("nats above the VAE")
        else:
            axes.set_xlabel("nats per image")
        _not_run(axes, places[rows["mean"].isna().to_numpy()])
        axes.margins(x=0.2)
        if x.isna().all() and rows["published_difference_to_vae"].isna().all():
            axes.set_xticks([])
        own, published = (_of_vae(rows, name) for name in ("mean", "published"))
        axes.set_title(f"{rows['column'].iloc[0]}\nVAE {own}, paper {published}", fontsize=9)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for mark, (colour, marker, label) in _MARKS.items()
        if (table["mark"] == mark).any()
    ]
    handles.append(
        Line2D([], [], color="0.55", marker="o", markerfacecolor="none", linestyle="none",
               label="published")
    )  # fmt: skip
    return _finish(figure, handles, caption, title)


def companion_dots(table: pd.DataFrame, caption: str = "", title: str = "") -> Figure:
    """Draws the scores of better and better proposals for each method, a panel a column.

    Arguments:
        table: A row for each cell with ``panel``, ``column``, ``method``, ``score`` (its name),
            ``mean`` and ``sd``.
        caption: A line below.
        title: A line above.

    Raises:
        ValueError: If a column of the table is missing, or there is no row.
    """
    _check(table, "score")
    scores = list(dict.fromkeys(table["score"]))
    figure, panels = _grid(table)
    for axes, rows in panels:
        methods = list(dict.fromkeys(rows["method"]))
        for index, score in enumerate(scores):
            found = rows[rows["score"] == score].set_index("method").reindex(methods)
            # a little below each other, so that intervals can be told apart
            places = np.arange(len(methods))[::-1] + 0.25 - 0.5 * index / max(len(scores) - 1, 1)
            axes.errorbar(
                found["mean"], places, xerr=found["sd"].fillna(0), linestyle="none",
                fmt=MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)],
                markersize=4, capsize=1.5, linewidth=1,
            )  # fmt: skip
        axes.set_title(rows["column"].iloc[0], fontsize=9)
        axes.set_xlabel("nats per image")
        run = set(rows.loc[rows["mean"].notna(), "method"])
        absent = np.array([method not in run for method in methods])
        _not_run(axes, np.arange(len(methods))[::-1][absent])
        if not run:
            axes.set_xticks([])
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
               linestyle="none", label=score)
        for i, score in enumerate(scores)
    ]  # fmt: skip
    return _finish(figure, handles, caption, title)


def time_dots(table: pd.DataFrame, caption: str = "", title: str = "") -> Figure:
    """Draws inference times: median and quartiles of each method, on a logarithmic axis.

    Arguments:
        table: A row for each cell with ``panel``, ``column``, ``method``, ``ms``, ``ms_low``,
            ``ms_high`` and ``published``.
        caption: A line below.
        title: A line above.

    Raises:
        ValueError: If a column of the table is missing, or there is no row.
    """
    _check(table.rename(columns={"ms": "mean", "ms_low": "sd"}), "ms_high", "published")
    figure, panels = _grid(table)
    for axes, rows in panels:
        places = np.arange(len(rows))[::-1]
        widths = np.stack([rows["ms"] - rows["ms_low"], rows["ms_high"] - rows["ms"]])
        axes.errorbar(
            rows["ms"], places, xerr=np.maximum(widths, 0), fmt="o", color=COLOURS[0],
            markersize=4.5, capsize=2, linewidth=1.1, linestyle="none",
        )  # fmt: skip
        axes.plot(
            rows["published"], places + 0.3, linestyle="none", marker="o", color="0.55",
            markerfacecolor="none", markersize=4.5,
        )  # fmt: skip
        axes.set_xscale("log")
        values = rows[["ms_low", "ms_high", "published"]].to_numpy(float)
        few = not np.isfinite(values).any() or np.nanmax(values) < 30 * np.nanmin(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _not_run(axes, places[rows["ms"].isna().to_numpy()])
        if not np.isfinite(values).any():
            axes.set_xticks([])
        axes.set_title(rows["column"].iloc[0], fontsize=9)
        axes.set_xlabel("ms per 128 images")
    handles = [
        Line2D([], [], color=COLOURS[0], marker="o", linestyle="none", label="median, quartiles"),
        Line2D([], [], color="0.55", marker="o", markerfacecolor="none", linestyle="none",
               label="published (other device)"),
    ]  # fmt: skip
    return _finish(figure, handles, caption, title)


def _check(table: pd.DataFrame, *columns: str) -> None:
    missing = {"panel", "column", "method", "mean", "sd", *columns} - set(table.columns)
    if missing:
        raise ValueError(f"the table lacks the columns {sorted(missing)}")
    if table.empty:
        raise ValueError("the table has no rows to draw")


def _grid(table: pd.DataFrame) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Axes for each column, a row of them for each panel."""
    by_panel = [
        [rows for _, rows in part.groupby("column", sort=False)]
        for _, part in table.groupby("panel", sort=False)
    ]
    width = max(len(part) for part in by_panel)
    methods = max(rows["method"].nunique() for part in by_panel for rows in part)
    height = len(by_panel) * (0.19 * methods + 1.0)
    figure = Figure(figsize=(max(2.3 * width + 1.6, 6.5), height), dpi=150)
    grid = figure.subplots(len(by_panel), width, squeeze=False)
    found = []
    for line, part in zip(grid, by_panel, strict=True):
        for index, axes in enumerate(line):
            if index >= len(part):
                axes.set_visible(False)
                continue
            rows = part[index]
            labels = list(dict.fromkeys(rows["method"]))
            axes.set_yticks(np.arange(len(labels))[::-1], labels if index == 0 else [])
            axes.set_ylim(-0.7, len(labels) - 0.3)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            found.append((axes, rows))
        if table["panel"].nunique() > 1:
            line[0].set_ylabel(part[0]["panel"].iloc[0], fontsize=9)
    return figure, found


def _not_run(axes: Axes, places: NDArray[Any]) -> None:
    for place in places:
        axes.annotate(
            "not run", (1, place), (-2, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", fontsize=6.5, color="0.5",
        )  # fmt: skip


def _of_vae(rows: pd.DataFrame, name: str) -> str:
    found = rows.loc[rows["method"] == "VAE", name]
    value = float(found.iloc[0]) if len(found) else math.nan
    return "–" if math.isnan(value) else f"{value:.1f}"


def _finish(figure: Figure, handles: list[Line2D], caption: str, title: str) -> Figure:
    """Title and legend above the panels, the caption below, for which the figure grows."""
    width, height = figure.get_size_inches()
    columns = min(len(handles), max(1, int(width / 2.4)))
    head = 0.38 if title else 0.1
    # the legend's lines, and the panels' own titles
    above = head + 0.2 * -(-len(handles) // columns) + 0.55
    below = 0.16 * (len(caption) // int(width * 13) + 1) + 0.1
    height += above + below
    figure.set_size_inches(width, height)
    finish(figure, caption)
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=11)
    figure.legend(
        handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=8,
        bbox_to_anchor=(0.5, 1 - head / height), borderaxespad=0,
    )  # fmt: skip
    top = 1 - above / height
    spec = figure.axes[0].get_subplotspec()
    lines = spec.get_gridspec().nrows if spec else 1
    # between panels, eight tenths of an inch for the labels below one and the titles of the next
    panel = (top - figure.subplotpars.bottom) * height / lines - 0.8
    figure.subplots_adjust(top=top, hspace=0.8 / max(panel, 0.8))
    return figure
