"""Records of runs and of their evaluations, with the compute that each run took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.results import read_results

DATA_NAMES = {
    "mnist": "MNIST", "omniglot": "OMNIGLOT", "cifar10": "CIFAR10", "svhn": "SVHN",
    "celeba": "CelebA",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of scores."""

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
        name: Name of its files.
        title: Title of the table.
        panels: Groups of columns by their heading.
        guides: Rows of the paper, as ``pyro-gpvae train --guide`` names them.
    """

    name: str
    title: str
    panels: dict[str, tuple[Column, ...]]
    guides: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """The record of a run, or of an evaluation with a proposal comparison."""

    file: Path
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Returns the value of a field such as "config.epochs"; errors name file and field."""
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
        # an evaluation may use other random numbers than its run
        return int(self["recorded.seed" if "recorded" in self.content else "config.seed"])

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self["run"]) if "run" in self.content else self.file.parent


def read_records(folders: Iterable[Path]) -> tuple[list[Record], list[Record], list[str]]:
    """Reads every ``record.json`` below the folders.

    Returns:
        The records of runs; those of evaluations that compare proposals, by the guide that was
        trained in the run; and lines of text about files that are damaged.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a field of an evaluation is missing, or it is of a run that has changed.
    """
    runs, evaluations, flags = [], [], []
    for folder in folders:
        frame, skipped = read_results(folder)
        files = [folder / name / "record.json" for name in frame["run"]]
        runs += [Record(file, read_json(file)) for file in files]
        for file in sorted(folder.rglob("record.json")):
            lines = [line for line in skipped if line.startswith(f"{file}: ")]
            if not lines:
                continue
            try:
                record = Record(file, read_json(file))
            except ValueError:
                record = None
            if record is None or "run" not in record.content:
                flags += [f"left out: {line}" for line in lines]
            elif part_of(record) != "scores" and record["trained_guide"] == record.guide:
                evaluations.append(record)
    by_folder = {record.file.parent.resolve(): record for record in runs}
    for record in evaluations:
        run = by_folder.get(record.folder.resolve(), record)
        then = record["recorded.log_evidence"]
        now = run["recorded.log_evidence" if run is record else "scores.log_evidence"]
        if then != now:
            raise ValueError(
                f"{record.file}: recorded.log_evidence is {then}, but scores.log_evidence in "
                f"{run.file} is {now}: evaluate that run again"
            )
    return runs, evaluations, flags


def total_budget(record: Record, others: Sequence[Record]) -> tuple[int, int | None]:
    """Returns epochs, and gradient steps per image, of a run together with its warm start.

    The latter are None if they are not known, see :func:`gradients`.
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
    """Returns how many latent vectors are decoded and differentiated for an image and epoch.

    It is 1 for most guides; M for a mixture, a draw from each component; 3 M for a recursive
    mixture with more than one component, M for each of components, weights and model; S k + 1 for
    k refinement steps of S samples. Decoding without a gradient, as in a line search, does not
    count. It is None for VLAE, whose Jacobians cost p times as much, and for unknown guides.
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
    """Returns whether a guide has several encoders."""
    return guide.partition(":")[0] in ("me", "rme")


def method_label(guide: str) -> str:
    """Returns the paper's name, such as SA(4), or the guide's own name if the paper has none."""
    name, _, options = guide.partition(":")
    names = {"vae": "VAE", "gp": "GPVAE"} | {
        n: n.upper() for n in ("sa", "iaf", "hf", "me", "rme", "vlae")
    }
    if name in names and (not options or options.isdigit()):
        return names[name] + (f"({options})" if options else "")
    return guide


def _start(record: Record, others: Sequence[Record]) -> Record:
    """Finds the record of a run's warm start, at its own path or below the folders given."""
    name = Path(record["config.warm_start"])
    # a sweep names it without a path: it lies beside the run
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


def part_of(record: Record) -> str:
    """Returns the part of a record that has its scores."""
    return next((p for p in ("reference", "companion") if p in record.content), "scores")
