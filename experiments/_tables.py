"""What the score tables share: records in; Markdown, LaTeX, CSV and pictures out.

A table has columns (data set, dimension p, decoder) and rows (guides). Its cells are filled from
the records of finished runs, and of their evaluations with ``pyro-gpvae evaluate RUN --companion N
--out FOLDER``, wherever they lie below the folders given. A cell without a record is "not run".
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from pyro_gpvae.files import read_json, write_text
from pyro_gpvae.plots.tables import companion_dots, score_dots
from pyro_gpvae.results import read_results
from pyro_gpvae.statistics import compare_methods, order_change

PUBLISHED = Path(__file__).parent / "published"
PUBLISHED_EPOCHS = 2000
#: Scores of a companion, by the entry of its record: better and better proposals.
COMPANION = {
    "ELBO": ("own", "elbo"),
    "IWAE, own q": ("own", "log_evidence"),
    "IWAE, best width": ("width", "log_evidence"),
    "IWAE, optimum": ("optimum", "log_evidence"),
    "AIS": ("annealed", "log_evidence"),
}
OWN, REFERENCE = "IWAE, own q", "IWAE, optimum"

#: What all records of a table, and all of one data set, must have in common.
BUDGET = ("config.batch_size", "config.learning_rate", "config.likelihood")
OF_DATA = (
    "data.train_sha256", "data.test_sha256", "data.train_images", "data.validation_images",
)  # fmt: skip
#: What is only flagged where records differ in it.
FLAGGED = ("commit", "versions.torch", "device")

_NAMES = {"vae": "VAE", "gp": "GPVAE", "sa": "SA", "iaf": "IAF", "hf": "HF", "me": "ME",
          "rme": "RME", "vlae": "VLAE"}  # fmt: skip
_DATA = {"mnist": "MNIST", "omniglot": "OMNIGLOT", "cifar10": "CIFAR10", "svhn": "SVHN",
         "celeba": "CelebA"}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of scores."""

    data: str
    latent_dim: int
    decoder: str = "conv"

    @property
    def key(self) -> tuple[str, int, str]:
        return self.data, self.latent_dim, self.decoder

    @property
    def label(self) -> str:
        return f"{_DATA.get(self.data, self.data)}, p = {self.latent_dim}"


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: Of its files.
        title: Of the table.
        panels: Columns that are printed beside each other, by a heading.
        guides: The rows of the paper, as ``pyro-gpvae train --guide`` names them.
    """

    name: str
    title: str
    panels: dict[str, tuple[Column, ...]]
    guides: tuple[str, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(column for columns in self.panels.values() for column in columns)


@dataclass(frozen=True)
class Row:
    """A row: a guide, cold or warm-started; or a VAE that was trained for longer, a control."""

    guide: str
    warm: bool = False
    multiple: float = 1.0

    @property
    def role(self) -> str:
        return "method" if self.multiple == 1 else "control"

    @property
    def label(self) -> str:
        longer = f", {self.multiple:g} × epochs" if self.multiple != 1 else ""
        return method_label(self.guide) + longer + (", warm start" if self.warm else "")


@dataclass(frozen=True)
class Record:
    """The record of a run, or of an evaluation with a companion."""

    file: Path
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The value of a field such as "config.epochs"; an error names file and field."""
        value: Any = self.content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{self.file}: the field {name!r} is missing")
            value = value[key]
        return value

    def number(self, name: str) -> float:
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"{self.file}: the field {name!r} must be a number, got {value!r}")
        return float(value)

    @cached_property
    def column(self) -> tuple[str, int, str]:
        return self["data.name"], self["config.latent_dim"], self["config.decoder"]

    @property
    def guide(self) -> str:
        return str(self["config.guide"])

    @property
    def seed(self) -> int:
        # an evaluation may have had other random numbers: its run is meant
        return int(self["recorded.seed" if "recorded" in self.content else "config.seed"])

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self["run"]) if "run" in self.content else self.file.parent


@dataclass
class Collected:
    """The records of a table, sorted into its cells.

    Attributes:
        rows: The rows, in the order in which they are printed.
        cells: Records by row and column.
        epochs: The budget; None if there are no records.
        controls: What each control is for, by its multiple of the budget.
        flags: In what records differ that may be compared all the same.
    """

    rows: list[Row]
    cells: dict[tuple[Row, tuple[str, int, str]], list[Record]]
    epochs: int | None
    controls: dict[float, list[str]]
    flags: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells.values() for record in cell]


