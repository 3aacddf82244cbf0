"""The scores of a table as data frames: statistics, differences, and what was published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from _records import Collected, Column, Record, Table
from _significance import compare_methods, order_change

PUBLISHED = Path(__file__).parent / "published"
#: Scores of a companion, by the entry of its record: better and better proposals.
COMPANION = {
    "ELBO": ("own", "elbo"),
    "IWAE, own q": ("own", "log_evidence"),
    "IWAE, best width": ("width", "log_evidence"),
    "IWAE, optimum": ("optimum", "log_evidence"),
    "AIS": ("annealed", "log_evidence"),
}
OWN, REFERENCE = "IWAE, own q", "IWAE, optimum"


def published_scores(column: str = "score") -> pd.DataFrame:
    """All published numbers of a kind, indexed by guide, data, latent_dim and decoder."""
    parts = [pd.read_csv(file, comment="#") for file in sorted(PUBLISHED.glob("*.csv"))]
    frame = pd.concat([part for part in parts if column in part.columns])
    return frame.set_index(["guide", "data", "latent_dim", "decoder"])


def score_frame(table: Table, collected: Collected, scores: dict[str, str]) -> pd.DataFrame:
    """A row for each cell and score: statistics, differences, and what was published.

    Arguments:
        table: The table.
        collected: Its records.
        scores: The field of each score in a record, by its name.
    """
    published = published_scores()
    if not all(record["config.likelihood"] == "gaussian" for record in collected.records):
        published = published.iloc[:0]  # all of them are Gaussian
    lines = []
    for panel, columns in table.panels.items():
        for column in columns:
            reference = _published(published, "vae", column)[0]
            for score, name in scores.items():
                found = {
                    row: [
                        record.number(name)
                        for record in collected.cells.get((row, column.key), [])
                        if _has(record, name)
                    ]
                    for row in collected.rows
                }
                values = {row.label: value for row, value in found.items() if value}
                compared = compare_methods(values) if values else pd.DataFrame()
                vae = compared["mean"].get("VAE", math.nan) if values else math.nan
                for row in collected.rows:
                    value, sd = _published(published, row.guide, column)
                    if row.role == "control" or score not in ("IWAE", OWN):
                        value, sd = math.nan, math.nan
                    line: dict[str, Any] = {
                        "panel": panel,
                        "column": column.label,
                        "data": column.data,
                        "decoder": column.decoder,
                        "latent_dim": column.latent_dim,
                        "method": row.label,
                        "guide": row.guide,
                        "role": row.role,
                        "score": score,
                        "seeds": 0,
                        **dict.fromkeys(("mean", "sd", "mark"), math.nan),
                        **dict.fromkeys(("p", "p_holm", "p_welch", "p_welch_holm"), math.nan),
                        "note": "not run",
                        "epochs": (collected.epochs or math.nan) * row.multiple,
                        "published": value,
                        "published_sd": sd,
                        "published_difference_to_vae": value - reference,
                    }
                    if row.label in compared.index:
                        line |= compared.loc[row.label].to_dict()
                    line["difference_to_vae"] = line["mean"] - vae
                    lines.append(line)
    frame = pd.DataFrame(lines)
    frame["mark"] = frame["mark"].astype(object).where(frame["mark"].notna(), "")
    return frame


def companion_frame(table: Table, collected: Collected) -> pd.DataFrame:
    """As :func:`score_frame` for all scores of the companions, with the mean width factor."""
    fields = {score: ".".join(("companion", *path)) for score, path in COMPANION.items()}
    frame = score_frame(table, collected, fields)
    factors = {
        (row.label, *key): pd.Series([r["companion.width.factor"] for r in cell]).mean()
        for (row, key), cell in collected.cells.items()
        if all(_has(record, "companion.width.factor") for record in cell)
    }
    keys = zip(frame["method"], frame["data"], frame["latent_dim"], frame["decoder"], strict=True)
    frame["factor"] = [factors.get(key, math.nan) for key in keys]
    return frame


def drawn(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the controls that were not run anywhere, of which a picture shows nothing."""
    run = set(frame.loc[frame["mean"].notna(), "method"])
    return frame[frame["method"].isin(run) | (frame["role"] == "method")]


def order_text(frame: pd.DataFrame, has_companions: bool) -> str:
    """Whether methods come in the same order with their own q and with the optimal proposal."""
    if not has_companions:
        return "The scores that separate model from proposal were not run."
    changes, compared = [], 0
    for (_, label), rows in frame.groupby(["panel", "column"], sort=False):
        means = [
            rows[(rows["score"] == score) & rows["mean"].notna()].set_index("method")["mean"]
            for score in (OWN, REFERENCE)
        ]
        change = order_change(means[0].to_dict(), means[1].to_dict())
        if change is None:
            continue
        compared += 1
        if change.swapped:
            decoder = rows["decoder"].iloc[0]
            text = f"{label} ({decoder}): {change.swapped} of {change.pairs} pairs swap"
            best, other = change.best
            text += f", the best is no longer {best} but {other}" if best != other else ""
            changes.append(text)
    if not compared:
        return ""
    which = "between IWAE with the guide's own q and with each image's optimum as proposal"
    if not changes:
        return f"The order of methods is the same {which}."
    return f"The order of methods changes {which}: {'; '.join(changes)}."


def _published(frame: pd.DataFrame, guide: str, column: Column) -> tuple[float, float]:
    key = (guide, column.data, column.latent_dim, column.decoder)
    if key not in frame.index:
        return math.nan, math.nan
    row = frame.loc[key]
    return float(row["score"]), float(row["sd"])


def _has(record: Record, name: str) -> bool:
    """Whether the guide has that score: an entry of a companion may be "missing"."""
    parent = record[name.rpartition(".")[0]]
    return "missing" not in parent
