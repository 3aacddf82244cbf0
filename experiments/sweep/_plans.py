r"""Plans: grids of runs in TOML, which are checked before anything is trained.

A plan is a title, a budget that all its runs share, a grid, and methods::

    title = "Table 4: CIFAR10"

    [budget]             # a number of seeds, and options of a run
    epochs = 2000
    seeds = 5

    [grid]               # options of a run: a list is one cell for each value
    data = "cifar10"
    latent_dim = [10, 20, 50]

    [[methods]]          # a guide, or a list of guides, and options that differ from the grid's
    guide = ["vae", "sa:1", "sa:2"]

    [[methods]]
    name = "GPVAE"       # its name in tables; by default the guide
    guide = "gp"
    warm_start = "vae"   # an earlier method: its cell with the same data, p, decoder and seed

    [[methods]]
    name = "VAE, as many epochs"
    guide = "vae"
    epochs_factor = 2    # times the budget's epochs, for controls

Each cell is one run, a :class:`~pyro_gpvae.RunConfig`. The name of its folder tells what it is
and ends in a hash of all its options, including the budget.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.config import PLACE, RunConfig
from pyro_gpvae.runs.folder import check_trust
from pyro_gpvae.runs.results import FULL

#: The keys of conditions, see :func:`parse_where`.
KEYS = ("method", "guide", "data", "latent_dim", "decoder", "seed")
#: A warm start agrees with the run that starts from it in these.
#: A larger grid is a mistake, and takes hours to read.
_MOST_CELLS = 10_000
_SAME = ("data", "latent_dim", "decoder", "likelihood", "seed")
_GRID = {f.name for f in fields(RunConfig)} - {*FULL, *PLACE, "guide", "warm_start", "seed"}
_METHOD = _GRID | {"name", "guide", "warm_start", "epochs_factor"}


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Attributes:
        method: Its name in tables.
        config: Its options; ``warm_start`` is the name of another cell.
        epochs_factor: How many times the budget's epochs it is trained.
        depth: 0, or the depth of its warm start plus 1.
    """

    method: str
    config: RunConfig
    epochs_factor: int = 1
    depth: int = 0

    @property
    def name(self) -> str:
        """Name of its run folder, which is readable and differs for different options.

        Example:
            >>> Cell("GPVAE", RunConfig(guide="gp:num_nodes=8", data="mnist")).name
            'mnist-p10-conv-gp-num_nodes=8-seed0-5ee3f32e'
        """
        config = self.config
        # without defaults, so that an option that is new in a later version changes no name
        options = {
            f.name: value
            for f in fields(config)
            if (value := getattr(config, f.name)) != f.default and f.name not in PLACE
        }
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        warm = () if config.warm_start is None else ("warm",)
        parts = (Path(config.data).stem, f"p{config.latent_dim}", config.decoder, config.guide)
        slug = "-".join(re.sub(r"[^\w.=]+", "-", part).strip("-") for part in (*parts, *warm))
        return f"{slug}-seed{config.seed}-{digest[:8]}"

    def fits(self, key: str, wanted: str) -> bool:
        """Whether it has a value; the name of a guide stands for the guide with any options."""
        found = self.method if key == "method" else str(getattr(self.config, key))
        return found == wanted or (key == "guide" and found.partition(":")[0] == wanted)


@dataclass(frozen=True)
class Plan:
    """A plan that has been read and checked.

    Attributes:
        source: The file.
        title: Title of its tables.
        budget: The options that all runs share, and the number of seeds.
        cells: The runs. Those that others start from come first.
    """

    source: Path
    title: str
    budget: dict[str, int | None]
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def budget_overrides(self) -> dict[str, dict[str, int | None]]:
        """The options in which the budget differs from the paper's, with both values."""
        return {
            name: {"used": self.budget[name], "full": full}
            for name, full in FULL.items()
            if self.budget[name] != full
        }

    def metadata(self, cell: Cell) -> dict[str, Any]:
        """Returns what the record of a cell says about its plan."""
        return {
            "file": self.source.name,
            "title": self.title,
            "method": cell.method,
            "epochs_factor": cell.epochs_factor,
            "budget": self.budget,
            "cut": self.budget_overrides,
        }

    def select(self, where: Mapping[str, Collection[str]]) -> Plan:
        """Returns the plan with only the cells that match, and those that they start from.

        Raises:
            ValueError: If a value fits no cell of the plan, or no cell fits all keys.
        """
        wanted = list(self.cells)
        for key, values in where.items():
            for value in values:
                if not any(cell.fits(key, value) for cell in self.cells):
                    raise ValueError(f"{self.source}: no cell has {key}={value}, see --dry-run")
            wanted = [cell for cell in wanted if any(cell.fits(key, value) for value in values)]
        if not wanted:
            raise ValueError(f"{self.source}: no cell fits all of {', '.join(where)}")
        names = {cell.name for cell in wanted}
        for cell in reversed(self.cells):  # those that others start from come first
            if cell.name in names and cell.config.warm_start is not None:
                names.add(cell.config.warm_start)
        return replace(self, cells=tuple(cell for cell in self.cells if cell.name in names))


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
        if not values or key not in KEYS or key in where:
            raise ValueError(
                f"cannot read the condition {condition!r}: expected KEY=VALUE,VALUE with a key of "
                f"{', '.join(KEYS)}, each once"
            )
        # a comma within a guide's options is followed by KEY=
        where[key] = re.split(r",(?!\w+=)", values)
    return where


