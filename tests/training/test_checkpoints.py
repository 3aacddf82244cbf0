import os
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from toy import Dying, Kill, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import Checkpoints, ImageModel, available_guides, fit, make_guide
from pyro_gpvae.training.checkpoint import Checkpoint


def uint8(count, shape=(1, 2, 3)):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def pair(kind=GaussianGuide):
    torch.manual_seed(0)
    model = linear_model().float()
    torch.manual_seed(1)
    return model, kind(model, linear_encoder())


def train(folder=None, build=pair, epochs=2, every=1, resume=False, **options):
    """The weights, the checkpoints and the history of 25 images in batches of 10."""
    model, guide = build()
    checkpoints = folder
    if isinstance(folder, str | Path):
        checkpoints = Checkpoints(folder, every=every, resume=resume)
    options = {"data": uint8(25), "batch_size": 10, "seed": 5} | options
    history = fit(
        model, guide, epochs=epochs, progress=False, checkpoints=checkpoints, learning_rate=0.01,
        **options,
    )  # fmt: skip
    weights = [
        p for m in (model, guide) if isinstance(m, nn.Module) for p in m.state_dict().values()
    ]
    return weights, checkpoints, history.frame()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


def assert_equal(found, wanted):
    """Parameters, buffers, moments, random states, position and history: bit for bit."""
    assert same(found[0], wanted[0])
    states = []
    for _, checkpoints, _ in (found, wanted):
        checkpoint = checkpoints.latest()
        state = {"step": checkpoint.step, **checkpoint.state}
        del state["seconds"]
        state["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
        states.append(state)
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert same(states[0][name], states[1][name]), name
    assert states[0]["optimizers"][0]
    timeless = [f.drop(columns="seconds") for f in (found[2], wanted[2])]
    assert timeless[0].equals(timeless[1])


def functions():
    """A guide that is a function with parameters in Pyro's store, and draws from numpy."""
    pyro.clear_param_store()

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            noise = torch.tensor(np.random.rand() * 0.01, dtype=torch.float32)  # noqa: NPY002
            pyro.sample("z", dist.Normal(loc + noise, scale).to_event(1))

    return pair()[0], guide


class Awkward(GaussianGuide):
    """Parameters that are not in the order of memory, and a buffer that is replaced."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.turned = nn.Parameter(torch.linalg.qr(torch.randn(4, 2)).Q.t())
        self.wide = nn.Parameter(torch.randn(2, 3).t())
        self.register_buffer("average", torch.zeros(2))

    def posterior(self, x):
        q = super().posterior(x)
        shift = self.turned.sum(1) + self.wide.square().sum(1)[:2]
        if self.training:
            self.average = 0.9 * self.average + 0.1 * q.mean.mean(0).detach()
        return dist.Normal(q.mean + shift + self.average, q.stddev).to_event(1)


class Averaging(GaussianGuide):
    """Buffers that are not persistent: a running mean, and one of the size of the batch."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.register_buffer("average", torch.zeros(2), persistent=False)
        self.register_buffer("last", torch.zeros(0), persistent=False)

    def posterior(self, x):
        q = super().posterior(x).base_dist
        if self.training:
            self.average.mul_(0.9).add_(0.1 * q.mean.mean(0).detach())
            self.last = torch.zeros(len(x))
        return dist.Normal(q.mean + self.average, q.stddev).to_event(1)


PROGRAMS = {
    "vae": lambda: {"validation": uint8(4)},
    "functions": lambda: {"build": functions},
    "awkward parameters": lambda: {"build": lambda: pair(Awkward)},
    "buffers that are not persistent": lambda: {"build": lambda: pair(Averaging)},
    # Pyro guesses max_plate_nesting in a first run, which draws random numbers
    "an objective that sets itself up": lambda: {
        "elbo": Trace_ELBO(num_particles=2, vectorize_particles=True)
    },
}


def assert_resumes(folder, step, options):
    """A training that was killed after a step and continued is one that was not disturbed."""
    undisturbed = train(folder / "a", **options())
    wanted = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(Kill):
        train(Dying(folder / "b", step), **options())
    torch.manual_seed(77)  # whatever the new process drew before
    assert_equal(train(folder / "b", resume=True, **options()), undisturbed)
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, wanted[name])


