r"""Colours, markers and layout that all figures share."""

from __future__ import annotations

import textwrap
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

#: The colours of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")
#: A grey that can be read on white and on dark pages alike.
GREY = "#7a7a7a"


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """Returns a figure without pyplot, and its axes in an array (rows, columns)."""
    figure = Figure(figsize=(width, height), dpi=150)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def tidy(axes: Axes, x: str, y: str = "", grid: Literal["both", "x", "y"] = "both") -> None:
    """Names the axes, draws a faint grid behind the data, and no frame above and to the right."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, caption: str, title: str = "") -> Figure:
    """Adds a title and a caption to a figure, and fits the axes between them."""
    width, height = figure.get_size_inches()
    # textwrap does not break at a non-breaking space, so that "K = 100" stays on one line
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


def on_any_page(figure: Figure) -> Figure:
    """Prepares a figure of images for light and dark pages: no background, and grey texts."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(labelcolor=GREY)
    for text in figure.findobj(Text):
        text.set_color(GREY)
    return figure
