"""The training step: backends agree, nothing reads the device, no update that is not finite."""

import copy
import logging
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import FAMILIES, make
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Dying, Kill, images, linear_encoder, linear_model, uint8

from guides import GaussianGuide
from pyro_gpvae import Checkpoints, NonFiniteError, fit
from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.model.elbo import Block
from pyro_gpvae.training import _divergence, loop
from pyro_gpvae.training import step as training_step
from pyro_gpvae.training.step import TrainingStep

# two full minibatches an epoch, and a last one of 5
N, B = 21, 8


@pytest.fixture
def interpreted(monkeypatch):
    """ "compiled" runs the graph that would be compiled, operator by operator."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


def tensors(model, guide):
    """All that a training changes, by name: parameters and buffers of modules, params of Pyro."""
    found = {}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            found |= {f"{role}.{n}": t for n, t in program.state_dict().items()}
    found |= {n: p.detach() for n, p in pyro.get_param_store().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def trained(make_pair, backend, *, data=None, epochs=3, **options):
    """What a training makes of a fresh pair, and its history."""
    pyro.clear_param_store()
    model, guide = make_pair()
    options = {"batch_size": B, "learning_rate": 5e-3, "progress": False, "seed": 3} | options
    data = uint8(N) if data is None else data
    history = fit(model, guide, data, epochs=epochs, backend=backend, **options)
    return tensors(model, guide), history.frame().drop(columns="seconds")


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    columns = list(expected[1].columns)
    assert list(found[1].columns) == columns
    ours, theirs = (torch.from_numpy(frame.to_numpy(float)) for _, frame in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_backends_agree(make_pair, **options):
    eager = trained(make_pair, "eager", **options)
    before = tensors(*make_pair())
    assert any(not torch.equal(eager[0][name], value) for name, value in before.items())
    assert_same(trained(make_pair, "compiled", **options), eager)


#: tests/training/test_compiled.py has all families, for two steps each.
SPECS = ["vae", "gp", "gp:estimator=weights", "me:3", "rme:3", "sa:2,line_search=False"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_backends_agree(spec, interpreted):
    epochs = 17 if spec in ("vae", "gp") else 2  # 51 steps, or 6
    assert_backends_agree(lambda: make(spec), epochs=epochs)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
# inside torch's own compiler, the first time
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("spec", ["gp"])  # half a minute each
def test_backends_agree_when_really_compiled(spec, monkeypatch):
    calls = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(1) or original(*a, **k))
    try:
        assert_backends_agree(lambda: make(spec), epochs=17)
    finally:
        torch.compiler.reset()
    assert calls


# --- which backend


def ours(caplog):
    """The lines in the log, without those of torch."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("pyro_gpvae")]


def branching():
    class Branching(GaussianGuide):
        def posterior(self, x):
            q = super().posterior(x)
            return q if x.mean() > 0 else dist.Normal(q.mean, 1.0).to_event(1)

    return of(Branching)


def of(kind, **options):
    torch.manual_seed(0)
    model = linear_model()
    return model, kind(model, linear_encoder(), **options).double()


def test_auto_takes_the_eager_way_where_it_must_and_says_so_once(monkeypatch, caplog):
    expected = trained(branching, "eager")
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="pyro_gpvae"):
        found = trained(branching, "auto")
    assert_same(found, expected, tolerance=0)
    (message,) = ours(caplog)
    assert "backend 'eager', not 'compiled'" in message
    assert "reads a tensor in Python" in message
    assert "\n" not in message


def test_auto_falls_back_when_the_compiler_fails(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nand a page of output")

    expected = trained(lambda: make("gp"), "eager")
    monkeypatch.setattr(torch, "compile", lambda graph, **_: broken)
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    assert_same(trained(lambda: make("gp"), "auto"), expected, tolerance=0)
    assert ours(caplog) == ["trained with backend 'eager', not 'compiled': no C++ compiler"]
    with pytest.raises(UnsupportedError, match="no C"):
        trained(lambda: make("gp"), "compiled")


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    def wrong(graph, **_):
        def function(*inputs):
            loss, *gradients = graph(*inputs)
            return [loss * 1.1, *gradients]

        return function

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(UnsupportedError, match="Use backend 'eager'"):
        trained(lambda: make("vae"), "compiled")


def test_auto_compiles_only_long_trainings(monkeypatch, caplog):
    made = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: made.append(1) or graph)
    trained(lambda: make("vae"), "auto")
    assert not made
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 9)
    trained(lambda: make("vae"), "auto")
    assert made
    assert not ours(caplog)


