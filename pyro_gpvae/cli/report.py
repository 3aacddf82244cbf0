r"""``pyro-gpvae report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyro_gpvae.cli._shared import Quiet, RunFolders, Where, keywords

__all__ = ["Report"]


@dataclass(kw_only=True)
class Report(Where):
    """Compare runs in one HTML file: scores, curves, gaps, hard images, samples, latent space.

    Attributes:
        runs: Run folders, or MODULE:FUNCTION that returns a model and its guide, with
            --trust-guide.
        out: The HTML file, which needs no other file.
        images: The inference gap is measured on the first so many test images; 0 omits it.
        overwrite: Replace the file.
        quiet: Show no progress on standard error.
    """

    runs: RunFolders
    out: Path = Path("report.html")
    images: int = 20
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        if not self.runs:
            raise ValueError("expected one or more run folders")
        from pyro_gpvae.runs.run_report import report_runs

        options = keywords(self)
        report_runs(options.pop("runs"), options.pop("out"), **options)
        print(f"written to {self.out}")
