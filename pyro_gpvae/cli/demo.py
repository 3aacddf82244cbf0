r"""``pyro-gpvae demo``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pyro_gpvae.cli._shared import Command, Quiet, keywords

__all__ = ["Demo"]


@dataclass(kw_only=True)
class Demo(Command):
    """Train VAE, GPVAE and newton on 5,000 digits, and report what inference loses: 3 minutes.

    Attributes:
        out: Folder of the report; an earlier report in it is replaced.
        quick: Cut the budget to under 30 seconds; every caption says so.
        seed: Seed of the whole demo.
        device: "cpu", "cuda" or "cuda:INDEX"; None is CUDA if it is available, else the CPU.
        quiet: Show no progress on standard error.
    """

    out: Path = Path("demo")
    quick: bool = False
    seed: int = 0
    device: str | None = None
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.demo import run_demo

        begin = time.monotonic()
        run_demo(**keywords(self) | {"progress": not self.quiet}).print()
        print(f"\n{time.monotonic() - begin:.0f} seconds; the report is {self.out / 'report.html'}")
