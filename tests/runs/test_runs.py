import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from guides import GaussianGuide, GPGuide
from pyro_gpvae import Checkpoints, ImageModel, log_evidence
from pyro_gpvae.core._files import InUseError, new_folder, read_json, write_json
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.folder import RUN_FILES, check_options, load_run
from pyro_gpvae.runs.train import complete_run, resume_run, train_run
from pyro_gpvae.runs.weights import load_weights, save_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"

TINY = {
    "latent_dim": 2,
    "epochs": 1,
    "batch_size": 48,
    "train_images": 64,
    "test_images": 10,
    "num_samples": 5,
    "device": "cpu",
}


def tiny(**changes):
    return RunConfig(**(TINY | changes))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A finished VAE run and its record."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    return folder, train_run(tiny(guide="vae"), folder, progress=False)


@pytest.fixture(scope="module")
def gp(tmp_path_factory, vae):
    """A finished GPVAE run that started from the VAE."""
    folder = tmp_path_factory.mktemp("runs") / "gp"
    config = tiny(guide="gp", warm_start=str(vae[0]), validation=8)
    return folder, train_run(config, folder, progress=False)


def test_a_run_writes_what_it_promises(gp):
    folder, record = gp
    assert sorted(path.name for path in folder.iterdir()) == sorted(RUN_FILES)
    assert json.loads((folder / "record.json").read_text()) == record
    assert json.loads((folder / "config.json").read_text()) == record["config"]
    assert record["config"]["chunk_size"] >= 1, "None is resolved"
    assert record["backend"] == "eager", "what auto chose"
    assert record["versions"]["torch"] == version("torch")
    assert record["threads"] == torch.get_num_threads()
    assert record["data"]["train_images"] == 56
    assert record["data"]["validation_images"] == 8
    assert record["seconds"]["training"] > 0
    assert record["seconds"]["evaluation"] > 0
    diagnostics = record["diagnostics"]
    assert diagnostics["kl_weights_per_image"] == pytest.approx(diagnostics["kl_weights"] / 56)
    assert {"v_over_h2", "r"} < diagnostics.keys()
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == 1
    assert np.isfinite(history["validation_elbo"]).all()


def test_scores_are_the_means_of_the_table(gp):
    folder, record = gp
    table = pd.read_csv(folder / "scores.csv")
    scores = record["scores"]
    assert len(table) == scores["num_images"] == 10
    assert (table["log_evidence"] >= table["elbo"]).all()
    assert scores["log_evidence"] == pytest.approx(table["log_evidence"].mean(), rel=1e-5)
    assert scores["elbo"] == pytest.approx(table["elbo"].mean(), rel=1e-5)
    # of ten images: between the middle two
    assert scores["median_log_evidence"] == pytest.approx(table["log_evidence"].median(), rel=1e-6)
    guide = load_run(folder).guide
    x = load_run(folder).data.test / 255
    torch.testing.assert_close(
        torch.tensor(table["uncertainty"].to_numpy(np.float32)), guide.uncertainty(x).detach()
    )


@pytest.mark.parametrize("run", ["vae", "gp"])
def test_evaluation_after_reload_equals_the_recorded_score(run, request):
    folder, record = request.getfixturevalue(run)
    assert evaluate_run(folder)["scores"] == record["scores"]
    assert evaluate_run(folder, seed=1)["scores"]["elbo"] != record["scores"]["elbo"]


