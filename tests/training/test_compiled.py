"""Programs that a compiled step computes as the eager one does, and those that it refuses."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from families import FAMILIES, make
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.training.step import TrainingStep

N, B = 50, 8
pytestmark = pytest.mark.usefixtures("interpreted")


def assert_backends_agree(model, guide, dtype=torch.float64, **options):
    """Loss and gradient of each block agree, also after the parameters have moved."""
    x = images(2 * B, seed=4).to(dtype)
    step = TrainingStep(model, guide, x[:B], N, backend="compiled", **options)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for batch in x.split(B):
        for block in range(len(step.blocks)):
            results = []
            for evaluate in (step._compiled[block], lambda x, b=block: step.evaluate(b, x)):
                torch.manual_seed(3)
                loss, _ = evaluate((batch,))
                gradients = [p.grad for p in step.blocks[block].parameters]
                results.append([loss, torch.random.get_rng_state(), *gradients])
            for found, expected in zip(*results, strict=True):
                assert (found is None) == (expected is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        step(batch)
    return step


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=pytest.mark.slow) if s == "rme:3" else s for s in FAMILIES]
)
def test_every_family_has_the_same_loss_and_gradients(spec):
    assert_backends_agree(*make(spec))


def test_float32():
    assert_backends_agree(*make("vae", torch.float32), dtype=torch.float32)


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


def counts(self, x):
    self.calls += 1
    return self.shifted(x, 1 / self.calls)


CALLS = []


def counts_elsewhere(self, x):  # as a slow schedule in a closure
    CALLS.append(1)
    return self.shifted(x, 1e-9 * len(CALLS))


def sorts_in_python(self, x):
    rows = [sorted(row) for row in x.flatten(1).tolist()]
    return Guide.forward(self, torch.tensor(rows, dtype=x.dtype).reshape(x.shape))


def sorts_in_numpy(self, x):
    return Guide.forward(self, torch.from_numpy(np.sort(x.numpy())))


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


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (branches, "reads a tensor in Python"),
        (counts, "changes the attribute guide.calls"),
        (counts_elsewhere, "loss and gradient norm are .* and, called again on the same noise"),
        (sorts_in_python, "cannot be trained with backend 'compiled'"),
        (sorts_in_numpy, "cannot be trained with backend 'compiled'"),
        (keeps_a_tensor, "changes the attribute guide.kept"),
        (writes_to_a_tensor_that_is_no_buffer, r"writes to a tensor of shape \(2,\)"),
        (replaces_a_buffer, "replaces its tensor average, as PyroParam does"),
        (draws_from_numpy, "changes the random state of numpy"),
        (draws_from_a_generator_of_its_own, "from a generator of its own"),
        (fills_a_part_of_a_tensor, "into a part of a tensor"),
        (fills_a_tensor_that_was_used, "into a part of a tensor"),
        (draws_gamma, "draws random numbers by aten::_standard_gamma"),
    ],
)
def test_what_no_graph_can_hold_is_refused(forward, words):
    TrainingStep(*guide_of(forward), images(B), N)(images(B))  # eager, it works
    model, guide = guide_of(forward)
    leaves = dict(guide.named_parameters())
    with pytest.raises(UnsupportedError, match=words):
        TrainingStep(model, guide, images(B), N, backend="compiled")
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
    with poutine.scale(scale=0.5):
        assert_backends_agree(model, Several(model).double(), elbo=elbo(**options))