def test_a_backend_that_is_unknown_or_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"backend must be .*'eager'.*, got 'fast'"):
        trained(lambda: make("vae"), "fast")
    with pytest.raises(UnsupportedError, match="reads a tensor in Python"):
        trained(branching, "compiled")


# --- learning rates


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("spec", ["vae", "me:3", "rme:3"])
def test_a_parameter_may_have_a_learning_rate_of_its_own(spec, backend, interpreted):
    model, guide = make(spec)
    before = tensors(model, guide)
    step = TrainingStep(
        model, guide, uint8(B), N, learning_rates={"model.log_sigma": 1e-2}, backend=backend
    )
    step(uint8(B))
    for name, tensor in tensors(model, guide).items():
        # the first step of Adam has the length of its learning rate in every coordinate
        length = float((tensor - before[name]).abs().max())
        assert length == pytest.approx(1e-2 if name == "model.log_sigma" else 5e-4, rel=0.2), name


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_learning_rates_resume_bit_for_bit_and_belong_to_the_training(
    backend, interpreted, tmp_path
):
    options = {"learning_rates": {"model.log_sigma": 0.1, "guide.head.bias": 1e-4}}
    expected = trained(lambda: make("vae"), backend, **options)
    with pytest.raises(Kill):
        trained(lambda: make("vae"), backend, checkpoints=Dying(tmp_path), **options)
    with pytest.raises(ValueError, match=r"its learning_rates is \{'model.log_sigma'.*, not \{\}"):
        trained(lambda: make("vae"), backend, checkpoints=Checkpoints(tmp_path, resume=True))
    resumed = {"checkpoints": Checkpoints(tmp_path, resume=True), **options}
    assert_same(trained(lambda: make("vae"), backend, **resumed), expected, tolerance=0)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"log_sigma": 1e-2}, "names 'log_sigma', which is not trained; .* model.log_sigma, "),
        ({"model.decoder.0.weight": 1e-2}, "names 'model.decoder.0.weight', which is not trained"),
        ({"model.log_sigma": -1}, "learning_rate must be positive, got -1"),
    ],
)
def test_learning_rates_that_cannot_be_used(rates, message):
    with pytest.raises(ValueError, match=message):
        stepper(lambda: frozen("decoder"), learning_rates=rates)


# --- no reading of the device


class NoReading(TorchDispatchMode):
    """Fails where a tensor is copied to the host: there a GPU would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unread(monkeypatch):
    """Steps that must not look at a tensor from Python."""

    def refuse(*_, **__):
        raise AssertionError("reads the device")

    def step(stepper, batch):
        with monkeypatch.context() as patch, NoReading():
            for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, refuse)
            return stepper(batch)

    return step


def stepper(make_pair, **options):
    return TrainingStep(*make_pair(), uint8(N)[:B], N, **options)


@pytest.mark.parametrize("spec", FAMILIES)
def test_a_step_does_not_read_the_device(spec, unread):
    step = stepper(lambda: make(spec))
    step(uint8(N)[:B].clamp(max=254))
    loss = unread(step, uint8(N)[:B])
    assert torch.isfinite(unread(step, uint8(N)[:5]))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("spec", ["vae", "me:3"])
def test_a_traced_step_does_not_read_the_device(spec, unread, interpreted):
    step = stepper(lambda: make(spec), backend="compiled")
    step(uint8(N)[:B].clamp(max=254))
    unread(step, uint8(N)[:B])


# --- not finite


class Breaking(GaussianGuide):
    """Its mean is not a number for images whose first pixel is white, or while it is told so."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.register_buffer("broken", torch.zeros(()), persistent=False)

    def posterior(self, x):
        q = super().posterior(x)
        bad = (x.flatten(1)[:, :1] == 1) | (self.broken > 0)
        return dist.Normal(torch.where(bad, torch.nan, q.mean), q.stddev).to_event(1)


class SlopeBreaks(Breaking):
    """Its loss is finite, its gradient is not."""

    def posterior(self, x):
        q = GaussianGuide.posterior(self, x)
        root = (q.mean * (1 - self.broken)).square().sqrt()  # 0 · ∞ in the backward pass
        return dist.Normal(q.mean + self.broken * root, q.stddev).to_event(1)


