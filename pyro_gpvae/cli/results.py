r"""``pyro-gpvae results``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pyro_gpvae.cli._shared import Command
from pyro_gpvae.core._text import printable

__all__ = ["Results"]


@dataclass(kw_only=True)
class Results(Command):
    """List the runs in a folder, and say what makes their scores incomparable.

    Attributes:
        folder: The folder; its runs may lie in subfolders.
        csv: Write all columns to this file.
        seeds: Print means and standard deviations over seeds instead.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    csv: Path | None = None
    seeds: bool = False

    def run(self) -> None:
        from pyro_gpvae.core._files import write_text
        from pyro_gpvae.runs import results

        frame, skipped = results.read_results(self.folder)
        for line in skipped if self.verbose else ():
            print(printable(f"skipped: {line}"), file=sys.stderr)
        if self.csv is not None:
            write_text(self.csv, frame.to_csv(index=False))
        names = ["run", "method", "data", "latent_dim", "decoder", "seed", "epochs"]
        table = frame[[*names, "log_evidence", "elbo"]]
        if self.seeds:
            table = results.over_seeds(frame)
        if not frame.empty:
            print(printable(table.to_string(index=False, float_format="{:.2f}".format)))
        print(f"{len(frame)} runs, {len(skipped)} other records; scores in nats per image")
        for line in results.differences(frame):
            print(printable(f"differs: {line}"))
