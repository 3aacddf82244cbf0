"""Several seeds in one program: each run is what it would be alone."""

import io
import json
import re
import shutil
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import (
    Checkpoints,
    ImageModel,
    NonFiniteError,
    RunConfig,
    UnsupportedError,
    fit,
    load_run,
    make_guide,
    train_run,
    training,
)
from pyro_gpvae.cli.main import main
from pyro_gpvae.model.elbo import Block
from pyro_gpvae.runs.seeds import resume_seeds, train_seeds
from pyro_gpvae.runs.train import Begun

SEEDS = (3, 5, 8)
FAMILIES = ["vae", "gp", "gp:estimator=weights", "gp:estimator=marginal", "gp:features=own",
            "iaf:2", "hf:2", "me:2", "rme:2", "full", "iterative:1",
            "sa:1,line_search=False"]  # fmt: skip


def data(count=21):
    return (images(count) * 255).to(torch.uint8)


def build(spec, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    model = linear_model().to(dtype)
    return model, make_guide(spec, model, encoder=linear_encoder()).to(dtype)


def together(spec, seeds=SEEDS, dtype=torch.float64, **options):
    pairs = [build(spec, seed, dtype) for seed in seeds]
    models, guides = zip(*pairs, strict=True)
    options = {"epochs": 3, "batch_size": 8, "progress": False} | options
    return pairs, fit(models, guides, data(), seeds=seeds, **options)


def alone(spec, seed, dtype=torch.float64, **options):
    pair = build(spec, seed, dtype)
    options = {"epochs": 3, "batch_size": 8, "progress": False} | options
    return pair, fit(*pair, data(), seed=seed, **options)


def difference(ours, theirs):
    """The largest difference of any parameter."""
    return max(
        float((a - b).detach().abs().max())
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("spec", FAMILIES)
def test_a_run_is_what_it_would_be_alone(spec):
    # of 21 images: 8, 8 and 5, where it takes no long time to trace both; 7, 7 and 7
    options = {"validation": data(5), "batch_size": 8 if spec in ("vae", "gp", "rme:2") else 7}
    pairs, histories = together(spec, **options)
    for seed, pair, history in zip(SEEDS, pairs, histories, strict=True):
        single, expected = alone(spec, seed, **options)
        assert difference(pair, single) < 1e-10
        rows = [h.frame().drop(columns="seconds") for h in (history, expected)]
        assert list(rows[0]) == list(rows[1])
        assert float((rows[0] - rows[1]).abs().max().max()) < 1e-8


def test_the_runs_differ():
    pairs, _ = together("vae")
    assert difference(pairs[0], pairs[1]) > 1e-3


def test_float32_after_a_hundred_steps():
    pairs, _ = together("gp", dtype=torch.float32, epochs=34)
    for seed, pair in zip(SEEDS, pairs, strict=True):
        single, _ = alone("gp", seed, dtype=torch.float32, epochs=34)
        assert difference(pair, single) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["gp", "me:2"])
def test_captured_on_a_gpu(spec):
    options = {"device": "cuda", "batch_size": 8}
    pairs, histories = together(spec, backend="captured", **options)
    assert {history.backend for history in histories} == {"captured"}
    for seed, pair in zip(SEEDS, pairs, strict=True):
        single, _ = alone(spec, seed, backend="eager", **options)
        assert difference(pair, single) < 1e-8


def test_convolutions():
    def conv(seed):
        torch.manual_seed(seed)
        model = ImageModel((1, 28, 28), 2)
        return model, make_guide("vae", model)

    pixels = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    options = {"epochs": 2, "batch_size": 6, "progress": False}
    pairs = [conv(seed) for seed in (1, 2)]
    fit(*zip(*pairs, strict=True), pixels, seeds=(1, 2), **options)
    for seed, pair in zip((1, 2), pairs, strict=True):
        single = conv(seed)
        fit(*single, pixels, seed=seed, **options)
        assert difference(pair, single) < 1e-4


class Transposed(nn.Linear):
    """Its gradient lies in memory in another order than its weight."""

    def forward(self, x):
        return x @ self.weight.t().contiguous() + self.bias


def test_gradients_in_another_order_of_memory():
    def pair(seed):
        torch.manual_seed(seed)
        model = linear_model()
        encoder = nn.Sequential(nn.Flatten(), Transposed(6, 5)).double()
        return model, make_guide("vae", model, encoder=encoder).double()

    pairs = [pair(seed) for seed in (1, 2)]
    options = {"epochs": 3, "batch_size": 8, "progress": False}
    fit(*zip(*pairs, strict=True), data(), seeds=(1, 2), **options)
    single = pair(2)
    fit(*single, data(), seed=2, **options)
    assert difference(pairs[1], single) < 1e-10


def test_resumes_as_one(tmp_path):
    pairs, histories = together("rme:2", batch_size=7)
    saving = Checkpoints(tmp_path / "checkpoints", every=2)
    steps = []
    original = Checkpoints.save

    def save_and_stop(self, state):
        original(self, state)
        steps.append(state.step)
        if state.step == 4:  # in the middle of the second epoch
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            together("rme:2", batch_size=7, checkpoints=saving)
    assert steps == [0, 2, 4]
    again, continued = together("rme:2", batch_size=7, checkpoints=saving, resume=True)
    for pair, other in zip(pairs, again, strict=True):
        assert difference(pair, other) == 0
    for one, other in zip(histories, continued, strict=True):
        assert one.frame().drop(columns="seconds").equals(other.frame().drop(columns="seconds"))
    with pytest.raises(ValueError, match="of 3 runs, not 2"):
        together("vae", seeds=(3, 5), checkpoints=saving, resume=True)
    with pytest.raises(ValueError, match="its seed is 3, not 6"):
        together("vae", seeds=(6, 5, 8), checkpoints=saving, resume=True)


def test_the_run_that_is_not_finite_is_named():
    pairs = [build("vae", seed) for seed in SEEDS]
    with torch.no_grad():
        next(pairs[1][1].encoder.parameters()).fill_(torch.nan)
    before = [p.clone() for p in pairs[0][1].parameters()]
    with pytest.raises(NonFiniteError, match=r"at step 1: before it, guide\.encoder"):
        fit(*zip(*pairs, strict=True), data(), seeds=SEEDS, epochs=1, batch_size=8, progress=False)
    for old, new in zip(before, pairs[0][1].parameters(), strict=True):
        assert torch.equal(old, new)  # they stop together


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": (1, 1, 2)}, "seeds must differ"),
        ({"seeds": (1, 2)}, "2 seeds need as many models and guides, got 3 and 3"),
        ({"seeds": ()}, "0 seeds need"),
        ({"seeds": None}, "need seeds="),
        ({"on_nonfinite": "skip"}, "single runs"),
        ({"backend": "captured", "device": "cpu"}, "needs CUDA"),
    ],
)
def test_refuses(changes, words):
    pairs = [build("vae", seed) for seed in SEEDS]
    options = {"seeds": SEEDS, "epochs": 1, "progress": False} | changes
    with pytest.raises(ValueError, match=words):
        fit(*zip(*pairs, strict=True), data(), **options)


