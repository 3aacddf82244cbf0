import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from toy import linear_encoder, linear_model, uint8

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, NonFiniteError, fit, initial_sigma, load_data, log_evidence
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.model.elbo import Block


def pair(kind=GaussianGuide):
    torch.manual_seed(0)
    model = linear_model().float()
    return model, kind(model, linear_encoder())


@pytest.mark.parametrize("kind", [GaussianGuide, GPGuide])
def test_same_seed_same_run_and_the_global_state_is_untouched(kind):
    runs = []
    for seed in (0, 0, 1):
        model, guide = pair(kind)
        torch.manual_seed(len(runs))
        state = torch.random.get_rng_state()
        history = fit(
            model, guide, uint8(30), epochs=3, batch_size=8, seed=seed, progress=False
        ).frame()
        assert torch.equal(torch.random.get_rng_state(), state)
        runs.append((history.drop(columns="seconds"), [*model.parameters(), *guide.parameters()]))
    assert runs[0][0].equals(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert not runs[0][0].equals(runs[2][0])


def test_every_epoch_visits_each_image_once_in_a_new_order():
    seen = []

    class Watching(GaussianGuide):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                seen.append(x)
            return super().forward(x)

    model = linear_model().float()
    data = uint8(21)
    fit(model, Watching(model, linear_encoder()), data, epochs=2, batch_size=8, progress=False)
    del seen[0]  # the call that sets everything up
    assert [len(batch) for batch in seen] == [8, 8, 5] * 2
    epochs = [torch.cat(seen[:3]), torch.cat(seen[3:])]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        rows = {tuple(image.flatten().tolist()) for image in epoch}
        assert rows == {tuple(image.flatten().tolist()) for image in data.float() / 255}


def test_learns_and_logs_on_real_digits():
    data = load_data("mnist5k").take(train=512, test=10)
    torch.manual_seed(0)
    model = ImageModel(data.image_shape, 5, sigma=initial_sigma(data.train))
    guide = GaussianGuide(model)
    train, validation = split_validation(data.train, 64)
    frame = fit(
        model, guide, train, epochs=5, learning_rate=2e-3, validation=validation, progress=False
    ).frame()
    assert list(frame["epoch"]) == [1, 2, 3, 4, 5]
    assert list(frame["step"]) == [4, 8, 12, 16, 20]
    assert frame["loss"].iloc[-1] < frame["loss"].iloc[0] - 50
    assert frame["validation_elbo"].iloc[-1] > frame["validation_elbo"].iloc[0]
    bound = frame["log_likelihood"] - frame["kl_z"] - frame["kl_global"]
    assert abs(bound.iloc[-1] + frame["loss"].iloc[-1]) < 30
    assert not guide.training
    assert not model.training


def test_objective_comes_from_the_argument_or_the_guide_or_is_trace_elbo():
    losses = {}
    objectives = {"guide's": None, "trace": Trace_ELBO(), "mf": TraceMeanField_ELBO()}
    for name, objective in objectives.items():
        model, guide = pair()
        frame = fit(model, guide, uint8(10), epochs=1, elbo=objective, progress=False).frame()
        losses[name] = frame["loss"].iloc[0]
    assert losses["guide's"] == losses["mf"]
    assert losses["guide's"] != losses["trace"]


def test_diagnostics_do_not_overwrite_the_history():
    class Named(GaussianGuide):
        def diagnostics(self, x):
            return {"loss": torch.tensor(-1.0), "step": torch.tensor(-2.0), "width": 3.0}

    model, guide = pair(Named)
    (row,) = fit(model, guide, uint8(10), epochs=1, progress=False).rows
    assert row["loss"] > 0
    assert row["step"] == 1
    assert (row["guide_loss"], row["guide_step"], row["width"]) == (-1, -2, 3)


class SameNoise(TraceMeanField_ELBO):
    """An objective that draws the same noise in every call."""

    def differentiable_loss(self, *args):
        with seeded(0, torch.device("cpu")):
            return super().differentiable_loss(*args)


def test_blocks_are_differentiated_at_the_same_parameters():
    results = []
    for separate in (False, True):

        class Blocks(GaussianGuide):
            def blocks(self, model):
                parts = [list(self.parameters()), list(model.parameters())]
                parts = parts if separate else [[*parts[0], *parts[1]]]  # noqa: B023
                return [Block(SameNoise(), part) for part in parts]

        model, guide = pair(Blocks)
        fit(model, guide, uint8(10), epochs=3, batch_size=4, progress=False)
        results.append([*model.parameters(), *guide.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("nameless", "name"), [(False, "guide.head.bias"), (True, r"of shape \(5,\)")]
)
def test_a_parameter_in_two_blocks_is_refused(nameless, name):
    hidden = torch.nn.Parameter(torch.zeros(5))  # no module holds it, so it has no name

    class Blocks(GaussianGuide):
        def blocks(self, model):
            parts = [self.parameters(), model.parameters()]
            shared = [hidden if nameless else self.head.bias]
            return [Block(Trace_ELBO(), [*part, *shared]) for part in parts]

    with pytest.raises(ValueError, match=f"the parameter {name} is in several blocks"):
        fit(*pair(Blocks), uint8(10), epochs=1, progress=False)


def test_blocks_train_their_own_parameters():
    class Blocks(GaussianGuide):
        def blocks(self, model):
            return [
                Block(Trace_ELBO(), list(self.encoder.parameters())),
                Block(TraceMeanField_ELBO(), list(model.parameters())),
            ]

    model, guide = pair(Blocks)
    before = [copy.deepcopy(m.state_dict()) for m in (guide.encoder, guide.head, model)]
    fit(model, guide, uint8(10), epochs=1, progress=False)
    changed = [
        any(not value.equal(old[name]) for name, value in m.state_dict().items())
        for m, old in zip((guide.encoder, guide.head, model), before, strict=True)
    ]
    assert changed == [True, False, True]


class Scaled(PyroModule):
    """A guide with parameters that Pyro's global store knows by the names of its attributes."""

    def __init__(self, model, encoder, lazy=False):
        super().__init__()
        self.encoder, self.head, self.lazy = encoder, nn.Linear(3, 2), lazy
        if not lazy:
            self.width = PyroParam(torch.ones(2), constraint=dist.constraints.positive)

    @PyroParam(constraint=dist.constraints.positive)
    def scale(self):  # exists only after first use
        return torch.ones(2)

    def forward(self, x):
        scale = self.scale if self.lazy else self.width
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head(self.encoder(x)), scale).to_event(1))


