r"""``pyro-gpvae gap``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyro_gpvae.cli._shared import Quiet, RunFolders, Where, keywords

__all__ = ["Gap"]


@dataclass(kw_only=True)
class Gap(Where):
    """Decompose the inference gap of runs; tell a better model from a better proposal.

    Finished images are kept in OUT/chunks: the same command continues where it was stopped. Once
    it is done, only --overwrite replaces the files in OUT; no image is measured again.

    Attributes:
        runs: Run folders, or MODULE:FUNCTION that returns a model and its guide, with
            --trust-guide.
        images: The number of test images of each run, from the first on.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        ais_chains: Chains per image of annealed importance sampling; 0 turns it off.
        ais_steps: Steps of annealed importance sampling, from the best full Gaussian.
        seed: Seed of the samples.
        out: Folder for gap.csv (one row per run and image), gap.json, gap.md, gap.png and
            report.html.
        overwrite: Replace these files of an earlier measurement.
        quiet: Show no progress on standard error.
    """

    runs: RunFolders
    images: int = 100
    num_samples: int = 500
    reference_samples: int = 1000
    ais_chains: int = 8
    ais_steps: int = 30
    seed: int = 0
    out: Path = Path("gap")
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        if not self.runs:
            raise ValueError("expected one or more run folders")
        from pyro_gpvae.runs.gap_report import report_gaps

        options = keywords(self)
        options["num_images"] = options.pop("images")
        budget = {name: options.pop(name) for name in ("num_samples", "reference_samples", "seed")}
        budget["num_chains"] = options.pop("ais_chains")
        budget["num_steps"] = options.pop("ais_steps")
        report_gaps(options.pop("runs"), options.pop("out"), budget, **options).print()
        print(f"written to {self.out}")
