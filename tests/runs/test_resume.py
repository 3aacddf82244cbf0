"""A run that is stopped or killed at any moment is continued to the same numbers."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from pyro_gpvae import Checkpoints, load_run, resume_run, train_run
from pyro_gpvae.cli.main import main
from pyro_gpvae.core._files import InUseError, partial_folder, read_json, write_json
from pyro_gpvae.core._signals import Terminated
from pyro_gpvae.runs.folder import RUN_FILES


def test_an_existing_folder_is_only_replaced_when_told(folder, tiny, tmp_path):
    (folder / "history.csv").write_text("old")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        train_run(tiny(guide="vae"), folder, progress=False)
    with pytest.raises(ValueError, match=r"unknown guide 'vea'.*did you mean 'vae'"):
        train_run(tiny(guide="vea"), folder, overwrite=True, progress=False)
    assert (folder / "history.csv").read_text() == "old", "a failed run changes nothing"
    train_run(tiny(guide="vae"), folder, overwrite=True, progress=False)
    assert (folder / "history.csv").read_text().startswith("epoch")
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"because it holds 'thesis\.tex'"):
        train_run(tiny(guide="vae"), folder, overwrite=True, progress=False)
    assert (folder / "thesis.tex").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing half-written"


def test_json_has_no_nan_and_damage_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan"), "y": [1.5, float("inf")], "z": {"σ": 1}})
    assert read_json(path) == {"x": None, "y": [1.5, None], "z": {"σ": 1}}
    for content in ('{"x": ', "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)


class Kill(BaseException):
    """The process ends."""


def train_and_die(config, out, step, monkeypatch):
    save = Checkpoints.save

    def dying(self, state):
        save(self, state)
        if state.step == step:
            raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying)
        with pytest.raises(Kill):
            train_run(config, out, progress=False, checkpoint_every=1)


WHEN = {"the start": 0, "an epoch": 1, "two epochs": 3}


@pytest.mark.parametrize("step", WHEN.values(), ids=WHEN)
@pytest.mark.parametrize("kind", ["vae", "gp"])
def test_a_killed_run_is_continued_to_the_same_numbers(
    kind, step, vae, tiny, tmp_path, monkeypatch
):
    start = str(vae[0]) if kind == "gp" else None
    config = tiny(guide=kind, epochs=2, warm_start=start, validation=8)
    wanted = train_run(config, tmp_path / "a", progress=False)
    train_and_die(config, tmp_path / "b", step, monkeypatch)
    assert not (tmp_path / "b").exists()
    with pytest.raises(FileNotFoundError, match=r"not finished: continue it \(--resume .*b\)"):
        load_run(tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"unfinished run: continue it \(--resume .*b\)"):
        train_run(config, tmp_path / "b", progress=False)
    found = train_run(config, tmp_path / "b", resume=True, progress=False)
    for name in ("config", "data", "steps", "scores", "sigma", "diagnostics"):
        assert found[name] == wanted[name], name
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(RUN_FILES)
    for name in ("weights.safetensors", "scores.csv"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "b.partial").exists()
    for call in (resume_run, lambda out: train_run(config, out, resume=True)):
        assert call(tmp_path / "b") == found, "a finished run is left as it is"
    other = dataclasses.replace(config, epochs=3)
    with pytest.raises(ValueError, match=r"b was trained with epochs = 2, not 3"):
        train_run(other, tmp_path / "b", resume=True)


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed_or_started_again(tiny, tmp_path):
    (tmp_path / "b.partial").mkdir()
    write_json(tmp_path / "b.partial" / "config.json", dataclasses.asdict(tiny(guide="vae")))
    record = resume_run(tmp_path / "b", progress=False)
    (tmp_path / "c.partial").mkdir()
    assert (
        train_run(tiny(guide="vae"), tmp_path / "c", progress=False)["scores"] == record["scores"]
    )


def test_a_run_that_is_refused_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ValueError, match="reads a tensor in Python"):
        train_run(tiny(guide="sa:1", backend="compiled"), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_in_its_last_moment(folder, vae, tiny):
    """The folder has its name already; checkpoints and lock are still there."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "lock"):
        (folder / name).touch()
    assert load_run(folder).record == json.loads(json.dumps(vae[1]))
    assert resume_run(folder) == vae[1]
    train_run(tiny(guide="vae"), folder, overwrite=True, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(RUN_FILES)


@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_the_first_step_says_how_to_resume(
    begun, tiny, tmp_path, monkeypatch, capsys
):
    """Where nothing was begun, no folder is left."""
    out = tmp_path / "run"
    if begun:
        train_and_die(tiny(guide="vae"), out, 1, monkeypatch)

    def fit(*args, **kwargs):
        raise Terminated

    monkeypatch.setattr("pyro_gpvae.runs.train.fit", fit)
    options = ["--resume", str(out)] if begun else ["--guide=vae", "--out", str(out)]
    assert main(["train", *options]) == 143
    assert partial_folder(out).exists() == begun
    assert (f"continue with: pyro-gpvae train --resume {out}" in capsys.readouterr().err) == begun


def test_unfinished_work_is_overwritten_when_told(tiny, tmp_path, monkeypatch):
    train_and_die(tiny(guide="vae"), tmp_path / "b", 1, monkeypatch)
    record = train_run(tiny(guide="gp"), tmp_path / "b", overwrite=True, progress=False)
    assert record["config"]["guide"] == "gp"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_was_writing_is_no_part_of_the_run(tiny, tmp_path, monkeypatch):
    for name in ("resumed", "overwritten"):
        train_and_die(tiny(guide="vae"), tmp_path / name, 1, monkeypatch)
        (tmp_path / f"{name}.partial" / ".history.csv.0123abcd.partial").touch()
    resume_run(tmp_path / "resumed", progress=False)
    train_run(tiny(guide="vae"), tmp_path / "overwritten", overwrite=True, progress=False)
    for name in ("resumed", "overwritten"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(RUN_FILES)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_not_emptied(tiny, tmp_path, overwrite):
    thesis = tmp_path / "run.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(FileExistsError, match=r"run.partial is not overwritten, .*thesis"):
        train_run(tiny(guide="vae"), tmp_path / "run", overwrite=overwrite, progress=False)
    assert thesis.exists()


def test_a_run_goes_on_only_with_what_it_was_begun_with(tiny, tmp_path, monkeypatch):
    start = tmp_path / "start"
    train_run(tiny(guide="vae"), start, progress=False)
    config = tiny(guide="gp", warm_start=str(start))
    train_and_die(config, tmp_path / "b", 1, monkeypatch)
    train_run(tiny(guide="vae", seed=7), start, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="its warm start changed"):
        resume_run(tmp_path / "b", progress=False)
    assert (tmp_path / "b.partial" / "checkpoint.pt").is_file()
    train_run(tiny(guide="vae"), start, overwrite=True, progress=False)
    assert resume_run(tmp_path / "b.partial", progress=False)["steps"] == 2


def test_a_mistake_overwrites_nothing(tiny, tmp_path, monkeypatch):
    train_and_die(tiny(guide="vae"), tmp_path / "b", 1, monkeypatch)
    with pytest.raises(ValueError, match="minst"):
        train_run(tiny(data="minst"), tmp_path / "b", overwrite=True, progress=False)
    assert resume_run(tmp_path / "b", progress=False)["steps"] == 2


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to continue"):
        resume_run(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from pyro_gpvae.core._files import work_folder
with work_folder(sys.argv[1], files=["config.json"], unfinished=["checkpoint.pt"]) as folder:
    (folder / "checkpoint.pt").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_run_folder(tiny, tmp_path):
    out = tmp_path / "run"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with owner:
        assert owner.stdout.readline() == b"held\n"
        write_json(tmp_path / "run.partial" / "config.json", dataclasses.asdict(tiny(guide="vae")))
        for call in (train_run, lambda *a, **k: resume_run(a[1])):
            with pytest.raises(InUseError, match=r"another process is working in .*run\.partial"):
                call(tiny(guide="vae"), out, overwrite=True)
        assert (tmp_path / "run.partial" / "checkpoint.pt").is_file(), (
            "the owner's work is untouched"
        )
        owner.kill()
    # a dead owner does not block
    assert train_run(tiny(guide="vae"), out, overwrite=True, progress=False)["steps"] == 2
