"""Records as data frames with a row per run, and the statistics of their scores over seeds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.results import COLUMNS, read_results

#: A column of a table.
KEY = ["data", "latent_dim", "decoder"]
#: Scores of a proposal comparison: better and better proposals.
OWN, WIDTH, OPTIMUM = "IWAE, own q", "IWAE, best width", "IWAE, optimum"
PROPOSALS = ["ELBO", OWN, WIDTH, OPTIMUM, "AIS"]


def read_records(folders: Iterable[Path]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Reads every ``record.json`` below the folders.

    Returns:
        A row per run, as of :func:`pyro_gpvae.runs.results.read_results`; the same rows with
        the scores of each evaluation that compares proposals, by the guide that was trained in the
        run; and lines of text about files that are left out.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If an evaluation is of a run that has changed.
    """
    found = [(folder, *read_results(folder)) for folder in folders]
    frames = [
        frame.assign(folder=[folder / name for name in frame["run"]]) for folder, frame, _ in found
    ]
    nothing = pd.DataFrame(columns=["folder", *COLUMNS])
    runs = pd.concat([f for f in frames if len(f)] or [nothing], ignore_index=True)
    runs["file"] = runs["folder"].map(lambda folder: folder / "record.json")
    runs = runs.assign(IWAE=runs["log_evidence"].astype(float)).astype({"latent_dim": int})
    runs["data"] = runs["data"].map(lambda name: Path(name).stem)  # also of the user's own files
    rows, flags = [], []
    for line in [line for _, _, skipped in found for line in skipped]:
        file = Path(line.partition("record.json: ")[0]) / "record.json"
        try:
            record = read_json(file)
        except ValueError:
            record = {}
        if "run" not in record:
            flags.append(f"left out: {line}")
        elif (scores := _proposals(record)) and record["guide"] == record["trained_guide"]:
            name, score = Path(record["run"]).name, record["recorded"]["log_evidence"]
            named = runs[runs["folder"].map(lambda folder: folder.name) == name]
            same = named[named["IWAE"] == score]
            if len(named) > len(same) == 0:
                raise ValueError(
                    f"{file}: recorded.log_evidence is {score}, but scores.log_evidence in "
                    f"{named['file'].iloc[0]} is not: evaluate that run again"
                )
            rows += [run | {"file": file} | scores for run in same[:1].to_dict("records")]
    names = [*runs.columns, *PROPOSALS, "factor", "unreliable", "width_images"]
    evaluations = pd.DataFrame(rows, columns=names)
    numbers = {"latent_dim": int, **dict.fromkeys([*PROPOSALS, "factor"], float)}
    return runs, evaluations.astype(numbers), flags


