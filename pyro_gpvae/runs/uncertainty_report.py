r"""Inference uncertainty of a run: both scores, their rank correlation with the gap, pictures."""

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
from pyro_gpvae.data.images import to_float
from pyro_gpvae.evaluation.uncertainty import (
    MIN_IMAGES,
    RankCorrelation,
    posterior_record,
    rank_correlation,
    uncertainty_scores,
)
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

#: What may predict the gap: the two scores of a random encoder, then what any encoder offers.
SCORES = {
    "uncertainty": "Σ v/h² + r",
    "bhattacharyya": "expected Bhattacharyya distance (nats)",
    "log_width": "log-width Σ b",
    "distance": "distance from the prior's mean, ‖a‖²",
    "reconstruction": "reconstruction error -log p(x|z = a) (nats)",
    "surprise": "-log p(x) (nats)",
}
_RANDOM = ("uncertainty", "bhattacharyya")
_PANELS = 3  # least, and as many most uncertain images whose posteriors are drawn


def add_uncertainty(table: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Adds a column for each of :data:`SCORES` to a run's table of gaps.

    Raises:
        ValueError: If the guide is not a random encoder.
    """
    like = next(run.model.parameters())
    images = run.data.test[: len(table)]
    parts = [
        uncertainty_scores(run.model, run.guide, to_float(x.to(like.device), like.dtype))
        for x in images.split(256)
    ]
    scores = pd.concat(parts, ignore_index=True).set_index(table.index)
    return pd.concat([table, scores], axis=1).assign(surprise=-table["log_evidence"])


def correlate(table: pd.DataFrame, num_bootstrap: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Spearman's ρ of each score with the gap and with its amortisation part, with intervals.

    Arguments:
        table: As :func:`add_uncertainty` returns it; images that have not converged are left out.
        num_bootstrap, seed: See :func:`pyro_gpvae.evaluation.uncertainty.rank_correlation`.

    Returns:
        A row for each score and ``gap``: ``rho``, ``low``, ``high`` (95 %) and ``num_images``.

    Raises:
        ValueError: If there are fewer than 8 images that have converged.
    """
    kept = table[table["converged"]]
    rows = []
    for score in SCORES:
        for gap in ("gap", "amortisation"):
            if len(kept) and np.ptp(kept[score]) == 0:  # an encoder without spread
                found = RankCorrelation(math.nan, math.nan, math.nan, len(kept))
            else:
                found = rank_correlation(
                    kept[score], kept[gap], num_bootstrap=num_bootstrap, seed=seed
                )
            rows.append({"score": score, "against": gap, **found._asdict()})
    return pd.DataFrame(rows)


def correlation_markdown(correlations: pd.DataFrame) -> str:
    """The correlations as a Markdown table."""
    lines = ["| score of an image | ρ with log p(x) - ELBO | ρ with the amortisation gap |"]
    lines.append("|---|--:|--:|")
    for score, rows in correlations.groupby("score", sort=False):
        cells = [_text(row) for row in rows.to_dict("records")]
        name = SCORES[str(score)].replace("|", "\\|")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_uncertainty(
    folder: str | Path,
    out: str | Path,
    *,
    images: int,
    num_samples: int,
    reference_samples: int,
    bootstrap: int,
    show: int,
    seed: int,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
    progress: bool = True,
) -> str:
    """Measures gap and uncertainty of a run's test images; returns a report in Markdown.

    Writes ``uncertainty.csv`` (a row an image), ``uncertainty.json``, ``uncertainty.md``,
    ``images.npz``, and for p = 2 ``posterior.npz``: all that :func:`render_uncertainty` needs.
    For the arguments see ``pyro-gpvae uncertainty --help``.

    Raises:
        FileNotFoundError, ValueError: If the run cannot be read, its guide is not a random
            encoder, there are fewer than 8 images, or fewer than 8 converge.
    """
    out = Path(out)
    run = load_run(folder, data=data, root=root, device=device, trust_guide=trust_guide)
    count = min(images, len(run.data.test))
    if count < MIN_IMAGES:
        raise ValueError(
            f"a rank correlation needs at least {MIN_IMAGES} images, got {count} (images = "
            f"{images}, of {len(run.data.test)} test images)"
        )
    like = next(run.model.parameters())
    first = to_float(run.data.test[:1].to(like.device), like.dtype)
    uncertainty_scores(run.model, run.guide, first)  # an error before the work, not after it
    budget: dict[str, Any] = {
        "num_samples": num_samples,
        "reference_samples": reference_samples,
        "num_chains": 0,
        "num_steps": 1,
        "seed": seed,
    }
    table, _ = measure_gaps(
        [folder],
        out,
        num_images=images,
        data=data,
        root=root,
        device=device,
        trust_guide=trust_guide,
        progress=progress,
        **budget,
    )
    table = add_uncertainty(table, run)
    correlations = correlate(table, bootstrap, seed)
    shown = run.data.test[: len(table)]
    record = {
        "format": 1,
        "run": describe(run),
        "images": len(table),
        "converged": int(table["converged"].sum()),
        "budget": budget | {"bootstrap": bootstrap},
        "show": show,
        **environment(like.device),
        "correlations": correlations.to_dict("records"),
        "posterior_images": [],
    }
    if run.model.latent_dim == 2:
        order = table["uncertainty"].to_numpy().argsort(kind="stable")
        count = min(_PANELS, len(order) // 2)
        chosen = [*order[:count], *order[::-1][:count]]
        record["posterior_images"] = [int(index) for index in chosen]
        x = to_float(shown[torch.tensor(chosen)].to(like.device), like.dtype)
        _write_arrays(out / "posterior.npz", **posterior_record(run.model, run.guide, x, seed=seed))
    _write_arrays(out / "images.npz", images=shown.numpy())
    write_text(out / "uncertainty.csv", table.to_csv(index=False))
    write_json(out / "uncertainty.json", record)
    text = "\n".join([_caption(record), "", correlation_markdown(correlations), "", _READING, ""])
    write_text(out / "uncertainty.md", text)
    return text


def render_uncertainty(out: str | Path) -> None:
    """Draws ``uncertain.png``, ``scatter.png`` and for p = 2 ``posterior.png`` from the record."""
    from pyro_gpvae.plots.gap import uncertainty_scatter
    from pyro_gpvae.plots.images import uncertain_images
    from pyro_gpvae.plots.posterior import posterior_panels

    out = Path(out)
    record, table = read_json(out / "uncertainty.json"), read_table(out / "uncertainty.csv")
    with np.load(out / "images.npz") as file:
        images = file["images"]
    caption = _caption(record)
    if len(images) > 1:
        uncertain_images(
            images,
            table["uncertainty"],
            record["show"],
            f"{SCORES['uncertainty']} over dimensions. {caption}",
        ).savefig(out / "uncertain.png")
    found = {
        row["score"]: f"ρ = {_text(row)}"
        for row in record["correlations"]
        if row["against"] == "gap"
    }
    names = (*_RANDOM, "reconstruction")
    uncertainty_scatter(
        table[table["converged"]],
        {name: SCORES[name] for name in names},
        {name: found[name] for name in names},
        caption,
    ).savefig(out / "scatter.png")
    if record["posterior_images"]:
        with np.load(out / "posterior.npz") as file:
            arrays = dict(file)
        rows = table.iloc[record["posterior_images"]]
        titles = [
            f"uncertainty {row.uncertainty:.3g}, gap {row.gap:.3g} nats"
            for row in rows.itertuples()
        ]
        posterior_panels(
            images[rows.index],
            arrays,
            titles,
            len(titles) // 2,
            "Least (above) and most uncertain images (below). Contours hold 50 % and 90 % of the "
            f"probability, those of the draws 90 %. {caption}",
        ).savefig(out / "posterior.png")


_READING = (
    "Spearman's ρ with a 95 % bootstrap interval over the images, for this one run. Below the two "
    "scores of the random encoder: what any encoder has. A score is worth something where its ρ "
    "is positive, and it adds something where it is above theirs."
)


def _caption(record: dict[str, Any]) -> str:
    config, budget = record["run"]["config"], record["budget"]
    left = record["images"] - record["converged"]
    return (
        f"{config['guide']} on {config['data']}, p = {config['latent_dim']}, {config['epochs']} "
        f"epochs, seed {config['seed']}; {record['images']} test images"
        + (f", {left} left out (optimum not converged)" if left else "")
        + f"; ELBO: K = {budget['num_samples']}, log p(x): K = {budget['reference_samples']}."
    )


def _text(row: dict[str, Any]) -> str:
    if row["rho"] is None or row["rho"] != row["rho"]:
        return "–"  # constant: no ranks
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _write_arrays(path: Path, **arrays: Any) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())