@pytest.mark.parametrize("step", [0, 1, 3, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_after_any_step_and_resumed_equals_undisturbed(name, step, tmp_path):
    assert_resumes(tmp_path, step, PROGRAMS[name])


FAMILIES = [
    *sorted(available_guides()),
    *("gp:estimator=weights", "gp:estimator=marginal", "gp:covariance=full", "iaf:2", "vlae:1"),
]


def digits_pair(spec):
    def build():
        torch.manual_seed(0)
        model = ImageModel((1, 8, 8), 2, sigma=0.3)
        return model, make_guide(spec, model)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("spec", FAMILIES)
def test_every_guide_family_resumes_in_the_middle_of_an_epoch(spec, tmp_path):
    options = {"build": digits_pair(spec), "data": uint8(10, (1, 8, 8)), "batch_size": 4}
    assert_resumes(tmp_path, 2, lambda: options)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["vae", "gp", "sa:1"])
def test_on_cuda_in_deterministic_mode(spec, tmp_path):
    def build():
        return [program.cuda() for program in digits_pair(spec)()]

    options = {"build": build, "data": uint8(10, (1, 8, 8)), "batch_size": 4}
    torch.use_deterministic_algorithms(True)
    try:
        assert_resumes(tmp_path, 2, lambda: options)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_finished_training_goes_on_for_more_epochs(tmp_path):
    undisturbed = train(tmp_path / "a", epochs=4)
    train(tmp_path / "b", epochs=2)
    assert_equal(train(tmp_path / "b", epochs=4, resume=True), undisturbed)


def test_other_options_of_the_objective_are_refused(tmp_path):
    train(tmp_path, epochs=1, elbo=Trace_ELBO(num_particles=2))
    assert len(train(tmp_path, resume=True, elbo=Trace_ELBO(num_particles=2))[2]) == 2
    with pytest.raises(ValueError, match="its objective 0's num_particles is 2, not 1"):
        train(tmp_path, resume=True, elbo=Trace_ELBO())


def test_a_state_that_is_no_tensor_is_refused_before_training(tmp_path):
    class Stateful(GaussianGuide):
        def get_extra_state(self):
            return {"temperature": 1.0}

        def set_extra_state(self, state):
            pass

    programs = pair(Stateful)
    with pytest.raises(ValueError, match="guide has get_extra_state, whose result cannot be"):
        train(tmp_path, lambda: programs)
    assert torch.equal(programs[1].head.weight, pair()[1].head.weight)


def test_a_folder_with_checkpoints_is_not_trained_over(tmp_path):
    train(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"holds a checkpoint .* \(resume=True\)"):
        train(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path):
    undisturbed = train(tmp_path / "a")
    with pytest.raises(Kill):
        train(Dying(tmp_path / "b", 5))
    truncate(tmp_path / "b" / NEWEST)
    checkpoints = Checkpoints(tmp_path / "b")
    with pytest.warns(UserWarning, match="is damaged: .*the checkpoint before is used"):
        state = checkpoints.latest()
    previous = (tmp_path / "b" / PREVIOUS).read_bytes()
    checkpoints.save(state)
    assert (tmp_path / "b" / PREVIOUS).read_bytes() == previous
    assert_equal(train(tmp_path / "b", resume=True), undisturbed)


def changed(folder, change):
    """Changes the state in the newest checkpoint."""
    content = torch.load(folder / NEWEST, weights_only=True)
    change(content["state"])
    torch.save(content, folder / NEWEST)


def moment(index, name, value):
    def change(state):
        if value is None:
            del state["optimizers"][0][index][name]
        else:
            state["optimizers"][0].setdefault(index, {})[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(lambda s, c=c: s.update(c) for c in (
            {"rows": None}, {"rows": [1, 2]}, {"options": None}, {"seconds": None},
            {"position": [-3, 0]}, {"position": ["x", 0]}, {"position": [2, 4]}, {"counters": [1]},
            {"optimizers": []}, {"random": {}},
        )),
        moment(1, "exp_avg", torch.zeros(())),
        moment(0, "step", torch.zeros(2)),
        moment(0, "exp_avg_sq", None),
        moment(99, "exp_avg", torch.zeros(())),
        lambda state: state.pop("weights"),
    ],
)  # fmt: skip
def test_an_inconsistent_state_is_refused(change, tmp_path):
    train(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=r"the checkpoint of step 6 is (inconsistent|of another)"):
        train(tmp_path, resume=True)


def test_checkpoints_do_not_change_a_training(tmp_path):
    assert same(train(None)[0], train(tmp_path)[0])


def frozen():
    model, guide = pair()
    return model.requires_grad_(False), guide