def _proposals(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the scores of a comparison; the committed evaluations have the part "companion"."""
    if "companion" in record:
        part = record["companion"]
        own, width, optimum = part["own"], part["width"], part["optimum"]
        scores = {
            "ELBO": own["elbo"],
            OWN: own["log_evidence"],
            WIDTH: width.get("log_evidence"),
            OPTIMUM: optimum["log_evidence"],
            "AIS": part["annealed"].get("log_evidence"),
            "factor": width.get("factor"),
            "unreliable": optimum["not_converged"],
            "width_images": part["validation"],
        }
    elif "reference" in record:
        part = record["reference"]
        scores = {"factor": part["mean_width"], "unreliable": part["not_trusted"]}
        names = {"IWAE": OWN, "IWAE, width c": WIDTH, "IWAE, instance:full": OPTIMUM, "AIS": "AIS"}
        for row, estimate in part["estimates"].items():
            scores[names.get(re.sub(r"\(\d+\)", "", row), row)] = estimate["log_evidence"]
    else:
        return {}
    return scores | {"num_test": part["num_images"], "num_samples": part["num_samples"]}


@dataclass
class Collected:
    """The records of a table."""

    runs: pd.DataFrame  # with the method of their row
    rows: pd.DataFrame  # method, guide, role and epochs, in the order of the table
    epochs: int | None  # the budget; None if there are no records
    controls: dict[float, list[str]]  # what each control is for, by its multiple of the budget
    flags: list[str]  # differences between records that are compared nevertheless


def collect(
    columns: pd.DataFrame,
    guides: Sequence[str],
    records: pd.DataFrame,
    starts: pd.DataFrame,
    epochs: int | None = None,
) -> Collected:
    """Sorts records into the rows of a table, and refuses those that do not compare.

    The epochs of a method, alone or with those of its warm start, must be the table's. A VAE with
    the epochs of a control is that control; a VAE that other runs started from is left out. Warm
    starts are found among ``starts``. The budget is by default the most frequent number of epochs.

    Raises:
        ValueError: If budgets or images are mixed, or a run is there twice. Names file and field.
    """
    runs = records.merge(columns[KEY], on=KEY)
    for file in runs.loc[runs["freeze_decoder"].eq(True), "file"]:
        raise ValueError(f"{file}: freeze_decoder is true: its decoder is that of another run")
    if epochs is None and len(runs):
        methods = runs[runs["guide"] != "vae"]
        epochs = int(Counter((methods if len(methods) else runs)["epochs"]).most_common(1)[0][0])
    rates = ("learning_rate", "sigma_learning_rate")
    _check_same(runs, "batch_size", *rates, "keep_best", "likelihood", "num_samples")
    for _, group in runs.groupby("data"):
        _check_same(group, "train_sha256", "test_sha256", "validation", "num_test")
    totals = [_totals(run, starts) for run in runs.to_dict("records")]
    runs["total"] = [float(total) for total, _ in totals]
    runs["gradient_steps"] = [steps for _, steps in totals]
    runs["warm"] = runs["warm_start"].notna()
    all_guides = dict.fromkeys([*guides, *runs["guide"]])
    controls = _controls(all_guides, runs, epochs)
    flags = _differences(runs)

    multiples = (runs["total"] / (epochs or 1)).where(runs["guide"] == "vae", 1.0)
    names = {Path(name).name for f in (records, starts) for name in f["warm_start"].dropna()}
    is_start = runs["folder"].map(lambda folder: folder.name).isin(names)
    control = multiples.isin([1.0, *controls])
    fits = control & (
        runs["guide"].eq("vae") | runs["epochs"].eq(epochs) | runs["total"].eq(epochs)
    )
    for odd in runs[~fits & (control | ~is_start)].itertuples():
        raise ValueError(
            f"{odd.file}: epochs is {odd.epochs} ({odd.total:g} with its warm start), "
            f"expected {epochs}, or for a VAE a multiple of that for a control "
            f"({', '.join(f'{m:g}' for m in controls)}). Give only the folders of one budget, or "
            "name it with --epochs"
        )
    labels = [_label(*row) for row in zip(runs["guide"], runs["warm"], multiples, strict=True)]
    runs = runs.assign(method=labels)[fits]
    for method, row in runs.fillna({"gradient_steps": 0}).groupby("method", sort=False):
        _check_same(row, "total", "gradient_steps", where=f"the row {method}")
        twice = row[row.duplicated([*KEY, "seed"], keep=False)].sort_values("seed")
        if len(twice):
            files = " and ".join(map(str, twice["file"][:2]))
            raise ValueError(f"{files}: seed is {twice['seed'].iloc[0]} in both, of {method}")
    rows = []
    longer = [("vae", multiple) for multiple in controls if multiple != 1]
    for guide, multiple in [*((guide, 1.0) for guide in all_guides), *longer]:
        both = [_label(guide, warm, multiple) for warm in (False, True)]
        found = [label for label in both if label in set(runs["method"])]
        for label in found or both[: guide in guides]:
            role = "method" if multiple == 1 else "control"
            rows.append((label, guide, role, (epochs or math.nan) * multiple))
    frame = pd.DataFrame(rows, columns=["method", "guide", "role", "epochs"])
    return Collected(runs, frame, epochs, controls, flags)


def _check_same(runs: pd.DataFrame, *names: str, where: str = "one table") -> None:
    for name in names:
        usual = runs[name].mode()[:1].tolist()
        for odd in runs[~runs[name].isin(usual)].to_dict("records"):
            other = runs.loc[runs[name].isin(usual), "file"].iloc[0]
            raise ValueError(
                f"{odd['file']}: {name} is {odd[name]!r}, but {usual[0]!r} in {other}: records of "
                f"{where} must agree. Give only the folders of some of them"
            )


def _differences(runs: pd.DataFrame) -> list[str]:
    """Describes differences that are only flagged, with a file for each value."""
    flags = []
    for name in ("commit", "torch", "device"):
        files = runs.groupby(name, sort=False)["file"].agg(["first", "size"])
        if len(files) > 1:
            values = "; ".join(f"{v!r} in {f} ({n} in all)" for v, f, n in files.itertuples())
            flags.append(f"records differ in {name}: {values}")
    for run in runs[runs["commit"].map(str).str.endswith("+")][:1].itertuples():
        flags.append(f"{run.file}: commit is {run.commit!r}: files had been changed")
    return flags


def _controls(
    guides: Iterable[str], runs: pd.DataFrame, epochs: int | None
) -> dict[float, list[str]]:
    """Returns the multiples of the budget at which a VAE has as much compute, and for what."""
    reasons = []
    for guide in guides:
        if guide.partition(":")[0] in ("me", "rme") and (steps := gradients(guide) or 0) > 1:
            reasons.append((float(steps), f"the gradient steps of {method_label(guide)}"))
    for run in runs[runs["warm"] & (runs["guide"] != "vae")].itertuples():
        label = _label(run.guide, True, 1)
        reasons.append((run.total / (epochs or 1), f"the epochs of {label}"))
        if not math.isnan(run.gradient_steps):
            reasons.append((run.gradient_steps / (epochs or 1), f"the gradient steps of {label}"))
    return {
        multiple: [reason for m, reason in dict.fromkeys(reasons) if m == multiple]
        for multiple in sorted({multiple for multiple, _ in reasons})
    }


def _totals(run: dict[str, Any], starts: pd.DataFrame) -> tuple[int, float]:
    """Returns epochs, and gradient steps per image, of a run together with its warm start."""
    epochs = int(run["epochs"])
    steps = epochs * (gradients(run["guide"]) or math.nan)
    if isinstance(run["warm_start"], str):
        before, steps_before = _totals(_start(run, starts), starts)
        return epochs + before, steps + steps_before
    return epochs, steps


def _start(run: dict[str, Any], starts: pd.DataFrame) -> dict[str, Any]:
    """Finds the record of a run's warm start by the name of its folder."""
    names = starts["folder"].map(lambda folder: folder.name)
    same = (starts[KEY] == pd.Series(run)[KEY]).all(axis=1)
    found = starts[same & names.eq(Path(run["warm_start"]).name)]
    beside = found[found["folder"].map(lambda folder: folder.parent) == run["folder"].parent]
    found = beside if len(beside) else found
    if len(found) != 1:
        raise ValueError(
            f"{run['file']}: warm_start is {run['warm_start']!r}, of which no record, or several, "
            "are below the folders given: the total of its epochs is not known"
        )
    return dict(found.iloc[0])


@cache
def gradients(guide: str) -> int | None:
    """Returns how many latent vectors are decoded and differentiated for an image and epoch.

    It is 1 for most guides; M for a mixture, a draw from each component; 3 M for a recursive
    mixture with more than one component, M for each of components, weights and model; S k + 1 for
    k refinement steps of S samples. Decoding without a gradient, as in a line search, does not
    count. It is None for VLAE, whose Jacobians cost p times as much, and for unknown guides.
    """
    name = guide.partition(":")[0]
    if name not in ("me", "rme", "sa", "iterative"):
        return 1 if name in ("vae", "gp", "full", "lowrank", "iaf", "hf") else None
    built = make_guide(guide, ImageModel((1, 28, 28), latent_dim=1))  # it knows its options
    if name in ("sa", "iterative"):
        return int(built.num_samples * built.num_steps + 1)
    count = int(built.num_components)
    return 3 * count if name == "rme" and count > 1 else count


def method_label(guide: str) -> str:
    """Returns the paper's name, such as SA(4), or the guide's own name if the paper has none."""
    name, _, options = guide.partition(":")
    names = {"vae": "VAE", "gp": "GPVAE"} | {
        n: n.upper() for n in ("sa", "iaf", "hf", "me", "rme", "vlae")
    }
    if name in names and (not options or options.isdigit()):
        return names[name] + (f"({options})" if options else "")
    return guide


def _label(guide: str, warm: bool, multiple: float) -> str:
    longer = f", {multiple:g} × epochs" if multiple != 1 else ""
    return method_label(guide) + longer + (", warm start" if warm else "")


def compare_methods(scores: Mapping[str, Sequence[float]], level: float = 0.01) -> pd.DataFrame:
    r"""Compares every method with the best of them, as in the paper's Table 4.

    The best method has the highest mean over its seeds. Every other one is compared with it by
    Student's two-sided t-test, which assumes equal variances, and by Welch's, which does not, with
    :func:`holm`'s correction for the tests of the column. As in the paper, the mark is that of
    Student's p, uncorrected. The best is chosen on the tested scores, so that p-values are too
    small. They are NaN where there is no test, for the reason in ``note``.

    Raises:
        ValueError: If a score is not finite.

    Example:
        >>> table = compare_methods({"VAE": [1.0, 2.0, 3.0], "GPVAE": [5.0, 6.0, 7.0]})
        >>> table.loc["VAE", "mark"], f'{table.loc["VAE", "p"]:.4f}'
        ('different', '0.0080')
    """
    values = {name: np.asarray(list(column), dtype=float) for name, column in scores.items()}
    for name, column in values.items():
        if len(column) == 0 or not np.isfinite(column).all():
            raise ValueError(f"the scores of {name!r} must be finite, got {column.tolist()}")
    best = max(values, key=lambda name: float(values[name].mean()))
    rows = []
    for name, column in values.items():
        count, p, welch, note = len(column), math.nan, math.nan, ""
        if count == 1:
            note = "1 seed"
        elif name != best and len(values[best]) == 1:
            note = "the best has 1 seed"
        elif name != best and np.ptp(column) == 0 == np.ptp(values[best]):
            note = "no spread over seeds"  # t would be infinite, or 0/0
        elif name != best:
            p = float(stats.ttest_ind(values[best], column, equal_var=True).pvalue)
            welch = float(stats.ttest_ind(values[best], column, equal_var=False).pvalue)
        mark = "untested" if math.isnan(p) else "no difference" if p > level else "different"
        sd = float(column.std(ddof=1)) if count > 1 else math.nan
        mark = "best" if name == best else mark
        rows.append((count, float(column.mean()), sd, mark, p, p, welch, welch, note))
    names = ["seeds", "mean", "sd", "mark", "p", "p_holm", "p_welch", "p_welch_holm", "note"]
    table = pd.DataFrame(rows, index=list(values), columns=names)
    for name in ("p", "p_welch"):
        table[f"{name}_holm"] = holm(table[name])
    return table


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Returns Holm's corrected p-values, :math:`\max_{j \le i} \min\{1, (m - j + 1) p_{(j)}\}`.

    NaN is no test, and not counted. Reference: Holm, *A simple sequentially rejective multiple test
    procedure*, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.array(p_values, dtype=float)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    factors = len(order) - np.arange(len(order))
    p[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return p