@dataclass(kw_only=True)
class Options:
    """Options of a score table.

    Attributes:
        records: Folders with runs and evaluations, at any depth; none is a table of what is
            published.
        epochs: The budget of the table, where records do not agree; by default the most frequent.
        out: Folder of the results.
    """

    records: tyro.conf.Positional[tuple[Annotated[Path, tyro.conf.arg(metavar="FOLDER")], ...]] = ()
    epochs: int | None = None
    out: Path = Path("docs/results")


def main(table: Table, options: Options) -> None:
    """Makes the table and its companion."""
    runs, companions, damaged = read_records(options.records)
    collected = collect(table, runs, epochs=options.epochs, others=runs)
    beside = collect(table, companions, epochs=options.epochs or collected.epochs, others=runs)
    check_pairs(runs, companions)
    scores = score_frame(table, collected, {"IWAE": "scores.log_evidence"})
    proposals = companion_frame(table, beside)
    order = order_text(proposals, bool(companions))
    caption = score_caption(collected, order)
    flags = list(dict.fromkeys([*damaged, *collected.flags, *beside.flags]))
    for flag in flags:
        print(f"warning: {flag}", file=sys.stderr)
    out, name = options.out, table.name
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", scores.to_csv(index=False))
    write_text(out / f"{name}.md", score_markdown(table, scores, caption, flags))
    write_text(out / f"{name}.tex", score_latex(table, scores, caption))
    score_dots(drawn(scores), caption, table.title).savefig(out / f"{name}.png")
    caption = companion_caption(beside, order)
    name = f"{table.name}_companion"
    write_text(out / f"{name}.csv", proposals.to_csv(index=False))
    write_text(out / f"{name}.md", companion_markdown(table, proposals, caption, flags))
    write_text(out / f"{name}.tex", companion_latex(table, proposals, caption))
    title = f"{table.title}: better model or better proposal?"
    companion_dots(drawn(proposals), caption, title).savefig(out / f"{name}.png")
    print((out / f"{table.name}.md").read_text(encoding="utf-8"))
    print(f"written to {out}: {table.name} and {name}, each as .md, .tex, .csv and .png")


# Records


def read_records(folders: Iterable[Path]) -> tuple[list[Record], list[Record], list[str]]:
    """Reads every ``record.json`` below the folders.

    Returns:
        The records of runs; those of evaluations with a companion by the run's own guide (other
        evaluations, of a guide that was not trained there, are no rows of a table); and, as lines
        of text, the files that are damaged.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a field of an evaluation is missing.
    """
    runs, companions, flags = [], [], []
    for folder in folders:
        frame, skipped = read_results(folder)
        for name in frame["run"]:
            file = folder / name / "record.json"
            runs.append(Record(file, read_json(file)))
        for file in sorted(folder.rglob("record.json")):
            lines = [line for line in skipped if line.startswith(f"{file}: ")]
            if not lines:
                continue
            try:
                record = Record(file, read_json(file))
            except ValueError:
                flags += lines  # damaged
                continue
            if "run" not in record.content:
                flags += lines
            elif "companion" in record.content and record["trained_guide"] == record.guide:
                companions.append(record)
    return runs, companions, [f"left out: {flag}" for flag in flags]


