"""Folders of runs as one table, with the differences that make scores incomparable."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.config import RunConfig

__all__ = [
    "BUDGET",
    "COLUMNS",
    "FULL",
    "differences",
    "over_seeds",
    "read_results",
]

#: The budget of the paper's supplement, sections 2 and 4; its number of seeds is not known.
#: None is all images.
FULL: dict[str, int | None] = {
    "epochs": 2000,
    "seeds": 5,
    "train_images": None,
    "test_images": None,
    "num_samples": 100,
    "batch_size": 128,
    "validation": 0,
}

#: The options of a budget.
BUDGET = tuple(name for name in FULL if name != "seeds")
_CELL = ("data", "latent_dim", "decoder", "likelihood")
_RATES = ("learning_rate", "sigma_learning_rate")
_TRAINING = ("guide", *_RATES, "keep_best", "freeze_decoder", "warm_start")
#: Runs that agree in these are repetitions.
_ROW = ("method", *_CELL, *BUDGET, *_TRAINING)
_SCORES = ("log_evidence", "elbo", "monte_carlo_error", "sampling_error")
#: Where the columns of the table are in a record.
_FIELDS = {
    "method": "plan.method",
    **{name: f"config.{name}" for name in (*_CELL, "seed", *BUDGET, *_TRAINING)},
    "epochs_factor": "plan.epochs_factor",
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
_NUMBERS = ("log_evidence", "elbo", "steps", "train_seconds", "test_seconds", "num_test")


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
            row = _row(read_json(source))
        except (OSError, ValueError) as error:
            skipped.append(f"{source}: {error}")
        else:
            rows.append({"run": source.parent.relative_to(folder).as_posix()} | row)
    return pd.DataFrame(rows, columns=COLUMNS), skipped


def _row(record: dict[str, Any]) -> dict[str, Any]:
    if "run" in record:
        raise ValueError("an evaluation of another run, not a run")
    if not isinstance(record.get("config"), dict):
        raise ValueError("not the record of a run: it has no config")
    # with the defaults of options that an older version did not have
    record = record | {"config": asdict(RunConfig.from_json(record["config"], "config"))}
    values = {name: _look_up(record, field) for name, field in _FIELDS.items()}
    for name in (*_NUMBERS, "train_sha256", "test_sha256"):
        value, kinds = values[name], (int, float) if name in _NUMBERS else (str,)
        if type(value) not in kinds or (name in _NUMBERS and not math.isfinite(value)):
            raise ValueError(f"not the record of a run: {_FIELDS[name]} is {value!r}")
    if type(values["epochs_factor"]) is not int or values["epochs_factor"] < 1:
        values["epochs_factor"] = 1
    if values["sigma_learning_rate"] is None:
        values["sigma_learning_rate"] = values["learning_rate"]
    if not isinstance(values["method"], str):
        warm = " after " + Path(values["warm_start"]).name if values["warm_start"] else ""
        values["method"] = values["guide"] + warm
    return values


def _look_up(record: Any, field: str) -> Any:
    """Returns the value of a field such as "config.data", or None."""
    for key in field.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def differences(frame: pd.DataFrame) -> list[str]:
    """Returns what may make the scores of a table incomparable, one line for each field.

    All runs should have the same commit, torch, device and budget, and all runs on one data set the
    same images. No two repetitions should have the same seed.
    """
    shared = frame.assign(epochs=frame["epochs"] // frame["epochs_factor"])  # controls have more
    lines = []
    for name in ("commit", "torch", "device", "threads", *BUDGET):
        lines += _differs(shared, name)
    for (data, _), group in frame.groupby(["data", "likelihood"]):  # one of them binarises
        for name in ("train_sha256", "test_sha256"):
            lines += _differs(group, name, f" on {data}")
    for _, runs in _shown(frame).groupby([*_ROW, "seed"], sort=False)["run"]:
        if len(runs) > 1:
            lines.append(f"the same options and seed are those of {', '.join(runs)}")
    return lines


def _differs(frame: pd.DataFrame, name: str, where: str = "") -> list[str]:
    values = [
        f"{value} in {runs.iloc[0]}" + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
        for value, runs in frame.groupby(frame[name].map(_show), sort=False)["run"]
    ]
    return [f"{_FIELDS[name]}{where} is {'; '.join(values)}"] if len(values) > 1 else []


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the options as texts; each seed has a warm start of its own."""
    texts = {name: frame[name].map(_show) for name in _ROW}
    texts["warm_start"] = frame["warm_start"].map(lambda folder: "no" if pd.isna(folder) else "yes")
    return frame.assign(**texts)


def _show(value: Any) -> str:
    """Returns a value as text; hashes are cut to twelve digits."""
    if value is None or value != value:
        return "None"
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28,}", r"\1", text)


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the number of seeds, and the mean and standard deviation of log p(x) over them.

    Runs of one row differ in the seed alone. The columns are the method, the data, and every
    option in which rows differ.

    Raises:
        ValueError: If a seed is there twice in one row.
    """
    shown = _shown(frame)
    differ = [name for name in _ROW if shown[name].nunique() > 1]
    groups = shown.groupby([*dict.fromkeys(["method", *_CELL[:3], *differ])], sort=False)
    for _, runs in groups:
        if runs["seed"].duplicated().any():
            raise ValueError(
                f"a seed is there twice among {', '.join(runs['run'])}: keep the runs of each "
                "table in a folder of their own"
            )
    columns = {"seeds": "size", "log_evidence": "mean", "sd": "std"}
    return groups["log_evidence"].agg(**columns).reset_index()
