"""One linear-Gaussian model, written in six idioms of Pyro, has the same exact numbers in each."""

import math
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gpvae import annealed_evidence, decompose, log_evidence, reference_evidence
from pyro_gpvae.evaluation.optimum import optimise_gaussian

LOADINGS = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -1.2]]).double()
NOISE = 0.7
X = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4], [0.0, 0.0, 1.0], [-2.0, 1.0, 0.5]]).double()
EVIDENCE = dist.MultivariateNormal(
    torch.zeros(3).double(), LOADINGS @ LOADINGS.mT + NOISE**2 * torch.eye(3).double()
).log_prob(X)
COVARIANCE = torch.linalg.inv(torch.eye(2).double() + LOADINGS.mT @ LOADINGS / NOISE**2)


pytestmark = pytest.mark.usefixtures("double_precision")


def posterior(x):
    mean = x @ LOADINGS @ COVARIANCE / NOISE**2
    return dist.MultivariateNormal(mean, COVARIANCE.expand(len(x), 2, 2))


def observe(z, x):
    pyro.sample("x", dist.Normal(z @ LOADINGS.mT, NOISE).to_event(1), obs=x)


def idiom(plate):
    """A model and its exact posterior in ``plate(x)``."""

    def model(x):
        with plate(x):
            prior = dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1)
            observe(pyro.sample("z", prior), x)

    def guide(x):
        with plate(x):
            pyro.sample("z", posterior(x))

    return model, guide


def two_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            zero = torch.zeros(len(x)).double()
            parts = [pyro.sample(name, dist.Normal(zero, 1.0)) for name in ("first", "second")]
            observe(torch.stack(parts, -1), x)

    def guide(x):
        mean = posterior(x).mean
        slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
        rest = COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(mean[:, 0], COVARIANCE[0, 0].sqrt()))
            centre = mean[:, 1] + slope * (first - mean[:, 0])
            pyro.sample("second", dist.Normal(centre, rest.sqrt()))

    return model, guide


def auxiliary():
    """As EasyGuide and Pyro's autoguides do: a draw, and the latent as a function of it."""
    model, _ = idiom(lambda x: pyro.plate("data", len(x)))

    def guide(x):
        with pyro.plate("data", len(x)):
            draw = pyro.sample("draw", posterior(x), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(draw, event_dim=1))

    return model, guide


def with_modules():
    decoder = nn.Linear(2, 3, bias=False).double()
    decoder.weight.data = LOADINGS.clone()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(decoder(z), NOISE).to_event(1), obs=x)

    return model, idiom(lambda x: pyro.plate("data", len(x)))[1]


IDIOMS = {
    "sized plate": lambda: idiom(lambda x: pyro.plate("data", len(x))),
    "plate without a size": lambda: idiom(lambda x: pyro.plate("data")),
    "plate of another name": lambda: idiom(lambda x: pyro.plate("rows", len(x))),
    "two sites": two_sites,
    "auxiliary site and Delta": auxiliary,
    "pyro.module": with_modules,
}


@pytest.mark.parametrize("name", IDIOMS)
def test_the_numbers_are_exact_in_every_idiom(name):
    pyro.clear_param_store()
    model, guide = IDIOMS[name]()
    exact = {"rtol": 0, "atol": 1e-8}
    found = log_evidence(model, guide, X, 30, seed=0)
    torch.testing.assert_close(found.log_evidence, EVIDENCE, **exact)
    torch.testing.assert_close(found.elbo, EVIDENCE, **exact)
    optimum = optimise_gaussian(model, X, tolerance=1e-9, max_steps=500)
    torch.testing.assert_close(optimum.elbo, EVIDENCE, rtol=0, atol=1e-6)
    annealed = annealed_evidence(model, X, num_chains=64, num_steps=60, seed=0)
    error = (annealed.log_evidence - EVIDENCE) / annealed.standard_error
    assert float(error.abs().max()) < 4
    gap = decompose(model, guide, X, num_samples=30, reference_samples=50)
    torch.testing.assert_close(gap.elbo, EVIDENCE, **exact)
    torch.testing.assert_close(gap.log_evidence, EVIDENCE, rtol=0, atol=1e-6)
    torch.testing.assert_close(gap.elbo_full, EVIDENCE, rtol=0, atol=0.05)


