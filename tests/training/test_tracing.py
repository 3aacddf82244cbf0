"""A Pyro objective as a traced function of tensors: the same numbers, and no side effects."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from families import FAMILIES, READERS, make
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import PerImage, pair
from pyro_gpvae.core._errors import UnsupportedError, unvalidated
from pyro_gpvae.core._seeds import random_state
from pyro_gpvae.model.elbo import Block, without_host_sync
from pyro_gpvae.training._tracing import trace_loss

N = 50
B = 8


class Objective:
    """The objective of a block of a guide, eager and traced."""

    def __init__(self, model, guide, block=None, elbo=None):
        self.model, self.guide = model, guide
        trained = list({id(p): p for m in (model, guide) for p in m.parameters()}.values())
        trained = [p for p in trained if p.requires_grad]
        objective = elbo or (guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO())
        block = block or Block(objective, trained)
        self.parameters = list(block.parameters)
        self.objective = without_host_sync(block.elbo)
        model, guide = block.model or model, block.guide or guide
        self.programs = PerImage(pair(model, guide), N), PerImage(guide, N)

    def __call__(self, x):
        return self.objective.differentiable_loss(*self.programs, x)

    def traced(self, x):
        modules = {"model": self.model, "guide": self.guide}
        return trace_loss(self, modules, self.parameters, x)

    def eager(self, x):
        """Loss and gradients by parameter."""
        with unvalidated():
            loss = self(x)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, gradients, strict=True)
        return loss.detach(), {id(p): g for p, g in pairs if g is not None}

    def assert_same(self, traced, x, seed=3):
        """The traced function has the value and the gradients of the eager way."""
        torch.manual_seed(seed)
        loss, gradients = self.eager(x)
        after = torch.random.get_rng_state()
        torch.manual_seed(seed)
        found, pure_gradients = traced(x, traced.noise())
        assert torch.equal(torch.random.get_rng_state(), after)  # the same noise, and no more
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-10)
        assert {id(traced.leaves[name]) for name in traced.used} == gradients.keys()
        for name, gradient in zip(traced.used, pure_gradients, strict=True):
            expected = gradients[id(traced.leaves[name])]
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def objectives(model, guide):
    blocks = guide.blocks(model) if hasattr(guide, "blocks") else [None]
    return [Objective(model, guide, block) for block in blocks]


@torch.no_grad()
def disturb(*modules):
    """Moves all parameters in place, as an optimiser does."""
    for module in modules:
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("spec", FAMILIES)
def test_every_family_has_the_same_loss_and_gradients(spec):
    model, guide = make(spec)
    disturb(guide)
    for objective in objectives(model, guide):
        traced = objective.traced(images(B, seed=4))
        objective.assert_same(traced, images(B))
        disturb(model, guide)  # it sees what an optimiser does to the parameters
        objective.assert_same(traced, images(B, seed=5), seed=6)


@pytest.mark.parametrize("spec", READERS)
def test_families_that_read_the_device_say_so(spec):
    (objective,) = objectives(*make(spec))
    with pytest.raises(UnsupportedError, match=r"reads a tensor in Python, as in .*\.item\(\)"):
        objective.traced(images(B))


def normalised():
    """A guide with batch normalisation, and a module that is also the model's."""
    torch.manual_seed(0)
    model = linear_model()
    encoder = nn.Sequential(*linear_encoder(), nn.BatchNorm1d(3))
    guide = GaussianGuide(model, encoder).double().train()
    guide.shared = model.decoder
    return model, guide


@pytest.mark.parametrize("make_pair", [normalised, lambda: make("rme:2")])
def test_tracing_leaves_no_trace(make_pair):
    model, guide = make_pair()
    modules = nn.ModuleDict({"model": model, "guide": guide})
    before = {n: t.clone() for n, t in modules.state_dict().items()}
    tensors = [*modules.named_parameters(), *modules.named_buffers()]
    random.gauss(0, 1), np.random.normal()  # noqa: NPY002 (both keep a second number)
    state = random_state(torch.device("cpu"))
    for objective in objectives(model, guide):
        objective.traced(images(B))
    now = random_state(torch.device("cpu"))
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert all(torch.equal(v, before[n]) for n, v in modules.state_dict().items())
    for (name, old), (same, new) in zip(
        tensors, [*modules.named_parameters(), *modules.named_buffers()], strict=True
    ):
        assert name == same
        assert new is old
        assert new.grad is None
    assert pyro.settings.get("validate_distributions_pyro") is True


def test_a_module_that_model_and_guide_share():
    objective = Objective(*normalised())
    objective.assert_same(objective.traced(images(B)), images(B))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_written_where_they_are(training):
    results = []
    for kind in ("eager", "traced"):
        model, guide = normalised()
        guide.train(training)
        objective = Objective(model, guide)
        traced = objective.traced(images(B)) if kind == "traced" else None
        torch.manual_seed(1)
        for x in images(3 * B, seed=7).split(B):
            objective.eager(x) if traced is None else traced(x, traced.noise())
        layer = guide.encoder[3]
        assert int(layer.num_batches_tracked) == (3 if training else 0)
        results.append((layer.running_mean, layer.running_var))
    assert torch.equal(results[0][0], torch.zeros(3).double()) is not training
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)


class Guide(GaussianGuide):
    """A guide to derive mischief from."""

    def __init__(self, model):
        super().__init__(model, linear_encoder())
        self.calls = 0
        self.kept = torch.zeros(2, dtype=torch.float64)
        self.own = torch.Generator().manual_seed(0)
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))

    def shifted(self, x, shift):
        q = self.posterior(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(q.mean + shift, q.stddev).to_event(1))


def guide_of(forward, base=Guide):
    kind = type(forward.__name__, (base,), {"forward": forward})
    torch.manual_seed(0)
    model = linear_model()
    return model, kind(model).double().train()


def branches(self, x):
    if x.mean() > 0.5:
        return self.shifted(x, 1.0)
    return Guide.forward(self, x)


def takes_a_number(self, x):
    return self.shifted(x, float(x.mean()))


def counts(self, x):
    self.calls += 1
    return self.shifted(x, 1 / self.calls)


def makes_an_attribute(self, x):
    self.new = len(x)
    return Guide.forward(self, x)


def keeps_a_tensor(self, x):
    z = self.shifted(x, self.kept)
    self.kept = 0.9 * self.kept + 0.1 * z.detach().mean(0)
    return z


def writes_to_a_tensor_that_is_no_buffer(self, x):
    z = self.shifted(x, self.kept)
    self.kept.mul_(0.9).add_(0.1 * z.detach().mean(0))
    return z


def replaces_a_buffer(self, x):
    z = self.shifted(x, self.average)
    self.average = 0.9 * self.average + 0.1 * z.detach().mean(0)
    return z


def draws_from_numpy(self, x):
    return self.shifted(x, np.random.normal())  # noqa: NPY002


def draws_from_python(self, x):
    return self.shifted(x, random.random())


def counts_in_a_dictionary(self, x):
    self.numbers = getattr(self, "numbers", {"calls": 0})
    self.numbers["calls"] += 1
    return self.shifted(x, 0.0)


def masks(self, x):
    return self.shifted(x, x[x > 0.5].mean())


def draws_from_a_generator_of_its_own(self, x):
    return self.shifted(x, torch.randn(2, generator=self.own, dtype=x.dtype))


def fills_a_part_of_a_tensor(self, x):
    noise = torch.zeros(len(x), 4, dtype=x.dtype)
    noise[:, :2].normal_()
    return self.shifted(x, noise[:, :2] + noise[:, 2:])


def fills_a_tensor_that_was_used(self, x):
    noise = torch.zeros(len(x), 2, dtype=x.dtype)
    zero = noise * 1.0
    return self.shifted(x, noise.normal_() * 0 + zero)


def draws_gamma(self, x):
    concentration = 1 + self.encode(x)[1].square()
    return self.shifted(x, dist.Gamma(concentration, torch.ones_like(concentration)).rsample())


def draws_bernoulli(self, x):
    probs = torch.sigmoid(self.encode(x)[1])
    return self.shifted(x, torch.bernoulli(probs))


def drops_out(self, x):
    return self.shifted(x, torch.nn.functional.dropout(torch.ones_like(x).flatten(1)[:, :2]))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (branches, "reads a tensor in Python"),
        (takes_a_number, "reads a tensor in Python"),
        (counts, "changes its attribute guide.calls"),
        (counts_in_a_dictionary, "changes its attribute guide.numbers"),
        (masks, "shape of what aten.index.Tensor returns depends on data"),
        (makes_an_attribute, "changes its attribute guide.new"),
        (keeps_a_tensor, "changes its attribute guide.kept"),
        (writes_to_a_tensor_that_is_no_buffer, r"writes to a tensor of shape \(2,\)"),
        (
            replaces_a_buffer,
            "replaces its tensor average, as PyroParam does: .*write to it in place",
        ),
        (draws_from_numpy, "random numbers of numpy or Python: use pyro.sample"),
        (draws_from_python, "random numbers of numpy or Python: use pyro.sample"),
        (draws_from_a_generator_of_its_own, "from a generator of its own"),
        (fills_a_part_of_a_tensor, "into a part of a tensor"),
        (fills_a_tensor_that_was_used, "into a part of a tensor"),
        (draws_gamma, "draws random numbers by aten::_standard_gamma"),
        (draws_bernoulli, "draws random numbers by aten::bernoulli"),
        (drops_out, "draws random numbers by aten::"),
    ],
)
def test_what_no_graph_can_hold_is_refused(forward, words):
    model, guide = guide_of(forward)
    objective = Objective(model, guide)
    with unvalidated():
        Objective(*guide_of(forward))(images(B))  # eager, it works
    leaves = dict(guide.named_parameters())
    with pytest.raises(UnsupportedError, match=words):
        objective.traced(images(B))
    assert all(p is leaves[n] for n, p in guide.named_parameters())


