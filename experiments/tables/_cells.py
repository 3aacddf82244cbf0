"""Sorts records into the cells of a score table, and refuses those that do not compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _records import Record, Table, gradients, is_mixture, method_label, part_of, total_budget

#: Fields in which all records of a table must agree, and those for each data set.
BUDGET = ("config.batch_size", "config.learning_rate", "config.likelihood")
OF_DATA = (
    "data.train_sha256", "data.test_sha256", "data.train_images", "data.validation_images",
)  # fmt: skip
#: Fields whose differences are only flagged.
FLAGGED = ("commit", "versions.torch", "device")


@dataclass(frozen=True)
class Row:
    """A guide, with or without a warm start, or a control: a VAE that is trained for longer."""

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


@dataclass
class Collected:
    """The records of a table, sorted into its cells.

    Attributes:
        rows: Rows in the order in which they are printed.
        cells: Records by row and column.
        epochs: The budget; None if there are no records.
        controls: What each control is for, by its multiple of the budget.
        flags: Differences between records that are compared nevertheless.
    """

    rows: list[Row]
    cells: dict[tuple[Row, tuple[str, int, str]], list[Record]]
    epochs: int | None
    controls: dict[float, list[str]]
    flags: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells.values() for record in cell]


def collect(
    table: Table,
    records: Sequence[Record],
    *,
    epochs: int | None = None,
    others: Sequence[Record] = (),
) -> Collected:
    """Sorts records into the cells of a table, and leaves out those of other columns.

    The epochs of a method, alone or with those of its warm start, must be the table's. A VAE with
    the epochs of a control is that control; a VAE that other runs started from is left out.

    Arguments:
        table: The table.
        records: Records of runs, or of evaluations.
        epochs: Its budget; by default the most frequent number of epochs.
        others: Records of runs among which warm starts may be found.

    Raises:
        ValueError: If budgets or images are mixed, a run is there twice, or a field is missing.
            The message names file and field.
    """
    wanted = {column.key for columns in table.panels.values() for column in columns}
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
    part = part_of(records[0]) if records else "scores"
    _check_same(records, [*BUDGET, f"{part}.num_samples"])
    for data in dict.fromkeys(record["data.name"] for record in records):
        of_data = [record for record in records if record["data.name"] == data]
        _check_same(of_data, [*OF_DATA, f"{part}.num_images"])

    guides = dict.fromkeys((*table.guides, *(record.guide for record in records)))
    controls = _controls(guides, records, totals, epochs)
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
    for guide, multiple in [(g, 1.0) for g in guides] + [("vae", m) for m in sorted(controls)]:
        if guide != "vae" or (guide, multiple) not in {(r.guide, r.multiple) for r in rows}:
            both = [Row(guide, warm, multiple) for warm in (False, True)]
            found = [row for row in both if row in present]
            asked_for = guide in table.guides or multiple != 1
            rows += found or ([both[0]] if asked_for else [])
    return Collected(rows, cells, epochs, dict(sorted(controls.items())), _differences(records))


def _controls(
    guides: Iterable[str],
    records: Sequence[Record],
    totals: dict[int, tuple[int, int | None]],
    epochs: int | None,
) -> dict[float, list[str]]:
    """Returns the multiples of the budget at which a VAE has as much compute, and for what."""
    controls: dict[float, list[str]] = {}
    for guide in guides:
        steps = gradients(guide)
        if is_mixture(guide) and steps is not None and steps > 1:
            _add(controls, steps, f"the gradient steps of {method_label(guide)}")
    for record in records:
        if record["config.warm_start"] is not None and record.guide != "vae" and epochs:
            label = Row(record.guide, warm=True).label
            total, steps = totals[id(record)]
            _add(controls, total / epochs, f"the epochs of {label}")
            if steps is not None:
                _add(controls, steps / epochs, f"the gradient steps of {label}")
    return controls


def _add(controls: dict[float, list[str]], multiple: float, reason: str) -> None:
    reasons = controls.setdefault(multiple, [])
    if reason not in reasons:
        reasons.append(reason)


def _name(folder: str | None) -> str | None:
    return None if folder is None else Path(folder).name


def _check_same(records: Sequence[Record], fields: Iterable[str]) -> None:
    for name in fields:
        counts = Counter(repr(record[name]) for record in records)
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        other = next(record for record in records if repr(record[name]) == usual)
        odd = next(record for record in records if repr(record[name]) != usual)
        raise ValueError(
            f"{odd.file}: {name} is {odd[name]!r}, but {other[name]!r} in {other.file} (and in "
            f"{counts[usual]} of {len(records)} records): records of one table must agree"
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
    """Describes differences that are only flagged, with a file for each value."""
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