def test_refuses_a_single_model():
    model, guide = build("vae", 0)
    with pytest.raises(ValueError, match="must be sequences, one for each seed"):
        fit(model, guide, data(), epochs=1, seeds=(0, 1), progress=False)


def test_refuses_runs_that_are_not_built_alike():
    pairs = [build("vae", 0), build("full", 1)]
    with pytest.raises(ValueError, match="build them alike"):
        fit(*zip(*pairs, strict=True), data(), epochs=1, seeds=(0, 1), progress=False)


@pytest.mark.parametrize("who", ["both", "model"])
def test_refuses_one_model_for_several_seeds(who):
    (model, guide), (_, other) = build("vae", 0), build("vae", 1)
    guides = [guide, guide if who == "both" else other]
    with pytest.raises(ValueError, match=r"runs 0 and 1 share (model|guide)\..* of its own"):
        fit([model, model], guides, data(), epochs=1, seeds=(0, 1), progress=False)


@pytest.mark.parametrize("spec", ["sa:1", "vlae:1"])
def test_what_cannot_be_stacked_says_so(spec):
    words = "model and guide cannot be stacked: it reads a tensor.*Train seed by seed"
    with pytest.raises(UnsupportedError, match=words):
        together(spec)


class Own(GaussianGuide):
    """A guide whose features of images differ from those of other seeds."""

    def __init__(self, model, seed, how):
        super().__init__(model, linear_encoder())
        self.how = how
        turned = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        if how == "a tensor":
            self.turned = turned
        elif how == "a list":
            self.places = turned.tolist()
        elif how == "a number":
            self.factor = 1.0 + 1e-9 * seed
        elif how == "an object":
            self.options = types.SimpleNamespace(factor=1.0 + 1e-9 * seed)
        elif how == "a closure":
            self.turn = lambda: turned
        self.model = model if how == "owns the model" else None

    def posterior(self, x):
        flat = x.flatten(1)
        if self.how == "a tensor":
            flat = flat[:, self.turned]
        elif self.how == "a list":
            flat = flat[:, self.places]
        elif self.how == "a number":
            flat = flat * self.factor
        elif self.how == "an object":
            flat = flat * self.options.factor
        elif self.how == "a closure":
            flat = flat[:, self.turn()]
        elif self.how == "numpy":
            flat = torch.from_numpy(np.sort(flat.numpy()))
        return super().posterior(flat.reshape(x.shape))