def test_same_seed_same_numbers(vae, tmp_path):
    folder, record = vae
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = train_run(tiny(guide="vae"), tmp_path / "again", progress=False)
    other = train_run(tiny(guide="vae", seed=1), tmp_path / "other", progress=False)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert again["scores"] == record["scores"]
    assert other["scores"]["elbo"] != record["scores"]["elbo"]
    ours, theirs = (load_file(run / "weights.safetensors") for run in (folder, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_precision_of_training_is_an_option(vae, tmp_path):
    folder, record = vae
    train_run(tiny(guide="vae", precision="float32"), tmp_path / "exact", progress=False)
    lowered = train_run(tiny(guide="vae", precision="bf16"), tmp_path / "bf16", progress=False)
    weights, exact, rounded = (
        load_file(f / "weights.safetensors")
        for f in (folder, tmp_path / "exact", tmp_path / "bf16")
    )
    assert all(torch.equal(exact[name], tensor) for name, tensor in weights.items())
    assert not all(torch.equal(rounded[name], tensor) for name, tensor in weights.items())
    assert lowered["config"]["precision"] == "bf16"
    assert lowered["scores"]["elbo"] == pytest.approx(record["scores"]["elbo"], rel=0.01)


def test_a_warm_start_takes_over_model_and_encoder(vae, tmp_path):
    # with a learning rate of 1e-12 the weights stay where they started
    config = tiny(guide="gp", warm_start=str(vae[0]), learning_rate=1e-12, seed=7)
    train_run(config, tmp_path / "gp", progress=False)
    start, run = load_run(vae[0]), load_run(tmp_path / "gp")
    for name in ("model", "guide"):
        expected = getattr(start, name).state_dict()
        found = getattr(run, name).state_dict()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 3}, "latent_dim is 3, but the warm start .* has 2"),
        ({"likelihood": "bernoulli"}, "likelihood is 'bernoulli', but .* has 'gaussian'"),
        ({"decoder": "fc"}, "decoder is 'fc', but the warm start .* has 'conv'"),
    ],
)
def test_a_warm_start_must_fit(vae, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_run(tiny(warm_start=str(vae[0]), **changes), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_another_guide_over_the_trained_decoder(vae, tmp_path):
    # a flow without steps that starts from the VAE's encoder is the VAE
    result = evaluate_run(vae[0], guide="iaf:0", out=tmp_path / "evaluation")
    assert result["scores"] == vae[1]["scores"]
    assert read_json(tmp_path / "evaluation" / "record.json")["scores"] == result["scores"]
    assert len(pd.read_csv(tmp_path / "evaluation" / "scores.csv")) == 10
    smaller = evaluate_run(vae[0], num_samples=1, test_images=3)["scores"]
    assert (smaller["num_images"], smaller["num_samples"]) == (3, 1)


def test_a_guide_without_warm_start_and_with_lazy_parameters(vae, tmp_path, monkeypatch):
    (tmp_path / "lazy_guides.py").write_text(
        textwrap.dedent("""
        import pyro, torch
        import pyro.distributions as dist
        from pyro.nn import PyroModule, PyroParam

        class Lazy(PyroModule):
            def __init__(self, model):
                super().__init__()
                self.p = model.latent_dim

            @PyroParam(constraint=dist.constraints.positive)
            def scale(self):  # exists only after first use
                return torch.ones(self.p)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(torch.zeros(self.p), self.scale).to_event(1))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    record = train_run(tiny(guide="lazy_guides:Lazy"), tmp_path / "run", progress=False)
    again = evaluate_run(tmp_path / "run", trust_guide=True)
    assert again["scores"] == record["scores"]
    assert evaluate_run(vae[0], guide="lazy_guides:Lazy")["guide"] == "lazy_guides:Lazy"

    train_run(tiny(guide="lazy_guides:Lazy", seed=1), tmp_path / "other", progress=False)
    folders = tmp_path / "run", tmp_path / "other"
    runs = [load_run(folder, trust_guide=True) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):  # one does not have the other's scale
        log_evidence(run.model, run.guide, run.data.test, 2)
        saved = load_file(folder / "weights.safetensors")["guide.scale_unconstrained"]
        assert torch.equal(run.guide.scale_unconstrained, saved)
    assert not torch.equal(*(run.guide.scale_unconstrained for run in runs))


def test_bernoulli_fully_connected_and_your_own_images(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(20, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train=images, test=images[:3])
    config = tiny(
        data=str(tmp_path / "own.npz"),
        train_images=None,
        test_images=None,
        likelihood="bernoulli",
        decoder="fc",
        guide="vae",
    )
    record = train_run(config, tmp_path / "run", progress=False)
    assert record["sigma"] is None
    assert record["data"]["name"] == "own-binarized"
    assert evaluate_run(tmp_path / "run")["scores"] == record["scores"]

    shutil.move(tmp_path / "own.npz", tmp_path / "moved.npz")
    with pytest.raises(FileNotFoundError, match=r"own\.npz"):
        evaluate_run(tmp_path / "run")
    moved = evaluate_run(tmp_path / "run", data=str(tmp_path / "moved.npz"))
    assert moved["scores"] == record["scores"]
    np.savez(tmp_path / "own.npz", train=images, test=images[3:6])
    with pytest.raises(ValueError, match=r"the test images .* are not those of the run"):
        evaluate_run(tmp_path / "run")


def test_an_existing_folder_is_only_replaced_when_told(vae, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
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


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "a/b/file"):
        pass


def test_weights_survive_the_round_trip(tmp_path):
    model = ImageModel((1, 8, 8), 2)
    guide = GPGuide(model)
    save_weights(tmp_path / "w.safetensors", model, guide)
    expected = {k: v.clone() for k, v in (model.state_dict() | guide.state_dict()).items()}
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(1)
    load_weights(tmp_path / "w.safetensors", model, guide)
    found = model.state_dict() | guide.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_that_cannot_be_used(tmp_path):
    model = ImageModel((1, 8, 8), 2)
    guide = GaussianGuide(model)
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*w\.safetensors"):
        load_weights(path, model, guide)
    with pytest.raises(ValueError, match="the guide is a function, expected"):
        save_weights(path, model, lambda x: None)
    assert not path.exists()

    save_weights(path, model, guide)
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read the weights in .*w\.safetensors"):
            load_weights(path, model, guide)
    save_file({"model.log_sigma": torch.zeros(3), "other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"do not fit .*guide\..* is missing.* more"):
        load_weights(path, model, guide)
    path.write_bytes(whole)
    bigger = ImageModel((1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"has shape \(.*\), expected \("):
        load_weights(path, bigger, GaussianGuide(bigger))
    assert all(torch.equal(guide.state_dict()[name], before[name]) for name in before)


def test_json_has_no_nan_and_damage_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan"), "y": [1.5, float("inf")], "z": {"σ": 1}})
    assert read_json(path) == {"x": None, "y": [1.5, None], "z": {"σ": 1}}
    for content in ('{"x": ', "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)


def test_damaged_run_folders(vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        load_run(tmp_path / "nowhere")
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
    (folder / "manifest.json").unlink()  # to see what is checked besides
    config = read_json(folder / "config.json")
    for changes, message in (
        ({"flavour": "sweet"}, r"config\.json has the unknown option 'flavour'"),
        ({"epochs": "three"}, r"config\.json: epochs must be int, got 'three'"),
        ({"latent_dim": 3}, r"weights\.safetensors do not fit"),
    ):
        write_json(folder / "config.json", config | changes)
        with pytest.raises(ValueError, match=message):
            load_run(folder)
    write_json(folder / "config.json", config)
    write_json(folder / "record.json", {"scores": {}})
    with pytest.raises(ValueError, match=r"record\.json is not the record of a run"):
        load_run(folder)
    (folder / "record.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        load_run(folder)


@pytest.mark.parametrize("name", [name for name in RUN_FILES if name != "manifest.json"])
def test_a_flipped_bit_in_any_file_is_found(vae, name, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{name} is not what was written"):
        load_run(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        load_run(folder)


def test_a_run_of_a_newer_version_is_refused(vae, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
    (folder / "manifest.json").unlink()
    write_json(folder / "record.json", vae[1] | {"format": 2})
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1: upgrade"):
        load_run(folder)


def test_a_file_imports_no_code_unless_it_is_trusted(vae, tmp_path, monkeypatch):
    """A stranger's run folder names a module that lies beside it."""
    canary = tmp_path / "canary"
    (tmp_path / "evil_guides.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nGuide = print"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
    (folder / "manifest.json").unlink()
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"guide": "evil_guides:Guide"})
    partial = tmp_path / "other.partial"
    partial.mkdir()
    write_json(partial / "config.json", config | {"guide": "evil_guides:Guide"})
    for call in (
        lambda: load_run(folder),
        lambda: evaluate_run(folder, guide="vae"),
        lambda: train_run(tiny(guide="vae", warm_start=str(folder)), tmp_path / "new"),
        lambda: resume_run(tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match=r"not registered.*trust_guide"):
            call()
        assert not canary.exists()
    with pytest.raises(AttributeError):  # print makes no guide; but now it is imported
        load_run(folder, trust_guide=True)
    assert canary.exists()


# --- runs that are stopped ----------------------------------------------------------------------


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
def test_a_killed_run_is_continued_to_the_same_numbers(kind, step, vae, tmp_path, monkeypatch):
    start = str(vae[0]) if kind == "gp" else None
    config = tiny(guide=kind, epochs=2, warm_start=start, validation=8)
    wanted = train_run(config, tmp_path / "a", progress=False)
    train_and_die(config, tmp_path / "b", step, monkeypatch)
    assert not (tmp_path / "b").exists()
    with pytest.raises(FileNotFoundError, match=r"not finished: continue it \(--resume .*b\)"):
        load_run(tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"unfinished run: continue it \(--resume .*b\)"):
        train_run(config, tmp_path / "b", progress=False)
    found = complete_run(config, tmp_path / "b", progress=False)
    for name in ("config", "data", "steps", "scores", "sigma", "diagnostics"):
        assert found[name] == wanted[name], name
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(RUN_FILES)
    for name in ("weights.safetensors", "scores.csv"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "b.partial").exists()
    for call in (resume_run, lambda out: complete_run(config, out)):
        assert call(tmp_path / "b") == found, "a finished run is left as it is"


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed_or_started_again(tmp_path):
    (tmp_path / "b.partial").mkdir()
    write_json(tmp_path / "b.partial" / "config.json", dataclasses.asdict(tiny(guide="vae")))
    record = resume_run(tmp_path / "b", progress=False)
    (tmp_path / "c.partial").mkdir()
    assert (
        train_run(tiny(guide="vae"), tmp_path / "c", progress=False)["scores"] == record["scores"]
    )


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="reads a tensor in Python"):
        train_run(tiny(guide="sa:1", backend="compiled"), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())
    train_run(tiny(guide="vae"), tmp_path / "run", progress=False)


def test_a_run_killed_in_its_last_moment(vae, tmp_path):
    """The folder has its name already; checkpoints and lock are still there."""
    folder = tmp_path / "run"
    shutil.copytree(vae[0], folder)
    (folder / "checkpoints").mkdir()
    (folder / "lock").touch()
    assert load_run(folder).record == vae[1]
    assert resume_run(folder) == vae[1]
    train_run(tiny(guide="vae"), folder, overwrite=True, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(RUN_FILES)


def test_unfinished_work_is_overwritten_when_told(tmp_path, monkeypatch):
    train_and_die(tiny(guide="vae"), tmp_path / "b", 1, monkeypatch)
    record = train_run(tiny(guide="gp"), tmp_path / "b", overwrite=True, progress=False)
    assert record["config"]["guide"] == "gp"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_was_writing_is_no_part_of_the_run(tmp_path, monkeypatch):
    for name in ("resumed", "overwritten"):
        train_and_die(tiny(guide="vae"), tmp_path / name, 1, monkeypatch)
        (tmp_path / f"{name}.partial" / ".history.csv.0123abcd.partial").touch()
    resume_run(tmp_path / "resumed", progress=False)
    train_run(tiny(guide="vae"), tmp_path / "overwritten", overwrite=True, progress=False)
    for name in ("resumed", "overwritten"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(RUN_FILES)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_not_emptied(tmp_path, overwrite):
    thesis = tmp_path / "run.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(FileExistsError, match=r"run.partial is no unfinished run"):
        train_run(tiny(guide="vae"), tmp_path / "run", overwrite=overwrite, progress=False)
    assert thesis.exists()


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path, monkeypatch):
    start = tmp_path / "start"
    train_run(tiny(guide="vae"), start, progress=False)
    config = tiny(guide="gp", warm_start=str(start))
    train_and_die(config, tmp_path / "b", 1, monkeypatch)
    train_run(tiny(guide="vae", seed=7), start, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="its warm start changed"):
        resume_run(tmp_path / "b", progress=False)
    assert (tmp_path / "b.partial" / "checkpoints").is_dir()
    train_run(tiny(guide="vae"), start, overwrite=True, progress=False)
    assert resume_run(tmp_path / "b.partial", progress=False)["steps"] == 2


def test_a_mistake_overwrites_nothing(tmp_path, monkeypatch):
    train_and_die(tiny(guide="vae"), tmp_path / "b", 1, monkeypatch)
    with pytest.raises(ValueError, match="minst"):
        train_run(tiny(data="minst"), tmp_path / "b", overwrite=True, progress=False)
    assert resume_run(tmp_path / "b", progress=False)["steps"] == 2


def test_a_finished_run_of_other_options_is_refused(vae):
    run = load_run(vae[0])
    check_options(run, run.config, (), "delete it")
    other = dataclasses.replace(run.config, seed=7, device="cuda")
    message = f"{vae[0]} was trained with seed = {run.config.seed}, not 7: delete it"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(run, other, ("device",), "delete it")
    check_options(run, other, ("device", "seed"), "delete it")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to continue"):
        resume_run(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from pyro_gpvae.core._files import work_folder
with work_folder(sys.argv[1]) as folder:
    (folder / "checkpoints").mkdir()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_run_folder(tmp_path):
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
        assert (tmp_path / "run.partial" / "checkpoints").is_dir(), "the owner's work is untouched"
        owner.kill()
    # a dead owner does not block
    assert resume_run(out, progress=False)["steps"] == 2


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("run-*")))
def test_a_run_of_every_format_still_loads(name):
    """tests/fixtures/make.py wrote them, with the version of that time."""
    run = load_run(FIXTURES / name, data=str(FIXTURES / "images.npz"))
    recorded = run.record["scores"]["log_evidence"]
    evidence = log_evidence(run.model, run.guide, run.data.test, 5, seed=0, chunk_size=640)
    assert evidence.mean == pytest.approx(recorded, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"decoder": "rnn"}, "decoder must be one of .*conv.*, got 'rnn'"),
        ({"validation": 64}, "64"),
        ({"train_images": 5000}, "4000 images, got 5000"),
        ({"data": "mnist5"}, "mnist5k"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "the device 'cuda:99' is not there"),
    ],
)
def test_bad_options_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_run(tiny(**changes), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []
