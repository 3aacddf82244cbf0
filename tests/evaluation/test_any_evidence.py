"""Exact log p(x) of conjugate models of any data, by every evaluator."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from rows import WEIGHT, X, evidence_of_linear, linear
from torch import nn

from pyro_gpvae import (
    ImageModel,
    annealed_evidence,
    decompose,
    elbo_terms,
    log_evidence,
    reference_evidence,
)
from pyro_gpvae.evaluation.importance import ParetoWarning

close = {"rtol": 0, "atol": 1e-8}


pytestmark = pytest.mark.usefixtures("double_precision")


def beta_bernoulli(x):
    """Trials in a plate inside that of the data."""
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("trials", x.shape[1], dim=-2):
            pyro.sample("x", dist.Bernoulli(p), obs=x.mT)


def beta(x):
    ones, count = x.sum(1), x.shape[1]
    with pyro.plate("data", len(x)):
        pyro.sample("p", dist.Beta(2.0 + ones, 3.0 + count - ones))


def evidence_of_trials(x):
    ones, count = x.sum(1), x.shape[1]
    parts = [torch.lgamma(2.0 + ones), torch.lgamma(3.0 + count - ones)]
    whole = torch.lgamma(torch.tensor(5.0 + count))
    return sum(parts) - whole - (torch.lgamma(torch.tensor([2.0, 3.0, 5.0])) @ WHOLE)


WHOLE = torch.tensor([1.0, 1.0, -1.0]).double()
CONCENTRATION = torch.tensor([1.0, 2.0, 3.0]).double()


def dirichlet_multinomial(x):
    with pyro.plate("rows", len(x)):
        p = pyro.sample("p", dist.Dirichlet(CONCENTRATION))
        # the numbers of trials of the rows differ, which torch's own support does not know
        pyro.sample("x", dist.Multinomial(probs=p, validate_args=False), obs=x)


def dirichlet(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("p", dist.Dirichlet(CONCENTRATION + x))


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.01))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x, 1.01))


TRIALS = (torch.rand(4, 10, generator=torch.Generator().manual_seed(0)) < 0.4).double()
COUNTS = torch.tensor([[100, 200, 50], [3, 0, 1], [0, 0, 40]])
LARGE = torch.tensor([0, 255, 400, 100])
#: A model, its exact posterior, data, and their log p(x).
CONJUGATE = {
    "beta-bernoulli": lambda: (beta_bernoulli, beta, TRIALS, evidence_of_trials(TRIALS)),
    "dirichlet-multinomial": lambda: (
        dirichlet_multinomial,
        dirichlet,
        COUNTS,
        dist.DirichletMultinomial(CONCENTRATION, COUNTS.sum(-1), validate_args=False).log_prob(
            COUNTS
        ),
    ),
    "gamma-poisson": lambda: (
        gamma_poisson,
        gamma,
        LARGE,
        dist.GammaPoisson(2.0, 0.01).log_prob(LARGE),
    ),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_every_evaluator_gives_the_evidence_of_counts(name):
    model, guide, x, exact = CONJUGATE[name]()
    torch.testing.assert_close(log_evidence(model, guide, x, 5).log_evidence, exact, **close)
    terms = elbo_terms(model, guide, x, len(x))
    assert terms["log_likelihood"] - terms["kl_z"] == pytest.approx(float(exact.mean()), abs=1e-8)
    gap = decompose(model, guide, x, num_samples=50, reference_samples=200, seed=0)
    torch.testing.assert_close(gap.elbo, exact, **close)
    torch.testing.assert_close(gap.log_evidence, exact, **close)
    assert bool((gap.elbo_full < exact + 4 * gap.elbo_full_error).all())
    annealed = annealed_evidence(model, x, num_chains=32, num_steps=200, seed=0)
    error = (annealed.log_evidence - exact) / annealed.standard_error
    assert float(error.abs().max()) < 4
    reference = reference_evidence(model, x, num_samples=2000, seed=0)  # without a guide
    assert bool(((reference.log_evidence - exact).abs() < 4 * reference.standard_error).all())


class Encoder(nn.Module):
    """The diagonal Gaussian of a network, with ``posterior(x)`` only."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)

    def posterior(self, x):
        loc, log_scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def test_a_plain_callable_has_the_family_and_the_gaps_of_the_same_posterior():
    torch.manual_seed(0)
    encoder = Encoder()

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder.posterior(x))

    def auxiliary(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", encoder.posterior(x), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u, event_dim=1))

    class Easy(EasyGuide):
        def guide(self, x):
            group = self.group(match="z")
            with self.plate("data", len(x), dim=-1):
                group.sample("group", encoder.posterior(x))

    easy = Easy(linear)
    easy(X)
    expected = decompose(linear, encoder, X, num_samples=50, reference_samples=100, seed=0)
    assert expected.family == "diagonal"
    for guide in (plain, auxiliary, easy):
        found = decompose(linear, guide, X, num_samples=50, reference_samples=100, seed=0)
        assert found.family == "diagonal"
        for name in ("approximation", "amortisation", "elbo", "elbo_diagonal", "log_evidence"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    torch.testing.assert_close(expected.log_evidence, evidence_of_linear(X), rtol=0, atol=1e-4)


def test_a_factor_of_a_guide_is_part_of_its_density():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior = dist.Normal(x / 1.25, 0.2**0.5)
            u = pyro.sample("u", posterior, infer={"is_auxiliary": True})
            pyro.factor("jacobian", -u, has_rsample=True)
            pyro.sample("z", dist.Delta(u.exp()))

    x = X[:, 0]
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    torch.testing.assert_close(log_evidence(model, guide, x, 5).log_evidence, exact, **close)
    torch.testing.assert_close(decompose(model, guide, x, num_samples=9).elbo, exact, **close)
    terms = elbo_terms(model, guide, x, 4)
    assert terms["log_likelihood"] - terms["kl_z"] == pytest.approx(float(exact.mean()))


# --- modes, precision and scale


class Normalised(nn.Module):
    """A model and a guide with running statistics and dropout, both used by functions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Dropout(0.5))

    def model(self, x):
        linear(x)

    def guide(self, x):
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("as_function", [False, True])
def test_modules_in_training_mode_are_evaluated_in_evaluation_mode(as_function):
    torch.manual_seed(0)
    vae = Normalised()
    vae.net(torch.randn(100, 3))  # running statistics
    guide = (lambda x: vae.guide(x)) if as_function else vae.guide

    def numbers():
        return [
            log_evidence(vae.model, guide, X, 50, seed=0).log_evidence,
            decompose(vae.model, guide, X, num_samples=20, reference_samples=20, seed=0).elbo,
        ]

    expected = [value.clone() for value in (vae.eval(), numbers())[1]]
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.train()
    torch.testing.assert_close(numbers(), expected, rtol=0, atol=0)
    assert all(module.training for module in vae.modules())
    torch.testing.assert_close(vae.state_dict(), before, rtol=0, atol=0)


EVALUATORS = {
    "log_evidence": lambda model, guide, x: log_evidence(model, guide, x, 5),
    "annealed_evidence": lambda model, guide, x: annealed_evidence(model, x, num_steps=2),
    "reference_evidence": lambda model, guide, x: reference_evidence(model, x, num_samples=5),
    "decompose": lambda model, guide, x: decompose(model, guide, x),
    "elbo_terms": lambda model, guide, x: elbo_terms(model, guide, x, len(x)),
}


def prior_of_two(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("name", EVALUATORS)
def test_half_precision_is_refused_by_name(name):
    decoder = nn.Linear(2, 3).half()

    def half(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z.half()), 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"model\.decoder\.weight is torch.float16, in which log"):
        EVALUATORS[name](half, prior_of_two, X)

    def model(x):  # parameters in single precision, draws in half precision
        with pyro.plate("data", len(x)):
            z = sample_half(x)
            pyro.sample("x", dist.Normal(z.double() @ WEIGHT.mT, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            sample_half(x)

    with pytest.raises(ValueError, match=r"the site 'z' is torch.bfloat16, in which log densities"):
        EVALUATORS[name](model, guide, X)


def sample_half(x):
    zero = torch.zeros(len(x), 2, dtype=torch.bfloat16)
    return pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
@pytest.mark.parametrize("name", EVALUATORS)
def test_floats_from_0_to_255_are_refused_by_the_image_model_alone(name):
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)))
    model = ImageModel((1, 2, 2), 2, decoder)
    images = 255 * torch.rand(3, 1, 2, 2)
    with pytest.raises(ValueError, match="divide values 0 to 255 by 255"):
        EVALUATORS[name](model, prior_of_two, images)
    EVALUATORS[name](linear, prior_of_two, 255 * torch.rand(3, 3))


def test_programs_without_parameters_get_floats_in_the_default_dtype():
    seen = []

    def model(x):
        seen.append(x.dtype)
        linear(x)

    for dtype in (torch.float32, torch.float64):
        log_evidence(model, prior_of_two, X.to(dtype), 2)
    assert set(seen) == {torch.float64}


def test_a_short_schedule_warns_and_its_step_sizes_accept():
    exact = evidence_of_linear(X)
    found = annealed_evidence(linear, X, num_chains=64, num_steps=20, seed=0)
    assert float(found.acceptance_rate.min()) > 0.5
    error = (found.log_evidence - exact) / found.standard_error
    assert float(error.abs().max()) < 4

    def narrow(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.01).to_event(1), obs=x)

    exact = dist.Normal(0.0, (1 + 1e-4) ** 0.5).log_prob(X).sum(-1)
    with pytest.warns(ParetoWarning, match="chains carry the weight of 4 of 4 images"):
        found = annealed_evidence(narrow, X, num_chains=16, num_steps=10, seed=0)
    assert bool((found.effective_sample_size < 3).all())
    assert bool((found.log_evidence < exact).all())


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
def test_a_default_device_changes_no_number():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.mT, 0.5).to_event(1), obs=x)

    torch.manual_seed(0)
    guide = Encoder()

    def numbers():
        short = {"num_samples": 20, "seed": 0}
        return [
            log_evidence(model, guide, X, **short).log_evidence,
            decompose(model, guide, X, reference_samples=20, **short).elbo_full,
            annealed_evidence(model, X, num_steps=5, seed=0).log_evidence,
            reference_evidence(model, X, **short).log_evidence,
        ]

    expected = numbers()
    with torch.device("meta"):
        torch.testing.assert_close(numbers(), expected, rtol=0, atol=0)
