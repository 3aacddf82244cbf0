"""Decomposes the inference gap of every guide family on the embedded digits.

    python experiments/studies/gap_table.py --epochs 20 --seeds 1

Trains each family end to end (finished runs of the same configuration are used again, also those of
``compare.py`` with ``--runs runs/compare``), and decomposes the gap of the first test images into
approximation, amortisation and, for the GPVAE, the terms of its random weights. Every decoder is
scored by its own guide, by one common refined proposal and by annealed importance sampling. For
random encoders the rank correlation of their uncertainty with the gap is added.

The script first prints an estimate of its duration. When it is started again after an interrupt it
continues: finished runs, checkpoints, and every 25 finished images are kept in --runs. It writes
``results/gap.json``, ``.csv`` and ``.md``, and ``images/gap.png``, to --docs; ``--render`` makes
text and picture again from JSON and CSV.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from _study import RunOptions

from pyro_gpvae.core._files import read_json, write_text
from pyro_gpvae.evaluation.importance import ParetoWarning
from pyro_gpvae.plots.gap import gap_ladder
from pyro_gpvae.runs.config import PLACE, RunConfig, check_same
from pyro_gpvae.runs.folder import load_run
from pyro_gpvae.runs.gap_report import (
    gap_caption,
    gap_markdown,
    measure_gaps,
    read_table,
    write_gaps,
)
from pyro_gpvae.runs.train import train_run
from pyro_gpvae.runs.uncertainty_report import add_uncertainty, correlate, correlation_markdown

#: Names, options and folders are those of compare.py, so that its runs can be used again.
GUIDES = (
    "vae", "gp", "full", "lowrank:4", "iaf:2", "hf:4", "me:2", "rme:2", "iterative:3", "sa:1",
    "vlae:1",
)  # fmt: skip
#: Options of a run that do not change its training.
_IRRELEVANT = (*PLACE, "test_images", "num_samples")


@dataclass(kw_only=True)
class Options(RunOptions):
    """Options of the table.

    Attributes:
        images: Decompose the gaps of the first so many test images.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian.
        ais_chains: Chains per image of annealed importance sampling; 0 for none.
        ais_steps: Its steps.
        runs: Folder of runs and of finished images.
        docs: Folder of the results.
    """

    images: int = 100
    num_samples: int = 500
    reference_samples: int = 1000
    ais_chains: int = 8
    ais_steps: int = 30
    runs: Path = Path("runs/gap_table")
    docs: Path = Path("docs")


def main(options: Options) -> None:
    results = options.docs / "results"
    if not options.render:
        collect(options)
    record, table = read_json(results / "gap.json"), read_table(results / "gap.csv")
    caption = f"{gap_caption(record)} The paper trains for 2000 epochs."
    text = gap_markdown(table, caption) + correlations_markdown(record)
    write_text(results / "gap.md", text)
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    gap_ladder(table, caption).savefig(options.docs / "images" / "gap.png", dpi=150)
    print(text)


def collect(options: Options) -> None:
    """Trains and measures what is missing, and writes the record and the table of images."""
    folders, labels = [], []
    for config in configurations(options):
        folder = _folder(options, config)
        if not (folder / "record.json").exists():
            print(f"training {folder}", flush=True)
            with warnings.catch_warnings():
                # of the guide's own importance weights, which are not what is measured here
                warnings.simplefilter("ignore", ParetoWarning)
                train_run(config, folder, resume=True)
        check_same(load_run(folder).config, config, _IRRELEVANT, folder)
        folders.append(folder)
        labels.append(config.guide)
    budget = _budget(options)
    table, runs = measure_gaps(
        folders,
        options.runs,
        budget,
        num_images=options.images,
        labels=labels,
        root=options.root,
        device=options.device,
    )
    correlations = []
    for folder in folders:
        run = load_run(folder, root=options.root, device=options.device)
        if hasattr(run.guide, "moments"):
            rows = correlate(add_uncertainty(table[table["run"] == str(folder)], run))
            rows = rows.assign(guide=run.config.guide, seed=run.config.seed)
            correlations += rows.to_dict("records")
    # what is committed names no folder of this machine
    table["run"] = table["run"].map(lambda run: str(Path(run).relative_to(options.runs)))
    for description in runs:
        description["run"] = str(Path(description["run"]).relative_to(options.runs))
    write_gaps(options.docs / "results", table.round(4), runs, budget, correlations=correlations)


def configurations(options: Options) -> list[RunConfig]:
    """Returns the configurations of the runs."""
    names = ("data", "root", "epochs", "latent_dim", "train_images", "device")
    shared = {name: getattr(options, name) for name in names} | {"test_images": options.images}
    guides = options.guides or GUIDES
    return [
        RunConfig(guide=g, seed=seed, **shared) for g in guides for seed in range(options.seeds)
    ]


def correlations_markdown(record: dict[str, Any]) -> str:
    """Makes a table of rank correlations for each run with a random encoder."""
    if not record["correlations"]:
        return ""
    lines = ["", "Spearman's ρ of an image's scores with its gap, 95 % bootstrap intervals over "]
    lines[-1] += "the images. The first two are the inference uncertainty of the random encoder, "
    lines[-1] += "the others need none."
    for (guide, seed), rows in pd.DataFrame(record["correlations"]).groupby(
        ["guide", "seed"], sort=False
    ):
        lines += ["", f"`{guide}`, seed {seed}:", "", correlation_markdown(rows)]
    return "\n".join([*lines, ""])


def _budget(options: Options) -> dict[str, Any]:
    return {
        "num_samples": options.num_samples,
        "reference_samples": options.reference_samples,
        "num_chains": options.ais_chains,
        "num_steps": options.ais_steps,
        "seed": 0,
    }


def _folder(options: Options, config: RunConfig) -> Path:
    return options.runs / f"seed-{config.seed}" / config.guide.replace(":", "-")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
