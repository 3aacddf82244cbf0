"""A run is trained, evaluated and written to a folder that gives the same score again."""

import json
import shutil
import textwrap
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pyro_gpvae import NonFiniteError, load_run, log_evidence, train_run
from pyro_gpvae.cli.main import main
from pyro_gpvae.cli.train import Train
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.folder import RUN_FILES
from pyro_gpvae.runs.train import resume_run

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
    assert len(record["weights_sha256"]) == 64
    assert record["warm_start"]["config"]["guide"] == "vae"
    assert load_run(folder).total_epochs == 2, "captions count those of the warm start"
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


def test_same_seed_same_numbers(vae, tiny, tmp_path):
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


def test_the_precision_of_training_is_an_option(vae, tiny, tmp_path):
    folder, record = vae
    lowered = train_run(tiny(guide="vae", precision="bf16"), tmp_path / "bf16", progress=False)
    weights, rounded = (load_file(f / "weights.safetensors") for f in (folder, tmp_path / "bf16"))
    assert not all(torch.equal(rounded[name], tensor) for name, tensor in weights.items())
    assert lowered["config"]["precision"] == "bf16"
    assert lowered["scores"]["elbo"] == pytest.approx(record["scores"]["elbo"], rel=0.01)


def test_sigma_may_have_a_learning_rate_of_its_own(vae, tiny, tmp_path):
    calibrated = tiny(guide="vae", sigma_learning_rate=1e-2)
    record = train_run(calibrated, tmp_path / "calibrated", progress=False)
    assert record["config"]["sigma_learning_rate"] == 1e-2
    assert record["sigma"] != pytest.approx(vae[1]["sigma"], rel=0.01)
    for name, value in (("freeze_decoder", True), ("likelihood", "bernoulli")):
        options = {"sigma_learning_rate": 1e-2, "warm_start": str(vae[0]), name: value}
        with pytest.raises(ValueError, match="sigma_learning_rate needs a learned σ"):
            tiny(**options).check()
    with pytest.raises(ValueError, match="sigma_learning_rate must be positive, got 0"):
        tiny(sigma_learning_rate=0).check()


def test_a_warm_start_takes_over_model_and_encoder(vae, tiny, tmp_path):
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
def test_a_warm_start_must_fit(vae, tiny, tmp_path, changes, message):
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
    for option in ("num_samples", "test_images", "seed"):
        with pytest.raises(ValueError, match=f"{option} must be .*, got True"):
            evaluate_run(vae[0], **{option: True})
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"reference must be 1 to 10 test images, got {count}"):
            evaluate_run(vae[0], reference=count)


@pytest.mark.filterwarnings("ignore:no estimate of log p")
def test_reference_estimates_stand_beside_the_score(vae, tmp_path, capsys):
    out = tmp_path / "evaluation"
    result = evaluate_run(vae[0], reference=3, out=out)
    assert result["scores"] == vae[1]["scores"]
    reference = read_json(out / "record.json")["reference"]
    assert reference == result["reference"]
    assert (reference["num_images"], reference["num_samples"]) == (3, 5)
    names = ["IWAE(5)", "IWAE(5), width c", "IWAE(5), instance:full", "AIS(30)"]
    assert list(reference["estimates"]) == names
    assert 0.8 <= reference["mean_width"] <= 4
    table = pd.read_csv(out / "scores.csv")
    for name in names:
        assert table[name].notna().tolist() == 3 * [True] + 7 * [False]
        mean = reference["estimates"][name]["log_evidence"]
        assert mean == pytest.approx(table[name].mean(), rel=1e-5)
    assert main(["evaluate", str(vae[0]), "--reference", "2"]) == 0
    text = capsys.readouterr().out
    for line in ("of the first 2 test images", *names, "mean c =", "most reliable", "(equal)"):
        assert line in text


