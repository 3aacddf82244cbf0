"""Programs that are not images: any names, numbers and supports of latents, with exact values."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam

from pyro_gpvae import (
    annealed_evidence,
    decompose,
    elbo_terms,
    fit,
    log_evidence,
    reference_evidence,
)
from pyro_gpvae.evaluation.optimum import optimise_gaussian

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
    torch.testing.assert_close(found.log_evidence, exact, **close)
    for name, (value, error, _) in found.estimates.items():
        if name.endswith("prior"):  # of whose draws a fifth are no draws of the posterior
            assert float(((value - exact) / error).abs().max()) < 4
        else:
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
    with pytest.warns(
        UserWarning, match="mixed_up or prior_of_three gives other numbers, or"
    ) as caught:
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


# --- posteriors that are no Gaussians: several modes, edges of the support, far from the start

ANGLES = torch.linspace(-3.14, 3.14, 12).double()
NOISE = torch.randn(12, 2, generator=torch.Generator().manual_seed(1)).double()
ON_CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], -1) + 0.7 * NOISE


def log_likelihood_of_angle(angle, x):
    mean = torch.stack([angle.cos(), angle.sin()], -1)
    return dist.Normal(mean, 0.7).to_event(1).log_prob(x)


def circle(x):
    """An angle whose posterior has a mode at both ends of its support, or at none."""
    with pyro.plate("data", len(x)):
        angle = pyro.sample("angle", dist.Uniform(-torch.pi, torch.pi))
        mean = torch.stack([angle.cos(), angle.sin()], -1)
        pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)


def evidence_of_angle():
    grid = torch.linspace(-torch.pi, torch.pi, 100_001)[:, None]
    density = log_likelihood_of_angle(grid, ON_CIRCLE).exp() / (2 * torch.pi)
    return torch.trapezoid(density, grid[:, 0], dim=0).log()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reference_evidence_finds_both_ends_of_an_angle(seed):
    """Importance sampling from the best Gaussian alone misses up to 0.35 nats here."""
    found = reference_evidence(circle, ON_CIRCLE, seed=seed)
    error = found.log_evidence - evidence_of_angle()
    assert float((error / found.standard_error).abs().max()) < 4
    assert float(error.abs().max()) < 0.1


def test_the_best_gaussian_of_an_angle_is_the_best():
    nodes, weights = map(torch.from_numpy, hermegauss(60))
    loc, scale = torch.meshgrid(
        torch.linspace(-9, 9, 181), torch.linspace(-4, 2.5, 66).exp(), indexing="ij"
    )
    u = (loc[..., None] + scale[..., None] * nodes).unsqueeze(-1)
    log_jacobian = torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    angle = torch.pi * (2 * u.sigmoid() - 1)
    log_joint = log_likelihood_of_angle(angle, ON_CIRCLE) + log_jacobian
    elbo = torch.einsum("ijkb,k->ijb", log_joint, weights / weights.sum())
    elbo = elbo + scale.log().unsqueeze(-1) + 0.5 * math.log(2 * torch.pi * math.e)
    found = optimise_gaussian(circle, ON_CIRCLE)
    assert bool(found.converged.all())
    assert float((elbo.amax((0, 1)) - found.elbo).max()) < 0.1


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_best_gaussian_of_counts_far_above_the_prior(scale):
    """The posterior of the logarithm of the rate is almost a Gaussian."""
    x = torch.tensor([500, 1500, 20_000])

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, scale))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    found = optimise_gaussian(model, x)
    assert bool(found.converged.all())
    gap = dist.GammaPoisson(2.0, scale).log_prob(x) - found.elbo
    assert float(gap.abs().max()) < 0.01


# --- discrete and continuous latents, further plates


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("marks", [{"enumerate": "parallel"}, {}])
def test_a_discrete_latent_beside_a_continuous_one(marks):
    """k is summed out where it is marked, else drawn from its prior; the guide samples z."""
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 4.0])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer=marks)
            z = pyro.sample("z", dist.Normal(means[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 1.0))

    parts = dist.Normal(means, 1.25**0.5).log_prob(X.unsqueeze(-1))
    exact = (parts + weights.log()).logsumexp(-1)
    for vectorized in (None, False):
        found = log_evidence(model, guide, X, 2000, seed=0, vectorized=vectorized)
        assert float(((found.log_evidence - exact) / found.standard_error).abs().max()) < 4
    if not marks:  # terms of the ELBO draw k from its prior, which cancels
        found = log_evidence(model, guide, X, 20_000, seed=0)
        terms = [elbo_terms(model, guide, X, 4) for _ in range(400)]
        elbo = torch.tensor([t["log_likelihood"] - t["kl_z"] for t in terms])
        error = float(elbo.std()) / 400**0.5
        assert float(elbo.mean()) == pytest.approx(float(found.elbo.mean()), abs=4 * error)
    with pytest.raises(ValueError, match=r"the guide does not sample the sites \['k'\] of the mod"):
        fit(model, guide, X, epochs=1, progress=False)


def test_annealing_starts_from_a_guide_where_the_model_has_a_further_plate():
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("times", x.shape[1], dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=x.mT)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x.sum(1), 1.0 + x.shape[1]))

    x = torch.tensor([[1, 3, 2], [0, 1, 0], [7, 5, 9]])
    exact = log_evidence(model, guide, x, 2).log_evidence  # of the posterior itself
    for program in (guide, None):
        found = annealed_evidence(model, x, program, num_chains=16, seed=0)
        error = found.log_evidence - exact
        assert bool((error.abs() < 4 * found.standard_error + 1e-6).all())


def test_annealing_from_a_guide_that_validates_its_draws():
    """Long steps leave the support of a LogNormal by rounding, and are rejected."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfCauchy(1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    class Guide:
        def posterior(self, x):
            return dist.LogNormal(x.clamp(min=0.3).log(), 0.7)

    z = torch.linspace(1e-6, 200, 1_000_001)
    log_joint = dist.HalfCauchy(1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(X.unsqueeze(-1))
    found = annealed_evidence(model, X, Guide(), num_chains=32, seed=0)
    error = found.log_evidence - torch.trapezoid(log_joint.exp(), z).log()
    assert float((error / found.standard_error).abs().max()) < 4


def test_a_guide_that_observes_by_reparametrisation_is_refused_by_name():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    decentred = poutine.reparam(guide, {"z": LocScaleReparam(0.0)})
    with pytest.raises(ValueError, match=r"the guide observes \['z'\]"):
        log_evidence(linear, decentred, X, 5)
