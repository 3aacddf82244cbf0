"""Commands in a folder that somebody else filled: none of its code runs."""

import json
import os
import subprocess
import sys

import pytest

from pyro_gpvae import RunConfig, train_run
from pyro_gpvae.core import _registry
from pyro_gpvae.model.guide import load_guide

#: A command as its console script runs it: the folder of the script is on the path, not the
#: working directory. An audit hook sees all code that is executed, whatever its module is called,
#: and a last finder stands for a file that is named like any module that nobody finds.
PROGRAM = """
import os, sys
here = os.getcwd()
def seen(what):
    os.write(1, f"HOSTILE: {what}\\n".encode())
def audit(event, args):
    if event == "exec" and getattr(args[0], "co_filename", "").startswith(here):
        seen(args[0].co_filename)
    if event == "subprocess.Popen" and args[0] != "git":
        seen(f"{args[0]} is started")
class Last:
    def find_spec(self, name, path=None, target=None):
        if here in sys.path or "" in sys.path:
            seen(f"{name} would be imported from {here}")
sys.addaudithook(audit)
sys.meta_path.append(Last())
from pyro_gpvae.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
NAMES = (
    "sitecustomize", "usercustomize", "guides", "evil", "torch", "pyro", "numpy", "matplotlib",
    "flint", "evil_backend", "conftest", "setup",
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run folder with everything in it that could be taken for code to run."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    config = RunConfig(
        guide="vae", latent_dim=2, epochs=1, train_images=32, test_images=4, num_samples=2,
        device="cpu",
    )  # fmt: skip
    train_run(config, folder, progress=False)
    for name in NAMES:
        (folder / f"{name}.py").write_text("class Guide: pass\nFigureCanvas = None\n")
    (folder / "matplotlibrc").write_text("backend: module://evil_backend\ntext.usetex: True\n")
    (folder / "pyproject.toml").write_text("[tool.pyro_gpvae]\nguide = 'evil:Guide'\n")
    (folder / "manifest.json").unlink(missing_ok=True)
    info = folder / "evil-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    points = "".join(f"{name} = evil:Guide\n" for name in ("evil", "gp", "vae"))
    (info / "entry_points.txt").write_text(f"[pyro_gpvae.guides]\n{points}")
    return folder


def run(folder, arguments, tmp_path):
    script = tmp_path / "pyro-gpvae"
    script.write_text(PROGRAM)
    path = [entry for entry in sys.path if entry and entry != str(folder)]
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


GAP = ["--images=3", "--num-samples=4", "--reference-samples=4", "--ais-chains=0"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["guides"],
        pytest.param(["results", "."], marks=pytest.mark.slow),
        pytest.param(["evaluate", "."], marks=pytest.mark.slow),
        pytest.param(
            ["generate", ".", "--samples=2", "--out={out}"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["gap", ".", *GAP, "--out={out}"], marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_of_the_folder_runs(arguments, hostile, tmp_path):
    arguments = [argument.format(out=tmp_path / "out") for argument in arguments]
    found = run(hostile, arguments, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "HOSTILE" not in found.stdout
    assert "evil" not in found.stdout


@pytest.mark.slow
def test_a_guide_that_the_folder_registers_is_not_loaded(hostile, tmp_path):
    config, record = hostile / "config.json", hostile / "record.json"
    before = config.read_text(), record.read_text()
    try:
        evil = json.loads(before[0]) | {"guide": "evil"}
        config.write_text(json.dumps(evil))
        record.write_text(json.dumps(json.loads(before[1]) | {"config": evil}))
        found = run(hostile, ["evaluate", "."], tmp_path)
        assert found.returncode == 2
        assert "'evil', which is not registered" in found.stderr
        assert "HOSTILE" not in found.stdout
        # the test would see code that runs
        found = run(hostile, ["train", "--guide=evil:Guide", f"--out={tmp_path / 'own'}"], tmp_path)
        assert "HOSTILE" in found.stdout
    finally:
        config.write_text(before[0])
        record.write_text(before[1])


def test_a_name_that_two_distributions_register_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, guide in (("first", "gp"), ("second", "mine"), ("third", "mine")):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[pyro_gpvae.guides]\n{guide} = {name}_module:G\n")
    with pytest.raises(ValueError, match="distributions first and pyro-gpvae both register the g"):
        load_guide("gp")
    with pytest.raises(ValueError, match=r"second and third both .* 'second_module:G' or 'third_m"):
        load_guide("mine")
    assert load_guide("vae").__name__ == "GaussianGuide", "other names are not affected"
    monkeypatch.chdir(tmp_path)
    assert "mine" not in _registry.registered_guides(), "nothing is looked up where one works"


def test_the_working_directory_is_on_the_path_for_one_import_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named_guide.py").write_text("import sys\npath = list(sys.path)\nG = print\n")
    (tmp_path / "broken_guide.py").write_text("raise RuntimeError('broken')\n")
    before = list(sys.path)
    assert load_guide("named_guide:G") is print
    assert sys.modules["named_guide"].path == [*before, str(tmp_path)]
    with pytest.raises(ValueError, match="RuntimeError: broken"):
        load_guide("broken_guide:G")
    assert sys.path == before
