r"""``pyro-gpvae train``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from pyro_gpvae.commands._text import print_scores
from pyro_gpvae.config import RunConfig
from pyro_gpvae.runs import train_run

__all__ = ["Train"]


@dataclass(kw_only=True)
class Train(RunConfig):
    """Train a guide and a model, evaluate them on the test images, write a run folder.

    Attributes:
        out: The run folder: it appears when the run is finished.
        overwrite: Replace an earlier run in that folder.
        quiet: Show no progress bar.
    """

    out: Path = Path("run")
    overwrite: bool = False
    quiet: bool = False

    def run(self) -> None:
        options = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        record = train_run(
            RunConfig(**options), self.out, overwrite=self.overwrite, progress=not self.quiet
        )
        print_scores(record)
        print(f"written to {self.out}")
