r"""Report of the inference uncertainty of a run: scores, correlations with the gap, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.evaluation import uncertainty
from pyro_gpvae.evaluation.posterior_grid import posterior_record
from pyro_gpvae.runs.folder import Place, Run
from pyro_gpvae.runs.gap_report import measure_gaps
from pyro_gpvae.runs.programs import open_run
from pyro_gpvae.runs.report import Report, Section, caption, describe

__all__ = ["SCORES", "add_uncertainty", "correlate", "correlation_table", "report_uncertainty"]

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
    kept, options = table[table["converged"]], {"num_bootstrap": num_bootstrap, "seed": seed}
    rows = [
        {"score": score, "against": gap}
        | uncertainty.rank_correlation(kept[score], kept[gap], **options)._asdict()
        for score in SCORES
        for gap in ("gap", "amortisation")
    ]
    return pd.DataFrame(rows)


def correlation_table(correlations: pd.DataFrame) -> pd.DataFrame:
    """Returns the correlations as a table of texts."""
    rows = []
    for score, group in correlations.groupby("score", sort=False):
        gap, amortisation = map(_interval, group.to_dict("records"))
        rows.append(
            {
                "score of an image": SCORES[str(score)],
                "ρ with log p(x) - ELBO": gap,
                "ρ with the amortisation gap": amortisation,
            }
        )
    return pd.DataFrame(rows)


def report_uncertainty(
    run_folder: str | Path,
    out: str | Path,
    *,
    images: int = 200,
    num_samples: int = 500,
    reference_samples: int = 1000,
    bootstrap: int = 2000,
    seed: int = 0,
    progress: bool = True,
    **place: Unpack[Place],
) -> Report:
    """Measures gap and uncertainty of a run's test images, and writes both with a report.

    For the arguments see ``pyro-gpvae uncertainty --help``, and for ``place``
    :func:`pyro_gpvae.load_run`. A guide without uncertainty, or fewer than 8 images that
    converge, are a ValueError.
    """
    out, run = Path(out), open_run(run_folder, **place)
    test = run.data.test[:images]
    if len(test) < uncertainty.MIN_IMAGES:
        raise ValueError(
            f"a rank correlation needs at least {uncertainty.MIN_IMAGES} images, got {len(test)} "
            f"(images = {images}, of {len(run.data.test)} test images)"
        )
    uncertainty.uncertainty_scores(run.model, run.guide, test[:1])  # fails before the work
    budget = {"num_samples": num_samples, "reference_samples": reference_samples}
    budget |= {"num_chains": 0, "num_steps": 1, "seed": seed}
    table = measure_gaps([run], out, budget, num_images=images, progress=progress)
    table = add_uncertainty(table, run)
    correlations = correlate(table, bootstrap, seed)
    left = len(table) - int(table["converged"].sum())
    note = f"ELBO: K = {num_samples}, log p(x): K = {reference_samples}."
    if left:
        note += f" {left} images are left out (optimum not converged)."
    note = f"Guide {run.config.guide}, {caption([run], len(table), note)}"
    record: dict[str, Any] = {
        "format": 1,
        "run": describe(run),
        "images": len(table),
        "converged": len(table) - left,
        "budget": budget | {"bootstrap": bootstrap},
        **environment(next(run.model.parameters()).device),
        "correlations": correlations.to_dict("records"),
    }
    write_text(out / "uncertainty.csv", table.to_csv(index=False))
    write_json(out / "uncertainty.json", record)
    figures = _figures(run, table, correlations, note, seed)
    section = Section(
        "Does uncertainty tell the gap?", [_READING], correlation_table(correlations), figures
    )
    report = Report("Inference uncertainty", note, [section])
    report.save(out, "uncertainty.md")
    return report


def _figures(
    run: Run, table: pd.DataFrame, correlations: pd.DataFrame, note: str, seed: int
) -> dict[str, Any]:
    """Returns ``uncertain.png``, ``scatter.png`` and for p = 2 ``posterior.png``."""
    from pyro_gpvae.plots import posterior_panels, uncertain_images, uncertainty_scatter

    test, scores = run.data.test[: len(table)], table["uncertainty"]
    text = f"{SCORES['uncertainty']} over dimensions. {note}"
    figures = {"uncertain.png": uncertain_images(test.numpy(), scores, caption=text)}
    rows = correlations[correlations["against"] == "gap"].to_dict("records")
    titles = {row["score"]: f"ρ = {_interval(row)}" for row in rows}
    labels = {name: SCORES[name] for name in _DRAWN}
    kept = table[table["converged"]]
    figures["scatter.png"] = uncertainty_scatter(kept, labels, titles, note)
    if run.model.latent_dim == 2:
        order, count = scores.argsort(kind="stable").tolist(), min(3, len(table) // 2)
        chosen = [*order[:count], *order[::-1][:count]]
        panels = [
            f"uncertainty {row.uncertainty:.2g}\ngap {row.gap:.3g} nats"
            for row in table.iloc[chosen].itertuples()
        ]
        text = (
            "The least (above) and the most uncertain images (below). Contours contain 50 % and "
            f"90 % of the probability, those of the draws 90 %. {note}"
        )
        posteriors = posterior_record(run.model, run.guide, test[chosen], seed=seed)
        figures["posterior.png"] = posterior_panels(
            test[chosen].numpy(), posteriors, panels, count, text
        )
    return figures


def _interval(row: dict[str, Any]) -> str:
    if pd.isna(row["rho"]):  # null in JSON
        return "–"  # a constant has no ranks
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