def collect(
    table: Table,
    records: Sequence[Record],
    *,
    epochs: int | None = None,
    others: Sequence[Record] = (),
) -> Collected:
    """Sorts records into the cells of a table; those of other columns are left out.

    A method's own epochs, or its total with those of the warm start, must be the table's; a VAE
    with as many as a control is that control; a VAE that other runs started from is left out.

    Arguments:
        table: The table.
        records: Of runs, or of companions.
        epochs: Its budget; by default the most frequent number of epochs.
        others: Records of runs among which warm starts may be found.

    Raises:
        ValueError: If budgets or images are mixed, a run is there twice, or a field is missing;
            names file and field.
    """
    wanted = {column.key for column in table.columns}
    records = [record for record in records if record.column in wanted]
    for record in records:
        if record["config.freeze_decoder"]:
            raise ValueError(
                f"{record.file}: config.freeze_decoder is true: a guide on a decoder of another "
                "run is no row of this table"
            )
    if epochs is None and records:
        methods = [r for r in records if r.guide != "vae"] or records
        epochs = Counter(int(r["config.epochs"]) for r in methods).most_common(1)[0][0]
    totals = {id(record): total_budget(record, others) for record in records}
    _same(records, BUDGET)
    _same(records, ["companion.num_samples" if _is_companion(records) else "scores.num_samples"])
    for data in dict.fromkeys(record["data.name"] for record in records):
        part = [record for record in records if record["data.name"] == data]
        count = "companion.num_images" if _is_companion(records) else "scores.num_images"
        _same(part, [*OF_DATA, count])

    controls: dict[float, list[str]] = {}
    guides = dict.fromkeys((*table.guides, *(record.guide for record in records)))
    for guide in guides:
        if gradients(guide) > 1 and is_mixture(guide):
            _add(controls, gradients(guide), f"the gradient steps of {method_label(guide)}")
    for record in records:
        if record["config.warm_start"] is not None and record.guide != "vae" and epochs:
            row = Row(record.guide, warm=True)
            total, steps = totals[id(record)]
            _add(controls, total / epochs, f"the epochs of {row.label}")
            _add(controls, steps / epochs, f"the gradient steps of {row.label}")

    starts = {_name(record["config.warm_start"]) for record in (*records, *others)}
    cells: dict[tuple[Row, tuple[str, int, str]], list[Record]] = {}
    for record in records:
        warm = record["config.warm_start"] is not None
        total, _ = totals[id(record)]
        if record.guide == "vae" and epochs and total != epochs:
            if total / epochs in controls:
                row = Row("vae", warm, total / epochs)
            elif _name(str(record.folder)) in starts:
                continue
            else:
                raise _mixed(record, total, epochs, controls)
        elif epochs not in (int(record["config.epochs"]), total):
            raise _mixed(record, total, epochs, controls)
        else:
            row = Row(record.guide, warm)
        cell = cells.setdefault((row, record.column), [])
        for other in cell:
            if other.seed == record.seed:
                raise ValueError(
                    f"{record.file}: config.seed is {record.seed}, as in {other.file}: "
                    f"{row.label} is there twice for {record.column}"
                )
        cell.append(record)

    present = {row for row, _ in cells}
    rows: list[Row] = []
    for guide in guides:
        rows += _rows(guide, 1.0, present, guide in table.guides)
    for multiple in sorted(multiple for multiple in controls if multiple != 1):
        rows += _rows("vae", multiple, present, True)
    return Collected(rows, cells, epochs, dict(sorted(controls.items())), _differences(records))


def _rows(guide: str, multiple: float, present: set[Row], wanted: bool) -> list[Row]:
    """A guide's rows: cold, warm-started, or, if there is neither and it is wanted, "not run"."""
    both = [Row(guide, warm, multiple) for warm in (False, True)]
    return [row for row in both if row in present] or ([both[0]] if wanted else [])


def total_budget(record: Record, others: Sequence[Record]) -> tuple[int, int]:
    """Epochs, and gradient steps per image, of a run together with what it started from."""
    epochs = int(record.number("config.epochs"))
    total, steps = epochs, epochs * gradients(record.guide)
    if record["config.warm_start"] is not None:
        before = total_budget(_start(record, others), others)
        total, steps = total + before[0], steps + before[1]
    return total, steps


def gradients(guide: str) -> int:
    """How many latent vectors are decoded, and differentiated, for an image and epoch.

    One for most guides; M for a mixture, a draw from each component; 3 M for a recursive mixture
    that has more than one: its components, its weights, and its model take M each; k + 1 for SA(k).
    """
    name, _, options = guide.partition(":")
    first = options.split(",")[0].rpartition("=")[2]
    count = int(first) if first.isdigit() else 2
    if name == "rme":
        return 3 * count if count > 1 else 1
    return {"me": count, "sa": count + 1}.get(name, 1)


def is_mixture(guide: str) -> bool:
    """Whether it has several encoders."""
    return guide.partition(":")[0] in ("me", "rme")


def method_label(guide: str) -> str:
    """VAE, SA(4), ...; a guide that the paper does not have is called by its own name."""
    name, _, options = guide.partition(":")
    if name in _NAMES and (not options or options.isdigit()):
        return _NAMES[name] + (f"({options})" if options else "")
    return guide