def numbers(model, guide):
    """What every evaluator gives."""
    gap = decompose(model, guide, X, num_samples=30, reference_samples=50)
    annealed = annealed_evidence(model, X, num_chains=8, num_steps=20, seed=0)
    found = log_evidence(model, wide(guide), X, 30, seed=0)
    return torch.stack([gap.elbo, gap.log_evidence, annealed.log_evidence, found.log_evidence])


def wide(guide):
    """A guide whose weights are random."""

    def run(x):
        with pyro.plate("data", len(x)):
            q = posterior(x)
            pyro.sample("z", dist.Normal(q.mean, 1.0).to_event(1))

    return run


ANGLES = torch.linspace(-math.pi, math.pi, 2001)[:-1].double()
PRIORS = {
    "mixture": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7]).double()),
            dist.Normal(torch.tensor([-2.0, 2.0]).double(), 0.5),
        ),
        lambda z: z,
        torch.linspace(-6.0, 6.0, 6001).double(),
    ),
    "mixture of positive": (
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.3, 0.7]).double()),
            dist.Gamma(torch.tensor([2.0, 9.0]).double(), 3.0),
        ),
        torch.log,
        torch.linspace(1e-6, 15.0, 30001).double(),
    ),
    "angle": (dist.VonMises(torch.tensor(1.0).double(), 2.0), torch.cos, ANGLES),
}


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
@pytest.mark.parametrize("name", PRIORS)
def test_mixtures_and_angles_as_priors(name):
    """The density of an angle is periodic, and only one turn of it is a density."""
    prior, link, grid = PRIORS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(link(z), 0.5), obs=x)

    x = X[:, 0]
    joint = prior.log_prob(grid) + dist.Normal(link(grid), 0.5).log_prob(x[:, None])
    exact = joint.logsumexp(-1) + (grid[1] - grid[0]).log()
    found = reference_evidence(model, x, num_samples=4000, num_chains=0)
    error = (found.log_evidence - exact).abs()
    assert bool((error < 4 * found.standard_error + 1e-3).all()), error
    assert float(found.standard_error.max()) < 0.1


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
def test_a_pair_of_angles_as_prior():
    loc, concentration = torch.tensor([0.5, -0.5]).double(), torch.tensor([3.0, 2.0]).double()
    prior = dist.SineBivariateVonMises(*loc, *concentration, correlation=torch.tensor(1.0).double())

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.expand([len(x)]))
            pyro.sample("x", dist.Normal(z.cos(), 0.5).to_event(1), obs=x)

    x = torch.tensor([[0.3, -0.2], [0.9, 0.5]]).double()
    grid = torch.cartesian_prod(ANGLES[::5], ANGLES[::5])
    likelihood = dist.Normal(grid.cos(), 0.5).log_prob(x[:, None]).sum(-1)
    exact = (prior.log_prob(grid) + likelihood).logsumexp(-1) + math.log((2 * math.pi / 400) ** 2)
    found = reference_evidence(model, x, num_samples=4000, num_chains=0)
    error = (found.log_evidence - exact).abs()
    assert bool((error < 4 * found.standard_error).all()), error
    assert float(found.standard_error.max()) < 0.1


def test_draws_of_an_angle_beyond_one_turn_are_refused():
    prior = PRIORS["angle"][0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.cos(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 10.0))

    with pytest.raises(ValueError, match="lie outside the support Interval"):
        log_evidence(model, guide, X[:, 0], 50)


def test_the_gap_of_a_model_with_a_sequential_plate():
    def program(sample):
        def run(x):
            with pyro.plate("data", len(x)):
                for j in pyro.plate("columns", x.shape[1]):
                    sample(j, x[:, j])

        return run

    def observe_one(j, x):
        z = pyro.sample(f"z{j}", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample(f"x{j}", dist.Normal(z, 1.0), obs=x)

    model = program(observe_one)
    guide = program(lambda j, x: pyro.sample(f"z{j}", dist.Normal(x / 2, 0.5**0.5)))
    gap = decompose(model, guide, X)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X).sum(-1)
    for found in (gap.log_evidence, gap.elbo, gap.elbo_full, gap.elbo_diagonal):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore::pyro_gpvae.evaluation.importance.ParetoWarning")
def test_inference_mode_and_threads_change_nothing():
    programs = idiom(lambda x: pyro.plate("data", len(x)))
    alone = numbers(*programs)
    with torch.inference_mode():
        torch.testing.assert_close(numbers(*programs), alone, rtol=0, atol=0)
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(numbers, *programs) for _ in range(8)]
        for future in together:
            torch.testing.assert_close(future.result(), alone, rtol=0, atol=0)
