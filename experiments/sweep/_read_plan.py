r"""Reads plans, which are grids of runs in TOML, and checks them before anything is trained.

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
    warm_start = "vae"   # the name of another method: its cell with the same data, p, decoder, seed

    [[methods]]
    name = "VAE, as many epochs"
    guide = "vae"
    epochs_factor = 2    # times the budget's epochs, for controls

Each cell is one run, a :class:`~pyro_gpvae.RunConfig`. The name of its folder tells what it is
and ends in a hash of all its options, including the budget.
"""

from __future__ import annotations

import itertools
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from _plans import Cell, Plan

from pyro_gpvae.data.images import available_data
from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.config import PLACE, RunConfig
from pyro_gpvae.runs.folder import check_trust
from pyro_gpvae.runs.results import FULL

_OPTIONS = {f.name for f in fields(RunConfig)}
_GRID = _OPTIONS - set(FULL) - {*PLACE, "guide", "warm_start", "seed"}
_METHOD = _GRID | {"name", "guide", "warm_start", "epochs_factor"}


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not TOML: {error}") from error
    _check_names(source, "the plan", content, {"title", "budget", "grid", "methods"})
    methods = content.get("methods")
    if not isinstance(methods, list) or not methods:
        raise ValueError(f"{source}: methods must be a list of tables, [[methods]], with a guide")
    for name in ("budget", "grid"):
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"{source}: {name} must be a table, [{name}]")
    if not isinstance(content.get("title", ""), str):
        raise ValueError(f"{source}: title must be a text, got {content['title']!r}")
    grid = content.get("grid", {})
    _check_names(source, "grid", grid, _GRID)
    budget = _budget(source, content.get("budget", {}), cuts)
    entries = [
        entry for number, m in enumerate(methods, 1) for entry in _entries(source, number, m)
    ]
    by_method = _expand(source, budget, grid, entries)
    expanded = [cell for cells in by_method.values() for cell in cells]
    _check_guides(source, expanded, trust_guide)
    _check_distinct(source, expanded, "key")
    cells = _resolve(source, by_method)
    _check_distinct(source, cells, "name")
    return Plan(source, content.get("title", source.stem), budget, cells)


def _budget(
    source: Path, given: dict[str, Any], cuts: Mapping[str, int | None]
) -> dict[str, int | None]:
    _check_names(source, "budget", given, set(FULL))
    budget = FULL | given | {name: value for name, value in cuts.items() if value is not None}
    for name, value in budget.items():
        optional = FULL[name] is None and value is None
        if not optional and (type(value) is not int or value < (0 if name == "validation" else 1)):
            raise ValueError(f"{source}: budget.{name} must be a positive number, got {value!r}")
    train, held_out = budget["train_images"], budget["validation"] or 0
    if train is not None and held_out > train - 2:
        raise ValueError(
            f"{source}: budget.validation is {held_out}, with {train} training images: at least 2 "
            "must be left to train on"
        )
    return budget


def _entries(source: Path, number: int, method: Any) -> Iterator[dict[str, Any]]:
    """A method's table, once for each guide, with its name."""
    field = f"methods[{number}]"
    if not isinstance(method, dict):
        raise ValueError(f"{source}: {field} must be a table, [[methods]]")
    for name in ("seed", *FULL):
        if name in method:
            raise ValueError(
                f"{source}: {field}.{name} would mix budgets in one table: write it in [budget]"
                + ("; for a control write epochs_factor" if name == "epochs" else "")
            )
    _check_names(source, field, method, _METHOD)
    guides = method.get("guide")
    for guide in guides if isinstance(guides, list) and guides else [guides]:
        if not isinstance(guide, str):
            raise ValueError(
                f"{source}: {field}.guide must be a guide such as 'vae', or a list of some, got "
                f"{guides!r}"
            )
        if isinstance(guides, list) and "name" in method:
            raise ValueError(f"{source}: {field}.name would name {len(guides)} guides alike")
        yield {"name": guide, "epochs_factor": 1, "warm_start": None} | method | {"guide": guide}


