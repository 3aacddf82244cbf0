r"""``pyro-gpvae gap``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["GAP_FILES", "Gap"]

GAP_FILES = ("gap.csv", "gap.json", "gap.md", "gap.png")


@dataclass(kw_only=True)
class Gap:
    """Decompose the inference gap of runs; tell a better model from a better proposal.

    Finished images are kept in OUT/chunks: the same command again goes on where it was stopped.
    Once it is done, OUT is replaced with --overwrite only, and without measuring them again.

    Attributes:
        runs: Run folders.
        images: The first so many test images of each run.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        ais_chains: Chains per image of annealed importance sampling; 0 is none.
        ais_steps: Steps of annealed importance sampling, from the best full Gaussian.
        seed: Seed of the samples.
        data: Name or .npz path of the runs' data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is that of each run.
        trust_guide: Import the guide MODULE:CLASS that a run names.
        out: Folder for gap.csv (a row a run and image), gap.json, gap.md and gap.png.
        overwrite: Replace these four files of an earlier measurement.
        quiet: Show no progress bar.
    """

    runs: tyro.conf.Positional[tuple[Annotated[Path, tyro.conf.arg(metavar="RUN")], ...]]
    images: int = 100
    num_samples: int = 500
    reference_samples: int = 1000
    ais_chains: int = 8
    ais_steps: int = 30
    seed: int = 0
    data: str | None = None
    root: str | None = None
    device: str | None = None
    trust_guide: bool = False
    out: Path = Path("gap")
    overwrite: bool = False
    quiet: bool = False

    def run(self) -> None:
        from pyro_gpvae.plots.gap import gap_ladder  # imports matplotlib
        from pyro_gpvae.runs.gap_report import gap_caption, measure_gaps, read_table, write_gaps

        if not self.overwrite:
            self._check_out()
        budget: dict[str, Any] = {
            "num_samples": self.num_samples,
            "reference_samples": self.reference_samples,
            "num_chains": self.ais_chains,
            "num_steps": self.ais_steps,
            "seed": self.seed,
        }
        table, runs = measure_gaps(
            self.runs,
            self.out,
            num_images=self.images,
            data=self.data,
            root=self.root,
            device=self.device,
            trust_guide=self.trust_guide,
            progress=not self.quiet,
            **budget,
        )
        record = write_gaps(self.out, table, runs, budget)
        saved = read_table(self.out / "gap.csv")
        caption = gap_caption(record)
        prices = ["spread", "kl_global"]
        unknown = saved.loc[saved[prices].isna().any(axis=1), "label"].unique()
        if len(unknown):
            caption += (
                f" Left out: prices of random weights that {', '.join(unknown)} does not tell."
            )
            saved[prices] = saved[prices].fillna(0.0)
        gap_ladder(saved, caption).savefig(self.out / "gap.png")
        print((self.out / "gap.md").read_text(encoding="utf-8"))
        print(f"written to {self.out}")

    def _check_out(self) -> None:
        """Refuses to replace an earlier measurement; chunks of an unfinished one may be there."""
        for name in GAP_FILES:
            if (self.out / name).exists():
                raise FileExistsError(
                    f"{self.out / name} is of an earlier measurement: choose another --out, or "
                    "replace it (--overwrite)"
                )
