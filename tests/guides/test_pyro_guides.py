"""Pyro's own objects are guides: they train by plain SVI and by fit, to the exact evidence."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import affine_coupling, conditional_affine_coupling, iterated
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.optim import ClippedAdam
from torch.utils.data import DataLoader, TensorDataset
from toy import exact_evidence, exact_posterior, images, linear_encoder, linear_model

from pyro_gpvae import PerImage, decompose, elbo_terms, fit, log_evidence

X = images(5)
#: Autoguides with a density, and the gap that their ELBO may have, in nats per image.
AUTOGUIDES = {
    "AutoNormal": 0.5,
    "AutoDiagonalNormal": 0.5,
    "AutoMultivariateNormal": 0.1,
    "AutoLowRankMultivariateNormal": 0.3,
    "AutoIAFNormal": 0.5,
    "AutoNormalizingFlow": 0.5,
    "AutoGaussian": 0.1,
    "AutoStructured": 0.5,
    "AutoNormalMessenger": 0.5,
    "AutoHierarchicalNormalMessenger": 0.5,
    "AutoRegressiveMessenger": 0.5,
}
OPTIONS = {
    "AutoLowRankMultivariateNormal": {"rank": 5},
    "AutoNormalizingFlow": {"init_transform_fn": partial(iterated, 1, affine_coupling)},
}
#: Bases, guides without a density, and those with tests of their own.
OTHERS = {
    "AutoCallable", "AutoContinuous", "AutoDelta", "AutoDiscreteParallel", "AutoGuide",
    "AutoGuideList", "AutoLaplaceApproximation", "AutoMessenger",
}  # fmt: skip


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


def build(name, model):
    return getattr(autoguide, name)(model, **OPTIONS.get(name, {}))


def test_every_autoguide_is_here():
    classes = {name for name in autoguide.__all__ if name.startswith("Auto")}
    assert classes == {*AUTOGUIDES, *OTHERS}


def by_fit(model, guide, data=X, **options):
    options = {"epochs": 250, "batch_size": 5, "learning_rate": 0.03} | options
    fit(model, guide, data, progress=False, **options)


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        *((name, train) for name in AUTOGUIDES),
        ("AutoNormal", by_fit),
        ("AutoMultivariateNormal", by_fit),
        ("AutoNormalMessenger", by_fit),
    ],
)
def test_autoguides_are_trained_to_their_bound_and_give_the_evidence(name, trainer):
    torch.manual_seed(0)
    model = frozen_model()
    guide = build(name, model)
    trainer(model, guide)
    assert -0.02 < gap(model, guide) < AUTOGUIDES[name] + 0.1
    evidence = exact_evidence(model, X)
    terms = [elbo_terms(model, guide, X, 5) for _ in range(30)]
    bound = sum(t["log_likelihood"] - t["kl_z"] - t["kl_global"] for t in terms) / 30
    assert abs(bound - float(evidence.mean())) < AUTOGUIDES[name] + 0.5
    if name == "AutoNormal" or name.endswith("Messenger"):
        found = log_evidence(model, guide, X, 2000, seed=0)
        error = (found.log_evidence - evidence) / found.standard_error
        assert float(error.abs().max()) < 4
    else:
        with pytest.raises(ValueError, match="draws all 5 members of the batch at once, from its"):
            log_evidence(model, guide, X, 10)
    with pytest.raises(ValueError, match=rf"is not amortised.*instance:autoguide={name[:8]}"):
        decompose(model, guide, X)


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides_of_one_image_give_its_evidence(name):
    torch.manual_seed(0)
    model, x = frozen_model(), X[:1]
    guide = build(name, model)
    by_fit(model, guide, x, epochs=100)
    found = log_evidence(model, guide, x, 2000, seed=0)
    error = (found.log_evidence - exact_evidence(model, x)) / found.standard_error
    assert float(error.abs()) < 4
    assert float(found.standard_error) < 0.1
    assert bool((model.prior().mean == 0).all())  # which a guide may have as its first value


class Table(torch.nn.Module):
    """A posterior for each member of the data, in their order."""

    def __init__(self, count):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(count, 2))
        self.log_scale = torch.nn.Parameter(torch.zeros(count, 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def test_a_table_of_posteriors_keeps_the_order_of_the_data():
    torch.manual_seed(0)
    model, guide = frozen_model(), Table(5)
    by_fit(model, guide)
    assert -0.02 < gap(model, guide) < 0.5


@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
def test_guides_that_know_members_are_not_trained_on_parts_of_the_data_or_in_another_order(kind):
    model = frozen_model()
    with pytest.raises(ValueError, match=rf"{kind.__name__} has parameters for each .*\['z'\]: it"):
        by_fit(model, kind(model), batch_size=2)
    with pytest.raises(ValueError, match="give a DataLoader with shuffle=False, or tensors"):
        by_fit(model, kind(model), DataLoader(TensorDataset(X), 5, shuffle=True))
    by_fit(model, kind(model), DataLoader(TensorDataset(X), 5), epochs=1)


def test_a_messenger_that_shares_its_parameters_is_amortised():
    model = frozen_model()
    guide = AutoNormalMessenger(model, amortized_plates=("data",))
    by_fit(model, guide, batch_size=2, epochs=100)
    found = log_evidence(model, guide, X, 20_000, seed=0)
    error = (found.log_evidence - exact_evidence(model, X)) / found.standard_error
    assert float(error.abs().max()) < 4


def test_a_guide_that_observes_is_refused():
    model = frozen_model()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", exact_posterior(model, x))
            pyro.sample("x", model.likelihood(torch.zeros(len(x), 2)), obs=x)

    for run in (lambda *args: elbo_terms(*args, 5), by_fit, log_evidence):
        with pytest.raises(ValueError, match=r"the guide observes \['x'\], whose density"):
            run(linear_model(), guide, X)


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