def check_pairs(runs: Sequence[Record], companions: Sequence[Record]) -> None:
    """Refuses the companion of a run that has been replaced since."""
    by_folder = {record.file.parent.resolve(): record for record in runs}
    for companion in companions:
        run = by_folder.get(companion.folder.resolve())
        if run is None:
            continue
        ours, theirs = companion["recorded.log_evidence"], run["scores.log_evidence"]
        if ours != theirs:
            raise ValueError(
                f"{companion.file}: recorded.log_evidence is {ours}, but scores.log_evidence in "
                f"{run.file} is {theirs}: evaluate that run again"
            )


def _is_companion(records: Sequence[Record]) -> bool:
    return bool(records) and "companion" in records[0].content


def _start(record: Record, others: Sequence[Record]) -> Record:
    """The record of a run's warm start: where it was, or below the folders given."""
    name = Path(record["config.warm_start"])
    # as it was given, or beside the run, where a sweep names it without a path
    for folder in (name, record.folder.parent / name.name):
        if (folder / "record.json").is_file():
            return Record(folder / "record.json", read_json(folder / "record.json"))
    for count in range(len(name.parts), 0, -1):
        tail = name.parts[-count:]
        found = [o for o in others if o.folder.parts[-count:] == tail and o.column == record.column]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ValueError(
        f"{record.file}: config.warm_start is {str(name)!r}, of which no record, or several, are "
        "below the folders given: the total of its epochs is not known"
    )


def _name(folder: str | None) -> str | None:
    return None if folder is None else Path(folder).name


def _same(records: Sequence[Record], fields: Iterable[str]) -> None:
    for name in fields:
        counts = Counter(repr(record[name]) for record in records)
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        other = next(record for record in records if repr(record[name]) == usual)
        odd = next(record for record in records if repr(record[name]) != usual)
        raise ValueError(
            f"{odd.file}: {name} is {odd[name]!r}, but {other[name]!r} in {other.file} (and in "
            f"{counts[usual]} of {len(records)} records): one table compares equals"
        )


def _mixed(record: Record, total: int, epochs: int | None, controls: Iterable[float]) -> ValueError:
    hint = ""
    if record.guide == "vae":
        hint = f", or a multiple of that for a control ({', '.join(f'{m:g}' for m in controls)})"
    return ValueError(
        f"{record.file}: config.epochs is {record['config.epochs']} ({total} with its warm start), "
        f"expected {epochs}{hint}: one table has one budget. Give only the folders of one budget, "
        "or name it with --epochs"
    )


def _differences(records: Sequence[Record]) -> list[str]:
    """In what records differ that may be compared all the same, with a file for each value."""
    flags = []
    for name in FLAGGED:
        first = {record[name]: record.file for record in reversed(records)}
        counts = Counter(record[name] for record in records)
        if len(counts) > 1:
            values = "; ".join(
                f"{value!r} in {first[value]}" + (f" and {n - 1} more" if n > 1 else "")
                for value, n in counts.most_common()
            )
            flags.append(f"records differ in {name}: {values}")
    for record in records:
        if str(record["commit"]).endswith("+"):
            flags.append(f"{record.file}: commit is {record['commit']!r}: files had been changed")
            break
    return flags


def _add(controls: dict[float, list[str]], multiple: float, reason: str) -> None:
    reasons = controls.setdefault(multiple, [])
    if reason not in reasons:
        reasons.append(reason)


# Frames


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


# Text


def score_caption(collected: Collected, order: str) -> str:
    """Budget, seeds, tests, controls."""
    text = "Test log-likelihood, IWAE with each guide's own q, in nats per image: mean ± standard "
    text += f"deviation over seeds. {_budget_text(collected, 'scores')} {_test_text()} "
    text += "Δ is the difference to the VAE's row; paper: the published score, and its own Δ. "
    return " ".join(f"{text}{_control_text(collected)} {order}".split())


def companion_caption(collected: Collected, order: str) -> str:
    text = "The same models, scored with better and better proposals, in nats per image: mean ± "
    text += "standard deviation over seeds, in parentheses the difference to the VAE's row. ELBO "
    text += "and IWAE with the guide's own q; IWAE with its spread multiplied by the factor c that "
    text += "is best on images that are no test images; IWAE with the best full Gaussian of each "
    text += "image, the reference; annealed importance sampling from there. "
    text += f"{_budget_text(collected, 'companion')} {_test_text()} "
    if collected.records:
        left = sum(int(r["companion.optimum.not_converged"]) for r in collected.records)
        count = sum(int(r["companion.num_images"]) for r in collected.records)
        text += f"The optimum of {left:,} of {count:,} images had not converged. "
        sources = sorted({str(r["companion.validation"]) for r in collected.records})
        text += f"c was chosen on {' or on '.join(sources)}. "
    return " ".join(f"{text}{order}".split())


