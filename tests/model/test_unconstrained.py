"""Any Pyro program as a model of one real vector: the guides for images infer it as well."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gpvae import fit, log_evidence, make_guide, reference_evidence
from pyro_gpvae.model.unconstrained import UnconstrainedModel
from pyro_gpvae.testing import check_guide

SHAPE, RATE = 3.0, 0.5


class Counts(nn.Module):
    """Two counts of each row with a common intensity, whose evidence is known."""

    def __init__(self):
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor([0.2, 1.0]))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            intensity = pyro.sample("intensity", dist.Gamma(SHAPE, RATE))
            rate = intensity.unsqueeze(-1) * self.log_weight.exp()
            pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=x)

    def evidence(self, x):
        total, weight = x.sum(-1), self.log_weight.exp()
        a, b = torch.tensor(SHAPE), torch.tensor(RATE)
        counts = (x * self.log_weight - (x + 1.0).lgamma()).sum(-1)
        gamma = a * b.log() - a.lgamma() + (a + total).lgamma()
        return (counts + gamma - (a + total) * (b + weight.sum()).log()).detach()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh())

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight).log1p())


@pytest.fixture
def counts():
    torch.manual_seed(0)
    intensity = dist.Gamma(SHAPE, RATE).sample((256, 1))
    return torch.poisson(intensity * torch.tensor([0.2, 1.0]).exp()).long()


@pytest.fixture
def program():
    return Counts()


def test_the_density_is_that_of_the_program_and_its_jacobian(program, counts):
    model, x = UnconstrainedModel(program, counts[:3]), counts[:5]
    z = torch.linspace(-1, 2, 4 * 2 * 5).reshape(4, 2, 5, 1)
    rate = z.exp() * program.log_weight.exp()
    expected = dist.Gamma(SHAPE, RATE).log_prob(z.exp()) + z
    expected = expected.squeeze(-1) + dist.Poisson(rate).log_prob(x).sum(-1)
    torch.testing.assert_close(model.log_joint(x, z), expected)
    q = model.likelihood(z)
    assert (q.batch_shape, q.event_shape) == ((4, 2, 5), (2,))
    torch.testing.assert_close(q.log_prob(x) + model.prior().log_prob(z), expected)
    torch.testing.assert_close(model.constrain(x, z[0, 0])["intensity"], z[0, 0, :, 0].exp())


def test_the_evidence_is_that_of_the_program(program, counts):
    x, exact = counts[:20], program.evidence(counts[:20])
    model = UnconstrainedModel(program, x)
    for target in (program, model):
        found = reference_evidence(target, x, num_samples=500, seed=0)
        assert ((found.log_evidence - exact).abs() <= 4 * found.standard_error + 1e-3).all()


@pytest.mark.parametrize(
    "spec",
    ["vae", "gp", "full", "lowrank:1", "iaf:1", "hf:1", "me:2", "rme:2", "sa:1", "iterative:1",
     "newton:0", "newton:1"],
)  # fmt: skip
def test_every_guide_learns_to_infer_the_program(spec, program, counts):
    model = UnconstrainedModel(program, counts[:3]).requires_grad_(False)
    torch.manual_seed(1)
    guide, x = make_guide(spec, model, encoder=Encoder()), counts[:50]
    rate = 3e-3 if spec == "newton:1" else 1e-2
    exact = float(program.evidence(x).mean())
    before = float(log_evidence(model, guide, x, 200, seed=0).elbo.mean())
    fit(model, guide, counts, epochs=50, batch_size=64, learning_rate=rate, progress=False, seed=0)
    after = log_evidence(model, guide, x, 1000, seed=0)
    gap, start = exact - float(after.elbo.mean()), exact - before
    assert -0.02 < gap < 0.5 * start
    assert float(after.log_evidence.mean()) == pytest.approx(exact, abs=0.1)


def test_the_program_is_trained_with_its_guide(program, counts):
    model = UnconstrainedModel(program, counts[:3])
    guide = make_guide("vae", model, encoder=Encoder())
    before = program.evidence(counts).mean()
    nn.init.zeros_(program.log_weight)
    fit(model, guide, counts, epochs=60, batch_size=64, learning_rate=1e-2, progress=False, seed=0)
    assert program.evidence(counts).mean() > before - 0.1


def test_a_guide_for_it_keeps_its_promises(program, counts):
    model = UnconstrainedModel(program, counts[:3])
    assert check_guide(make_guide("newton:1", model, encoder=Encoder()), model, counts[:4])


def test_a_copy_has_parameters_of_its_own(program, counts):
    model = UnconstrainedModel(program, counts[:3])
    other, z = copy.deepcopy(model), torch.zeros(5, 1)
    before = model.log_joint(counts[:5], z)
    nn.init.zeros_(other.parts[0].log_weight)
    assert torch.equal(model.log_joint(counts[:5], z), before)
    assert (other.log_joint(counts[:5], z) != before).any()


class TestRefused:
    def test_data_of_several_tensors(self, counts):
        def program(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), y), obs=x)

        with pytest.raises(ValueError, match="must be one tensor, got 2"):
            UnconstrainedModel(program, (torch.zeros(3), torch.ones(3)))

    def test_parameters_without_a_module(self):
        def program(x):
            scale = pyro.param("scale", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), scale), obs=x)

        with pytest.raises(ValueError, match="parameter 'scale' of program is in no module"):
            UnconstrainedModel(program, torch.zeros(3))

    def test_a_guide_that_needs_a_decoder(self, program, counts):
        model = UnconstrainedModel(program, counts[:3])
        with pytest.raises(ValueError, match=r"model\.decoder, which the model UnconstrainedModel"):
            make_guide("vlae:1", model, encoder=Encoder())
