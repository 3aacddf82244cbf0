r"""``pyro-gpvae generate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyro_gpvae.cli._shared import RunFolder, Where, keywords

__all__ = ["Generate"]


@dataclass(kw_only=True)
class Generate(Where):
    """Draw samples and reconstructions, and map the latent space of a run.

    Attributes:
        run_folder: The run folder, or MODULE:FUNCTION that returns a model and its guide, with
            --trust-guide.
        out: Folder for samples.png, reconstructions.png, latent.png, generated.json and
            report.html.
        samples: Number of samples from the prior.
        images: Indices of the test images to reconstruct, in order. None is the first 8.
        seed: Seed of all draws; None is that of the run.
        overwrite: Replace what this command wrote to that folder before.
    """

    run_folder: RunFolder
    out: Path = Path("generated")
    samples: int = 64
    images: tuple[int, ...] | None = None
    seed: int | None = None
    overwrite: bool = False

    def run(self) -> None:
        from pyro_gpvae.runs.generation_report import report_generation

        report_generation(**keywords(self)).print()
        print(f"written to {self.out}")
