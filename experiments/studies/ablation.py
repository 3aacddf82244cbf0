r"""What the options are worth: evidence of held-out training images, for the runs of a plan.

    python experiments/sweep/sweep.py --plan experiments/plans/evidence_ablation.toml \
        --out runs/ablation
    python experiments/studies/ablation.py runs/ablation --out experiments/results

The images that a run held out (``validation``) decide nothing but this table: log p(x) by K
importance samples with the guide's own q, and the ELBO. The test images are not looked at.
Writes ablation.json and ablation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from pyro_gpvae import load_run, log_evidence
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.runs.results import seeds_text


@dataclass
class Options:
    """What the options are worth.

    Attributes:
        runs: The folder of the runs.
        out: Where the table goes.
        images: How many of the held-out images to use.
        samples: K.
        seed: Of the samples.
    """

    runs: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("experiments/results")
    images: int = 256
    samples: int = 100
    seed: int = 0


def score(folder: Path, options: Options) -> dict[str, Any]:
    """One run: its method, seed, and scores on held-out images in nats per image."""
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


def table(rows: list[dict[str, Any]]) -> str:
    """The rows by method as Markdown, with the budget in the caption."""
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
        # the least: controls have a multiple of it
        f"Budget cut: {frame['epochs'].min()} epochs (the paper: 2000). What starts from a VAE had "
        "its epochs too.",
    ]
    return "\n".join(lines) + "\n"


def _score(values: pd.Series, sign: str = "-") -> str:
    values = values.dropna()
    if len(values) < 2:
        return f"{values.iloc[0]:{sign}.1f} (1 seed)" if len(values) else "–"
    return f"{values.mean():{sign}.1f} ± {values.std():.1f}"


def main(options: Options) -> None:
    folders = sorted(path.parent for path in options.runs.glob("*/record.json"))
    if not folders:
        raise SystemExit(f"ablation: there is no finished run in {options.runs}")
    rows = [score(folder, options) for folder in folders]
    rows.sort(key=lambda row: (row["method"].startswith(("sa", "rme")), row["method"], row["seed"]))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "ablation.json", {"rows": rows})
    write_text(options.out / "ablation.md", table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
