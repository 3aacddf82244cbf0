"""README and documentation: code runs, names exist, links lead somewhere, nothing is left out.

The tutorials themselves are executed by ``sphinx-build`` with PYRO_GPVAE_SMOKE=1.
"""

import ast
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from pyro import infer

import guides
import pyro_gpvae
import pyro_gpvae.plots
import pyro_gpvae.testing
from pyro_gpvae.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if not {"_build", "results"} & set(p.parts))
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9]_*.md"))
# what is cut so that the README runs in seconds: pattern and replacement
CUTS = [
    (r"epochs=\d+", "epochs=1"),
    (r"num_samples=100", "num_samples=5"),
    (r"\[:50\]", "[:3]"),
    (r'load_data\("mnist5k"\)', 'load_data("mnist5k").take(train=256, test=32)'),
]


def test_the_code_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_guides", raising=False)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (saved,) = (block for block in blocks if "class MyGuide" in block)
    (tmp_path / "my_guides.py").write_text(saved)  # as the reader is told to save it
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 20))
    namespace: dict = {
        "__name__": "__page__",
        "encoder": lambda x: encoder(x).chunk(2, dim=-1),  # of the reader
        "decoder": torch.nn.Linear(10, 784),
    }
    for number, block in enumerate(blocks):
        for pattern, replacement in CUTS:
            block = re.sub(pattern, replacement, block)
        exec(compile(block, f"README.md, block {number + 1}", "exec"), namespace)
    assert capsys.readouterr().out


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^python -m pip install -c constraints.txt .*$", readme, re.M)
    assert len(commands) == 2
    for command in commands:
        command = command.replace(" demo", " demo --quick --out").replace(' -m "not slow"', "")
        assert command in ci


def test_there_are_eight_tutorials_that_are_notebooks_with_a_smoke_setting():
    assert [int(page.name[0]) for page in TUTORIALS] == [1, 2, 3, 4, 5, 6, 7, 8]
    for page in TUTORIALS:
        text = page.read_text()
        assert text.startswith("---\nfile_format: mystnb\n"), page
        assert "\nsmoke:" in text.split("---\n")[1], page
        assert "remove-cell" not in text, page  # a reader of the notebook would see the cell
        assert not re.search(r"\{[\w:-]+\}`", text), page  # nor would Jupyter render a role
        assert "## What can go wrong" in text, page


def test_the_tutorials_work_one_after_the_other_in_one_folder():
    """No two cells of any pages make the same run folder, which the command would refuse."""
    made = [folder for page in TUTORIALS for folder in run_folders(page.read_text())]
    assert {"runs/vae", "runs/gap-vae", "killed/gp-0", "sweep"} <= set(made)
    assert len(made) == len(set(made)), sorted(made)


