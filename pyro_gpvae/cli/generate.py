r"""``pyro-gpvae generate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyro_gpvae.cli._shared import Quiet, RunFolder, Where, keywords

__all__ = ["Generate"]


@dataclass(kw_only=True)
class Generate(Where):
    """Draw samples, reconstructions, interpolations and traversals; measure the use of z.

    Attributes:
        run_folder: The run folder.
        out: Folder for samples.png, reconstructions.png, interpolations.png, traversals.png,
            active_units.png, all their numbers in arrays.npz, and latent.json with the active
            units of the first 500 test images.
        samples: Number of samples from the prior.
        images: Indices of the test images to reconstruct, in order; paths lead from each to the
            next, and the latent dimensions vary around the first. None is the first 8.
        steps: Images along a path or a latent dimension, both ends included.
        path: "spherical" paths keep the norm of z, as the prior does; "linear" ones do not.
        seed: Seed of all draws; None is that of the run.
        overwrite: Replace what this command wrote to that folder before.
        quiet: Show no progress on standard error.
    """

    run_folder: RunFolder
    out: Path = Path("generated")
    samples: int = 64
    images: tuple[int, ...] | None = None
    steps: int = 9
    path: Literal["spherical", "linear"] = "spherical"
    seed: int | None = None
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.generation_report import report_generation

        print(f"{report_generation(**keywords(self))}\nwritten to {self.out}")