def _expand(
    source: Path,
    budget: Mapping[str, int | None],
    grid: Mapping[str, Any],
    entries: Sequence[dict[str, Any]],
) -> dict[str, list[Cell]]:
    """The cells of each method; their ``warm_start`` is still the name of a method."""
    cells: dict[str, list[Cell]] = {}
    for entry in entries:
        name, factor = entry.pop("name"), entry.pop("epochs_factor")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{source}: methods.name must be a text, got {name!r}")
        if type(factor) is not int or factor < 1:
            raise ValueError(
                f"{source}: epochs_factor of the method {name!r} must be a whole number from 1 on, "
                f"got {factor!r}"
            )
        shared = {k: v for k, v in budget.items() if k != "seeds"}
        shared["epochs"] = (budget["epochs"] or 0) * factor
        options = {"seed": list(range(budget["seeds"] or 0)), **grid, **entry}
        choices = [value if isinstance(value, list) else [value] for value in options.values()]
        if not all(choices):
            empty = next(key for key, value in options.items() if value == [])
            raise ValueError(f"{source}: {empty} of the method {name!r} is an empty list")
        for values in itertools.product(*choices):
            run = dict(zip(options, values, strict=True))
            config = RunConfig.from_json(shared | run, f"{source}: the method {name!r}")
            if config.data not in available_data() and not Path(config.data).is_file():
                raise ValueError(
                    f"{source}: data of the method {name!r} is {config.data!r}, expected one of "
                    f"{', '.join(available_data())}, or an .npz file that is there"
                )
            cells.setdefault(name, []).append(Cell(name, config, factor))
    return cells


def _resolve(source: Path, methods: dict[str, list[Cell]]) -> tuple[Cell, ...]:
    """Replaces the names of methods in ``warm_start`` by those of cells; orders by depth."""
    done: dict[str, list[Cell]] = {}
    waiting = dict(methods)
    while waiting:
        ready = {
            name: cells
            for name, cells in waiting.items()
            if all(c.config.warm_start is None or c.config.warm_start in done for c in cells)
        }
        if not ready:
            name, cells = next(iter(waiting.items()))
            start = next(s for c in cells if (s := c.config.warm_start) not in (None, *done))
            raise ValueError(
                f"{source}: warm_start of the method {name!r} is {start!r}, which "
                + ("starts from it in turn" if start in methods else "is no method of this plan")
            )
        for name, cells in ready.items():
            done[name] = [_started(source, cell, done) for cell in cells]
            del waiting[name]
    cells = [cell for name in methods for cell in done[name]]
    return tuple(sorted(cells, key=lambda cell: cell.depth))


def _started(source: Path, cell: Cell, done: Mapping[str, list[Cell]]) -> Cell:
    method = cell.config.warm_start
    if method is None:
        return cell
    same = ("data", "latent_dim", "decoder", "likelihood", "seed")
    found = [c for c in done[method] if all(c.value(key) == cell.value(key) for key in same)]
    if len(found) != 1:
        raise ValueError(
            f"{source}: warm_start of the method {cell.method!r} is {method!r}, which has "
            f"{len(found)} cells with " + ", ".join(f"{key}={cell.value(key)}" for key in same)
        )
    config = replace(cell.config, warm_start=found[0].name)
    return replace(cell, config=config, depth=found[0].depth + 1)


def _check_distinct(source: Path, cells: Sequence[Cell], attribute: str) -> None:
    seen: dict[Any, Cell] = {}
    for cell in cells:
        other = seen.setdefault(getattr(cell, attribute), cell)
        if other is not cell:
            raise ValueError(
                f"{source}: two cells are the same: {other.name} of the method {other.method!r} "
                f"and {cell.name} of the method {cell.method!r}. Methods that differ in other "
                "options than data, latent_dim, decoder and likelihood need names of their own."
            )


def _check_guides(source: Path, cells: Sequence[Cell], trust_guide: bool) -> None:
    """Builds every guide once for small images, so that unknown names and options fail here."""
    for guide, cell in {cell.config.guide: cell for cell in cells}.items():
        if ":" in guide:
            check_trust(guide, source, trust_guide)
        model = ImageModel((1, 28, 28), cell.config.latent_dim)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_guide(guide, model)
        except ValueError as error:
            raise ValueError(f"{source}: guide of the method {cell.method!r}: {error}") from error


def _check_names(
    source: Path, where: str, table: Mapping[str, Any], known: Collection[str]
) -> None:
    unknown = sorted(table.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{source}: {where} has the unknown name {unknown[0]!r}; known are "
            f"{', '.join(sorted(known))}"
        )
