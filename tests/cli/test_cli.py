import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import fields
from importlib.metadata import EntryPoint

import pandas as pd
import pytest
from matplotlib.image import imread

from pyro_gpvae import available_guides, cli, commands
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.demo import DEMO_FILES, run_demo

TINY = [
    "--latent-dim=2",
    "--epochs=1",
    "--train-images=64",
    "--test-images=6",
    "--num-samples=5",
    "--device=cpu",
    "--quiet",
]

CUSTOM = """
    import pyro
    import pyro.distributions as dist
    import torch

    class Widened(torch.nn.Module):
        '''A Gaussian of learned width around a linear encoder.'''

        def __init__(self, model, width=1.0):
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
            self.encoder(torch.zeros(1, *model.image_shape))
            self.log_width = torch.nn.Parameter(torch.tensor(width).log())

        def posterior(self, x):
            return dist.Normal(self.encoder(x), self.log_width.exp()).to_event(1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                return pyro.sample("z", self.posterior(x))
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_train_and_evaluate(tmp_path, capsys):
    assert cli.main(["train", "--guide=vae", *TINY]) == 0
    record = read_json(tmp_path / "run" / "record.json")
    printed = capsys.readouterr().out
    assert f"{record['scores']['log_evidence']:.4f}" in printed
    assert "written to run" in printed

    assert cli.main(["evaluate", "run", "--out", "again"]) == 0
    assert "(equal)" in capsys.readouterr().out
    assert read_json(tmp_path / "again" / "record.json")["scores"] == record["scores"]
    assert cli.main(["evaluate", "run", "--num-samples=1", "--guide=gp"]) == 0
    assert "nan" not in capsys.readouterr().out

    assert cli.main(["train", "--guide=gp", "--warm-start=run", "--out=gp", *TINY]) == 0
    assert "v_over_h2" in capsys.readouterr().out

    (tmp_path / "run" / "weights.safetensors").write_bytes(b"damaged")
    assert cli.main(["evaluate", "run"]) == 2
    assert "weights.safetensors" in capsys.readouterr().err


def test_a_guide_of_your_own_from_the_current_directory(tmp_path, capsys):
    (tmp_path / "my_cli_guides.py").write_text(textwrap.dedent(CUSTOM))
    spec = "my_cli_guides:Widened:width=0.5"
    assert cli.main(["train", f"--guide={spec}", "--out=own", *TINY]) == 0
    assert cli.main(["evaluate", "own"]) == 2
    assert "--trust-guide" in capsys.readouterr().err
    assert cli.main(["evaluate", "own", "--trust-guide"]) == 0
    assert "(equal)" in capsys.readouterr().out
    assert read_json(tmp_path / "own" / "config.json")["guide"] == spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--guide=gpp"], "unknown guide 'gpp': did you mean 'gp'?"),
        (["train", "--guide=nowhere:Guide"], "cannot load the guide 'nowhere:Guide'"),
        (["train", "--data=minst"], "'minst'"),
        (["train", "--data=absent.npz"], "absent.npz"),
        (["train", "--warm-start=absent"], "there is no run folder absent"),
        (["train", "--out=full"], "exists and is not empty"),
        (["evaluate", "absent"], "there is no run folder absent"),
        (["demo", "--out=full"], "'precious.txt'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    command, *options = arguments
    tiny = TINY if command == "train" else []
    assert cli.main([command, *tiny, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-gpvae: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious.txt"]


def test_training_that_diverges_and_an_interrupt(capsys, monkeypatch):
    def stop(error):
        def train_run(*args, **kwargs):
            raise error

        return train_run

    diverged = stop(NonFiniteError("not finite\nat step 3"))
    monkeypatch.setattr("pyro_gpvae.cli.train.train_run", diverged)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "pyro-gpvae: error: not finite at step 3\n"
    monkeypatch.setattr("pyro_gpvae.cli.train.train_run", stop(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


def start(*arguments):
    code = "import sys; from pyro_gpvae.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LONG = ["--guide=vae", "--epochs=4", "--train-images=640", "--batch-size=16", *TINY[3:]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_then_resume_gives_the_undisturbed_run(number, code, tmp_path):
    options = ["train", "--latent-dim=2", *LONG]
    process = start(*options, "--out=stopped")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("stopped.partial/checkpoints/step-0/state.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    begin = time.monotonic()
    _, error = process.communicate(timeout=300)
    assert time.monotonic() - begin < 10  # half a second's work
    assert process.returncode == code
    assert "continue with: pyro-gpvae train --resume stopped" in error
    assert "stopped after step" in error
    assert not (tmp_path / "stopped").exists()

    resumed = start("train", "--resume=stopped", "--quiet")
    printed, error = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, error
    undisturbed = start(*options, "--out=undisturbed")
    assert undisturbed.communicate(timeout=300)[0].replace("undisturbed", "stopped") == printed
    weights = [tmp_path / run / "weights.safetensors" for run in ("stopped", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resume_takes_no_other_options(capsys):
    assert cli.main(["train", "--resume=run", "--epochs=3"]) == 2
    assert "--resume continues run with its own options: drop --epochs" in capsys.readouterr().err
    assert cli.main(["train", "--resume=run", "--overwrite"]) == 2
    assert "drop --overwrite" in capsys.readouterr().err
    assert cli.main(["train", "--resume=run"]) == 2
    assert "there is no run to continue" in capsys.readouterr().err


def test_an_error_with_its_traceback_on_request(monkeypatch):
    monkeypatch.setenv("PYRO_GPVAE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        cli.main(["evaluate", "absent"])


def test_guides_are_listed_even_if_one_is_broken(capsys, monkeypatch):
    good = available_guides()
    broken = {
        "absent": EntryPoint("absent", "no_such_module:Guide", "pyro_gpvae.guides"),
        "bare": EntryPoint("bare", "builtins:Ellipsis", "pyro_gpvae.guides"),
    }
    monkeypatch.setattr("pyro_gpvae.cli.guides.available_guides", lambda: broken | good)
    assert cli.main(["guides"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "The amortised Gaussian of the VAE." in lines["vae"]
    assert "cannot be loaded from no_such_module:Guide" in lines["absent"]
    assert good.keys() <= lines.keys()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", [field.name for field in fields(commands.Demo)]),
        ("train", [field.name for field in fields(commands.Train)]),
        ("evaluate", [field.name for field in fields(commands.Evaluate)][1:]),
        ("gap", [field.name for field in fields(commands.Gap)][1:]),
        ("uncertainty", [field.name for field in fields(commands.Uncertainty)][1:]),
        ("results", [field.name for field in fields(commands.Results)][1:]),
        ("generate", [field.name for field in fields(commands.Generate)][1:]),
    ],
)
def test_help_explains_every_option(command, options, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    entries = dict(entry.split(" ", 1) for entry in text.split(" --")[1:])
    for name in options:
        entry = entries[name.replace("_", "-")]
        explanation, default, _ = entry.partition("(default: ")
        assert default, f"--{name} does not show its default"
        assert len(explanation.split()) > 3, f"--{name} is not explained"


def test_wrong_options_exit_with_2():
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--epoch-count=3"])
    assert stop.value.code == 2


def test_the_help_does_not_import_matplotlib():
    code = "import sys, pyro_gpvae.cli.main; sys.exit('matplotlib' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_demo_writes_every_file_it_promises(tmp_path, capsys):
    options = {"train_images": 64, "test_images": 8, "num_samples": 3, "latent_dim": 2}
    metrics = run_demo("report", quick=True, epochs=2, progress=False, device="cpu", **options)
    printed = capsys.readouterr().out
    folder = tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == sorted(DEMO_FILES)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["caption"].startswith("QUICK DEMO, budget cut: 64 training and 8 test digits")
    assert metrics["caption"] in printed
    assert metrics["caption"] in (folder / "README.md").read_text()
    for picture in folder.glob("*.png"):
        pixels = imread(picture)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01, f"{picture.name} is blank"

    table = pd.read_csv(folder / "metrics.csv").set_index("method")
    assert list(table.index) == ["VAE at half time", "VAE", "GPVAE"]
    assert table["epochs"].tolist() == [1, 2, 2], "equal training"
    for name in ("vae", "gpvae"):
        config = read_json(folder / name / "config.json")
        assert config["warm_start"] == "report/start"
        assert config["epochs"] == 1
    scores = [pd.read_csv(folder / name / "scores.csv")["elbo"] for name in ("gpvae", "vae")]
    difference = scores[0] - scores[1]
    assert metrics["gpvae_minus_vae"]["elbo"] == pytest.approx(
        {"mean": difference.mean(), "standard_error": difference.std() / 8**0.5}
    )
    assert f"ELBO: {difference.mean():+.2f} ±" in printed
    assert cli.main(["evaluate", "report/gpvae"]) == 0
    assert "(equal)" in capsys.readouterr().out


def test_the_demo_needs_two_halves():
    with pytest.raises(ValueError, match="epochs must be even"):
        run_demo("report", epochs=3)


def test_warnings_are_one_line_each(tmp_path, capsys):
    options = ["--train-images", "32", "--test-images", "4", "--num-samples", "2", "--quiet"]
    run = str(tmp_path / "gp")
    assert cli.main(["train", "--guide", "gp", "--epochs", "1", "--out", run, *options]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["evaluate", run, "--guide", "sa:1"]) == 0
    error = capsys.readouterr().err
    assert "pyro-gpvae: warning: only the encoder of the GPGuide is copied" in error
    assert "semi_amortized.py" not in error
