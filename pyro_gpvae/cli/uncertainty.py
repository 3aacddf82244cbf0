r"""``pyro-gpvae uncertainty``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["Uncertainty"]


@dataclass(kw_only=True)
class Uncertainty:
    """Does a random encoder know where it infers badly? Its uncertainty against the measured gap.

    Finished images are kept in OUT/chunks: the same command again goes on where it was stopped.

    Attributes:
        run_folder: The folder of a run whose guide is a random encoder, such as "gp".
        images: The first so many test images.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        bootstrap: Resamples of the images for the intervals.
        show: How many of the least and of the most uncertain images the picture shows.
        seed: Seed of samples and resamples.
        data: Name or .npz path of the run's data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is the run's.
        trust_guide: Import the guide MODULE:CLASS that the run names.
        out: Folder for uncertainty.csv (a row an image), uncertainty.json and the pictures.
        quiet: Show no progress bar.
    """

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    images: int = 200
    num_samples: int = 500
    reference_samples: int = 1000
    bootstrap: int = 2000
    show: int = 16
    seed: int = 0
    data: str | None = None
    root: str | None = None
    device: str | None = None
    trust_guide: bool = False
    out: Path = Path("uncertainty")
    quiet: bool = False

    def run(self) -> None:
        from pyro_gpvae.runs.uncertainty_report import measure_uncertainty, render_uncertainty

        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("images", "num_samples", "reference_samples", "bootstrap", "show", "seed")
        }
        print(
            measure_uncertainty(
                self.run_folder,
                self.out,
                data=self.data,
                root=self.root,
                device=self.device,
                trust_guide=self.trust_guide,
                progress=not self.quiet,
                **options,
            )
        )
        render_uncertainty(self.out)
        print(f"written to {self.out}")
