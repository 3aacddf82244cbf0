"""What the score tables share: records in; Markdown, LaTeX, CSV and pictures out.

A table has columns (data set, dimension p, decoder) and rows (guides). Its cells are filled from
the records of finished runs, and of their evaluations with ``pyro-gpvae evaluate RUN --companion N
--out FOLDER``, wherever they lie below the folders given. A cell without a record is "not run".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from _dots import companion_dots, score_dots
from _frames import companion_frame, drawn, order_text, score_frame
from _records import Table, check_pairs, collect, read_records
from _render import (
    companion_caption,
    companion_latex,
    companion_markdown,
    score_caption,
    score_latex,
    score_markdown,
)

from pyro_gpvae.core._files import write_text


@dataclass(kw_only=True)
class Options:
    """Options of a score table.

    Attributes:
        records: Folders with runs and evaluations, at any depth; none is a table of what is
            published.
        epochs: The budget of the table, where records do not agree; by default the most frequent.
        out: Folder of the results.
    """

    records: tyro.conf.Positional[tuple[Annotated[Path, tyro.conf.arg(metavar="FOLDER")], ...]] = ()
    epochs: int | None = None
    out: Path = Path("docs/results")


def main(table: Table, options: Options) -> None:
    """Makes the table and its companion."""
    runs, companions, damaged = read_records(options.records)
    collected = collect(table, runs, epochs=options.epochs, others=runs)
    beside = collect(table, companions, epochs=options.epochs or collected.epochs, others=runs)
    check_pairs(runs, companions)
    scores = score_frame(table, collected, {"IWAE": "scores.log_evidence"})
    proposals = companion_frame(table, beside)
    order = order_text(proposals, bool(companions))
    caption = score_caption(collected, order)
    flags = list(dict.fromkeys([*damaged, *collected.flags, *beside.flags]))
    for flag in flags:
        print(f"warning: {flag}", file=sys.stderr)
    out, name = options.out, table.name
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", scores.to_csv(index=False))
    write_text(out / f"{name}.md", score_markdown(table, scores, caption, flags))
    write_text(out / f"{name}.tex", score_latex(table, scores, caption))
    caption = score_caption(collected, order, picture=True)
    score_dots(drawn(scores), caption, table.title).savefig(out / f"{name}.png")
    caption = companion_caption(beside, order)
    name = f"{table.name}_companion"
    write_text(out / f"{name}.csv", proposals.to_csv(index=False))
    write_text(out / f"{name}.md", companion_markdown(table, proposals, caption, flags))
    write_text(out / f"{name}.tex", companion_latex(table, proposals, caption))
    title = f"{table.title}: better model or better proposal?"
    caption = companion_caption(beside, order, picture=True)
    companion_dots(drawn(proposals), caption, title).savefig(out / f"{name}.png")
    print((out / f"{table.name}.md").read_text(encoding="utf-8"))
    print(f"written to {out}: {table.name} and {name}, each as .md, .tex, .csv and .png")
