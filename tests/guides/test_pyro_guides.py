"""Pyro's own objects are guides: they train by plain SVI and by fit, to the exact evidence."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import conditional_affine_coupling
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.optim import ClippedAdam
from toy import exact_evidence, exact_posterior, images, linear_encoder, linear_model

from pyro_gpvae import PerImage, fit

X = images(5)
#: Autoguides with a density, and the gap that their ELBO may have, in nats per image.
AUTOGUIDES = {
    AutoNormal: 0.5,
    AutoDiagonalNormal: 0.5,
    AutoMultivariateNormal: 0.1,
    lambda model: AutoLowRankMultivariateNormal(model, rank=5): 0.3,
    AutoIAFNormal: 0.5,
    AutoGaussian: 0.1,
    AutoStructured: 0.5,
}


@pytest.fixture(autouse=True)
def empty_store_and_float64():
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)  # some autoguides know no other dtype
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def frozen_model():
    return linear_model(sigma=1.0).requires_grad_(False)


def gap(model, guide):
    """The exact log p(x) minus the ELBO, in nats per image."""
    elbo = Trace_ELBO(300)
    with torch.no_grad():
        loss = elbo.loss(PerImage(model, 5), PerImage(guide, 5), X)
    return float(exact_evidence(model, X).mean()) + loss


def train(model, guide, steps=250, lr=0.05):
    programs = PerImage(model, 5), PerImage(guide, 5)
    svi = SVI(*programs, ClippedAdam({"lr": lr, "lrd": 0.99}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X)


@pytest.mark.parametrize("build", AUTOGUIDES, ids=lambda b: getattr(b, "__name__", "LowRank"))
def test_autoguides_by_plain_svi(build):
    torch.manual_seed(0)
    model = frozen_model()
    guide = build(model)
    train(model, guide)
    assert -0.02 < gap(model, guide) < AUTOGUIDES[build]


def test_the_laplace_approximation_is_exact_for_a_linear_model():
    torch.manual_seed(0)
    model = frozen_model()
    guide = AutoLaplaceApproximation(model)
    train(model, guide)
    found = guide.laplace_approximation(X)
    mean = exact_posterior(model, X).mean
    torch.testing.assert_close(found.loc.detach().unflatten(0, (5, 2)), mean, rtol=0, atol=0.02)
    assert abs(gap(model, found)) < 0.02


def test_a_list_of_guides_for_two_sites():
    """z = (a, b), of which a block has its own autoguide each."""
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(len(x)), 1.0))
            mean = torch.stack([a, a, b, b, b, a - b], -1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x.flatten(1))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["b"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, hide=["a"])))
    train(model, guide)
    weight = torch.tensor([[1.0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 1, -1]])
    covariance = weight.mT @ weight + torch.eye(6)
    log_p = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(X.flatten(1)).mean()
    elbo = Trace_ELBO(300)
    loss = elbo.loss(PerImage(model, 5), PerImage(guide, 5), X)
    # a and b are correlated, which KL(q ‖ p) of the best independent Gaussians says
    precision = weight @ weight.mT + torch.eye(2)
    expected = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert float(log_p) + loss == pytest.approx(float(expected), abs=0.05)


class Amortised(EasyGuide):
    """One group of sites, drawn by an encoder; z is a Delta on top of an auxiliary site."""

    def __init__(self, model):
        super().__init__(model)
        self.encoder = linear_encoder()
        self.head = torch.nn.Linear(3, 4)

    def guide(self, x):
        loc, log_scale = self.head(self.encoder(x)).chunk(2, -1)
        group = self.group(match="z")
        with self.plate("data", len(x), dim=-1):
            group.sample("auxiliary", dist.Normal(loc, log_scale.exp()).to_event(1))


class Flow(pyro.nn.PyroModule):
    """A conditional flow, whose networks are modules of Pyro."""

    def __init__(self, model):
        super().__init__()
        self.encoder = linear_encoder()
        self.coupling = conditional_affine_coupling(2, 3, hidden_dims=[8])
        self.head = torch.nn.Linear(3, 4)

    def forward(self, x):
        phi = self.encoder(x)
        loc, log_scale = self.head(phi).chunk(2, -1)
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        flow = dist.ConditionalTransformedDistribution(base, [self.coupling]).condition(phi)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", flow)


@pytest.mark.parametrize("kind", [Amortised, Flow])
@pytest.mark.parametrize("trainer", ["svi", "fit"])
def test_amortised_guides_of_pyro(kind, trainer):
    torch.manual_seed(0)
    model = frozen_model()
    guide = kind(model)
    guide(X)  # an EasyGuide learns its sites at its first call
    before = gap(model, guide)
    if trainer == "svi":
        train(model, guide)
    else:
        fit(model, guide, X, epochs=250, batch_size=5, learning_rate=0.03, progress=False)
    assert -0.02 < gap(model, guide) < min(0.25, before / 2)