def _test_text() -> str:
    return (
        "Red: the best mean of the column. Blue: little evidence of a difference from it (p > "
        "0.01, two-sided t-test, uncorrected as in the paper; Welch's and Holm's in the CSV)."
    )


def _budget_text(collected: Collected, part: str) -> str:
    records = collected.records
    if not records:
        return f"No records; the paper trains for {PUBLISHED_EPOCHS} epochs."
    first = records[0]
    texts = [
        f"{collected.epochs:,} epochs (the paper: {PUBLISHED_EPOCHS:,})",
        f"K = {first[f'{part}.num_samples']}",
    ]
    for data in dict.fromkeys(record["data.name"] for record in records):
        of_data = next(record for record in records if record["data.name"] == data)
        texts.append(
            f"{_DATA.get(data, data)}: {of_data['data.train_images']:,} training and "
            f"{of_data[f'{part}.num_images']:,} test images"
        )
    counts = sorted({len(cell) for cell in collected.cells.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    texts.append(f"{seeds} seed{'s' if counts[-1] > 1 else ''}")
    return "; ".join(texts) + "."


def _control_text(collected: Collected) -> str:
    texts = []
    for multiple, reasons in collected.controls.items():
        name = "VAE" if multiple == 1 else f"VAE, {multiple:g} × epochs"
        texts.append(f"{name}: {', '.join(reasons)}")
    text = "Controls of equal compute (a gradient step: one latent vector decoded and "
    text += "differentiated for an image). A method that is not warm-started has the epochs of the "
    return f"{text}VAE. {'; '.join(texts)}." if texts else ""


def _index(frame: pd.DataFrame) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """The cells by panel, column, score and method: looking them up in a frame takes seconds."""
    return {
        (cell["panel"], cell["column"], cell["score"], cell["method"]): cell
        for cell in frame.to_dict("records")
    }


def _methods(frame: pd.DataFrame) -> dict[str, str]:
    """The rows in their order, as Markdown has them: a guide's own name is code."""
    guides = set(frame["guide"])
    return {m: f"`{m}`" if m in guides else m for m in dict.fromkeys(frame["method"])}


def score_markdown(table: Table, frame: pd.DataFrame, caption: str, flags: Sequence[str]) -> str:
    lines, found = [f"# {table.title}", ""], _index(frame)
    for panel, columns in table.panels.items():
        if len(table.panels) > 1:
            lines += [f"## {panel}", ""]
        heads = [f"{column.label} | Δ | paper" for column in columns]
        lines.append(f"| method | {' | '.join(heads)} | seeds |")
        lines.append("|---|" + "--:|" * (3 * len(columns) + 1))
        for method, name in _methods(frame).items():
            cells, seeds = [name], []
            for column in columns:
                cell = found[panel, column.label, "IWAE", method]
                cells += [_score(cell, _math), _signed(cell["difference_to_vae"]), _paper(cell)]
                seeds.append(str(cell["seeds"]))
            cells.append(seeds[0] if len(set(seeds)) == 1 else ", ".join(seeds))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, caption, *_flag_lines(flags), ""])


def companion_markdown(
    table: Table, frame: pd.DataFrame, caption: str, flags: Sequence[str]
) -> str:
    lines, found = [f"# {table.title}: better model or better proposal?", ""], _index(frame)
    heads = " | ".join("IWAE, best width | c" if s == "IWAE, best width" else s for s in COMPANION)
    for panel, columns in table.panels.items():
        for column in columns:
            lines += [f"## {_heading(table, panel, column)}", ""]
            lines.append(f"| method | {heads} | paper | seeds |")
            lines.append("|---|" + "--:|" * (len(COMPANION) + 3))
            for method, name in _methods(frame).items():
                cells = [name]
                for score in COMPANION:
                    cell = found[panel, column.label, score, method]
                    difference = _signed(cell["difference_to_vae"])
                    text = _score(cell, _math)
                    cells.append(text + (f" ({difference})" if difference != "–" else ""))
                    if score == "IWAE, best width":
                        c = cell["factor"]
                        cells.append("–" if math.isnan(c) else f"{c:.2f}")
                cell = found[panel, column.label, OWN, method]
                cells += [_paper(cell), str(cell["seeds"])]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join([*lines, caption, *_flag_lines(flags), ""])