def read_plan(source: str | Path, trust_guide: bool = False, **cuts: int | None) -> Plan:
    """Reads a plan, and refuses what would fail or mislead when it is run.

    Arguments:
        source: The file.
        trust_guide: Import guides ``module:Class``, which are code that the file names.
        cuts: Numbers that replace those of the budget, such as ``epochs=20``; None is no change.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not TOML; has an unknown name, a wrong value, two equal cells, runs
            of different budgets, a guide that is not trusted, or a warm start that is not one
            cell. Names file and field.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"there is no plan {source}")
    try:
        content = tomllib.loads(source.read_text(encoding="utf-8"))
        _check_table("the plan", content, {"title", "budget", "grid", "methods"})
        budget, grid = content.get("budget", {}), content.get("grid", {})
        _check_table("budget", budget, FULL)
        _check_table("grid", grid, _GRID)
        budget = FULL | budget | {name: value for name, value in cuts.items() if value is not None}
        if type(budget["seeds"]) is not int or budget["seeds"] < 1:
            raise ValueError(f"budget.seeds must be at least 1, got {budget['seeds']!r}")
        if not isinstance(content.get("methods"), list):
            raise ValueError("methods must be tables, [[methods]], each with a guide")
        cells: list[Cell] = []
        for number, method in enumerate(content["methods"], 1):
            _check_table(f"methods[{number}]", method, _METHOD)
            cells += [_started(cell, cells) for cell in _cells(budget, grid | method)]
            _check_distinct(cells)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _check_guides(source, cells, trust_guide)
    return Plan(source, str(content.get("title", source.stem)), budget, tuple(cells))


def _check_table(where: str, table: Any, known: Collection[str]) -> None:
    unknown = sorted(set(table) - set(known)) if isinstance(table, dict) else [table]
    if unknown:
        raise ValueError(f"{where} has the unknown name {unknown[0]!r}; known are {sorted(known)}")


def _cells(budget: Mapping[str, int | None], options: dict[str, Any]) -> Iterator[Cell]:
    """The cells of a method; their ``warm_start`` is still the name of a method."""
    name, factor = options.pop("name", None), options.pop("epochs_factor", 1)
    if type(factor) is not int or factor < 1:
        raise ValueError(f"epochs_factor must be a whole number from 1 on, got {factor!r}")
    options = {"guide": None, "seed": range(budget["seeds"] or 0)} | options
    shared = {key: value for key, value in budget.items() if key != "seeds"}
    choices = [value if isinstance(value, list | range) else [value] for value in options.values()]
    for key, choice in zip(options, choices, strict=True):
        if not choice:
            raise ValueError(f"{key} of the method {name or options['guide']!r} is an empty list")
    if (count := math.prod(map(len, choices))) > _MOST_CELLS:
        raise ValueError(f"a method has {count:,} cells, expected at most {_MOST_CELLS:,}")
    for values in itertools.product(*choices):
        run = shared | dict(zip(options, values, strict=True))
        method = run["guide"] if name is None else name
        config = RunConfig.from_json(run, f"the method {method!r}")
        yield Cell(method, replace(config, epochs=factor * config.epochs), factor)


def _started(cell: Cell, earlier: Sequence[Cell]) -> Cell:
    """Replaces the name of a method in ``warm_start`` by that of its cell."""
    method = cell.config.warm_start
    if method is None:
        return cell
    same = {key: getattr(cell.config, key) for key in _SAME}
    found = [c for c in earlier if c.method == method and vars(c.config).items() >= same.items()]
    if len(found) != 1:
        raise ValueError(
            f"warm_start of the method {cell.method!r} is {method!r}: {len(found)} cells of "
            f"earlier methods have this name and "
            + ", ".join(f"{key}={value}" for key, value in same.items())
        )
    config = replace(cell.config, warm_start=found[0].name)
    return replace(cell, config=config, depth=found[0].depth + 1)


def _check_distinct(cells: Sequence[Cell]) -> None:
    """Refuses cells that are the same run, or have the same place in a table."""
    seen: dict[Any, Cell] = {}
    for cell in cells:
        place = (cell.method, *(getattr(cell.config, key) for key in _SAME))
        for key in (cell.name, place):
            other = seen.setdefault(key, cell)
            if other is not cell:
                raise ValueError(
                    f"two cells are the same: {other.name} of the method {other.method!r} and "
                    f"{cell.name} of the method {cell.method!r}. Methods that differ in other "
                    "options than data, latent_dim, decoder and likelihood need names of their own"
                )


def _check_guides(source: Path, cells: Sequence[Cell], trust_guide: bool) -> None:
    """Builds every guide once for small images, so that unknown names and options fail here."""
    for guide, cell in {cell.config.guide: cell for cell in cells}.items():
        if ":" in guide:
            check_trust(guide, source, trust_guide)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_guide(guide, ImageModel((1, 28, 28), cell.config.latent_dim))
        except ValueError as error:
            raise ValueError(f"{source}: guide of the method {cell.method!r}: {error}") from error