def run_folders(text):
    """The folders that the executed cells of a page train or write to."""
    cells = "".join(re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", text, re.M | re.S))
    trained = re.findall(r'train_run\(.*?f?"([^"]+)", progress', cells)
    cells = re.sub(r".*--dry-run.*", "", cells)
    started = re.findall(r"""--out(?:", "|\s+)(\w[\w/.{}$-]*)""", cells)
    return trained + started


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_python_name_on_a_page_exists(page):
    text = page.read_text()
    for name in re.findall(r"\{py:\w+\}`~?([\w.]+)`", text):
        resolve(name)
    for module, names in re.findall(r"^from ((?:pyro_gpvae|guides)\S*) import (.*)$", text, re.M):
        for name in names.split(", "):
            resolve(f"{module}.{name}")


@pytest.mark.parametrize("page", ["paper.md", "gpvae.md"])
def test_every_class_and_method_on_the_pages_of_the_paper_exists(page):
    sources = [p for folder in ("pyro_gpvae", "guides") for p in (ROOT / folder).rglob("*.py")]
    defined = {
        node.name
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    } | set(dir(infer))
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.M | re.S)
    for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", text):
        assert set(name.split(".")) <= defined, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_test_and_script_on_a_page_exists(page):
    text = page.read_text()
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    everything = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):  # a test that keeps a promise
        assert f"def {test}(" in everything, test
    for file in re.findall(r"`((?:experiments|guides|pyro_gpvae)/[\w/]+\.py)", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    modules = set(re.findall(r"automodule:: ([\w.]+)", pages))
    assert not [name for name in modules if "._" in name]  # private modules are no reference
    alone = re.findall(r"auto(?:class|function):: ([\w.]+)", pages)
    for package in (pyro_gpvae, pyro_gpvae.plots, pyro_gpvae.testing, guides):
        for name in package.__all__:
            module = getattr(package, name).__module__
            documented = module in modules or f"{package.__name__}.{name}" in alone
            assert documented, f"{name} is in {module}: add it to docs/reference"


def test_every_command_is_in_the_reference():
    text = (DOCS / "reference" / "commands.md").read_text()
    shown = re.findall(r'^show_help\("(\w+)"\)', text, re.M)
    commands = [command.__name__.lower() for command in get_args(main._Command)]
    assert sorted(shown) == sorted(commands)


def test_every_equation_and_table_row_of_the_supplement_has_an_entry():
    text = (DOCS / "paper.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    for number in range(1, 8):
        assert any(row.startswith(f"({number})") for row in rows), f"eq. ({number})"
    for number in (1, 2, 3):
        assert any(row.startswith(f"Table {number}") for row in rows), f"Table {number}"
    sections = re.split(r"^## |^\*\*Table (?=\d)", text, flags=re.M)
    table = {
        number: next(s for s in sections if s.startswith(start))
        for number, start in ((4, "Section 3: Table 4"), (5, "5**"), (6, "6**"))
    }
    refined = [f"SA({k})" for k in (1, 2, 4, 8)]
    laplace = [f"VLAE({k})" for k in (1, 2, 4, 8)]
    flows = [f"{name}({k})" for name in ("IAF", "HF") for k in (1, 2, 4, 8)]
    mixtures = [f"{name}({k})" for name in ("ME", "RME") for k in (2, 3, 4, 5)]
    for number, methods in (
        (4, ["VAE", *refined, *flows, *mixtures, "GPVAE"]),
        (5, ["VAE", *refined, *laplace, "GPVAE"]),
        (6, [*laplace, "GPVAE"]),
    ):
        for method in methods:
            assert f"\n| {method} |" in table[number], f"Table {number}, {method}"


def test_the_guides_of_the_papers_tables_can_be_built():
    text = (DOCS / "paper.md").read_text()
    model = pyro_gpvae.ImageModel((1, 8, 8), latent_dim=10)
    specs = set(re.findall(r"\| `((?:vae|gp|sa|iaf|hf|me|rme|vlae)\b[^`]*)` \|", text))
    assert len(specs) == 26
    for spec in sorted(specs):
        pyro_gpvae.make_guide(spec, model)


def test_every_record_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    for record in (DOCS / "results").glob("*.md"):
        assert f"{{include}} results/{record.name}" in text, record.name


def test_short_names_link_to_where_an_object_is_documented(monkeypatch):
    source = ast.parse((DOCS / "conf.py").read_text())
    (function,) = (
        node for node in source.body if getattr(node, "name", "") == "public_name"
    )  # without Sphinx, which the tests do not need
    namespace = {"pkgutil": pkgutil}
    exec(compile(ast.Module([function], []), "conf.py", "exec"), namespace)
    public_name = namespace["public_name"]
    assert (
        public_name("pyro_gpvae.ImageModel.prior")
        == "pyro_gpvae.model.image_model.ImageModel.prior"
    )
    assert (
        public_name("pyro_gpvae.training.TrainingStep") == "pyro_gpvae.training.step.TrainingStep"
    )
    assert public_name("pyro_gpvae.fit") == "pyro_gpvae.training.loop.fit"
    assert public_name("guides.GPGuide") == "guides.gp.GPGuide"
    assert public_name("torch.nn.Module") is None
    assert public_name("pyro_gpvae.no_such_name") is None


def resolve(name):
    """The object of a dotted name: a module, and attributes of it."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"there is no module {parts[0]!r}")
