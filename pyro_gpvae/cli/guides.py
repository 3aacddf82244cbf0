r"""``pyro-gpvae guides``."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pyro_gpvae.cli._shared import Command
from pyro_gpvae.core._registry import distribution_name, registered_guides


@dataclass(kw_only=True)
class Guides(Command):
    """List the registered guides."""

    def run(self) -> None:
        for name, points in registered_guides().items():
            for point in points:
                if len(points) > 1:
                    text = f"registered several times, here by {distribution_name(point)}"
                else:
                    text = _summary(*point.value.split(":", 1)) or f"({point.value})"
                print(f"{name:<12} {text}")
        print("Your own guide: --guide MODULE:CLASS, from the working directory or installed.")


def _summary(module: str, name: str = "") -> str:
    """Returns the first line of a class's docstring, from its source: nothing is imported.

    A name that ``module`` imports from another module is followed there. Returns "" if there is
    no docstring or no source.
    """
    try:
        first, *rest = module.split(".")
        spec = find_spec(first)  # of a top-level module, which does not import it
        if spec is None or spec.origin is None:
            return ""
        path = Path(spec.origin)
        if rest:
            path = path.parent.joinpath(*rest)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return (ast.get_docstring(node) or "").partition("\n")[0]
            if isinstance(node, ast.ImportFrom) and node.module and node.module != module:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _summary(node.module, alias.name)
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError):
        pass  # another package's mistake must not hide the rest of the list
    return ""
