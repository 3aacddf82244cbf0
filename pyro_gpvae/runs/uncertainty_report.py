r"""Report of the inference uncertainty of a run: scores, correlations with the gap, pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_json, write_text
from pyro_gpvae.evaluation import uncertainty
from pyro_gpvae.evaluation.posterior_grid import posterior_record
from pyro_gpvae.runs._text import caption, markdown_table
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.gap_chunks import describe, measure_gaps, read_table

__all__ = [
    "SCORES", "add_uncertainty", "correlate", "correlation_markdown", "measure_uncertainty",
    "render_uncertainty",
]  # fmt: skip

#: Scores that may predict the gap: two of a random encoder, then some that any encoder has.
SCORES = {
    "uncertainty": "Σ v/h² + r",
    "bhattacharyya": "expected Bhattacharyya distance (nats)",
    "log_width": "log-width Σ b",
    "distance": "distance from the prior's mean, ‖a‖²",
    "reconstruction": "reconstruction error -log p(x|z = a) (nats)",
    "surprise": "-log p(x) (nats)",
}
_DRAWN = ("uncertainty", "bhattacharyya", "reconstruction")  # in the scatter plots

_READING = (
    "Spearman's ρ with a 95 % bootstrap interval over the images, for this run alone. A random "
    "encoder adds information if the ρ of its two scores, the first ones, is above the others."
)


def add_uncertainty(table: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Returns the table of gaps of a random encoder with a column for each of :data:`SCORES`."""
    scores = uncertainty.uncertainty_scores(run.model, run.guide, run.data.test[: len(table)])
    return table.join(scores.set_index(table.index)).assign(surprise=-table["log_evidence"])


def correlate(table: pd.DataFrame, num_bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Returns Spearman's ρ of each score with the gap and with the amortisation gap.

    Images that have not converged are left out. A score that is constant has the ρ NaN.
    """
    kept = table[table["converged"]]
    rows = []
    for score in SCORES:
        constant = len(kept) > 0 and np.ptp(kept[score]) == 0
        for gap in ("gap", "amortisation"):
            found = uncertainty.RankCorrelation(math.nan, math.nan, math.nan, len(kept))
            if not constant:
                found = uncertainty.rank_correlation(
                    kept[score], kept[gap], num_bootstrap=num_bootstrap, seed=seed
                )
            rows.append({"score": score, "against": gap, **found._asdict()})
    return pd.DataFrame(rows)


def correlation_markdown(correlations: pd.DataFrame) -> str:
    """Returns the correlations as a Markdown table."""
    head = ("score of an image", "ρ with log p(x) - ELBO", "ρ with the amortisation gap")
    rows = [
        [SCORES[str(score)].replace("|", "\\|"), *map(_interval, group.to_dict("records"))]
        for score, group in correlations.groupby("score", sort=False)
    ]
    return markdown_table(head, rows)


def measure_uncertainty(
    run_folder: str | Path,
    out: str | Path,
    *,
    images: int = 200,
    num_samples: int = 500,
    reference_samples: int = 1000,
    bootstrap: int = 2000,
    show: int = 16,
    seed: int = 0,
    progress: bool = True,
    **where: Any,
) -> str:
    """Measures gap and uncertainty of a run's test images; returns a report in Markdown.

    For the arguments see ``pyro-gpvae uncertainty --help``, and for ``where``
    :func:`pyro_gpvae.load_run`. A guide without uncertainty, or fewer than 8 images that
    converge, are a ValueError.
    """
    out, run = Path(out), load_run(run_folder, **where)
    test = run.data.test[:images]
    if len(test) < uncertainty.MIN_IMAGES:
        raise ValueError(
            f"a rank correlation needs at least {uncertainty.MIN_IMAGES} images, got {len(test)} "
            f"(images = {images}, of {len(run.data.test)} test images)"
        )
    uncertainty.uncertainty_scores(
        run.model, run.guide, test[:1]
    )  # its errors come before the work
    budget = {"num_samples": num_samples, "reference_samples": reference_samples}
    budget |= {"num_chains": 0, "num_steps": 1, "seed": seed}
    options: dict[str, Any] = {"num_images": images, "progress": progress, **where, **budget}
    table = add_uncertainty(measure_gaps([run_folder], out, **options)[0], run)
    correlations = correlate(table, bootstrap, seed)
    chosen: list[int] = []
    if run.model.latent_dim == 2:  # the posteriors of the least and the most uncertain images
        order, count = table["uncertainty"].argsort(kind="stable").tolist(), min(3, len(test) // 2)
        chosen = [*order[:count], *order[::-1][:count]]
        posteriors = posterior_record(run.model, run.guide, test[chosen], seed=seed)
        np.savez_compressed(out / "posterior.npz", **posteriors)  # type: ignore[arg-type]
    record: dict[str, Any] = {
        "format": 1,
        "run": describe(run),
        "images": len(table),
        "converged": int(table["converged"].sum()),
        "budget": budget | {"bootstrap": bootstrap},
        "show": show,
        **environment(next(run.model.parameters()).device),
        "correlations": correlations.to_dict("records"),
        "posterior_images": chosen,
    }
    np.savez_compressed(out / "images.npz", images=test.numpy())
    write_text(out / "uncertainty.csv", table.to_csv(index=False))
    write_json(out / "uncertainty.json", record)
    text = "\n\n".join([_caption(record), correlation_markdown(correlations), _READING]) + "\n"
    write_text(out / "uncertainty.md", text)
    return text


def render_uncertainty(out: str | Path) -> None:
    """Draws ``uncertain.png``, ``scatter.png`` and for p = 2 ``posterior.png`` from the record."""
    from pyro_gpvae.plots import posterior_panels, uncertain_images, uncertainty_scatter

    out = Path(out)
    record, table = read_json(out / "uncertainty.json"), read_table(out / "uncertainty.csv")
    with np.load(out / "images.npz") as file:
        images = file["images"]
    text, scores = _caption(record), table["uncertainty"]
    note = f"{SCORES['uncertainty']} over dimensions. {text}"
    uncertain_images(images, scores, record["show"], note).savefig(out / "uncertain.png")
    rows = [row for row in record["correlations"] if row["against"] == "gap"]
    titles = {row["score"]: f"ρ = {_interval(row)}" for row in rows}
    labels = {name: SCORES[name] for name in _DRAWN}
    figure = uncertainty_scatter(table[table["converged"]], labels, titles, text)
    figure.savefig(out / "scatter.png")
    chosen = record["posterior_images"]
    if chosen:
        with np.load(out / "posterior.npz") as file:
            arrays = dict(file)
        panels = [
            f"uncertainty {row.uncertainty:.3g}, gap {row.gap:.3g} nats"
            for row in table.iloc[chosen].itertuples()
        ]
        note = (
            "The least (above) and the most uncertain images (below). Contours contain 50 % and "
            f"90 % of the probability, those of the draws 90 %. {text}"
        )
        figure = posterior_panels(images[chosen], arrays, panels, len(chosen) // 2, note)
        figure.savefig(out / "posterior.png")


def _caption(record: dict[str, Any]) -> str:
    run, budget = record["run"], record["budget"]
    left = record["images"] - record["converged"]
    text = f"ELBO: K = {budget['num_samples']}, log p(x): K = {budget['reference_samples']}."
    if left:
        text += f" {left} images are left out (optimum not converged)."
    return f"Guide {run['config']['guide']}, {caption([run], record['images'], text)}"


def _interval(row: dict[str, Any]) -> str:
    if row["rho"] is None or math.isnan(row["rho"]):
        return "–"  # a constant has no ranks
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
