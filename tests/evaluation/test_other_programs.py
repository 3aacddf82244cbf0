"""Programs that are not images: any names, numbers and supports of latents, with exact values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

from pyro_gpvae import annealed_evidence, decompose, log_evidence, reference_evidence

X = torch.tensor([1.0, 3.0, 0.0, 5.0]).double()
LABELS = torch.tensor([0, 1, 2, 3])
close = {"rtol": 0, "atol": 1e-8}


pytestmark = pytest.mark.usefixtures("double_precision")


def counts(x):
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def posterior_of_counts(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))


def test_conjugate_counts():
    exact = dist.GammaPoisson(2.0, 1.0).log_prob(X)
    found = log_evidence(counts, posterior_of_counts, X, 5)
    torch.testing.assert_close(found.log_evidence, exact, **close)
    annealed = annealed_evidence(counts, X, num_chains=64, seed=0)
    error = (annealed.log_evidence - exact) / annealed.standard_error
    assert float(error.abs().max()) < 4
    reference = reference_evidence(counts, X, posterior_of_counts, num_samples=2000)
    torch.testing.assert_close(reference.log_evidence, exact, rtol=0, atol=1e-6)
    gap = decompose(counts, posterior_of_counts, X)
    torch.testing.assert_close(gap.elbo, exact, **close)
    assert bool((gap.approximation > 0).all())


def labelled(x, y):
    with pyro.plate("b", len(x)):
        z2 = pyro.sample("z2", dist.Normal(y.double(), 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def test_two_latents_and_labels():
    """The Gaussian of each member is the posterior: nothing is estimated."""
    exact = dist.Normal(LABELS.double(), 3**0.5).log_prob(X)
    found = reference_evidence(labelled, (X, LABELS), num_samples=50)
    for value, _, _ in found.estimates.values():
        torch.testing.assert_close(value, exact, **close)


def mixture(x):
    with pyro.plate("data", len(x)):
        weights = torch.tensor([0.2, 0.3, 0.5])
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[k], 1.0), obs=x)


def test_a_discrete_latent_is_summed_out_or_refused():
    parts = dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 1.0).log_prob(X.unsqueeze(-1))
    exact = (parts + torch.tensor([0.2, 0.3, 0.5]).log()).logsumexp(-1)
    found = log_evidence(mixture, lambda x: None, X, 3).log_evidence
    torch.testing.assert_close(found, exact, **close)
    with pytest.raises(ValueError, match="latent site 'k' of the model mixture is discrete"):
        annealed_evidence(mixture, X)


def linear(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_the_auxiliary_density_of_autoguides_counts(name):
    torch.manual_seed(0)
    options = {} if name == "AutoIAFNormal" else {"init_scale": 1.0}
    guide = getattr(autoguide, name)(linear, **options)
    guide(X[:1])
    found = log_evidence(linear, guide, X[:1], 20_000, chunk_size=20_000, seed=0)
    error = found.log_evidence - dist.Normal(0.0, 3**0.5).log_prob(X[:1])
    assert float((error / found.standard_error).abs()) < 4
    assert float(found.standard_error) < 0.05
    with pytest.raises(ValueError, match="is not amortised"):
        decompose(linear, guide, X[:1])


def test_a_point_has_no_density():
    guide = autoguide.AutoDelta(linear)
    guide(X)
    with pytest.raises(ValueError, match="are points, which have no density"):
        log_evidence(linear, guide, X, 5)


@pytest.mark.parametrize(
    ("make", "end"),
    [(lambda: dist.Exponential(1.0), 20.0), (lambda: dist.Uniform(0.0, 3.0), 3 - 1e-6)],
    ids=["exponential", "uniform"],
)
def test_annealing_with_a_constrained_prior(make, end):
    prior = make()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    found = annealed_evidence(model, X, num_chains=32, seed=0)
    z = torch.linspace(1e-6, end, 100_001)
    log_joint = prior.log_prob(z) + dist.Normal(z, 0.5).log_prob(X.unsqueeze(-1))
    error = found.log_evidence - torch.trapezoid(log_joint.exp(), z).log()
    assert float((error / found.standard_error).abs().max()) < 4


def mixed_up(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = (torch.softmax(z, dim=1) * torch.arange(3.0)).sum(-1)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def prior_of_three(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_a_program_that_cannot_be_vectorised_runs_in_a_loop():
    with pytest.warns(UserWarning, match="mixed_up gives other numbers, or fails") as caught:
        found = log_evidence(mixed_up, prior_of_three, X[:2], 500, seed=0)
    assert len(caught) == 1
    asked = log_evidence(mixed_up, prior_of_three, X[:2], 500, seed=1, vectorized=False)
    error = torch.hypot(found.standard_error, asked.standard_error)
    assert bool(((found.log_evidence - asked.log_evidence).abs() < 4 * error).all())
    with pytest.raises(ValueError, match="observes nothing"):
        log_evidence(prior_of_three, prior_of_three, X, 5)


def test_observations_between_latent_sites_are_no_part_of_the_prior():
    def model(x):
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])

    rows = torch.stack([X, X.flip(0), LABELS.double()], -1)
    walk = torch.ones(3, 3).tril()
    covariance = walk @ walk.mT + 0.25 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(rows)
    found = annealed_evidence(model, rows, num_chains=32, seed=0)
    assert float(((found.log_evidence - exact) / found.standard_error).abs().max()) < 4
    reference = reference_evidence(model, rows, num_samples=50, seed=0)
    torch.testing.assert_close(reference.log_evidence, exact, rtol=0, atol=1e-6)