def with_white(number):
    """Images of which one breaks the guide."""
    data = uint8(N).clamp(max=254)
    data[number, 0, 0, 0] = 255
    return data


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [Breaking, SlopeBreaks])
@pytest.mark.parametrize("good", [0, 2])
def test_an_update_that_is_not_finite_is_not_made(kind, backend, good, interpreted):
    results = []
    for bad in (True, False):
        model, guide = of(kind)
        step = TrainingStep(
            model, guide, uint8(N)[:B].clamp(max=254), N, backend=backend, on_nonfinite="skip"
        )
        for seed in range(good):
            torch.manual_seed(seed)
            step(uint8(N)[seed : seed + B].clamp(max=254))
        if bad:
            before = tensors(model, guide), copy.deepcopy(step.optimizers[0].state_dict())
            loss, seen = float(step.counters.loss), float(step.counters.seen)
            guide.broken.fill_(1.0)
            step(uint8(N)[:B].clamp(max=254))
            guide.broken.fill_(0.0)
            after = tensors(model, guide), step.optimizers[0].state_dict()
            assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
            for number, moments in after[1]["state"].items():
                for name, moment in moments.items():
                    old = before[1]["state"].get(number, {}).get(name, torch.zeros_like(moment))
                    assert torch.equal(moment, old), name
            assert int(step.counters.skipped) == 1
            assert (float(step.counters.loss), float(step.counters.seen)) == (loss, seen)
        torch.manual_seed(9)
        step(uint8(N)[:B].clamp(max=254))
        assert int(step.counters.refused) == 0
        results.append(tensors(model, guide))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_an_update_that_is_not_made_leaves_running_statistics(backend, interpreted):
    class Normalised(Breaking):
        def __init__(self, model, encoder):
            super().__init__(model, nn.Sequential(encoder, nn.BatchNorm1d(3)))

        def posterior(self, x):
            return super().posterior(torch.where(self.broken > 0, x * torch.nan, x))

    model, guide = of(Normalised)
    step = TrainingStep(model, guide, uint8(N)[:B], N, backend=backend, on_nonfinite="skip")
    step(uint8(N)[:B].clamp(max=254))
    before = tensors(model, guide)
    guide.broken.fill_(1.0)
    step(uint8(N)[:B].clamp(max=254))
    assert int(step.counters.skipped) == 1
    assert all(torch.equal(tensors(model, guide)[name], v) for name, v in before.items())
    guide.broken.fill_(0.0)
    step(uint8(N)[:B].clamp(max=254))
    name = "guide.encoder.1.running_mean"
    assert not torch.equal(tensors(model, guide)[name], before[name])
    guide.broken.fill_(1.0)
    with pytest.raises(NonFiniteError):
        fit(model, guide, uint8(N), epochs=1, batch_size=B, backend=backend, progress=False)
    assert bool(tensors(model, guide)[name].isfinite().all())


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_halt_makes_no_update_after_the_first_that_is_refused(backend, interpreted):
    model, guide = of(Breaking)
    data = uint8(N).clamp(max=254)
    step = TrainingStep(model, guide, data[:B], N, backend=backend, on_nonfinite="stop")
    step(uint8(N)[:B].clamp(max=254))
    before = tensors(model, guide)
    guide.broken.fill_(1.0)
    step(uint8(N)[:B].clamp(max=254))
    guide.broken.fill_(0.0)
    for _ in range(3):
        step(uint8(N)[:B].clamp(max=254))
    assert all(torch.equal(tensors(model, guide)[name], v) for name, v in before.items())
    assert int(step.counters.skipped) == 4
    assert int(step.counters.seen) == B


