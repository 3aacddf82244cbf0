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
        folder: The folder; its runs may lie in subfolders.
        where: Only runs that match: KEY=VALUE,VALUE with one of the keys method, guide, data,
            latent_dim, decoder and seed. The name of a guide without options matches all options.
        csv: Write all columns to this file.
        table: Print a Markdown table of means over seeds instead, with the budget in its caption.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    where: tuple[str, ...] = ()
    csv: Path | None = None
    table: bool = False

    def run(self) -> None:
        from pyro_gpvae.core._files import write_text
        from pyro_gpvae.runs import results

        where = results.parse_where(self.where)
        frame, skipped = results.read_results(self.folder)
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        frame = results.select(frame, where)
        if self.csv is not None:
            write_text(self.csv, frame.to_csv(index=False))
        if self.table:
            print(results.score_table(frame))
            return
        names = ["run", "method", "data", "latent_dim", "decoder", "seed", "epochs"]
        names += ["log_evidence", "elbo"]
        if not frame.empty:
            print(frame[names].to_string(index=False, float_format="{:.2f}".format))
        print(f"{len(frame)} runs, {len(skipped)} files skipped; scores in nats per image")
        for line in results.differences(frame):
            print(f"differs: {line}")
