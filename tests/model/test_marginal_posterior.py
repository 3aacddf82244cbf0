"""The marginal posterior of eq. (7): density, samples, gradients."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy.integrate import quad
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gpvae import MarginalPosterior
from pyro_gpvae.model import marginal_posterior

PARAMETERS = [
    (0.0, 0.4, -1.0, 0.5),
    (0.7, 0.0, 0.3, 0.3),
    (-1.0, 1.0, -2.0, 0.1),
    (0.0, 10.0, 0.0, 0.5),
]


def marginal(a, sd_f, b, sd_log_h, **options):
    return MarginalPosterior(
        *(torch.tensor(p, dtype=torch.float64) for p in (a, sd_f, b, sd_log_h)), **options
    )


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("sigmas", [-5, -4, -1, 0, 0.5, 2, 5])
def test_density_against_brute_force_integration(parameters, sigmas):
    a, sd_f, b, sd_log_h = parameters
    q = marginal(*parameters)
    z = a + sigmas * float(q.stddev)

    def integrand(t):
        variance = sd_f**2 + np.exp(2 * (b + sd_log_h * t))
        conditional = np.exp(-0.5 * (z - a) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        return conditional * np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi)

    density, _ = quad(integrand, -12, 12, epsabs=0, epsrel=1e-11, limit=400)
    value = float(q.log_prob(torch.tensor(z, dtype=torch.float64)))
    assert value == pytest.approx(np.log(density), abs=1e-6)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_samples_have_the_density_the_mean_and_the_variance(parameters):
    # fails with a probability of 2e-4 for a right sampler
    torch.manual_seed(0)
    q = marginal(*parameters)
    samples = q.sample((400_000,))
    assert auto_goodness_of_fit(samples[:20_000], q.log_prob(samples[:20_000]).exp()) > 2e-5
    for found, expected in ((samples, q.mean), ((samples - q.mean).square(), q.variance)):
        assert abs(found.mean() - expected) < 4 * found.std() / len(samples) ** 0.5


def test_without_spread_it_is_the_normal_exactly():
    a, b = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    zero = torch.zeros_like(a)
    q, normal = MarginalPosterior(a, zero, b, zero), dist.Normal(a, b.exp())
    z = torch.randn(7, 5, 3).double()
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z), rtol=0, atol=1e-12)
    torch.manual_seed(0)
    sample = q.sample()
    torch.manual_seed(0)
    torch.testing.assert_close(sample, normal.sample(), rtol=0, atol=1e-15)
    torch.testing.assert_close(q.variance, normal.variance)


def test_shapes_and_expand():
    q = MarginalPosterior(torch.zeros(5, 2), 0.1, -1.0, 0.3).to_event(1)
    wide = q.expand((7, 5))
    assert wide.sample((4,)).shape == (4, 7, 5, 2)
    z = wide.sample()
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
    assert q.log_prob(z[:, :1]).shape == (7, 5)


def test_gradients_of_samples():
    parameters = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in PARAMETERS[0]]

    def sample(*parameters):
        torch.manual_seed(0)
        return MarginalPosterior(*parameters).rsample((3,))

    assert torch.autograd.gradcheck(sample, parameters)


def test_parameters_and_values_are_validated_if_validation_is_enabled():
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        marginal(*PARAMETERS[0], num_nodes=0)
    with pytest.raises(ValueError, match="loc_scale"):
        marginal(0.0, -0.1, 0.0, 0.1, validate_args=True)
    nan, q = torch.tensor([math.nan, 0.0]), marginal(*PARAMETERS[0])
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(nan)
    with pyro.validation_enabled(False):
        assert q.log_prob(nan).isnan().tolist() == [True, False]


def written_out(q, value):
    """The density by torch's own mixture, with every node, sample and latent at once."""
    n = q.num_nodes
    nodes = math.sqrt(2 * math.pi / n) * (torch.arange(n).double() - (n - 1) / 2)
    ell = q.log_scale[..., None] + q.log_scale_scale[..., None] * nodes
    scale = (q.loc_scale[..., None].square() + (2 * ell).exp()).sqrt()
    weights = dist.Categorical(logits=(-nodes.square() / 2).expand_as(scale))
    components = dist.Normal(q.loc[..., None].expand_as(scale), scale)
    return dist.MixtureSameFamily(weights, components).log_prob(value)


def random_marginal(*shape, seed=0):
    torch.manual_seed(seed)
    a, b = torch.randn(2, *shape).double()
    sd_f, sd_log_h = torch.rand(2, *shape).double()
    return MarginalPosterior(a, sd_f, b, sd_log_h)


@pytest.mark.parametrize("limit", [1, 700, 10**6])
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 4, 5, 3), (3,), (5, 1), (7, 1, 3), ()])
def test_samples_scored_in_parts_have_the_density_of_all_at_once(limit, shape, monkeypatch):
    monkeypatch.setattr(marginal_posterior, "_MAX_NODES", limit)
    q = random_marginal(5, 3)
    value = 10 * torch.randn(shape).double()  # far tails too
    expected = written_out(q, value)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(q.log_prob(value), expected, **close)
    wide = q.expand((6, *([1] * (expected.dim() - 2)), 5, 3))
    torch.testing.assert_close(
        wide.log_prob(value), expected.expand(wide.log_prob(value).shape), **close
    )


def test_gradients_do_not_depend_on_the_parts(monkeypatch):
    q = random_marginal(5, 3)
    value = torch.randn(4, 5, 3).double()
    parameters = [q.loc, q.loc_scale, q.log_scale, q.log_scale_scale, value]
    for parameter in parameters:
        parameter.requires_grad_()

    def log_prob(*parameters):
        return MarginalPosterior(*parameters[:4], validate_args=False).log_prob(parameters[4])

    expected = torch.autograd.grad(written_out(q, value).sum(), parameters)
    for limit in (1, 10**6):
        monkeypatch.setattr(marginal_posterior, "_MAX_NODES", limit)
        found = torch.autograd.grad(log_prob(*parameters).sum(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    small = [p.detach()[..., :1, :2].clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradgradcheck(log_prob, small)


def test_the_density_can_be_batched_and_traced():
    q = random_marginal(4, 5, 3)
    parameters = [q.loc, q.loc_scale, q.log_scale, q.log_scale_scale]

    def log_prob(*parameters):
        return MarginalPosterior(*parameters, validate_args=False).log_prob(torch.ones(2, 5, 3))

    expected = torch.stack([log_prob(*(p[i] for p in parameters)) for i in range(4)])
    torch.testing.assert_close(torch.vmap(log_prob)(*parameters), expected)
    graph = make_fx(log_prob)(*(p[0] for p in parameters))
    torch.testing.assert_close(graph(*(p[2] for p in parameters)), expected[2])


def test_infinite_and_empty_values():
    q = random_marginal(2)
    density = q.log_prob(torch.tensor([math.inf, 0.0], dtype=torch.float64))
    assert density[0] == -math.inf
    assert density[1].isfinite()
    assert q.log_prob(torch.zeros(0, 4, 2)).shape == (0, 4, 2)
    none = MarginalPosterior(torch.zeros(0, 2), 0.1, -1.0, 0.3)
    assert none.log_prob(torch.zeros(5, 0, 2)).shape == (5, 0, 2)