def place_of(number, seed=3):
    """The step of the first epoch in which an image is seen."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return int((order == number).nonzero()) // B + 1


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("number", [0, 4, 17])
@pytest.mark.parametrize("interval", [1, 100], ids=["every step", "late"])
def test_stop_names_the_step_and_the_image(backend, number, interval, interpreted, monkeypatch):
    # a GPU is read every 100 steps, and at the end of an epoch
    monkeypatch.setattr(loop, "_read_interval", lambda device: interval)
    with pytest.raises(NonFiniteError) as caught:
        trained(lambda: of(Breaking), backend, data=with_white(number))
    assert caught.value.step == place_of(number)
    assert caught.value.images == (number,)
    assert f"at step {place_of(number)}:" in str(caught.value)
    assert f"in image {number} (1 of the" in str(caught.value)


@pytest.mark.slow
def test_stop_names_the_block_that_broke_however_late_it_is_read(interpreted, monkeypatch):
    class Second(Breaking):
        """Three blocks; only the second breaks."""

        def second(self, x):
            q = self.posterior(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", q)

        def forward(self, x):
            q = GaussianGuide.posterior(self, x)
            with pyro.plate("data", len(x)):
                return pyro.sample("z", q)

        def blocks(self, model):
            head, encoder = list(self.head.parameters()), list(self.encoder.parameters())
            return [
                Block(TraceMeanField_ELBO(), encoder),
                Block(TraceMeanField_ELBO(), head, guide=self.second),
                Block(TraceMeanField_ELBO(), list(model.parameters())),
            ]

    monkeypatch.setattr(loop, "_read_interval", lambda device: 100)
    for number in (0, 4, 17):
        with pytest.raises(NonFiniteError) as caught:
            trained(lambda: of(Second), "compiled", data=with_white(number))
        assert caught.value.step == place_of(number)
        assert caught.value.images == (number,)
        assert "site 'z'" in str(caught.value)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_skipped_updates_are_counted_up_to_a_limit(backend, interpreted, monkeypatch):
    with pytest.warns(UserWarning, match=f"not finite at step {place_of(4)}: this update is"):
        _, frame = trained(
            lambda: of(Breaking), backend, data=with_white(4), epochs=4, on_nonfinite="skip"
        )
    assert list(frame["skipped"]) == [1, 2, 3, 4]
    assert bool(frame["loss"].notna().all())  # of the other minibatches
    monkeypatch.setattr(_divergence, "MAX_SKIPPED", 2)
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(NonFiniteError) as caught:
        trained(
            lambda: of(Breaking),
            backend,
            data=with_white(4),
            epochs=9,
            on_nonfinite="skip",
        )
    assert caught.value.images == (4,)
    assert "after 2 skipped updates" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "first", "second"),
    [
        ("gp", "compiled", "compiled"),
        ("vae", "eager", "compiled"),
        ("vae", "compiled", "eager"),
    ],
)
def test_resumes_bit_for_bit(spec, first, second, interpreted, tmp_path):
    expected = trained(lambda: make(spec), second, epochs=2)
    with pytest.raises(Kill):
        trained(lambda: make(spec), first, epochs=2, checkpoints=Dying(tmp_path, every=1))
    saving = Checkpoints(tmp_path, resume=True)
    found = trained(lambda: make(spec), second, epochs=2, checkpoints=saving)
    assert_same(found, expected, tolerance=0 if first == second else 1e-10)


# --- programs of all sorts


class Averaging(GaussianGuide):
    """Writes to a buffer in every call, and uses it."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x):
        q = self.posterior(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(q.mean + 0.1 * self.average, q.stddev).to_event(1))
        self.average.mul_(0.9).add_(0.1 * z.detach().mean(0))
        return z


def normalised(dropout=0.0):
    torch.manual_seed(0)
    model = linear_model()
    layers = [*linear_encoder(), nn.BatchNorm1d(3)]
    layers += [nn.Dropout(dropout)] if dropout else []
    return model, GaussianGuide(model, nn.Sequential(*layers)).double()


def sharing():
    """A module and a parameter that are both the model's and the guide's."""
    model, guide = of(GaussianGuide)
    guide.decoder = model.decoder
    guide.head.bias = nn.Parameter(torch.zeros(4).double())
    guide.tied = guide.head.bias
    return model, guide


def frozen(part):
    model, guide = of(GaussianGuide)
    (model.decoder if part == "decoder" else guide.encoder).requires_grad_(False)
    return model, guide


