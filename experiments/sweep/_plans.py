"""The cells of a plan: each is one run, with a folder name that is made from its options."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pyro_gpvae.runs.config import PLACE, RunConfig
from pyro_gpvae.runs.results import FULL

#: The keys of conditions, see :func:`parse_where`.
KEYS = ("method", "guide", "data", "latent_dim", "decoder", "seed")


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

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the cell of a table in which its score stands."""
        config = self.config
        options = (config.data, config.latent_dim, config.decoder, config.likelihood, config.seed)
        return self.method, *options

    def value(self, key: str) -> Any:
        return self.method if key == "method" else getattr(self.config, key)


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
            ValueError: If a value fits no cell of the plan.
        """
        for key, values in where.items():
            for value in values:
                if not any(matches(cell.value(key), value, key) for cell in self.cells):
                    known = dict.fromkeys(str(cell.value(key)) for cell in self.cells)
                    raise ValueError(
                        f"{self.source}: no cell has {key}={value}; there are {', '.join(known)}"
                    )
        wanted = {
            cell.name
            for cell in self.cells
            if all(
                any(matches(cell.value(key), v, key) for v in values)
                for key, values in where.items()
            )
        }
        if not wanted:
            conditions = " ".join(f"{key}={','.join(values)}" for key, values in where.items())
            raise ValueError(f"{self.source}: no cell fits {conditions}")
        for cell in reversed(self.cells):  # those that others start from come first
            if cell.name in wanted and cell.config.warm_start is not None:
                wanted.add(cell.config.warm_start)
        return replace(self, cells=tuple(cell for cell in self.cells if cell.name in wanted))


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