@pytest.mark.parametrize("lazy", [False, True])
def test_guides_of_one_class_have_parameters_of_their_own(lazy):
    options = {"epochs": 2, "batch_size": 5, "learning_rate": 0.1, "progress": False}

    def trained(seed):
        model, guide = pair(partial(Scaled, lazy=lazy))
        history = fit(model, guide, uint8(20), seed=seed, **options).frame()
        return model, guide, history.drop(columns="seconds")

    def values(run):
        return {name: value.clone() for name, value in run[1].state_dict().items()}

    with pyro.get_param_store().scope():
        alone = trained(1)
    with pyro.get_param_store().scope():
        first = trained(0)
        before, score = values(first), log_evidence(*first[:2], uint8(6), 5, seed=0).mean
        second = trained(1)
        assert second[2].equals(alone[2])
        assert all(torch.equal(v, alone[1].state_dict()[n]) for n, v in values(second).items())
        assert log_evidence(*first[:2], uint8(6), 5, seed=0).mean == score
        assert all(torch.equal(v, before[n]) for n, v in values(first).items())


def test_what_statements_made_in_pyros_store_is_trained_and_stays_there():
    class Mixed(Scaled):
        def forward(self, x):
            loc = pyro.param("loc", torch.zeros(2))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, self.width).to_event(1))

    def model(x):
        net = pyro.module("decoder", nn.Linear(2, 6), update_module_params=True)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x.flatten(1))

    def values():
        return [pyro.param(name).tolist() for name in ("loc", "decoder$$$weight")]

    other, guide = nn.Linear(1, 1), Mixed(None, linear_encoder())
    pyro.module("other", other)
    states = []
    for epochs in (1, 2):
        fit(model, guide, uint8(20), epochs=epochs, batch_size=5, progress=False)
        states.append(values())
        log_evidence(model, guide, uint8(3), 2)
        assert values() == states[-1]
    assert all(first != second for first, second in zip(*states, strict=True))
    assert states[0][0] != [0, 0]
    assert pyro.param("other$$$weight") is other.weight


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (uint8(5).long(), {}, "must be uint8 values 0 to 255 or floats, got torch.int64"),
        (uint8(5)[0], {}, r"\(1, 2, 3\)"),
        (uint8(5)[:0], {}, "(?i)empty|at least one|no image"),
        (torch.zeros(3, 1, 9, 9, dtype=torch.uint8), {}, r"expects images \(B, 1, 2, 3\)"),
        (uint8(5), {"epochs": 0}, "epochs must be at least 1, got 0"),
        (uint8(5), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (uint8(5), {"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        (uint8(5), {"on_nonfinite": "ignore"}, "on_nonfinite must be"),
        (uint8(5), {"backend": "fast"}, r"backend must be .*'eager'.*, got 'fast'"),
        (uint8(5), {"keep_best": True}, "pass validation="),
        (uint8(5), {"validation": uint8(3)[:0]}, "validation"),
        (uint8(5), {"validation": torch.zeros(3, 1, 9, 9)}, "expects images"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        fit(*pair(), data, **({"epochs": 1, "progress": False} | options))


def test_nothing_to_train():
    model = linear_model().float().requires_grad_(False)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="no parameter to train"):
        fit(model, guide, uint8(5), epochs=1, progress=False)


class Point(nn.Module):
    """q(z|x) is a point: nothing is drawn."""

    def __init__(self):
        super().__init__()
        self.encoder = linear_encoder(2).double()
        self.seen = []

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.seen.append(len(x))
        pyro.module("point", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))


@pytest.mark.parametrize("count", [512, 1100])
def test_validation_images_are_scored_in_parts_and_all_weigh_the_same(count):
    torch.manual_seed(0)
    model, guide, validation = linear_model(), Point(), uint8(count)
    validation[1024:] = 255  # the last part is unlike the others
    rows = fit(model, guide, uint8(20), epochs=1, validation=validation, progress=False).rows
    parts = [512, 512, 76] if count > 512 else [512]
    assert guide.seen[-len(parts) :] == parts
    x = validation.double() / 255
    z = guide.encoder(x)
    expected = (model.likelihood(z).log_prob(x) + model.prior().log_prob(z)).mean().detach()
    assert rows[0]["validation_elbo"] == pytest.approx(float(expected), rel=1e-12)


def test_a_training_leaves_modules_ready_for_evaluation_and_no_gradients():
    for epochs, learning_rate in ((1, 5e-4), (4, 1e30)):
        model, guide = pair()
        try:
            options = {"epochs": epochs, "learning_rate": learning_rate, "progress": False}
            fit(model, guide, uint8(20), batch_size=5, **options)
        except NonFiniteError:
            assert learning_rate > 1
        for program in (model, guide):
            assert not any(module.training for module in program.modules())
            assert all(p.grad is None for p in program.parameters())


class Normalised(GaussianGuide):
    """An encoder with batch normalisation, whose running statistics must see training only."""

    def __init__(self, model):
        encoder = linear_encoder()
        super().__init__(model, nn.Sequential(*encoder, nn.BatchNorm1d(3), nn.Dropout(0.5)))


def test_what_is_only_looked_at_leaves_no_trace_in_the_model():
    results = []
    for validation in (None, uint8(30)[20:]):
        torch.manual_seed(0)
        model = linear_model().float()
        guide = Normalised(model)
        data = uint8(30)[:20]
        fit(model, guide, data, epochs=2, batch_size=10, validation=validation, progress=False)
        results.append({k: v for k, v in guide.state_dict().items() if "running" in k})
    assert results[0]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
