r"""Folders of runs, read back as one table, with what makes their scores incomparable."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_gpvae.core._files import MANIFEST, check_manifest, read_json
from pyro_gpvae.runs.config import RunConfig

__all__ = [
    "COLUMNS",
    "FULL",
    "caption",
    "check_budget",
    "check_cells",
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

#: What conditions can be about.
KEYS = ("method", "guide", "data", "latent_dim", "decoder", "seed")


#: The options that a budget is made of, and that one table may not mix.
BUDGET = tuple(name for name in FULL if name != "seeds")

#: What names a column of :func:`score_table`: with the method, a cell, whose runs are averaged.
_PLACE = ["data", "latent_dim", "decoder", "likelihood"]

#: What the runs of a cell may not mix.
_OF_CELL = ("guide", "learning_rate", "freeze_decoder", "epochs_factor", "warm_start")


def read_results(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Reads every run below a folder.

    Arguments:
        folder: A results folder; its runs may lie in folders of their own at any depth.
            Unfinished runs, ``RUN.partial``, are not among them.

    Returns:
        A row a run, by path: ``run``, ``method``, the options, ``log_evidence`` and ``elbo`` in
        nats per image with their errors, seconds, and what the scores depend on (see
        :func:`differences`); and, as lines of text, the files that were skipped and why.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    rows, skipped = [], []
    for source in _records(folder):
        try:
            if (source.parent / MANIFEST).exists():  # runs of version 0.1 have none
                check_manifest(source.parent)
            row = _row(read_json(source), source)
        except (OSError, ValueError) as error:
            skipped.append(f"{source}: {error}")
            continue
        rows.append({"run": source.parent.relative_to(folder).as_posix()} | row)
    return pd.DataFrame(rows, columns=COLUMNS), skipped


def _records(folder: Path) -> Iterator[Path]:
    for source in sorted(folder.rglob("record.json")):
        parts = source.relative_to(folder).parts[:-1]
        if not any(part.endswith(".partial") or part.startswith(".") for part in parts):
            yield source


#: Where the columns of the table stand in a record.
_FIELDS = {
    "method": "plan.method",
    **{
        name: f"config.{name}"
        for name in ("guide", "data", "latent_dim", "decoder", "likelihood", "seed")
    },
    **{name: f"config.{name}" for name in BUDGET},
    "epochs_factor": "plan.epochs_factor",
    "learning_rate": "config.learning_rate",
    "warm_start": "config.warm_start",
    "freeze_decoder": "config.freeze_decoder",
    **{
        name: f"scores.{name}"
        for name in ("log_evidence", "elbo", "monte_carlo_error", "sampling_error")
    },
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


def _row(record: dict[str, Any], source: Path) -> dict[str, Any]:
    if "run" in record:
        raise ValueError("an evaluation of another run, not a run")
    if not isinstance(record.get("config"), dict):
        raise ValueError("not the record of a run: it has no config")
    # with the defaults of options that an older version did not have
    record = record | {"config": asdict(RunConfig.from_json(record["config"], "config"))}
    values: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value: Any = record
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values[name] = value
    for name in ("log_evidence", "elbo", "steps", "train_seconds", "test_seconds", "num_test"):
        value = values[name]
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"not the record of a run: {_FIELDS[name]} is {value!r}")
    for name in ("train_sha256", "test_sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"not the record of a run: {_FIELDS[name]} is {values[name]!r}")
    if type(values["epochs_factor"]) is not int or values["epochs_factor"] < 1:
        values["epochs_factor"] = 1
    if not isinstance(values["method"], str):
        warm = " after " + Path(values["warm_start"]).name if values["warm_start"] else ""
        values["method"] = values["guide"] + warm
    if not isinstance(values["cut"], dict):  # a run by hand: what it is short of the paper's
        values["cut"] = {
            name: {"used": values[name], "full": full}
            for name, full in FULL.items()
            if name != "seeds" and values[name] != full
        }
    return values


def matches(found: Any, wanted: str, key: str) -> bool:
    """Whether a value is the one asked for; of a guide, its name without options will do.

    Example:
        >>> matches("sa:4", "sa", "guide"), matches("sa:4", "sa:8", "guide"), matches(10, "10", "p")
        (True, False, True)
    """
    return str(found) == wanted or (key == "guide" and str(found).partition(":")[0] == wanted)


def parse_where(conditions: Sequence[str]) -> dict[str, list[str]]:
    """Reads conditions such as ``guide=gp,vae``.

    Raises:
        ValueError: If one is not KEY=VALUE,..., or the key is unknown or given twice.

    Example:
        >>> parse_where(["guide=gp,vae", "data=mnist"])
        {'guide': ['gp', 'vae'], 'data': ['mnist']}
    """
    where: dict[str, list[str]] = {}
    for condition in conditions:
        key, _, values = condition.partition("=")
        if not values or key not in KEYS:
            raise ValueError(
                f"the condition {condition!r} is none: expected KEY=VALUE,VALUE with a key of "
                f"{', '.join(KEYS)}"
            )
        if key in where:
            raise ValueError(f"{key} is given twice: separate its values by commas")
        # a comma within a guide's options is followed by KEY=
        where[key] = re.split(r",(?!\w+=)", values)
    return where


def select(frame: pd.DataFrame, where: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """The rows that fit; see :func:`parse_where`."""
    keep = pd.Series(True, index=frame.index)
    for key, values in where.items():
        keep &= frame[key].map(
            lambda found, k=key, vs=values: any(matches(found, v, k) for v in vs)
        )
    return frame[keep]


def differences(frame: pd.DataFrame) -> list[str]:
    """What may make the scores of a table incomparable, as lines of text that name file and field.

    The commit, torch and the device should be the same in all runs; the hashes of the images in
    all runs on the same data; the budget in all runs; and what :func:`check_cells` names in all
    whose mean is taken.
    """
    lines = []
    for name in ("commit", "torch", "device", "threads"):
        lines += _differences(frame, name, "")
    for (data, _), group in frame.groupby(["data", "likelihood"]):  # one of them binarises
        for name in ("train_sha256", "test_sha256"):
            lines += _differences(group, name, f" on {data}")
    return lines + _mixed_budgets(frame) + _mixed_cells(frame)


def check_budget(frame: pd.DataFrame) -> None:
    """Raises ValueError if runs that would stand in one table have different budgets."""
    lines = _mixed_budgets(frame)
    if lines:
        raise ValueError("mixed budgets in one table: " + "; ".join(lines))


def _mixed_budgets(frame: pd.DataFrame) -> list[str]:
    shared = frame.assign(epochs=frame["epochs"] // frame["epochs_factor"])
    return [line for name in BUDGET for line in _differences(shared, name, "")]


def check_cells(frame: pd.DataFrame) -> None:
    """Raises ValueError if runs that :func:`score_table` would average are not of one kind.

    They are those of one method, data set, p, decoder and likelihood. They may not differ in
    guide, learning rate, epochs factor, whether the decoder is frozen, and whether there is a warm
    start; and no seed may be there twice. The error names files and fields.
    """
    lines = _mixed_cells(frame)
    if lines:
        raise ValueError(
            "runs that are no repetitions of each other in one cell of a table: "
            + "; ".join(lines)
            + ". Keep those of each table in a folder of their own"
        )


def _mixed_cells(frame: pd.DataFrame) -> list[str]:
    # each seed has a start of its own
    start = frame["warm_start"].map(lambda folder: None if pd.isna(folder) else "a folder")
    lines = []
    for place, cell in frame.assign(warm_start=start).groupby(["method", *_PLACE], sort=False):
        where = f" of {', '.join(map(str, place))}"
        for name in _OF_CELL:
            lines += _differences(cell, name, where)
        for seed, runs in cell.groupby("seed")["run"]:
            if len(runs) > 1:
                first, *others = (f"{run}/record.json" for run in runs)
                lines.append(f"{', '.join(others)}: config.seed is {seed}, as in {first}{where}")
    return lines


def _differences(frame: pd.DataFrame, name: str, where: str) -> list[str]:
    counts = frame[name].map(_show).value_counts()
    if len(counts) < 2:
        return []
    usual = counts.index[0]
    lines = []
    for value, count in counts.iloc[1:].items():
        first = frame.loc[frame[name].map(_show) == value, "run"].iloc[0]
        others = f" and {count - 1} more" if count > 1 else ""
        lines.append(
            f"{first}/record.json{others}: {_FIELDS[name]} is {value}; {counts.iloc[0]} runs"
            f"{where} have {usual}"
        )
    return lines


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "all" if value is not None else "None"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def caption(frame: pd.DataFrame, title: str = "") -> str:
    """What a table of these runs must say: the budget, where it is cut, and what differs.

    Raises:
        ValueError: If there is no run, the budgets are mixed, or a cell is not of one kind.
    """
    if frame.empty:
        raise ValueError("there is no run to make a table of")
    check_budget(frame)
    check_cells(frame)
    first = frame.iloc[0]
    seeds = frame.groupby(["method", *_PLACE])["seed"].nunique()
    epochs = first["epochs"] // first["epochs_factor"]
    parts = [
        f"{epochs:,} epochs"
        + ("" if epochs == FULL["epochs"] else f" (the paper: {FULL['epochs']})"),
        f"K = {first['num_samples']}"
        + ("" if first["num_samples"] == FULL["num_samples"] else f" ({FULL['num_samples']})"),
    ]
    for name, what in (("train_images", "training"), ("test_images", "test")):
        if pd.notna(first[name]):
            parts.append(f"only the first {int(first[name]):,} {what} images")
    if first["validation"]:
        parts.append(f"{first['validation']:,} training images held out")
    if first["batch_size"] != FULL["batch_size"]:
        parts.append(f"batches of {first['batch_size']} ({FULL['batch_size']})")
    parts.append(seeds_text(seeds))
    text = (
        f"{title + '. ' if title else ''}log p(x), nats per image, by importance sampling: "
        f"{', '.join(parts)}."
    )
    if any(frame["cut"].map(bool)):
        text += " CUT BUDGET: compare these numbers with each other, not with published ones."
    flags = differences(frame)
    return text + "".join(f"\nNote: {flag}." for flag in flags)


def seeds_text(counts: Iterable[int]) -> str:
    """How many seeds there are, from the numbers of several cells.

    Example:
        >>> seeds_text([3, 1, 2]), seeds_text([1, 1])
        ('1 to 3 seeds', '1 seed')
    """
    counts = [*counts]
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def score_table(frame: pd.DataFrame, title: str = "") -> str:
    """A Markdown table: a row a method, a column a data set, p, decoder and likelihood; mean ± sd
    of seeds. Pixels are Gaussian where a column does not say otherwise.

    Raises:
        ValueError: If there is no run, the budgets are mixed, or a cell is not of one kind, see
            :func:`check_cells`.
    """
    text = caption(frame, title)
    heads = list(frame[_PLACE].drop_duplicates().itertuples(index=False, name=None))
    names = [
        f"{data}, p = {p}, {decoder}" + ("" if likelihood == "gaussian" else f", {likelihood}")
        for data, p, decoder, likelihood in heads
    ]
    lines = [f"| method | {' | '.join(names)} |"]
    lines.append("|---|" + "--:|" * len(heads))
    for method, rows in frame.groupby("method", sort=False):
        scores = rows.groupby(_PLACE)["log_evidence"]
        mean, sd = scores.mean(), scores.std()
        cells = []
        for head in heads:
            cell = f"{mean[head]:.1f}" if head in mean.index else "–"
            if head in sd.index and pd.notna(sd[head]):
                cell += f" ± {sd[head]:.1f}"
            cells.append(cell)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", text, ""])
