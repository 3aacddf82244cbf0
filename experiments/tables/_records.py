"""The records of runs and of their companions, sorted into the cells of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.results import read_results

#: What all records of a table, and all of one data set, must have in common.
BUDGET = ("config.batch_size", "config.learning_rate", "config.likelihood")
OF_DATA = (
    "data.train_sha256", "data.test_sha256", "data.train_images", "data.validation_images",
)  # fmt: skip
#: What is only flagged where records differ in it.
FLAGGED = ("commit", "versions.torch", "device")

_NAMES = {"vae": "VAE", "gp": "GPVAE", "sa": "SA", "iaf": "IAF", "hf": "HF", "me": "ME",
          "rme": "RME", "vlae": "VLAE"}  # fmt: skip
DATA_NAMES = {"mnist": "MNIST", "omniglot": "OMNIGLOT", "cifar10": "CIFAR10", "svhn": "SVHN",
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
        return f"{DATA_NAMES.get(self.data, self.data)}, p = {self.latent_dim}"


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
        steps = gradients(guide)
        if is_mixture(guide) and steps is not None and steps > 1:
            _add(controls, steps, f"the gradient steps of {method_label(guide)}")
    for record in records:
        if record["config.warm_start"] is not None and record.guide != "vae" and epochs:
            row = Row(record.guide, warm=True)
            total, steps = totals[id(record)]
            _add(controls, total / epochs, f"the epochs of {row.label}")
            if steps is not None:
                _add(controls, steps / epochs, f"the gradient steps of {row.label}")

    starts = {_name(record["config.warm_start"]) for record in (*records, *others)}
    cells: dict[tuple[Row, tuple[str, int, str]], list[Record]] = {}
    firsts: dict[Row, Record] = {}
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
        first = firsts.setdefault(row, record)
        if totals[id(record)] != totals[id(first)]:
            raise ValueError(
                f"{record.file}: config.epochs is {record['config.epochs']}, "
                f"{_in_all(totals[id(record)])}, but {_in_all(totals[id(first)])} in {first.file}: "
                f"the row {row.label} has one total. Give only the folders of one of them"
            )
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


def total_budget(record: Record, others: Sequence[Record]) -> tuple[int, int | None]:
    """Epochs, and gradient steps per image, of a run together with what it started from.

    The latter None if they are not known, see :func:`gradients`.
    """
    total, count = int(record.number("config.epochs")), gradients(record.guide)
    steps = None if count is None else total * count
    if record["config.warm_start"] is not None:
        before, steps_before = total_budget(_start(record, others), others)
        total += before
        steps = None if steps is None or steps_before is None else steps + steps_before
    return total, steps


@cache
def gradients(guide: str) -> int | None:
    """How many latent vectors are decoded, and differentiated, for an image and epoch.

    One for most guides; M for a mixture, a draw from each component; 3 M for a recursive mixture
    that has more than one: its components, its weights, and its model take M each; S k + 1 where
    k steps of S samples refine the encoder. What is decoded without a gradient, as in a line
    search, does not count. None where the number says little, for VLAE, whose Jacobians cost p
    times as much, or is not known, for the guides of others.
    """
    name = guide.partition(":")[0]
    if name in ("vae", "gp", "full", "lowrank", "iaf", "hf"):
        return 1
    if name not in ("me", "rme", "sa", "iterative"):
        return None
    built = make_guide(guide, ImageModel((1, 28, 28), latent_dim=1))  # it knows its options
    if not is_mixture(guide):
        return int(built.num_samples * built.num_steps + 1)
    count = int(built.num_components)
    return 3 * count if name == "rme" and count > 1 else count


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


def _in_all(total: tuple[int, int | None]) -> str:
    epochs, steps = total
    return f"{epochs} in all" + ("" if steps is None else f" with {steps} gradient steps")


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
