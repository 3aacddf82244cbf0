"""The scores of a table as a data frame: statistics, differences and published scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from _cells import Collected
from _records import Column, Record, Table, part_of
from _significance import compare_methods

PUBLISHED = Path(__file__).parent / "published"
#: Scores of a proposal comparison: better and better proposals.
OWN, WIDTH, OPTIMUM = "IWAE, own q", "IWAE, best width", "IWAE, optimum"
PROPOSALS = ("ELBO", OWN, WIDTH, OPTIMUM, "AIS")


def published_scores(column: str = "score") -> pd.DataFrame:
    """Returns all published numbers of a kind by guide, data, latent_dim and decoder."""
    parts = [pd.read_csv(file, comment="#") for file in sorted(PUBLISHED.glob("*.csv"))]
    frame = pd.concat([part for part in parts if column in part.columns])
    return frame.set_index(["guide", "data", "latent_dim", "decoder"])


def estimate(name: str) -> Callable[[Record], float | None]:
    """Returns a function that reads an estimate of a proposal comparison from a record.

    The committed records have the older part "companion", and the ELBO of the same images.
    """
    part, number = {
        "ELBO": ("own", "elbo"),
        OWN: ("own", "log_evidence"),
        WIDTH: ("width", "log_evidence"),
        OPTIMUM: ("optimum", "log_evidence"),
        "AIS": ("annealed", "log_evidence"),
    }[name]
    ends = {OWN: ")", WIDTH: ", width c", OPTIMUM: ", instance:full", "AIS": ")"}

    def read(record: Record) -> float | None:
        if part_of(record) == "companion":
            parent = f"companion.{part}"
            return None if "missing" in record[parent] else record.number(f"{parent}.{number}")
        method = "AIS(" if name == "AIS" else "IWAE("
        for row in record["reference.estimates"]:
            if name in ends and row.startswith(method) and row.endswith(f"{ends[name]}"):
                return record.number(f"reference.estimates.{row}.log_evidence")
        return None

    return read


def _factor(record: Record) -> float:
    if part_of(record) == "reference":
        c = record["reference.mean_width"]
        return math.nan if c is None else float(c)
    return float(record["companion.width"].get("factor", math.nan))


def score_frame(
    table: Table,
    collected: Collected,
    scores: Mapping[str, Callable[[Record], float | None]],
) -> pd.DataFrame:
    """Returns a row for each cell and score: statistics, differences and published scores.

    Arguments:
        table: The table.
        collected: Its records.
        scores: Functions that read a score, or None if a guide does not have it, from a record.
    """
    published = published_scores()
    if any(record["config.likelihood"] != "gaussian" for record in collected.records):
        published = published.iloc[:0]  # all of them are Gaussian
    lines = []
    for panel, column, score in (
        (panel, column, score)
        for panel, columns in table.panels.items()
        for column in columns
        for score in scores
    ):
        values = {}
        for row in collected.rows:
            found = [scores[score](record) for record in collected.cells.get((row, column.key), [])]
            if kept := [value for value in found if value is not None]:
                values[row.label] = kept
        compared = compare_methods(values) if values else pd.DataFrame({"mean": []})
        vae = compared["mean"].get("VAE", math.nan)
        reference = _published(published, "vae", column)[0]
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
                **dict.fromkeys(("mean", "sd"), math.nan),
                "mark": "",
                **dict.fromkeys(("p", "p_holm", "p_welch", "p_welch_holm"), math.nan),
                "note": "not run",
                "epochs": (collected.epochs or math.nan) * row.multiple,
                "published": value,
                "published_sd": sd,
                "published_difference_to_vae": value - reference,
            }
            if row.label in compared.index:
                line |= compared.loc[row.label].to_dict()
            lines.append(line | {"difference_to_vae": line["mean"] - vae})
    return pd.DataFrame(lines)


def with_factors(frame: pd.DataFrame, collected: Collected) -> pd.DataFrame:
    """Adds the mean width factor c, and leaves out columns and scores without a record."""
    factors = {
        (row.label, *key): sum(map(_factor, cell)) / len(cell)
        for (row, key), cell in collected.cells.items()
    }
    keys = zip(frame["method"], frame["data"], frame["latent_dim"], frame["decoder"], strict=True)
    frame = frame.assign(factor=[factors.get(key, math.nan) for key in keys])
    run = frame.groupby(["panel", "column"])["seeds"].transform("max") > 0
    run &= frame.groupby("score")["seeds"].transform("max") > 0
    return frame[run].reset_index(drop=True)


def _published(frame: pd.DataFrame, guide: str, column: Column) -> tuple[float, float]:
    key = (guide, column.data, column.latent_dim, column.decoder)
    if key not in frame.index:
        return math.nan, math.nan
    row = frame.loc[key]
    return float(row["score"]), float(row["sd"])


def order_text(frame: pd.DataFrame) -> str:
    """Says whether methods have the same order with their own q and with the optimal proposal."""
    changes, compared = [], 0
    for (_, label), rows in frame.groupby(["panel", "column"], sort=False):
        means = rows.pivot(index="method", columns="score", values="mean")
        means = means.reindex(columns=[OWN, OPTIMUM]).dropna()
        if len(means) < 2:
            continue
        compared += 1
        pairs = list(combinations(means.to_numpy(), 2))
        swapped = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
        if swapped:
            text = f"{label} ({rows['decoder'].iloc[0]}): {swapped} of {len(pairs)} pairs swap"
            best, other = means[OWN].idxmax(), means[OPTIMUM].idxmax()
            text += f", the best is no longer {best} but {other}" if best != other else ""
            changes.append(text)
    if not compared:
        return ""
    which = "between IWAE with the guide's own q and with the optimum of each image as proposal"
    if not changes:
        return f"The order of methods is the same {which}."
    return f"The order of methods changes {which}: {'; '.join(changes)}."