@pytest.mark.filterwarnings("ignore:the loss or its gradient")
def test_a_training_that_diverged_has_no_score(vae, tiny, tmp_path):
    config = tiny(guide="vae", on_nonfinite="skip", learning_rate=10.0, epochs=8)
    with pytest.raises(NonFiniteError, match="diverged: its loss is nan"):
        train_run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    folder = tmp_path / "other"
    shutil.copytree(vae[0], folder)
    scores = vae[1]["scores"] | {"log_evidence": -float("inf")}
    write_json(folder / "record.json", vae[1] | {"scores": scores})
    with pytest.raises(ValueError, match=r"diverged.* log p\(x\) None"):
        evaluate_run(folder)


def on_another_device(folder, copy):
    """Copies a run or what is left of it, as if it had been begun on a GPU."""
    shutil.copytree(folder, copy)
    for file in (copy / "config.json", copy / "record.json"):
        if file.exists():
            values = read_json(file)
            values.get("config", values)["device"] = "cuda:7"
            write_json(file, values)
    return copy


def test_a_device_that_is_given_wins(vae, tiny, tmp_path):
    start = on_another_device(vae[0], tmp_path / "start")
    with pytest.raises(ValueError, match="the device 'cuda:7' is not there"):
        load_run(start)
    config = tiny(guide="gp", warm_start=str(start))
    record = train_run(config, tmp_path / "gp", progress=False)
    assert record["config"]["device"] == "cpu"
    for name, resume in (
        ("a", lambda out: resume_run(out, device="cpu", progress=False)),
        ("b", lambda out: train_run(tiny(guide="vae"), out, resume=True, progress=False)),
    ):
        partial = on_another_device(vae[0], tmp_path / f"{name}.partial")
        (partial / "record.json").unlink()
        with pytest.raises(ValueError, match="the device 'cuda:7' is not there"):
            resume_run(tmp_path / name)
        assert resume(tmp_path / name)["scores"] == vae[1]["scores"]


def test_a_record_causes_no_download(folder, vae, tmp_path):
    place = {"data": "mnist", "root": str(tmp_path / "elsewhere"), "download": True}
    config = vae[1]["config"] | place
    write_json(folder / "config.json", config)
    write_json(folder / "record.json", vae[1] | {"config": config})
    for call in (
        lambda: evaluate_run(folder),
        lambda: Train(from_record=folder / "record.json", out=tmp_path / "again").run(),
        lambda: resume_run(tmp_path / "b"),
    ):
        shutil.copytree(folder, tmp_path / "b.partial", dirs_exist_ok=True)
        with pytest.raises(FileNotFoundError, match=r"elsewhere.*download=True"):
            call()
        assert not (tmp_path / "elsewhere").exists()


def test_a_guide_without_warm_start_and_with_lazy_parameters(vae, tiny, tmp_path, monkeypatch):
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


def test_bernoulli_fully_connected_and_your_own_images(tiny, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(20, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train=images, test=images[:3])
    monkeypatch.chdir(tmp_path)
    config = tiny(
        data="own.npz",
        train_images=None,
        test_images=None,
        likelihood="bernoulli",
        decoder="fc",
        guide="vae",
    )
    record = train_run(config, tmp_path / "run", progress=False)
    assert record["config"]["data"] == str(tmp_path / "own.npz"), "from anywhere"
    assert train_run(config, tmp_path / "run", resume=True) == record
    assert record["sigma"] is None
    assert record["data"]["name"] == "own-binarized"
    monkeypatch.chdir("/")
    assert evaluate_run(tmp_path / "run")["scores"] == record["scores"]

    shutil.move(tmp_path / "own.npz", tmp_path / "moved.npz")
    with pytest.raises(FileNotFoundError, match=r"own\.npz does not exist.*are now with --data"):
        evaluate_run(tmp_path / "run")
    moved = evaluate_run(tmp_path / "run", data=str(tmp_path / "moved.npz"))
    assert moved["scores"] == record["scores"]
    np.savez(tmp_path / "own.npz", train=images, test=images[3:6])
    with pytest.raises(ValueError, match=r"record.json: data.test_sha256 is not that of the test"):
        evaluate_run(tmp_path / "run")


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
def test_bad_options_are_refused_before_training(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_run(tiny(**changes), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []
