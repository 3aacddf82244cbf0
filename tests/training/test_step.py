"""The training step: backends agree, nothing reads the device, no update that is not finite."""

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
from trainings import B, N, assert_backends_agree, assert_same, of, tensors, trained

from guides import GaussianGuide
from pyro_gpvae import Checkpoints, fit
from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.model.elbo import Block
from pyro_gpvae.training import step as training_step
from pyro_gpvae.training.step import TrainingStep


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
# inside torch's own compiler, the first time
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_backends_agree_when_really_compiled(monkeypatch):
    calls = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(1) or original(*a, **k))
    try:
        assert_backends_agree(lambda: make("gp"), epochs=17)
    finally:
        torch.compiler.reset()
    assert calls


# --- which backend


def ours(caplog):
    """The lines in the log, without those of torch."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("pyro_gpvae")]


class Branching(GaussianGuide):
    def posterior(self, x):
        q = super().posterior(x)
        return q if x.mean() > 0 else dist.Normal(q.mean, 1.0).to_event(1)


def param_statements():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2).double())
        scale = pyro.param("scale", torch.ones(2).double(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return linear_model(), guide


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
        (lambda: of(Branching), "reads a tensor in Python"),
        (param_statements, "belongs to no module"),
        (pyro_module, "as PyroParam does"),
        (lambda: normalised(dropout=0.5), "draws random numbers by aten::"),
    ],
)
def test_auto_takes_the_eager_way_where_it_must_and_says_so_once(
    make_pair, message, interpreted, monkeypatch, caplog
):
    with pytest.raises(UnsupportedError, match=message):
        trained(make_pair, backend="compiled")
    expected = trained(make_pair, backend="eager")
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    caplog.clear()
    assert_same(trained(make_pair, backend="auto"), expected)
    (line,) = ours(caplog)
    assert "backend 'eager', not 'compiled': " in line
    assert message in line
    assert "\n" not in line


def test_auto_falls_back_when_the_compiler_fails(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nand a page of output")

    expected = trained(lambda: make("gp"), backend="eager")
    monkeypatch.setattr(torch, "compile", lambda graph, **_: broken)
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    assert_same(trained(lambda: make("gp"), backend="auto"), expected)
    assert ours(caplog) == ["trained with backend 'eager', not 'compiled': no C++ compiler"]
    with pytest.raises(UnsupportedError, match="no C"):
        trained(lambda: make("gp"), backend="compiled")


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    def wrong(graph, **_):
        def function(*inputs):
            loss, *gradients = graph(*inputs)
            return [loss * 1.1, *gradients]

        return function

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(UnsupportedError, match="Use backend 'eager'"):
        trained(lambda: make("vae"), backend="compiled")


def test_auto_compiles_only_long_trainings(monkeypatch, caplog):
    made = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: made.append(1) or graph)
    trained(lambda: make("vae"), backend="auto")
    assert not made
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 9)
    trained(lambda: make("vae"), backend="auto")
    assert made
    assert not ours(caplog)


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


@pytest.mark.parametrize(
    ("spec", "backend"),
    [*((spec, "eager") for spec in FAMILIES), ("vae", "compiled"), ("me:3", "compiled")],
)
def test_a_step_does_not_read_the_device(spec, backend, unread, interpreted):
    step = stepper(lambda: make(spec), backend=backend)
    step(uint8(N)[:B].clamp(max=254))
    assert torch.isfinite(unread(step, uint8(N)[:B]))
    assert torch.isfinite(unread(step, uint8(N)[:5]))


# --- resuming


RATES = {"learning_rates": {"model.log_sigma": 0.1, "guide.head.bias": 1e-4}}


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ("compiled", "compiled", {}),
        ("eager", "compiled", {}),
        ("compiled", "eager", {}),
        ("eager", "eager", RATES),
        ("compiled", "compiled", RATES),
    ],
)
def test_resumes_bit_for_bit(first, second, options, interpreted, tmp_path):
    expected = trained(lambda: make("vae"), backend=second, epochs=2, **options)
    with pytest.raises(Kill):
        trained(lambda: make("vae"), backend=first, checkpoints=Dying(tmp_path), **options)
    resume = {"epochs": 2, "checkpoints": Checkpoints(tmp_path, resume=True)}
    with pytest.raises(ValueError, match=r"its learning_rates is \{.*, not \{'model.log_sigma': 1"):
        trained(lambda: make("vae"), learning_rates={"model.log_sigma": 1.0}, **resume)
    found = trained(lambda: make("vae"), backend=second, **resume, **options)
    assert_same(found, expected, 0 if first == second else 1e-10)


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

    found, _ = trained(make_pair, backend="eager", data=uint8(16), epochs=2)
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

        results.append(trained(make_pair, backend="eager", epochs=2))
    assert_same(*results)


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
    expected = trained(make_pair, backend="eager", **options)
    monkeypatch.setattr(training_step, "WORTH_COMPILING", 1)
    assert_same(trained(make_pair, backend="auto", **options), expected, 1e-10)


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
        trained(lambda: make("vae"), backend="compiled", elbo=Annealed())
    trained(lambda: make("vae"), backend="eager", elbo=Annealed())


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

    eager = trained(on_cuda, backend="eager", data=uint8(N).cuda(), epochs=3)
    compiled = trained(on_cuda, backend="compiled", data=uint8(N).cuda(), epochs=3)
    assert_same(compiled, eager, 1e-8)
