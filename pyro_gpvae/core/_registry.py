r"""Finds guides by name without importing torch: entry points of installed distributions."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import EntryPoint, distributions
from typing import Any


def registered_guides() -> dict[str, list[EntryPoint]]:
    """Returns the entry points of the group ``pyro_gpvae.guides`` by name, sorted.

    A name has more than one entry point if several distributions register it. The working
    directory is not searched: a folder there must not choose the code that runs.
    """
    here = os.path.realpath(os.getcwd())
    path = [entry for entry in sys.path if os.path.realpath(entry) != here]
    found: dict[str, list[EntryPoint]] = {}
    seen = set()
    for distribution in distributions(path=path):
        points = distribution.entry_points.select(group="pyro_gpvae.guides")
        # the first distribution of a name on the path hides the others, as it does for imports
        if points and distribution.name not in seen:
            seen.add(distribution.name)
            for point in points:
                found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def distribution_name(point: EntryPoint) -> str:
    """Returns the name of the distribution that registers an entry point."""
    return point.dist.name if point.dist is not None else "an unknown distribution"


def import_named(module: str) -> Any:
    """Imports a module that the user has named, from ``sys.path`` or the working directory."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        return importlib.import_module(module)
    sys.path.append(folder)  # last, so that it hides no installed module
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