def wider():
    model, _ = pair()
    return model, GaussianGuide(model, linear_encoder(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, "its seed is 5, not 6"),
        ({"batch_size": 9}, "its batch_size is 10, not 9"),
        ({"data": uint8(26)}, "its num_images is 25, not 26"),
        ({"data": 255 - uint8(25)}, "its data is [0-9a-f]{64}, not"),
        ({"epochs": 1}, "has 2 epochs, more than epochs=1"),
        ({"build": digits_pair("vae"), "data": uint8(25, (1, 8, 8))}, "of another training"),
        ({"build": wider}, r"guide.head.weight has shape .*, expected"),
        ({"build": frozen}, "its trained is"),
        ({"build": lambda: [m.double() for m in pair()]}, "float32, expected .*float64"),
        ({"elbo": Trace_ELBO()}, "its objectives is"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(options, message, tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, resume=True, **options)


NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(bytes(content))


def no_zip(path):
    path.write_bytes(b"not a checkpoint")


@pytest.mark.parametrize("damage", [truncate, flip, no_zip, os.remove])
def test_a_damaged_file_falls_back_to_the_checkpoint_before(damage, tmp_path):
    undisturbed = train(tmp_path / "a")
    with pytest.raises(Kill):
        train(Dying(tmp_path / "b", 5))
    damage(tmp_path / "b" / NEWEST)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Checkpoints(tmp_path / "b").latest().step == 4
        found = train(tmp_path / "b", resume=True)
    messages = {str(w.message) for w in caught}
    if damage is not os.remove:
        assert len(messages) == 1, "one clear message"
        assert f"{NEWEST} is damaged: " in messages.pop()
    assert_equal(found, undisturbed)
    flip(tmp_path / "b" / NEWEST)
    flip(tmp_path / "b" / PREVIOUS)
    with pytest.raises(ValueError, match=r"t.pt is damaged.*previous.pt is damaged.*start again"):
        train(tmp_path / "b", resume=True)


def test_another_format_and_a_foreign_file_are_refused_by_name(tmp_path):
    train(tmp_path)
    content = torch.load(tmp_path / NEWEST, weights_only=True)
    torch.save(content | {"format": 99}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match=r"checkpoint.pt has format 99, .* upgrade"):
        train(tmp_path, resume=True)
    for foreign in ({"weights": torch.zeros(2)}, [1, 2], content | {"step": None}):
        torch.save(foreign, tmp_path / NEWEST)
        with pytest.raises(ValueError, match=r"checkpoint.pt is not a checkpoint of pyro-gpvae"):
            train(tmp_path, resume=True)


def test_no_code_in_a_checkpoint_runs(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    train(tmp_path / "run")
    for name in (NEWEST, PREVIOUS):
        torch.save({"format": 2, "step": 6, "state": {"rows": Evil()}}, tmp_path / "run" / name)
    with pytest.raises(ValueError, match=r"is damaged: Weights only load failed"):
        train(tmp_path / "run", resume=True)
    assert not canary.exists()


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint.pt.0123abcd.partial").write_bytes(b"half")
    assert_equal(train(tmp_path, resume=True), train(tmp_path.parent / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NEWEST, "lock"]


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_full_disk_is_reported_and_training_goes_on_or_stops(on_error, tmp_path, monkeypatch):
    undisturbed, written, fsync = train(tmp_path / "a"), [], os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    checkpoints = Checkpoints(tmp_path / "b", every=1, on_error=on_error)
    if on_error == "stop":
        with pytest.raises(OSError, match="No space left"):
            train(checkpoints)
    else:
        message = r"No space left .* Training continues; the last checkpoint is of step \d"
        with pytest.warns(UserWarning, match=message):
            weights, _, _ = train(checkpoints)
        assert same(weights, undisturbed[0])
    assert checkpoints.latest() is not None, "what was there is kept"
    assert not list((tmp_path / "b").glob(".check*")), "nothing half-written stays"


def test_checkpoints_by_steps_and_by_minutes(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every="3")
    assert [checkpoints.due(step) for step in (1, 2, 3, 4)] == [False, False, True, True]
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, every="1.5m")
    now[0] += 89
    assert not checkpoints.due(10**6)
    now[0] += 1
    assert checkpoints.due(1)
    checkpoints.save(Checkpoint(1, {}))
    assert not checkpoints.due(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a number of steps"),
        ({"every": "0m"}, "got '0m'"),
        ({"every": "-3"}, "got '-3'"),
        ({"on_error": "pray"}, "on_error must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints("folder", **options)


def test_a_checkpoint_that_a_running_training_moves_is_not_called_damaged(tmp_path, monkeypatch):
    train(tmp_path, every=2)
    checkpoints = Checkpoints(tmp_path)
    newest, before = checkpoints._files()
    monkeypatch.setattr(checkpoints, "_files", lambda: [tmp_path / "moved.pt", before])
    assert checkpoints.latest() is not None
    monkeypatch.setattr(checkpoints, "_files", lambda: [tmp_path / "moved.pt"])
    assert checkpoints.latest() is None
    assert newest.exists()
