"""Flows of zuko are guides and priors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro
from rows import WEIGHT, X, evidence_of_linear, linear
from torch import nn

from pyro_gpvae import annealed_evidence, decompose, fit, log_evidence, reference_evidence

zuko = pytest.importorskip("zuko")
pytestmark = pytest.mark.usefixtures("double_precision")


class Flow(nn.Module):
    """A conditional flow of zuko, as a guide and as ``posterior(x)``."""

    def __init__(self):
        super().__init__()
        self.flow = zuko.flows.MAF(2, 3, transforms=2, hidden_features=[16])

    def q(self, x):
        return ZukoToPyro(self.flow(x))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


class FlowPosterior(Flow):
    def posterior(self, x):
        return self.q(x)


@pytest.mark.parametrize("kind", [Flow, FlowPosterior])
def test_flows_of_zuko_are_guides(kind):
    torch.manual_seed(0)
    guide, exact = kind(), evidence_of_linear(X)
    fit(linear, guide, X, epochs=200, learning_rate=0.01, progress=False)
    found = log_evidence(linear, guide, X, 5000, seed=0)
    assert float(((found.log_evidence - exact) / found.standard_error).abs().max()) < 4
    gap = decompose(linear, guide, X, num_samples=50, reference_samples=100, seed=0)
    assert gap.family == "other"
    torch.testing.assert_close(gap.log_evidence, exact, rtol=0, atol=1e-6)
    annealed = annealed_evidence(linear, X, guide, seed=0)
    assert float(((annealed.log_evidence - exact) / annealed.standard_error).abs().max()) < 4


def test_a_flow_of_zuko_is_a_prior():
    torch.manual_seed(0)
    prior = zuko.flows.MAF(2, transforms=1, hidden_features=[8])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(prior()).expand([len(x)]))
            pyro.sample("x", dist.Normal(z @ WEIGHT.mT, 0.5).to_event(1), obs=x)

    axis = torch.linspace(-6, 6, 401)
    z = torch.cartesian_prod(axis, axis).unsqueeze(1)
    likelihood = dist.Normal(z @ WEIGHT.mT, 0.5).to_event(1).log_prob(X)
    with torch.no_grad():
        exact = (prior().log_prob(z) + likelihood).logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    annealed = annealed_evidence(model, X, num_chains=32, seed=0)
    assert float(((annealed.log_evidence - exact) / annealed.standard_error).abs().max()) < 4
    found = reference_evidence(model, X, num_samples=500, seed=0)
    assert bool(((found.log_evidence - exact).abs() < 4 * found.standard_error).all())
