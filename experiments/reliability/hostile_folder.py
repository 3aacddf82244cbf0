r"""Runs commands and scripts inside a folder that a stranger filled: none of its code may run.

    python experiments/reliability/hostile_folder.py

The folder is a run, with modules of many names, a distribution that registers guides, settings of
matplotlib that start LaTeX, and a plan. Every command is started as its console script is: the
folder of the script is on Python's path, the working directory is not. An audit hook sees all code
that is executed, whatever its module is called, and every program that is started; a last finder
stands for a file that is named like any module that nobody finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from _attempt import publish

from pyro_gpvae import RunConfig, train_run

EXPERIMENTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, runpy, sys
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
if sys.argv[1].endswith(".py"):
    sys.path[0] = os.path.dirname(sys.argv[1])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    from pyro_gpvae.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""
MODULES = (
    "sitecustomize", "usercustomize", "guides", "evil", "torch", "pyro", "numpy", "matplotlib",
    "flint", "evil_backend", "conftest", "setup",
)  # fmt: skip
#: Variables that name code which would be found in the folder.
ENVIRONMENT = {
    "MPLBACKEND": "module://evil_backend",
    "PYTHONBREAKPOINT": "evil.Guide",
    "PYRO_GPVAE_DATA": ".",
    "OMP_NUM_THREADS": "1",
}
GAP = ("--images=3", "--num-samples=4", "--reference-samples=4", "--ais-chains=0")
#: Commands, and scripts of experiments/, with what they are called with.
CALLS = {
    "help": ("--help",),
    "guides": ("guides",),
    "results": ("results", "."),
    "evaluate": ("evaluate", "."),
    "generate": ("generate", ".", "--samples=2", "--out={out}"),
    "gap": ("gap", ".", *GAP, "--out={out}"),
    "report": ("report", ".", "--images=0", "--out={out}/report.html"),
    "repeat": ("train", "--from-record=record.json", "--out={out}"),
    "sweep.py": ("{experiments}/sweep/sweep.py", "--plan=plan.toml", "--in-turn", "--out={out}"),
    "train": (
        "train", "--guide=gp", "--epochs=1", "--train-images=32", "--test-images=2",
        "--num-samples=2", "--out={out}",
    ),
    "demo": ("demo", "--quick", "--out={out}"),
    "uncertainty": (
        "uncertainty", ".", "--images=16", "--num-samples=4", "--reference-samples=4",
        "--bootstrap=10", "--out={out}",
    ),
}  # fmt: skip
for _script in sorted(EXPERIMENTS.glob("[!r]*/[!_]*.py")):  # not the campaigns, which fork
    CALLS.setdefault(_script.name, (str(_script), "--help"))
PLAN = """
[budget]
epochs = 1
seeds = 1
train_images = 32
test_images = 4
num_samples = 2
[[methods]]
guide = "vae"
"""


@dataclass(kw_only=True)
class Options:
    """Options of the campaign.

    Attributes:
        calls: Only these calls.
        out: Folder of the record; None is none.
    """

    calls: tuple[str, ...] = tuple(CALLS)
    out: Path | None = None


def make_hostile(folder: Path) -> None:
    """Makes a run folder with everything in it that could be taken for code to run."""
    config = RunConfig(
        guide="gp", latent_dim=2, epochs=1, train_images=32, test_images=16, num_samples=2,
        device="cpu",
    )  # fmt: skip
    train_run(config, folder, progress=False)
    for name in MODULES:
        (folder / f"{name}.py").write_text("class Guide: pass\nFigureCanvas = None\n")
    (folder / "matplotlibrc").write_text("backend: module://evil_backend\ntext.usetex: True\n")
    (folder / "pyproject.toml").write_text("[tool.pyro_gpvae]\nguide = 'evil:Guide'\n")
    (folder / "plan.toml").write_text(PLAN)
    info = folder / "evil-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    points = "".join(f"{name} = evil:Guide\n" for name in ("evil", "gp", "vae"))
    (info / "entry_points.txt").write_text(f"[pyro_gpvae.guides]\n{points}")


def call_inside(folder: Path, arguments: list[str], scratch: Path) -> tuple[int, str, str]:
    """Starts a command or a script inside a folder; returns status, output and errors."""
    script = scratch / "pyro-gpvae"
    script.write_text(PROGRAM)
    path = [entry for entry in sys.path if entry and entry != str(folder)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def attack(folder: Path, name: str, scratch: Path) -> str:
    """Makes one of the calls; returns what was wrong, or ""."""
    places = {"out": scratch / "out" / name, "experiments": EXPERIMENTS}
    arguments = [argument.format(**places) for argument in CALLS[name]]
    status, output, errors = call_inside(folder, arguments, scratch)
    seen = [line for line in output.splitlines() if "HOSTILE" in line or "evil" in line]
    return errors if status else "; ".join(seen)


def main(options: Options) -> bool:
    found = []
    with tempfile.TemporaryDirectory() as name:
        make_hostile(Path(name) / "run")
        for call in options.calls:
            wrong = attack(Path(name) / "run", call, Path(name))
            found.append((call, "broken" if wrong else "nothing ran", wrong))
    return publish("hostile_folder", options.out, {"calls": options.calls}, found)


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
