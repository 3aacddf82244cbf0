r"""Report of the inference uncertainty of a run: scores, correlations with the gap, pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_bytes, write_json, write_text
from pyro_gpvae.evaluation.posterior_grid import posterior_record
from pyro_gpvae.evaluation.uncertainty import (
    MIN_IMAGES,
    RankCorrelation,
    rank_correlation,
    uncertainty_scores,
)
from pyro_gpvae.runs._markdown import markdown_table
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.gap_chunks import describe, measure_gaps, read_table

__all__ = [
    "SCORES",
    "add_uncertainty",
    "correlate",
    "correlation_markdown",
    "measure_uncertainty",
    "render_uncertainty",
]

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
    "Spearman's ρ with a 95 % bootstrap interval over the images, for this run alone. The first "
    "two scores belong to the random encoder; any encoder has the others. A score is useful if its "
    "ρ is positive, and a random encoder adds information if its ρ is above those of the others."
)


def add_uncertainty(table: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Returns a run's table of gaps with a column for each of :data:`SCORES`.

    Raises:
        ValueError: If the guide is not a random encoder.
    """
    scores = uncertainty_scores(run.model, run.guide, run.data.test[: len(table)])
    scores = scores.set_index(table.index)
    return pd.concat([table, scores], axis=1).assign(surprise=-table["log_evidence"])


def correlate(table: pd.DataFrame, num_bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Returns Spearman's ρ of each score with the gap and with the amortisation gap.

    Arguments:
        table: As :func:`add_uncertainty` returns it. Images that have not converged are left out.
        num_bootstrap, seed: See ``rank_correlation`` of :mod:`pyro_gpvae.evaluation.uncertainty`.

    Returns:
        A row for each score and gap: ``rho``, ``low``, ``high`` (95 %) and ``num_images``. They
        are NaN for a score that is constant.

    Raises:
        ValueError: If fewer than 8 images have converged.
    """
    kept = table[table["converged"]]
    rows = []
    for score in SCORES:
        for gap in ("gap", "amortisation"):
            found = RankCorrelation(math.nan, math.nan, math.nan, len(kept))
            if not len(kept) or np.ptp(kept[score]) > 0:
                found = rank_correlation(
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

    Writes ``uncertainty.csv`` (one row per image), ``uncertainty.json``, ``uncertainty.md``,
    ``images.npz``, and for p = 2 ``posterior.npz``: everything that :func:`render_uncertainty`
    needs. For the arguments see ``pyro-gpvae uncertainty --help``; ``where`` are arguments of
    :func:`pyro_gpvae.load_run`.

    Raises:
        FileNotFoundError, ValueError: If the run cannot be read, its guide is not a random
            encoder, there are fewer than 8 images, or fewer than 8 converge.
    """
    out = Path(out)
    run = load_run(run_folder, **where)
    model, guide, test = run.model, run.guide, run.data.test
    count = min(images, len(test))
    if count < MIN_IMAGES:
        raise ValueError(
            f"a rank correlation needs at least {MIN_IMAGES} images, got {count} (images = "
            f"{images}, of {len(test)} test images)"
        )
    uncertainty_scores(model, guide, test[:1])  # its errors come before the work
    budget: dict[str, Any] = {"num_samples": num_samples, "reference_samples": reference_samples}
    budget |= {"num_chains": 0, "num_steps": 1, "seed": seed}
    table, _ = measure_gaps(
        [run_folder], out, num_images=images, progress=progress, **where, **budget
    )
    table = add_uncertainty(table, run)
    correlations = correlate(table, bootstrap, seed)
    record: dict[str, Any] = {
        "format": 1,
        "run": describe(run),
        "images": len(table),
        "converged": int(table["converged"].sum()),
        "budget": budget | {"bootstrap": bootstrap},
        "show": show,
        **environment(next(model.parameters()).device),
        "correlations": correlations.to_dict("records"),
        "posterior_images": [],
    }
    if model.latent_dim == 2:  # the posteriors of up to three least and three most uncertain images
        order = table["uncertainty"].to_numpy().argsort(kind="stable")
        count = min(3, len(order) // 2)
        chosen = [int(index) for index in (*order[:count], *order[::-1][:count])]
        record["posterior_images"] = chosen
        x = test[torch.tensor(chosen)]
        _write_arrays(out / "posterior.npz", **posterior_record(model, guide, x, seed=seed))
    _write_arrays(out / "images.npz", images=test[: len(table)].numpy())
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
    caption = _caption(record)
    if len(images) > 1:
        text = f"{SCORES['uncertainty']} over dimensions. {caption}"
        figure = uncertain_images(images, table["uncertainty"], record["show"], text)
        figure.savefig(out / "uncertain.png")
    titles = {
        row["score"]: f"ρ = {_interval(row)}"
        for row in record["correlations"]
        if row["against"] == "gap"
    }
    labels = {name: SCORES[name] for name in _DRAWN}
    figure = uncertainty_scatter(table[table["converged"]], labels, titles, caption)
    figure.savefig(out / "scatter.png")
    if record["posterior_images"]:
        with np.load(out / "posterior.npz") as file:
            arrays = dict(file)
        rows = table.iloc[record["posterior_images"]]
        panels = [
            f"uncertainty {r.uncertainty:.3g}, gap {r.gap:.3g} nats" for r in rows.itertuples()
        ]
        text = (
            "The least (above) and the most uncertain images (below). Contours contain 50 % and "
            f"90 % of the probability, those of the draws 90 %. {caption}"
        )
        figure = posterior_panels(images[rows.index], arrays, panels, len(panels) // 2, text)
        figure.savefig(out / "posterior.png")


def _caption(record: dict[str, Any]) -> str:
    config, budget = record["run"]["config"], record["budget"]
    left = record["images"] - record["converged"]
    return (
        f"{config['guide']} on {config['data']}, p = {config['latent_dim']}, {config['epochs']} "
        f"epochs, seed {config['seed']}; {record['images']} test images"
        + (f", {left} left out (optimum not converged)" if left else "")
        + f"; ELBO: K = {budget['num_samples']}, log p(x): K = {budget['reference_samples']}."
    )


def _interval(row: dict[str, Any]) -> str:
    if row["rho"] is None or math.isnan(row["rho"]):
        return "–"  # a constant has no ranks
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _write_arrays(path: Path, **arrays: Any) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())
