"""The command: what it prints, refuses and returns, and how it ends on signals."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest

from pyro_gpvae import NonFiniteError, __version__
from pyro_gpvae.cli.commands import Demo, Evaluate, Gap, Generate, Results, Uncertainty
from pyro_gpvae.cli.main import main
from pyro_gpvae.cli.train import Train
from pyro_gpvae.core import _registry
from pyro_gpvae.core._files import read_json
from pyro_gpvae.evaluation.importance import ParetoWarning

TINY = [
    "--latent-dim=2", "--epochs=1", "--train-images=64", "--test-images=6", "--num-samples=5",
    "--device=cpu", "--quiet",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_train_and_evaluate(tmp_path, capsys):
    assert main(["train", "--guide=vae", *TINY]) == 0
    record = read_json(tmp_path / "run" / "record.json")
    printed = capsys.readouterr().out
    assert f"{record['scores']['log_evidence']:.4f}" in printed
    assert "written to run" in printed

    assert main(["evaluate", "run", "--out", "again"]) == 0
    assert "(equal)" in capsys.readouterr().out
    assert read_json(tmp_path / "again" / "record.json")["scores"] == record["scores"]
    assert main(["evaluate", "run", "--num-samples=1", "--guide=gp"]) == 0
    assert "nan" not in capsys.readouterr().out

    assert main(["train", "--guide=gp", "--warm-start=run", "--out=gp", *TINY]) == 0
    assert "v_over_h2" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["evaluate", "gp", "--guide=sa:1"]) == 0
    error = capsys.readouterr().err
    assert "pyro-gpvae: warning: only the encoder of the GPGuide is copied" in error
    assert "semi_amortized.py" not in error, "a warning is one line"

    (tmp_path / "run" / "weights.safetensors").write_bytes(b"damaged")
    assert main(["evaluate", "run"]) == 2
    assert "weights.safetensors" in capsys.readouterr().err


def test_seeds_are_trained_in_turn_and_finished_ones_are_kept(tmp_path, capsys):
    options = ["train", "--guide=vae", "--seeds=2", "--seed=3", "--out=seeds", *TINY]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "seed 3:" in printed
    assert "written to seeds/seed-4" in printed
    weights = tmp_path / "seeds" / "seed-3" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(options) == 0
    assert capsys.readouterr().out == printed
    assert weights.stat().st_mtime_ns == before


def test_a_guide_of_your_own_from_the_working_directory(tmp_path, capsys):
    (tmp_path / "my_cli_guides.py").write_text("from guides import MixtureGuide as Mine")
    spec = "my_cli_guides:Mine:num_components=2"
    assert main(["train", f"--guide={spec}", "--out=own", *TINY]) == 0
    assert str(tmp_path) not in sys.path
    assert main(["evaluate", "own"]) == 2
    assert "--trust-guide" in capsys.readouterr().err
    assert main(["evaluate", "own", "--trust-guide"]) == 0
    assert "(equal)" in capsys.readouterr().out
    assert read_json(tmp_path / "own" / "config.json")["guide"] == spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--guide=gpp"], "unknown guide 'gpp': did you mean 'gp'?"),
        (["train", "--guide=me_too:Guide"], "No module named 'me_too'. Expected 'module:Class'"),
        (["train", "--data=absent.npz"], "absent.npz"),
        (["train", "--warm-start=absent"], "there is no run folder absent"),
        (["train", "--out=full"], "exists and is not empty"),
        (["train", "--seeds=0"], "seeds must be at least 1, got 0"),
        (["evaluate", "absent"], "there is no run folder absent"),
        (["demo", "--out=full"], "'precious.txt'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    command, *options = arguments
    tiny = TINY if command == "train" else []
    assert main([command, *tiny, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-gpvae: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious.txt"]


def test_which_errors_need_no_traceback(capsys, monkeypatch):
    def fail(error):
        def train_run(*args, **kwargs):
            raise error

        monkeypatch.setattr("pyro_gpvae.runs.train.train_run", train_run)

    fail(NonFiniteError("not finite\nat step 3"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "pyro-gpvae: error: not finite at step 3\n"
    fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert main(["train"]) == 2
    assert "tried to allocate 9 bytes" in capsys.readouterr().err
    fail(KeyboardInterrupt())
    assert main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err
    fail(RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError):
        main(["train"])
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        main(["evaluate", "absent", "-v"])


def test_a_kind_of_warning_stands_once(capsys, monkeypatch):
    def train_run(*args, **kwargs):
        for heavy in (3, 4):
            warnings.warn(f"{heavy} images", ParetoWarning, stacklevel=1)
        raise ValueError("done")

    monkeypatch.setattr("pyro_gpvae.runs.train.train_run", train_run)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["train"]) == 2
    assert capsys.readouterr().err.count("pyro-gpvae: warning: ") == 1


def test_progress_in_a_file_is_a_line_for_each_epoch(capsys):
    assert main(["train", "--guide=vae", *TINY[:-1], "--epochs=2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", loss ")[0] for line in lines if "epoch" in line] == [
        "vae: epoch 1 of 2",
        "vae: epoch 2 of 2",
    ]
    assert main(["train", "--guide=vae", *TINY, "--overwrite"]) == 0
    assert "epoch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "option"),
    [
        *(("--resume", o) for o in ("--epochs=3", "--overwrite", "--seeds=2", "--from-record=a")),
        *(("--from-record", o) for o in ("--epochs=3", "--seeds=2")),
    ],
)
def test_a_run_that_is_continued_or_repeated_takes_no_other_options(source, option, capsys):
    assert main(["train", f"{source}=run", option]) == 2
    error = capsys.readouterr().err
    assert f"error: {source} " in error
    assert f"drop {option.partition('=')[0]}" in error


def test_guides_are_listed_even_if_one_is_broken(capsys, monkeypatch):
    registered = _registry.registered_guides()
    group = "pyro_gpvae.guides"
    points = {
        "absent": [EntryPoint("absent", "no_such_module:Guide", group)],
        "twice": [EntryPoint("twice", f"module_{i}:Guide", group) for i in range(2)],
    }
    monkeypatch.setattr("pyro_gpvae.cli.commands.registered_guides", lambda: points | registered)
    assert main(["guides"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in (
        ("vae", "The amortised Gaussian of the VAE."),
        ("instance", "The Gaussian of highest ELBO"),
        ("absent", "(no_such_module:Guide)"),
        ("twice", "registered several times"),
    ):
        assert any(line.startswith(f"{name} ") and text in line for line in lines), name


def test_the_version_and_the_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-gpvae {__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "subcommands" in capsys.readouterr().out
    for wrong in (["trian"], ["train", "--epoch-count=3"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
        assert f"Unrecognized options: {wrong[-1]}" in capsys.readouterr().err


COMMANDS = (Demo, Train, Evaluate, Gap, Uncertainty, Results, Generate)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__.lower())
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command.__name__.lower(), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    entries = dict(entry.split(" ", 1) for entry in text.split(" --")[1:])
    for field in fields(command):
        if field.name in ("run_folder", "folder", "runs"):
            continue
        explanation, default, _ = entries[field.name.replace("_", "-")].partition("(default: ")
        assert default, f"--{field.name} does not show its default"
        assert len(explanation.split()) > 3, f"--{field.name} is not explained"


def start(*arguments, code="", **environment):
    code = f"import sys\nfrom pyro_gpvae.cli.main import main\n{textwrap.dedent(code)}\n"
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_terminal_without_greek_letters_and_a_reader_that_has_gone():
    process = start("train", "--help", PYTHONIOENCODING="ascii")
    text, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert "one learned ?, or" in " ".join(text.split())
    process = start("train", "--help")
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == "", "as after | head"
    process.stderr.close()


def test_gap_is_printed_where_there_are_no_greek_letters(monkeypatch, tmp_path):
    assert main(["train", "--guide=vae", "--out=run", *TINY]) == 0
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    few = ["--images=2", "--num-samples=10", "--reference-samples=20", "--ais-chains=0", "--quiet"]
    assert main(["gap", "run", *few]) == 0
    printed = streams[0].buffer.getvalue().decode("ascii")
    assert "written to gap" in printed
    assert "?" in printed, "in the place of a letter"
    assert "\N{PLUS-MINUS SIGN}" in (tmp_path / "gap" / "gap.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_then_resume_gives_the_undisturbed_run(number, code, tmp_path):
    options = ["train", "--guide=vae", "--epochs=4", "--train-images=640", "--batch-size=16"]
    options += [TINY[0], *TINY[3:]]
    process = start(*options, "--out=stopped")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("stopped.partial/checkpoint*.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert "continue with: pyro-gpvae train --resume stopped" in error
    assert "stopped after step" in error
    assert not (tmp_path / "stopped").exists()

    assert main(["train", "--resume=stopped", "--quiet"]) == 0
    assert main([*options, "--out=undisturbed"]) == 0
    weights = [tmp_path / run / "weights.safetensors" for run in ("stopped", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sigterm_before_anything_is_written(tmp_path):
    process = start(
        "train",
        code="""
            import time
            from pyro_gpvae.cli.train import Train
            Train.run = lambda self: (print("ready", flush=True), time.sleep(300))
        """,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 143
    assert error == "\npyro-gpvae: terminated: nothing half-written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_what_python_cannot_interrupt(number, code):
    process = start(
        "guides",
        code="""
            import hashlib
            from pyro_gpvae.core import _signals
            from pyro_gpvae.cli.commands import Guides
            _signals.GRACE = 0.1
            compute = lambda: hashlib.pbkdf2_hmac("sha1", b"", b"", 2**31 - 1)  # many minutes
            Guides.run = lambda self: (print("ready", flush=True), compute())
        """,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it computes
    try:
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
        for _ in range(100):  # a busy machine delivers two signals as one
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code