def test_parameters_of_param_statements_are_refused():
    model = linear_model()

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    guide(images(1))
    loc = pyro.param("loc").unconstrained()
    objective = without_host_sync(Trace_ELBO())

    def loss(x):
        return objective.differentiable_loss(PerImage(model, N), PerImage(guide, N), x)

    with pytest.raises(UnsupportedError, match=r"\(2,\) belong to no module.*pyro.param"):
        trace_loss(loss, {"model": model}, [*model.parameters(), loc], images(B))
    with pytest.raises(UnsupportedError, match=r"a parameter of shape \(2,\) that belongs to no"):
        trace_loss(loss, {"model": model}, list(model.parameters()), images(B))


def test_a_parameter_outside_the_modules_is_refused():
    model, guide = guide_of(Guide.forward)
    hidden = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    guide.posterior = lambda x: dist.Normal(x.flatten(1)[:, :2] + hidden, 1.0).to_event(1)
    with pytest.raises(UnsupportedError, match=r"a parameter of shape \(2,\) that belongs to no"):
        Objective(model, guide).traced(images(B))


class Counted(Trace_ELBO):
    steps = 0

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.steps += 1
        return self.steps * super().differentiable_loss(model, guide, *args, **kwargs)


def test_pyros_own_objective_reads_the_device():
    objective = Objective(*guide_of(Guide.forward), elbo=Counted())
    with pytest.raises(UnsupportedError, match="reads a tensor in Python"):
        objective.traced(images(B))


def test_errors_of_the_program_stay_what_they_are():
    def breaks(self, x):
        raise RuntimeError("mine")

    model, guide = guide_of(Guide.forward)
    objective = Objective(model, guide)
    type(guide).forward = breaks
    leaves = dict(guide.named_parameters())
    with pytest.raises(RuntimeError, match="mine"):
        objective.traced(images(B))
    assert all(p is leaves[n] for n, p in guide.named_parameters())


class Several(Guide):
    """Global, auxiliary and local sites under scales and masks, a block, and hand-made noise."""

    def __init__(self, model):
        super().__init__(model)
        self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def global_prior(self):
        zero = torch.zeros_like(self.loc)
        return {"shift": dist.Normal(zero, torch.ones_like(zero)).to_event(1)}

    def forward(self, x):
        with poutine.scale(scale=0.5):
            shift = pyro.sample("shift", dist.Normal(self.loc, 0.1).to_event(1))
        with poutine.block():
            inner = pyro.sample("inner", dist.Uniform(x.new_zeros(2), 0.1).to_event(1))
        q = self.posterior(x)
        noise = torch.empty_like(q.mean).normal_(mean=0.1, std=0.2)
        noise = noise + torch.empty_like(q.mean).uniform_(-0.1, 0.3) + torch.rand_like(q.mean)
        noise = noise + torch.zeros_like(q.mean).exponential_(30.0) + torch.randn(2, dtype=x.dtype)
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=False):
                f = pyro.sample(
                    "f", dist.Normal(q.mean, 0.1).to_event(1), infer={"is_auxiliary": True}
                )
            with poutine.mask(mask=x.flatten(1)[:, 0] > 0.3), poutine.scale(scale=2.0):
                loc = f + shift + inner + noise
                return pyro.sample("z", dist.Normal(loc, q.stddev).to_event(1))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_particles": 2},
        {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1},
    ],
)
def test_a_guide_of_ones_own_with_several_sites(elbo, options):
    torch.manual_seed(0)
    model = linear_model()
    guide = Several(model).double()
    if options.get("vectorize_particles"):  # f is (2, B, p) then, and the global draw (2, 1, p)
        guide = Several(model).double()
    with poutine.scale(scale=0.5):
        objective = Objective(model, guide, elbo=elbo(**options))
        traced = objective.traced(images(B))
        objective.assert_same(traced, images(B, seed=8))
    assert {draw.method for draw in traced.draws} == {"normal_", "uniform_", "exponential_"}


def test_a_subset_of_parameters_sees_what_happens_to_the_others():
    model, guide = make("gp")
    block = Block(TraceMeanField_ELBO(), list(guide.parameters()))
    objective = Objective(model, guide, block)
    traced = objective.traced(images(B))
    assert all(name.startswith("guide.") for name in traced.leaves)
    disturb(model)
    objective.assert_same(traced, images(B))


def test_frozen_parameters_have_no_gradient():
    model, guide = make("vae")
    model.decoder.requires_grad_(False)
    objective = Objective(model, guide)
    traced = objective.traced(images(B))
    assert "model.decoder.0.weight" in traced.others
    objective.assert_same(traced, images(B))


@pytest.mark.parametrize("count", [1, 2, 33])
def test_any_size_of_minibatch_and_float32(count):
    model, guide = make("vae", torch.float32)
    objective = Objective(model, guide)
    x = images(count).float()
    traced = objective.traced(x)
    torch.manual_seed(0)
    expected, _ = objective.eager(x)
    torch.manual_seed(0)
    found, gradients = traced(x, traced.noise())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {g.dtype for g in gradients} == {torch.float32}
