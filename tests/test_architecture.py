"""The rooms of the library: who may import whom, how large a file may be, what is public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_gpvae

ROOT = Path(__file__).parents[1]
#: What the modules of each room may import.
ALLOWED = {
    "core": set[str](),
    "data": {"core"},
    "plots": {"core", "data"},
    "model": {"core", "data"},
    "training": {"core", "data", "model"},
    "evaluation": {"core", "data", "model"},
    "guides": {"core", "data", "model", "training", "evaluation"},
    "testing": {"core", "data", "model", "training", "evaluation"},
    "runs": {"core", "data", "model", "plots", "training", "evaluation"},
    "cli": {"core", "data", "model", "plots", "training", "evaluation", "runs", "testing"},
}
LIBRARY = sorted([*ROOT.glob("pyro_gpvae/**/*.py"), *ROOT.glob("guides/*.py")])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in LIBRARY}


def room(module: str) -> str:
    """The room of a module: "model" of "pyro_gpvae.model.elbo", "" of the package itself."""
    parts = module.split(".")
    if parts[0] == "guides":
        return "guides"
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else ""


def imports(module: str) -> Iterator[str]:
    """The modules of this project that a module imports, wherever in the file.

    Imports that only a type checker sees are left out.
    """
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("pyro_gpvae", "guides"))


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    own = room(module)
    for name in imports(module):
        other = room(name)
        if not other:  # the package itself re-exports all rooms
            assert own in ("cli", "runs"), f"{module} imports {name}"
        elif other != own:
            assert other in ALLOWED[own], f"{module} imports {name}"


def test_there_is_no_circle_of_imports() -> None:
    graph = {name: set(imports(name)) - {name, "pyro_gpvae"} for name in MODULES}
    graph["pyro_gpvae"] = set()
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these modules import each other: {sorted(graph)}"


def test_files_are_short_enough_to_be_read() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in LIBRARY}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_the_public_names_are_few_and_exist() -> None:
    assert len(pyro_gpvae.__all__) <= 30
    for name in pyro_gpvae.__all__:
        assert getattr(pyro_gpvae, name) is not None


def test_every_room_says_what_it_holds() -> None:
    for name in ALLOWED:
        package = "guides" if name == "guides" else f"pyro_gpvae.{name}"
        text = ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8")))
        assert len((text or "").split()) >= 25, f"{package} needs a docstring that introduces it"


def test_test_files_do_not_import_each_other() -> None:
    for path in ROOT.glob("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").split(".")[-1].startswith("test_"), f"{path} imports {module}"
