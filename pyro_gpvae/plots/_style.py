r"""Colours, markers and layout that all pictures share."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "STYLES", "finish"]

#: Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "P", "X", "*")
STYLES = ("-", "--", "-.", ":")


def finish(figure: Figure, caption: str, title: str = "") -> Figure:
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
