r"""``pyro-gpvae results``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Results"]


@dataclass(kw_only=True)
class Results:
    """List the runs in a folder, and say what makes their scores incomparable.

    Attributes:
        folder: The folder; its runs may lie in folders of their own.
        where: Only runs that fit: KEY=VALUE,VALUE with a key of method, guide, data, latent_dim,
            decoder, seed. A guide's name without options fits all its options.
        csv: Write all columns to this file.
        table: Print a Markdown table instead, means over seeds, with the budget in its caption.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    where: tuple[str, ...] = ()
    csv: Path | None = None
    table: bool = False

    def run(self) -> None:
        from pyro_gpvae.core._files import write_text
        from pyro_gpvae.runs.results import (
            differences,
            parse_where,
            read_results,
            score_table,
            select,
        )

        where = parse_where(self.where)
        frame, skipped = read_results(self.folder)
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        frame = select(frame, where)
        if self.csv is not None:
            write_text(self.csv, frame.to_csv(index=False))
        if self.table:
            print(score_table(frame))
            return
        names = ["run", "method", "data", "latent_dim", "decoder", "seed", "epochs"]
        names += ["log_evidence", "elbo"]
        if not frame.empty:
            print(frame[names].to_string(index=False, float_format="{:.2f}".format))
        print(f"{len(frame)} runs, {len(skipped)} files skipped; scores in nats per image")
        for line in differences(frame):
            print(f"differs: {line}")