class OwnTwoBlocks(GaussianGuide):
    """Two blocks with guides of their own."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.extra = nn.Parameter(torch.ones(2))

    def other(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.extra.expand(len(x), 2), 1.0).to_event(1))

    def blocks(self, model):
        mine = [*self.encoder.parameters(), *self.head.parameters()]
        return [
            Block(TraceMeanField_ELBO(), mine),
            Block(TraceMeanField_ELBO(), [self.extra], guide=self.other),
        ]


@pytest.mark.parametrize(
    "make_pair",
    [
        lambda: of(Averaging),
        lambda: of(OwnTwoBlocks),
        normalised,
        sharing,
        lambda: frozen("decoder"),
        lambda: frozen("encoder"),
    ],
    ids=[
        "buffer",
        "two blocks",
        "batch normalisation",
        "shared",
        "frozen decoder",
        "frozen encoder",
    ],
)
def test_backends_agree_for_programs_of_all_sorts(make_pair, interpreted):
    data = uint8(22)  # 22 = 8 + 8 + 6
    assert_backends_agree(make_pair, data=data, validation=uint8(5))


@pytest.mark.parametrize(("frozen", "mode"), [(True, False), (True, True), (False, False)])
def test_networks_that_are_frozen_in_evaluation_mode_stay_in_it(frozen, mode):
    def make_pair():
        model, guide = normalised()
        guide.encoder.requires_grad_(not frozen).train(mode)
        return model, guide

    found, _ = trained(make_pair, "eager", data=uint8(16), epochs=2)
    same = torch.equal(found["guide.encoder.3.running_mean"], torch.zeros(3).double())
    assert same == (frozen and not mode)


@pytest.mark.parametrize("how", ["a part", "shared elements"])
def test_parameters_that_are_parts_of_other_tensors(how):
    """Fused kernels of Adam go through memory, whatever the strides."""

    results = []
    for own in (True, False):

        def make_pair(own=own):
            model, guide = make("vae")
            large = torch.linspace(-1, 1, 24).double().reshape(3, 8)
            weight = large.T[:4] if how == "a part" else large[0, 0].expand(4, 3)
            guide.head.weight = nn.Parameter(weight.contiguous() if own else weight)
            return model, guide

        results.append(trained(make_pair, "eager", epochs=2))
    assert_same(*results)


def param_statements():
    model = linear_model()

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2).double())
        scale = pyro.param("scale", torch.ones(2).double(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](6, 2)
        self.scale = PyroParam(torch.ones(2).double(), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.linear(x.flatten(1)), self.scale).to_event(1))


def pyro_module():
    torch.manual_seed(0)
    return linear_model(), Module().double()


@pytest.mark.parametrize(
    ("make_pair", "message"),
    [
        (param_statements, "belongs to no module"),
        (pyro_module, "as PyroParam does"),
        (lambda: normalised(dropout=0.5), "draws random numbers by aten::"),
    ],
)
def test_guides_that_no_graph_can_hold_take_the_eager_way(
    make_pair, message, interpreted, monkeypatch, caplog
):
    with pytest.raises(UnsupportedError, match=message):
        trained(make_pair, "compiled")
    expected = trained(make_pair, "eager")
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    caplog.clear()
    assert_same(trained(make_pair, "auto"), expected, tolerance=0)
    assert len(ours(caplog)) == 1


def test_pyro_modules_with_parameters_of_their_own(interpreted):
    with pyro.settings.context(module_local_params=True):
        assert_backends_agree(pyro_module)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoLowRankMultivariateNormal"])
def test_pyros_autoguides(name, interpreted, monkeypatch, caplog):
    """They have a latent vector for each image: all images are one minibatch."""

    def make_pair():
        torch.manual_seed(0)
        model = linear_model()
        options = {"rank": 2} if "LowRank" in name else {}
        guide = getattr(pyro.infer.autoguide, name)(model, **options)
        with torch.no_grad():
            guide(images(6))  # an autoguide has no parameters before its first call
        return model, guide

    options = {"data": uint8(6), "batch_size": 6}
    expected = trained(make_pair, "eager", **options)
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    assert_same(trained(make_pair, "auto", **options), expected, tolerance=1e-10)


def counting():
    """A guide that counts its calls in a closure, which a graph would freeze."""
    calls = [0]

    class Counting(GaussianGuide):
        def forward(self, x):
            calls[0] += 1
            q = self.posterior(x)
            with pyro.plate("data", len(x)):
                loc = q.mean * (1 + 1e-10 * calls[0])  # as a slow schedule
                return pyro.sample("z", dist.Normal(loc, q.stddev).to_event(1))

    return of(Counting)


def test_hidden_counters_are_found(interpreted):
    words = "cannot be trained with backend 'compiled': .* Use backend 'eager'"
    with pytest.raises(UnsupportedError, match=words):
        trained(counting, "compiled")


@pytest.mark.parametrize("register", ["hook", "post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_called(register, interpreted):
    calls = []
    model, guide = make("vae")
    getattr(guide.head.weight, f"register_{register}")(lambda *_: calls.append(1))
    with pytest.raises(UnsupportedError, match=r"guide\.head\.weight has a hook, which"):
        TrainingStep(model, guide, uint8(N)[:B], N, backend="compiled")
    step = TrainingStep(model, guide, uint8(N)[:B], N)
    calls.clear()
    step(uint8(N)[:B].clamp(max=254))
    assert calls


class InList(GaussianGuide):
    """Its head is in a list, where nobody finds it."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.heads = [self.head]
        del self.head

    def encode(self, x):
        features = self.encoder(x)
        head = self.heads[0].to(features.dtype)
        return (features, *head(features).chunk(2, dim=-1))