def of_its_own(seed, how):
    torch.manual_seed(seed)
    model = linear_model().double()
    return model, Own(model, seed, how).double()


BY_NAME = r"guide\.{} of run 1 is not that of run 0, and only parameters .*Train seed by seed"
BY_NUMBERS = r"run [01] has loss and gradient norm .* alone.*Train seed by seed"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a tensor", BY_NAME.format("turned")),
        ("a list", BY_NAME.format("places")),
        ("a number", BY_NAME.format("factor")),
        ("an object", BY_NAME.format("options")),
        ("a closure", BY_NUMBERS),
        ("numpy", BY_NUMBERS),
    ],
)
def test_what_differs_between_runs_and_is_no_parameter_is_found(how, words):
    pairs = [of_its_own(seed, how) for seed in (0, 1)]
    with pytest.raises(UnsupportedError, match=words):
        fit(*zip(*pairs, strict=True), data(), epochs=1, seeds=(0, 1), progress=False)


def test_a_guide_that_holds_the_model():
    options = {"epochs": 3, "batch_size": 8, "progress": False}
    pairs = [of_its_own(seed, "owns the model") for seed in (0, 1)]
    fit(*zip(*pairs, strict=True), data(), seeds=(0, 1), **options)
    for seed, pair in enumerate(pairs):
        single = of_its_own(seed, "owns the model")
        fit(*single, data(), seed=seed, **options)
        assert difference(pair, single) < 1e-10


def test_parameters_in_the_same_memory():
    pairs = [build("vae", seed) for seed in (0, 1)]
    for _, guide in pairs:
        guide.extra = torch.nn.Parameter(guide.head.bias.data)
    with pytest.raises(ValueError, match=r"is in the memory of .*one torch\.nn\.Parameter"):
        fit(*zip(*pairs, strict=True), data(), epochs=1, seeds=(0, 1), progress=False)


def test_what_is_frozen_in_one_run_only_is_named():
    pairs = [build("vae", seed) for seed in (0, 1)]
    pairs[1][1].head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"guide\.head\.weight is trained in some runs only"):
        fit(*zip(*pairs, strict=True), data(), epochs=1, seeds=(0, 1), progress=False)


def test_parameters_of_pyro_param_cannot_be_stacked():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))

    models = [linear_model().double() for _ in range(2)]
    with pytest.raises(UnsupportedError, match=r"parameters of pyro\.param statements"):
        fit(models, [guide, guide], data(), epochs=1, seeds=(0, 1), progress=False)


def test_parameters_of_no_module_cannot_be_stacked():
    class Scaled(GaussianGuide):
        def __init__(self, model):
            super().__init__(model, linear_encoder())
            self.scales = [torch.ones((), dtype=torch.float64, requires_grad=True)]

        def posterior(self, x):
            return super().posterior(x * self.scales[0])

        def blocks(self, model):
            return [Block(self.elbo(), [*self.parameters(), *self.scales])]

    models = [linear_model() for _ in range(2)]
    guides = [Scaled(model).double() for model in models]
    words = r"cannot be stacked: parameters of shape \(\) belong to no module.*Train seed by seed"
    with pytest.raises(UnsupportedError, match=words):
        fit(models, guides, data(), epochs=1, seeds=(0, 1), progress=False)


