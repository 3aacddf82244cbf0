r"""``pyro-gpvae uncertainty``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyro_gpvae.cli._shared import Quiet, RunFolder, Where, keywords

__all__ = ["Uncertainty"]


@dataclass(kw_only=True)
class Uncertainty(Where):
    """Correlate the uncertainty of a random encoder with the inference gap of each image.

    Finished images are kept in OUT/chunks: the same command continues where it was stopped.

    Attributes:
        run_folder: The folder of a run whose guide is a random encoder, such as "gp".
        images: The number of test images, from the first on.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        bootstrap: Resamples of the images for the intervals.
        seed: Seed of samples and resamples.
        out: Folder for uncertainty.csv (one row per image), uncertainty.json, the pictures
            and report.html.
        quiet: Show no progress on standard error.
    """

    run_folder: RunFolder
    images: int = 200
    num_samples: int = 500
    reference_samples: int = 1000
    bootstrap: int = 2000
    seed: int = 0
    out: Path = Path("uncertainty")
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.uncertainty_report import report_uncertainty

        report_uncertainty(**keywords(self)).print()
        print(f"written to {self.out}")