def test_parameters_that_would_never_be_trained():
    def of_another_model():
        return linear_model(), make("sa:1")[1]

    for make_pair in (of_another_model, lambda: of(InList)):
        model, guide = make_pair()
        with pytest.raises(ValueError, match=r"shape \(.*would never be trained\. Let both be"):
            fit(model, guide, uint8(N), epochs=1, progress=False)

    class Slope(GaussianGuide):
        """It differentiates in a leaf of its own."""

        def posterior(self, x):
            x = x.detach().requires_grad_()
            return super().posterior(x)

    model, guide = of(Slope)
    fit(model, guide, uint8(N), epochs=1, progress=False)
    model, guide = of(InList)
    guide.heads[0].requires_grad_(False)
    fit(model, guide, uint8(N), epochs=1, progress=False)


@pytest.mark.parametrize("read", [lambda x: x.numpy().tolist(), lambda x: x.tolist()])
def test_values_that_python_has_read_are_not_frozen(read, interpreted):
    class Sorting(GaussianGuide):
        """It sorts the pixels of an image in Python."""

        def posterior(self, x):
            rows = [sorted(row) for row in read(x.flatten(1))]
            return super().posterior(torch.tensor(rows, dtype=x.dtype).reshape(x.shape))

    words = "cannot be trained with backend 'compiled': "
    with pytest.raises(UnsupportedError, match=words):
        trained(lambda: of(Sorting), "compiled")


def test_an_objective_that_counts_is_refused(interpreted):
    class Annealed(Trace_ELBO):
        steps = 0

        def differentiable_loss(self, model, guide, *args, **kwargs):
            self.steps += 1
            total = 0.0
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                total = total - model_trace.log_prob_sum() + guide_trace.log_prob_sum()
            return total * (1 - 0.5**self.steps)

    with pytest.raises(UnsupportedError, match="objective changes its attributes"):
        trained(lambda: make("vae"), "compiled", elbo=Annealed())
    trained(lambda: make("vae"), "eager", elbo=Annealed())


def test_building_a_step_changes_nothing(interpreted):
    for make_pair in (normalised, sharing):
        model, guide = make_pair()
        model.train(), guide.train()
        before = tensors(model, guide)
        parameters = [*model.parameters(), *guide.parameters()]
        states = []  # the search for parameters draws once, whatever the backend
        for backend in ("eager", "compiled"):
            torch.manual_seed(0)
            step = TrainingStep(model, guide, uint8(N)[:B], N, backend=backend, on_nonfinite="skip")
            states.append(torch.random.get_rng_state())
        assert torch.equal(*states)
        assert all(torch.equal(tensors(model, guide)[n], v) for n, v in before.items())
        now = [*model.parameters(), *guide.parameters()]
        assert all(a is b for a, b in zip(now, parameters, strict=True))
        assert all(p.grad is None for p in now)
        assert model.training
        assert guide.training
        assert int(step.counters.skipped) == 0


# --- CUDA


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("spec", FAMILIES)
def test_no_synchronisation_on_a_gpu(spec):
    model, guide = (program.cuda() for program in make(spec, torch.float32))
    data = uint8(N).cuda()
    step = TrainingStep(model, guide, data[:B], N, backend="eager")
    for batch in (data[:B], data[:5]):  # makes the moments
        step(batch)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = [step(batch) for batch in (data[:B], data[:5])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(loss.isfinite()) for loss in losses)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["vae", "gp", "rme:3"])
def test_backends_agree_on_a_gpu(spec):
    def on_cuda():
        return [program.cuda() for program in make(spec)]

    eager = trained(on_cuda, "eager", data=uint8(N).cuda(), epochs=3)
    compiled = trained(on_cuda, "compiled", data=uint8(N).cuda(), epochs=3)
    assert_same(compiled, eager, tolerance=1e-8)