def saved_bytes(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return len(file.getvalue())


class Tied(GaussianGuide):
    """An encoder with running statistics and one layer twice."""

    def __init__(self, model):
        layer = nn.Linear(3, 3)
        encoder = nn.Sequential(*linear_encoder(), layer, nn.BatchNorm1d(3), layer)
        super().__init__(model, encoder)


@pytest.mark.parametrize("stopped", [None, "by the user", "by a check"])
def test_nothing_of_the_stack_is_left_in_models_and_guides(stopped, tmp_path, monkeypatch):
    pairs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = linear_model()
        pairs.append((model, Tied(model).double()))
    modules = [module for pair in pairs for module in pair]
    sizes = [saved_bytes(module) for module in modules]
    names = [dict(module.named_parameters(remove_duplicate=False)) for module in modules]

    def stop(*_):
        raise KeyboardInterrupt

    options = {"epochs": 2, "batch_size": 7, "progress": False, "seeds": SEEDS}
    if stopped is None:
        fit(*zip(*pairs, strict=True), data(), **options)
    else:
        where = "_update" if stopped == "by the user" else "_verify"
        monkeypatch.setattr(f"pyro_gpvae.training._stacked.StackedStep.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(*zip(*pairs, strict=True), data(), **options)
    assert [saved_bytes(module) for module in modules] == sizes
    for module, before in zip(modules, names, strict=True):
        assert not any(part.training for part in module.modules())
        assert all(p.grad is None for p in module.parameters())
        found = dict(module.named_parameters(remove_duplicate=False))
        assert all(found[name] is parameter for name, parameter in before.items())
        memory = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
        assert len({storage.data_ptr() for storage in memory}) == len(memory)


def test_auto_takes_the_eager_way_if_stacked_runs_cannot_be_compiled(monkeypatch, caplog):
    def fails(graph, **_):
        def function(*inputs):
            raise RuntimeError("there is no compiler")

        return function

    expected, _ = together("vae")
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(training, "WORTH_COMPILING", 1)
    found, histories = together("vae", backend="auto", device="cpu")
    assert [history.backend for history in histories] == ["eager"] * 3
    assert difference(found[0], expected[0]) == 0
    assert [r.getMessage() for r in caplog.records if r.name.startswith("pyro_gpvae")] == [
        "trained with backend 'eager', not 'compiled': there is no compiler"
    ]
    with pytest.raises(RuntimeError, match="no compiler"):
        together("vae", backend="compiled", device="cpu")


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, runs: runs.clear(),
        lambda tensors, runs: runs.__setitem__(1, None),
        lambda tensors, runs: runs[1].__setitem__("position", 16),
        lambda tensors, runs: tensors.pop("1.moments.0.0.exp_avg"),
        lambda tensors, runs: tensors.__setitem__("1.moments.0.0.step", torch.tensor(9.0)),
    ],
    ids=["no runs", "no run", "another place", "no moment", "another step of Adam"],
)
def test_a_checkpoint_that_makes_no_sense_is_refused(damage, tmp_path):
    together("vae", checkpoints=tmp_path, epochs=1)
    saving = Checkpoints(tmp_path)
    saved = saving.latest()
    damage(saved.tensors, saved.values["runs"])
    shutil.rmtree(tmp_path)
    with saving.in_use(resume=False):
        saving.save(saved)
    with pytest.raises(
        ValueError, match=r"makes no sense|not at one step|numbers of steps|of 0 runs"
    ):
        together("vae", checkpoints=tmp_path, resume=True, epochs=2)


TINY = {"latent_dim": 2, "epochs": 2, "batch_size": 24, "train_images": 64, "test_images": 5,
        "num_samples": 5, "device": "cpu"}  # fmt: skip


