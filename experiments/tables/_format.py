"""Formats tables as Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_COLOURS = {"best": "red", "no difference": "blue"}


@dataclass(frozen=True)
class Score:
    """A mean over seeds with its standard deviation and mark, see ``compare_methods``."""

    mean: float
    sd: float
    mark: str
    seeds: int
    suffix: str = ""

    def markdown(self) -> str:
        sd = "" if self.seeds == 1 else f"{self.sd:.1f}"
        text = f"{self.mean:.1f} ± {sd}" if sd else f"{self.mean:.1f}"
        if self.mark in _COLOURS:  # Markdown has no colours, mathematics in it has
            text = rf"{self.mean:.1f} \pm {sd}" if sd else f"{self.mean:.1f}"
            text = rf"$\color{{{_COLOURS[self.mark]}}}{{\mathbf{{{text}}}}}$"
        return self._notes(text)

    def latex(self) -> str:
        text = f"{self.mean:.1f}"
        if self.mark in _COLOURS:
            text = rf"\textcolor{{{_COLOURS[self.mark]}}}{{\textbf{{{text}}}}}"
        return self._notes(text if self.seeds == 1 else rf"{text}$^{{{self.sd:.1f}}}$")

    def _notes(self, text: str) -> str:
        if self.seeds == 0:
            return "not run"
        if self.seeds == 1:
            text += " (1 seed)"
        elif self.mark == "untested":
            text += " (not tested)"
        return text + self.suffix


Cell = str | Score


@dataclass(frozen=True)
class Block:
    """A part of a table: its heading, the heads of its columns, and its rows by method."""

    heading: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def markdown(title: str, blocks: Iterable[Block], caption: str, flags: Sequence[str] = ()) -> str:
    """Returns a page in Markdown. Methods in lower case are names of guides, set as code."""
    lines = [f"# {title}", ""]
    for block in blocks:
        lines += [f"## {block.heading}", ""] if block.heading else []
        lines.append(f"| method | {' | '.join(block.heads)} |")
        lines.append("|---|" + "--:|" * len(block.heads))
        for method, cells in block.rows:
            name = f"`{method}`" if method[:1].islower() else method
            texts = [cell if isinstance(cell, str) else cell.markdown() for cell in cells]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        lines.append("")
    notes = ["", "Flagged:", "", *(f"* {flag}" for flag in flags)] if flags else []
    return "\n".join([*lines, caption, *notes, ""])


def latex(name: str, blocks: Iterable[Block], caption: str) -> str:
    """Returns a table environment in LaTeX."""
    parts = []
    for block in blocks:
        count = len(block.heads) + 1
        heading = rf"\multicolumn{{{count}}}{{l}}{{{escape(block.heading)}}} \\"
        lines = [
            rf"\begin{{tabular}}{{l{'r' * (count - 1)}}}",
            r"\toprule",
            *([heading] if block.heading else []),
            " & ".join(map(escape, ["method", *block.heads])) + r" \\",
            r"\midrule",
        ]
        for method, cells in block.rows:
            texts = [escape(c) if isinstance(c, str) else c.latex() for c in cells]
            lines.append(" & ".join([escape(method), *texts]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    body = "\n\n\\medskip\n\n".join(parts)
    return (
        "% needs \\usepackage{booktabs,xcolor}\n"
        f"\\begin{{table}}\n\\centering\\scriptsize\n{body}\n"
        f"\\caption{{{escape(caption)}}}\n\\label{{tab:{name}}}\n\\end{{table}}\n"
    )


def escape(text: str) -> str:
    """Replaces characters that LaTeX does not print as they are."""
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    for character, command in (("Δ", r"\Delta"), ("×", r"\times"), ("±", r"\pm"), (">", ">")):
        text = text.replace(character, f"${command}$")
    return text.replace("–", "--")


def signed(value: float) -> str:
    """Formats a difference, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.1f}"
