r"""Reports: text, tables and figures, as Markdown, as one HTML file, and in the terminal."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import pyro_gpvae
from pyro_gpvae.core._files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_gpvae.runs.folder import Run

__all__ = ["HTML", "Report", "Section", "caption", "describe", "markdown_table", "number"]

#: The name of the HTML file in a folder of results.
HTML = "report.html"


@dataclass
class Section:
    """A part of a report: a table of texts, paragraphs below it, and figures by file name.

    The first column of the table names its rows. Words in `backticks` are code.
    """

    title: str
    text: Sequence[str] = ()
    table: pd.DataFrame | None = None
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass
class Report:
    """A title, a caption that tells data and budget, and sections, some of which are printed."""

    title: str
    caption: str
    sections: Sequence[Section]
    printed: int | None = None

    def markdown(self) -> str:
        """Returns the report in Markdown, with links to its figures."""
        parts = [f"# {self.title}", self.caption]
        for section in self.sections:
            parts.append(f"## {section.title}")
            if section.table is not None:
                parts.append(markdown_table(section.table))
            parts += [*section.text, *(f"![{section.title}]({name})" for name in section.figures)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Returns the report as one HTML file, which needs no other file and no network."""
        return self._html(self._drawn())

    def _drawn(self) -> dict[Figure, bytes]:
        """Returns the PNG file of each figure."""
        return {f: _png(f) for section in self.sections for f in section.figures.values()}

    def _html(self, drawn: dict[Figure, bytes]) -> str:
        from jinja2 import Environment, PackageLoader

        environment = Environment(
            loader=PackageLoader("pyro_gpvae.runs", ""), autoescape=True, trim_blocks=True
        )
        environment.filters |= {"code": _code}
        pictures = {figure: base64.b64encode(png).decode() for figure, png in drawn.items()}
        template = environment.get_template("report.html.jinja")
        return template.render(report=self, pictures=pictures, version=pyro_gpvae.__version__)

    def print(self) -> None:
        """Prints caption, tables and texts, in the width of the terminal."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        console.print(Text(self.caption))
        for section in self.sections[: self.printed]:
            if section.table is not None or section.text:
                console.print()
            if section.table is not None:
                table = section.table.replace("`", "", regex=True)  # marks of code in pages
                table = _fitting(table, console.width)
                shown = Table(title=Text(section.title), title_justify="left")
                for n, name in enumerate(table.columns):
                    shown.add_column(Text(name), justify="right" if n else "left", overflow="fold")
                for row in table.itertuples(index=False):
                    shown.add_row(*map(Text, row))
                console.print(shown)
            for paragraph in section.text:
                console.print(Text(paragraph))

    def save(self, folder: str | Path, page: str) -> None:
        """Writes the figures, the Markdown page with this name, and ``report.html``."""
        folder, drawn = Path(folder), self._drawn()
        for section in self.sections:
            for name, figure in section.figures.items():
                write_bytes(folder / name, drawn[figure])  # a link would lead out of the folder
        write_text(folder / page, self.markdown())
        write_text(folder / HTML, self._html(drawn))


def _fitting(table: pd.DataFrame, width: int) -> pd.DataFrame:
    """Returns a table of texts, or its transpose if its numbers do not fit into the width."""
    cells = [[*name.split(), *table[name]] for name in table.columns]
    needed = sum(max(map(len, column)) + 3 for column in cells) + 1  # heads are broken at spaces
    if needed <= width or len(table) >= table.shape[1]:
        return table
    first = table.columns[0]
    return table.set_index(first).T.rename_axis(index=first, columns=None).reset_index()


def markdown_table(table: pd.DataFrame) -> str:
    """Returns a table of texts in Markdown; columns after the first are aligned to the right."""
    rows = [[*table.columns], *table.itertuples(index=False, name=None)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def _code(text: str) -> Any:
    """Escapes a text for HTML; what stands in backticks becomes code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def describe(run: Run) -> dict[str, Any]:
    """Returns what a record tells about a run: its folder, options, data, epochs, σ and weights."""
    return {
        "run": str(run.folder),
        "config": {k: v for k, v in vars(run.config).items() if k != "root"},
        "train_images": run.record["data"]["train_images"],
        "epochs": run.total_epochs,
        "sigma": run.record.get("sigma"),
        "weights_sha256": run.weights_sha256,
    }


def caption(runs: Sequence[Run], test_images: int, budget: str) -> str:
    """Returns data, training and budget of runs."""

    def common(values: Iterable[Any]) -> str:
        return " / ".join(sorted({str(value) for value in values}))

    data = common(Path(run.config.data).name for run in runs)
    train = common(f"{run.record['data']['train_images']:,}" for run in runs)
    epochs = common(run.total_epochs for run in runs)
    latent_dim = common(run.config.latent_dim for run in runs)
    seed = common(run.config.seed for run in runs)
    # 0 epochs are those of programs that no run trained
    training = f"{epochs} epochs, seed {seed}" if epochs != "0" else "trained elsewhere"
    return (
        f"{data}: {train} training and {test_images} test images, p = {latent_dim}, {training}. "
        f"{budget}"
    )


def number(value: float | None) -> str:
    """Returns a number with three digits, and a dash for NaN and None."""
    if value is None or value != value:
        return "–"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"