def score_latex(table: Table, frame: pd.DataFrame, caption: str) -> str:
    blocks, found = [], _index(frame)
    for panel, columns in table.panels.items():
        lines = []
        for method in _methods(frame):
            cells, seeds = [_escape(method)], []
            for column in columns:
                cell = found[panel, column.label, "IWAE", method]
                seeds.append(str(cell["seeds"]))
                difference = _escape(_signed(cell["difference_to_vae"]))
                cells += [_score(cell, _tex), difference, _escape(_paper(cell))]
            cells.append(seeds[0] if len(set(seeds)) == 1 else ", ".join(seeds))
            lines.append(" & ".join(cells))
        heads = [*([column.label, "Δ", "paper"] for column in columns), ["seeds"]]
        blocks.append(_tabular(panel if len(table.panels) > 1 else "", heads, lines))
    return _latex_table(table.name, caption, blocks)


def companion_latex(table: Table, frame: pd.DataFrame, caption: str) -> str:
    blocks, found = [], _index(frame)
    for panel, columns in table.panels.items():
        for column in columns:
            lines = []
            for method in _methods(frame):
                row = [found[panel, column.label, score, method] for score in COMPANION]
                lines.append(" & ".join([_escape(method), *(_score(cell, _tex) for cell in row)]))
            blocks.append(_tabular(_heading(table, panel, column), [list(COMPANION)], lines))
    return _latex_table(f"{table.name}_companion", caption, blocks)


def _heading(table: Table, panel: str, column: Column) -> str:
    return (
        column.label
        if len({c.decoder for c in table.columns}) == 1
        else (f"{column.label}, {panel}")
    )


def _score(row: dict[str, Any], style: Callable[[str, str, str], str]) -> str:
    """The mean of a cell in its colour, never without a record."""
    if row["seeds"] == 0:
        return "not run"
    sd = "" if row["seeds"] == 1 else f"{row['sd']:.1f}"
    text = style(f"{row['mean']:.1f}", sd, row["mark"])
    return f"{text} (1 seed)" if row["seeds"] == 1 else text


def _math(mean: str, sd: str, mark: str) -> str:
    """Mathematics, because Markdown has no colours of its own."""
    colour = {"best": "red", "no difference": "blue"}.get(mark)
    if colour is None:
        return f"{mean} ± {sd}" if sd else mean
    value = rf"{mean} \pm {sd}" if sd else mean
    return rf"$\color{{{colour}}}{{\mathbf{{{value}}}}}$"


def _tex(mean: str, sd: str, mark: str) -> str:
    colour = {"best": "red", "no difference": "blue"}.get(mark)
    text = mean if colour is None else rf"\textcolor{{{colour}}}{{\textbf{{{mean}}}}}"
    return rf"{text}$^{{{sd}}}$" if sd else text


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1f}"


def _paper(row: dict[str, Any]) -> str:
    if math.isnan(row["published"]):
        return "–"
    return f"{row['published']:.1f} ({_signed(row['published_difference_to_vae'])})"


def _flag_lines(flags: Sequence[str]) -> list[str]:
    return ["", "Flagged:", "", *(f"* {flag}" for flag in flags)] if flags else []


def _tabular(heading: str, heads: list[list[str]], lines: list[str]) -> str:
    names = ["method", *(name for head in heads for name in head)]
    rule = rf"\multicolumn{{{len(names)}}}{{l}}{{{_escape(heading)}}} \\" if heading else ""
    return "\n".join(
        part
        for part in (
            rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"\toprule",
            rule,
            " & ".join(map(_escape, names)) + r" \\",
            r"\midrule",
            *(line + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        )
        if part
    )


def _latex_table(name: str, caption: str, blocks: list[str]) -> str:
    body = "\n\n\\medskip\n\n".join(blocks)
    return (
        "% needs \\usepackage{booktabs,xcolor}\n"
        f"\\begin{{table}}\n\\centering\\scriptsize\n{body}\n"
        f"\\caption{{{_escape(caption)}}}\n\\label{{tab:{name}}}\n\\end{{table}}\n"
    )


def _escape(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    for character, command in (("Δ", r"\Delta"), ("×", r"\times"), ("±", r"\pm"), (">", ">")):
        text = text.replace(character, f"${command}$")
    return text.replace("–", "--")
