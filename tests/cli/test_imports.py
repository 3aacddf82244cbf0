"""What is imported when: public names at their first use, heavy packages only by commands."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_gpvae

HEAVY = {"torch", "pyro", "numpy", "pandas", "scipy", "matplotlib"}


def imported(code):
    """The heavy packages that a program imports."""
    code += f"\nimport sys, json; print('\\n' + json.dumps(sorted({HEAVY} & set(sys.modules))))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


COMMAND = """
from pyro_gpvae.cli.main import main
try:
    main({arguments})
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--version"],
        ["train", "--help"],
        ["trian"],
        ["train", "--epoch=1"],
        ["guides"],
        ["gap"],
    ],
    ids=" ".join,
)
def test_help_lists_and_errors_of_arguments_import_nothing_heavy(arguments):
    assert imported(COMMAND.format(arguments=arguments)) == []


def test_measuring_imports_no_statistics_and_no_figures():
    code = "from pyro_gpvae import ImageModel, decompose, fit, log_evidence, make_guide; import sys"
    code += "\nassert 'scipy.stats' not in sys.modules"  # half a second
    assert "matplotlib" not in imported(code)


def test_results_are_listed_without_torch(tmp_path):
    assert not {"torch", "pyro"} & set(
        imported(COMMAND.format(arguments=["results", str(tmp_path)]))
    )


def test_the_package_imports_nothing_heavy():
    assert imported("import pyro_gpvae, pyro_gpvae.runs.config, pyro_gpvae.cli.main") == []


def test_public_names_exist_for_programs_and_type_checkers():
    names = pyro_gpvae.__all__
    assert names == sorted(names)
    assert set(names) <= set(dir(pyro_gpvae))
    tree = ast.parse(Path(pyro_gpvae.__file__).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pyro_gpvae.")
        for alias in node.names
    }
    assert typed == {n: f"pyro_gpvae.{module}" for n, module in pyro_gpvae._MODULE_OF.items()}
    assert set(names) == set(typed)
    for name in names:
        assert getattr(pyro_gpvae, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = pyro_gpvae.no_such_name
