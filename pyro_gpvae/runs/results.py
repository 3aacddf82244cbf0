"""Folders of runs as one table, with the differences that make scores incomparable."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.config import RunConfig

__all__ = [
    "COLUMNS",
    "FULL",
    "differences",
    "matches",
    "parse_where",
    "read_results",
    "score_table",
    "seeds_text",
    "select",
]

#: The budget of the paper's supplement, sections 2 and 4; its number of seeds is not known.
#: None is all images. A run with less says so in its record, and in the caption of every table.
FULL: dict[str, int | None] = {
    "epochs": 2000,
    "seeds": 5,
    "train_images": None,
    "test_images": None,
    "num_samples": 100,
    "batch_size": 128,
    "validation": 0,
}

#: The options of a budget, which one table may not mix.
BUDGET = tuple(name for name in FULL if name != "seeds")
#: The keys of conditions, see :func:`parse_where`.
KEYS = ("method", "guide", "data", "latent_dim", "decoder", "seed")

#: A cell of a table is a method and these; the runs of a cell are averaged,
_CELL = ["data", "latent_dim", "decoder", "likelihood"]
_RATES = ("learning_rate", "sigma_learning_rate")
#: and may not differ in these.
_OF_CELL = ("guide", *_RATES, "freeze_decoder", "epochs_factor", "warm_start")

_OPTIONS = ("guide", "data", "latent_dim", "decoder", "likelihood", "seed", *BUDGET)
_SCORES = ("log_evidence", "elbo", "monte_carlo_error", "sampling_error")
#: Where the columns of the table are in a record.
_FIELDS = {
    "method": "plan.method",
    **{name: f"config.{name}" for name in _OPTIONS},
    "epochs_factor": "plan.epochs_factor",
    **{name: f"config.{name}" for name in (*_RATES, "warm_start", "freeze_decoder")},
    **{name: f"scores.{name}" for name in _SCORES},
    "train_seconds": "seconds.training",
    "test_seconds": "seconds.evaluation",
    "steps": "steps",
    "num_test": "data.test_images",
    "plan": "plan.file",
    "cut": "plan.cut",
    "commit": "commit",
    "torch": "versions.torch",
    "device": "device",
    "threads": "threads",
    "train_sha256": "data.train_sha256",
    "test_sha256": "data.test_sha256",
}

#: The columns of the table.
COLUMNS = ["run", *_FIELDS]


def read_results(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Reads every finished run below a folder.

    Arguments:
        folder: A folder; its runs may lie in subfolders at any depth.

    Returns:
        A table with one row per run, ordered by path: ``run``, ``method``, the options,
        ``log_evidence`` and ``elbo`` in nats per image with their errors, seconds, and what the
        scores depend on (see :func:`differences`); and, as lines of text, the files that were
        skipped and the reasons.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    rows, skipped = [], []
    for source in sorted(folder.rglob("record.json")):
        parts = source.relative_to(folder).parts[:-1]
        if any(part.endswith(".partial") or part.startswith(".") for part in parts):
            continue
        try:
            row = _row(read_json(source), source)
        except (OSError, ValueError) as error:
            skipped.append(f"{source}: {error}")
        else:
            rows.append({"run": source.parent.relative_to(folder).as_posix()} | row)
    return pd.DataFrame(rows, columns=COLUMNS), skipped


def _row(record: dict[str, Any], source: Path) -> dict[str, Any]:
    if "run" in record:
        raise ValueError("an evaluation of another run, not a run")
    if not isinstance(record.get("config"), dict):
        raise ValueError("not the record of a run: it has no config")
    # with the defaults of options that an older version did not have
    record = record | {"config": asdict(RunConfig.from_json(record["config"], "config"))}
    values = {name: _look_up(record, field) for name, field in _FIELDS.items()}
    for name in ("log_evidence", "elbo", "steps", "train_seconds", "test_seconds", "num_test"):
        value = values[name]
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"not the record of a run: {_FIELDS[name]} is {value!r}")
    for name in ("train_sha256", "test_sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"not the record of a run: {_FIELDS[name]} is {values[name]!r}")
    if type(values["epochs_factor"]) is not int or values["epochs_factor"] < 1:
        values["epochs_factor"] = 1
    if values["sigma_learning_rate"] is None:
        values["sigma_learning_rate"] = values["learning_rate"]
    if not isinstance(values["method"], str):
        warm = " after " + Path(values["warm_start"]).name if values["warm_start"] else ""
        values["method"] = values["guide"] + warm
    if not isinstance(values["cut"], dict):  # a run without a plan: compared with the paper
        values["cut"] = {
            name: {"used": values[name], "full": FULL[name]}
            for name in BUDGET
            if values[name] != FULL[name]
        }
    return values


def _look_up(record: Any, field: str) -> Any:
    """Returns the value of a field such as "config.data", or None."""
    for key in field.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def matches(found: Any, wanted: str, key: str) -> bool:
    """Whether a value is the wanted one; the name of a guide matches it with all options.

    Example:
        >>> matches("sa:4", "sa", "guide"), matches("sa:4", "sa:8", "guide"), matches(10, "10", "p")
        (True, False, True)
    """
    return str(found) == wanted or (key == "guide" and str(found).partition(":")[0] == wanted)


def parse_where(conditions: Sequence[str]) -> dict[str, list[str]]:
    """Reads conditions such as ``guide=gp,vae``.

    Raises:
        ValueError: If one is not KEY=VALUE,..., or a key is unknown or given twice.

    Example:
        >>> parse_where(["guide=gp,vae", "data=mnist"])
        {'guide': ['gp', 'vae'], 'data': ['mnist']}
    """
    where: dict[str, list[str]] = {}
    for condition in conditions:
        key, _, values = condition.partition("=")
        if not values or key not in KEYS:
            raise ValueError(
                f"cannot read the condition {condition!r}: expected KEY=VALUE,VALUE with a key of "
                f"{', '.join(KEYS)}"
            )
        if key in where:
            raise ValueError(f"{key} is given twice: separate its values by commas")
        # a comma within a guide's options is followed by KEY=
        where[key] = re.split(r",(?!\w+=)", values)
    return where


def select(frame: pd.DataFrame, where: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """Returns the rows that fit the conditions of :func:`parse_where`."""
    for key, values in where.items():
        fits = [any(matches(found, value, key) for value in values) for found in frame[key]]
        frame = frame[fits]
    return frame


def differences(frame: pd.DataFrame) -> list[str]:
    """Returns what may make the scores of a table incomparable, as lines of text.

    All runs should have the same commit, torch and device, and the same budget; all runs on one
    data set the same images; and the runs of one cell must be repetitions that differ in the seed.
    The lines name file and field.
    """
    lines = []
    for name in ("commit", "torch", "device", "threads"):
        lines += _differences(frame, name, "")
    for (data, _), group in frame.groupby(["data", "likelihood"]):  # one of them binarises
        for name in ("train_sha256", "test_sha256"):
            lines += _differences(group, name, f" on {data}")
    return lines + _mixed_budgets(frame) + _mixed_cells(frame)


def _mixed_budgets(frame: pd.DataFrame) -> list[str]:
    shared = frame.assign(epochs=frame["epochs"] // frame["epochs_factor"])
    return [line for name in BUDGET for line in _differences(shared, name, "")]


def _mixed_cells(frame: pd.DataFrame) -> list[str]:
    """Returns in what the runs of one cell differ, and which seeds are there twice."""
    # each seed has a start of its own
    start = frame["warm_start"].map(lambda folder: None if pd.isna(folder) else "a folder")
    lines = []
    for key, cell in frame.assign(warm_start=start).groupby(["method", *_CELL], sort=False):
        where = f" of {', '.join(map(str, key))}"
        for name in _OF_CELL:
            lines += _differences(cell, name, where)
        for seed, runs in cell.groupby("seed")["run"]:
            if len(runs) > 1:
                first, *others = (f"{run}/record.json" for run in runs)
                lines.append(f"{', '.join(others)}: config.seed is {seed}, as in {first}{where}")
    return lines


def _differences(frame: pd.DataFrame, name: str, where: str) -> list[str]:
    shown = frame[name].map(_show)
    counts = shown.value_counts()
    lines = []
    for value, count in counts.iloc[1:].items():
        first = frame.loc[shown == value, "run"].iloc[0]
        others = f" and {count - 1} more" if count > 1 else ""
        lines.append(
            f"{first}/record.json{others}: {_FIELDS[name]} is {value}; {counts.iloc[0]} runs"
            f"{where} have {counts.index[0]}"
        )
    return lines


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "all" if value is not None else "None"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def seeds_text(counts: Iterable[int]) -> str:
    """Returns how many seeds there are, from the numbers of several cells.

    Example:
        >>> seeds_text([3, 1, 2]), seeds_text([1, 1])
        ('1 to 3 seeds', '1 seed')
    """
    counts = [*counts]
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def score_table(frame: pd.DataFrame, title: str = "") -> str:
    """Returns a Markdown table of means ± standard deviations over seeds, with its caption.

    It has one row per method, and one column per data set, p, decoder and likelihood. The caption
    says the budget, where it is smaller than the paper's, and the :func:`differences`.

    Raises:
        ValueError: If there is no run, the budgets are mixed, or the runs of a cell differ in more
            than the seed.
    """
    text = _caption(frame, title)
    likelihood = frame["likelihood"].map(lambda name: "" if name == "gaussian" else f", {name}")
    column = frame["data"] + ", p = " + frame["latent_dim"].map(str) + ", " + frame["decoder"]
    groups = frame.assign(column=column + likelihood).groupby(["method", "column"], sort=False)
    cells = {
        key: f"{runs.mean():.1f}" + (f" ± {runs.std():.1f}" if len(runs) > 1 else "")
        for key, runs in groups["log_evidence"]
    }
    columns = [*dict.fromkeys(column for _, column in cells)]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for method in dict.fromkeys(method for method, _ in cells):
        row = [cells.get((method, column), "–") for column in columns]
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join([*lines, "", text, ""])


def _caption(frame: pd.DataFrame, title: str) -> str:
    if frame.empty:
        raise ValueError("there is no run to make a table of")
    if lines := _mixed_budgets(frame):
        raise ValueError("mixed budgets in one table: " + "; ".join(lines))
    if lines := _mixed_cells(frame):
        raise ValueError(
            "the runs of a cell of a table differ in more than the seed: "
            + "; ".join(lines)
            + ". Keep the runs of each table in a folder of their own"
        )
    first = frame.iloc[0]
    epochs, num_samples = first["epochs"] // first["epochs_factor"], first["num_samples"]
    paper = f" (the paper: {FULL['epochs']})" if epochs != FULL["epochs"] else ""
    parts = [f"{epochs:,} epochs{paper}"]
    paper = f" ({FULL['num_samples']})" if num_samples != FULL["num_samples"] else ""
    parts.append(f"K = {num_samples}{paper}")
    for name, what in (("train_images", "training"), ("test_images", "test")):
        if pd.notna(first[name]):
            parts.append(f"only the first {int(first[name]):,} {what} images")
    if first["validation"]:
        parts.append(f"{first['validation']:,} training images held out")
    if first["batch_size"] != FULL["batch_size"]:
        parts.append(f"batches of {first['batch_size']} ({FULL['batch_size']})")
    parts.append(seeds_text(frame.groupby(["method", *_CELL])["seed"].nunique()))
    text = f"log p(x), nats per image, by importance sampling: {', '.join(parts)}."
    if any(frame["cut"].map(bool)):
        text += " CUT BUDGET: compare these numbers with each other, not with published ones."
    lines = [f"Note: {line}." for line in differences(frame)]
    return "\n".join([f"{title}. {text}" if title else text, *lines])