def test_run_folders_of_all_seeds(tmp_path):
    config = RunConfig(guide="vae", **TINY)
    records = train_seeds(config, (1, 4), tmp_path / "runs", progress=False)
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["seed-1", "seed-4", "seeds.json"]
    single = train_run(RunConfig(guide="vae", seed=4, **TINY), tmp_path / "alone", progress=False)
    assert records[1]["config"]["seed"] == 4
    assert records[1]["stacked"] == 2
    found, expected = (r["scores"]["log_evidence"] for r in (records[1], single))
    assert found == pytest.approx(expected, abs=1e-2)
    run = load_run(tmp_path / "runs" / "seed-4")
    assert run.record == records[1]
    with pytest.raises(ValueError, match="holds the runs seed-1, seed-4: name one of them"):
        load_run(tmp_path / "runs")
    assert resume_seeds(tmp_path / "runs", progress=False) == records
    with pytest.raises(FileExistsError, match="not empty"):
        train_seeds(config, (1, 4), tmp_path / "runs", progress=False)
    train_seeds(config, (7, 8), tmp_path / "runs", overwrite=True, progress=False)
    assert {p.name for p in (tmp_path / "runs").glob("seed-*")} == {"seed-7", "seed-8"}
    with pytest.raises(ValueError, match="at least two different"):
        train_seeds(config, (1, 1), tmp_path / "again", progress=False)
    with pytest.raises(FileNotFoundError, match="no runs to continue"):
        resume_seeds(tmp_path / "nothing")


def train_and_die(config, seeds, out, monkeypatch):
    """The process ends when all are trained and the first is evaluated."""
    finish = Begun.finish
    done = []

    def dying(self, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(finish(self, *args, **kwargs))
        return done[0]

    with monkeypatch.context() as patch:
        patch.setattr(Begun, "finish", dying)
        with pytest.raises(KeyboardInterrupt):
            train_seeds(config, seeds, out, progress=False)
    return done[0]


def test_unfinished_runs_are_overwritten_when_told(tmp_path, monkeypatch):
    out, config = tmp_path / "runs", RunConfig(guide="vae", **TINY | {"batch_size": 32})
    train_and_die(config, (1, 2), out, monkeypatch)
    with pytest.raises(FileExistsError, match="unfinished run"):
        train_seeds(config, (7, 8), out, progress=False)
    assert (tmp_path / "runs.partial" / "seed-1").is_dir()
    for seeds in ((7, 8), (4, 5)):
        train_seeds(config, seeds, out, overwrite=True, progress=False)
        names = [f"seed-{seed}" for seed in sorted(seeds)]
        assert sorted(path.name for path in out.iterdir()) == [*names, "seeds.json"]
    assert list(tmp_path.iterdir()) == [out]


def test_runs_go_on_by_the_name_of_their_unfinished_folder(tmp_path, monkeypatch):
    partial = tmp_path / "runs.partial"
    config = RunConfig(guide="vae", **TINY | {"batch_size": 32})
    first = train_and_die(config, (1, 2), tmp_path / "runs", monkeypatch)
    # what a process that is killed while it writes leaves
    (partial / "seed-2" / ".scores.csv.0123abcd.partial").touch()
    main(["train", f"--resume={partial}", "--quiet"])
    found = load_run(tmp_path / "runs" / "seed-1").record
    assert found["scores"] == first["scores"]
    assert not list(tmp_path.rglob("*.partial"))
    assert resume_seeds(partial)[0] == found, "and the finished ones are found by it, too"


def test_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "runs"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    main(["train", *options, "--guide=vae", "--seeds=2", "--seed=3", f"--out={out}", "--quiet"])
    assert re.findall(r"^seed (\d+):", capsys.readouterr().out, re.M) == ["3", "4"]
    expected = json.loads((out / "seed-4/record.json").read_text())["scores"]

    original = Checkpoints.save

    def save_and_stop(self, state):
        original(self, state)
        if state.step == 3:
            raise KeyboardInterrupt

    again = tmp_path / "again"
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    command = ["train", *options, "--guide=vae", "--seeds=2", "--seed=3", f"--out={again}"]
    assert main([*command, "--quiet", "--checkpoint-every=3"]) != 0
    assert f"--resume {again}" in capsys.readouterr().err
    assert not again.exists()
    monkeypatch.undo()
    main(["train", f"--resume={again}", "--quiet"])
    assert json.loads((again / "seed-4/record.json").read_text())["scores"] == expected
