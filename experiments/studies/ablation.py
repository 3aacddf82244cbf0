r"""What the options of GPVAE, SA and RME gain: log p(x) of held-out training images.

    python experiments/sweep/sweep.py --plan experiments/plans/evidence_ablation.toml \
        --out runs/ablation
    python experiments/studies/ablation.py runs/ablation --out experiments/results

Scores log p(x) by K importance samples with the guide's own q, and the ELBO, on the images that a
run held out (``validation``). They are used for nothing else, and no test image is used. Writes
ablation.json and ablation.md; ``--render`` makes the latter again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from _study import publish

from pyro_gpvae import load_run, log_evidence
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.runs.results import seeds_text


@dataclass
class Options:
    """Options of the study.

    Attributes:
        runs: Folder of the runs.
        out: Folder of the results.
        images: Number of held-out images to use.
        samples: Importance samples K.
        seed: Seed of the samples.
        render: Only make the page again from the record.
    """

    runs: Annotated[Path, tyro.conf.Positional] = Path("runs/ablation")
    out: Path = Path("experiments/results")
    images: int = 256
    samples: int = 100
    seed: int = 0
    render: bool = False


def score(folder: Path, options: Options) -> dict[str, Any]:
    """Returns method, seed, and scores on held-out images in nats per image of a run."""
    run = load_run(folder)
    _, validation = split_validation(run.data.train, run.config.validation)
    images = validation[: options.images]
    evidence = log_evidence(run.model, run.guide, images, options.samples, seed=options.seed)
    return {
        "method": run.record["plan"]["method"],
        "seed": run.config.seed,
        "epochs": run.config.epochs,
        "train_images": run.record["data"]["train_images"],
        "validation_images": len(images),
        "num_samples": options.samples,
        "log_evidence": evidence.mean,
        "elbo": float(evidence.elbo.mean()),
        "monte_carlo_error": evidence.monte_carlo_error,
        "sigma": run.record["sigma"],
        "steps": run.record["steps"],
        "commit": run.record["commit"],
        "versions": run.record["versions"],
        "device": run.record["device"],
    }


def page(record: dict[str, Any]) -> str:
    """Makes the Markdown page from a record, with the budget in the caption."""
    rows = record["rows"]
    frame = pd.DataFrame(rows)
    vae = frame[frame["method"] == "vae"].set_index("seed")["log_evidence"]
    frame["difference"] = frame["log_evidence"] - frame["seed"].map(vae)
    lines = [
        "| method | log p(x) | ELBO | minus VAE, same seed | σ | epochs |",
        "|---|---|---|---|---|---|",
    ]
    for method, group in frame.groupby("method", sort=False):
        sigma = group["sigma"].mean()
        lines.append(
            f"| {method} | {_score(group['log_evidence'])} | {_score(group['elbo'])} "
            f"| {_score(group['difference'], '+')} | {sigma:.3f} | {group['epochs'].iloc[0]} |"
        )
    first = rows[0]
    seeds = seeds_text(frame.groupby("method")["seed"].nunique())
    lines += [
        "",
        f"Nats per image on {first['validation_images']} held-out training images, "
        f"K = {first['num_samples']}, the guide's own q; mean ± standard deviation over "
        f"{seeds}; {first['train_images']} training images. "
        # controls have a multiple of the budget
        f"Budget cut: {frame['epochs'].min()} epochs (the paper: 2000). What "
        "starts from a VAE had its epochs in addition.",
    ]
    return "\n".join(lines) + "\n"


def _score(values: pd.Series, sign: str = "-") -> str:
    values = values.dropna()
    if len(values) < 2:
        return f"{values.iloc[0]:{sign}.1f} (1 seed)" if len(values) else "–"
    return f"{values.mean():{sign}.1f} ± {values.std():.1f}"


def measure(options: Options) -> dict[str, Any]:
    """Scores all finished runs of the folder."""
    folders = sorted(path.parent for path in options.runs.glob("*/record.json"))
    if not folders:
        raise SystemExit(f"ablation: there is no finished run in {options.runs}")
    rows = [score(folder, options) for folder in folders]
    rows.sort(key=lambda row: (row["method"].startswith(("sa", "rme")), row["method"], row["seed"]))
    return {"rows": rows}


def main(options: Options) -> None:
    publish("ablation", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
