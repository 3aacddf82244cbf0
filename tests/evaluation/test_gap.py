"""The decomposition of the inference gap: exact where it is known, resumed, honestly averaged."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import toy
from torch import nn
from torch.distributions import kl_divergence

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.evaluation import gap
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.testing import linear_gaussian

BUDGET = {"num_samples": 20, "reference_samples": 30}


class Known(nn.Module):
    """A guide whose posterior is given by a function of the exact one."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def shifted_diagonal(model):
    """A bad diagonal Gaussian around the exact posterior."""

    def posterior(x):
        exact = model.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt().expand(len(x), -1)
        return dist.Normal(exact.mean + 0.3 * scale, 1.2 * scale).to_event(1)

    return Known(posterior)


def shifted_full(model):
    def posterior(x):
        exact = model.posterior(x)
        return dist.MultivariateNormal(exact.mean + 0.1, exact.covariance_matrix * 1.3)

    return Known(posterior)


def curved_model():
    """A decoder so curved that its posteriors are far from Gaussian."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, toy.SHAPE))
    decoder[0].weight.data *= 3
    return ImageModel(toy.SHAPE, 2, decoder, sigma=0.3).double()


@pytest.mark.parametrize("make", [shifted_diagonal, shifted_full])
def test_the_gaps_of_a_linear_gaussian_model_are_the_analytic_ones(make):
    model = linear_gaussian((1, 8, 8), latent_dim=10).double()
    x = model.images(4)
    guide = make(model)
    found = decompose(model, guide, x, num_samples=40_000, reference_samples=100)
    with torch.no_grad():
        exact = model.posterior(x)
        variance = 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1).expand(4, -1)
        mean_field = kl_divergence(
            dist.MultivariateNormal(exact.mean, torch.diag_embed(variance)), exact
        )
        q = guide.posterior(x)
        covariance = getattr(q, "covariance_matrix", torch.diag_embed(q.variance))
        full = dist.MultivariateNormal(q.mean, covariance)
        total = kl_divergence(full, exact)
    assert float(mean_field.min()) > 0.2
    assert float(total.min()) > 0.3
    own = mean_field if make is shifted_diagonal else torch.zeros(4).double()
    assert found.family == ("diagonal" if make is shifted_diagonal else "full")
    assert bool(found.converged.all())
    for gap_, exact_gap in (
        (found.log_evidence, model.log_evidence(x)),
        (found.approximation, own),
        (found.amortisation, total - own),
        (found.log_evidence - found.elbo_full, torch.zeros(4).double()),
        (found.elbo_full - found.elbo_diagonal, mean_field),
    ):
        torch.testing.assert_close(gap_, exact_gap.detach(), rtol=0, atol=0.02)
    # a normal error: exceeded by a right estimate with probability 4 * 6e-5
    assert bool(((found.log_evidence - found.elbo - total).abs() < 4 * found.elbo_error).all())


def test_a_random_encoder_pays_for_its_spread_until_eq_2():
    model, x = toy.linear_model(), toy.images(6)
    torch.manual_seed(0)
    guide = GPGuide(model, toy.linear_encoder(), initial_scale=0.3).double()
    found = decompose(model, guide, x, num_train=50, num_samples=4000)
    with torch.no_grad():
        a, v, b, r = guide.moments(x)
        fit = toy.expected_log_likelihood(model, x, a, v + (2 * b + 2 * r).exp())
        bound = fit - guide.expected_kl(x) - guide.kl_weights() / 50
    assert float(found.weight_information.min()) > 0.05
    assert bool(((found.bound - bound).abs() < 4 * found.elbo_error).all())
    torch.testing.assert_close(found.kl_global, guide.kl_weights().detach().expand(6) / 50)
    table = found.table()
    rungs = table[list(gap.LADDER)].sum(axis=1)
    np.testing.assert_allclose(rungs, table["log_evidence"] - table["bound"], atol=1e-9)


def test_other_guides_pay_nothing():
    model, x = toy.linear_model(), toy.images(3)
    torch.manual_seed(0)
    found = decompose(model, GaussianGuide(model, toy.linear_encoder()).double(), x, **BUDGET)
    assert float(found.weight_information.abs().max()) == float(found.kl_global.abs().max()) == 0
    assert bool(found.annealed.isnan().all())
    torch.testing.assert_close(found.bound, found.elbo)


class Random(nn.Module):
    """A user's random encoder: the guide contract, and nothing else."""

    def posterior(self, x):
        return dist.Normal(x.flatten(1)[:, :2], math.hypot(1.0, 0.5)).to_event(1)

    def global_prior(self):
        return {"W": dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)}

    def forward(self, x):
        W = pyro.sample("W", dist.Normal(torch.zeros(2).double(), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2] + W, 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Found vars in guide")
def test_a_random_encoder_that_does_not_tell_its_prices():
    model, x = toy.linear_model(), toy.images(3)
    found = decompose(model, Random(), x, **BUDGET)
    assert bool(found.weight_information.isnan().all() & found.kl_global.isnan().all())
    assert bool(found.bound.isnan().all())
    # two methods more, and it does
    guide = Random()
    one = torch.ones(3, 2).double()
    guide.moments = lambda x: tuple(m[: len(x)] for m in (one, 0.25 * one, 0 * one, 0 * one))
    guide.kl_weights = lambda: torch.tensor(6.0)
    told = decompose(model, guide, x, num_train=3, **BUDGET)
    torch.testing.assert_close(told.weight_information, torch.full((3,), math.log(1.25)).double())
    torch.testing.assert_close(told.kl_global, torch.full((3,), 2.0).double())

    # what is scored given the weights has paid for their spread
    class Program(nn.Module):
        global_prior, moments, forward = Random.global_prior, guide.moments, Random.forward

    given = decompose(model, Program(), x, **BUDGET)
    assert float(given.weight_information.abs().max()) == 0
    assert bool(given.kl_global.isnan().all())


@pytest.mark.parametrize(
    ("moments", "got"),
    [
        ((1, 2), "int"),
        ({"mean": 0}, "str"),
        ((torch.zeros(1, 2),) * 3, "got"),
        ((torch.zeros(1, 2), *(torch.zeros(1, 3),) * 3), r"\[1, 2\].*\[1, 3\]"),
        ((torch.zeros(2),) * 4, r"\[2\]"),
    ],
)
def test_moments_of_another_kind_are_named(moments, got):
    guide = GaussianGuide(toy.linear_model(), toy.linear_encoder()).double()
    guide.global_prior = lambda: {"W": dist.Normal(0.0, 1.0)}
    guide.moments, guide.kl_weights = (lambda x: moments), lambda: torch.zeros(())
    message = rf"moments\(x\) of the guide GaussianGuide must be four tensors \(1, p\).*{got}"
    with pytest.raises(ValueError, match=message):
        decompose(toy.linear_model(), guide, toy.images(3), num_train=3, **BUDGET)


class Program(nn.Module):
    """A user's guide: no posterior, and a random weight of its own."""

    def __init__(self, q=dist.Normal):
        super().__init__()
        self.q = q

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            loc = x.flatten(1)[..., :2] + shift.unsqueeze(-1)
            pyro.sample("z", self.q(loc, 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Found vars in guide")
def test_any_program_is_a_guide():
    model, x = toy.linear_model(), toy.images(3)
    found = decompose(model, Program(), x, num_samples=2000, num_chains=4, num_steps=10)
    assert bool(found.trusted.all())
    assert found.family == "other"
    torch.testing.assert_close(found.log_evidence, toy.exact_evidence(model, x), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.annealed, toy.exact_evidence(model, x), rtol=0, atol=0.05)
    assert bool((found.log_evidence > found.elbo).all())


def test_images_in_parts_are_images_together():
    model, x = curved_model(), toy.images(32)
    torch.manual_seed(0)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    state = torch.random.get_rng_state()
    whole = decompose(model, guide, x, **BUDGET).table()
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = [
        decompose(model, guide, x[:25], **BUDGET).table(),
        decompose(model, guide, x[25:], first_image=25, **BUDGET).table(),
    ]
    together = pd.concat(parts, ignore_index=True).assign(image=range(32))
    pd.testing.assert_frame_equal(whole, together, check_exact=True)


def test_nearby_seeds_share_no_noise():
    model, x = curved_model(), toy.images(3)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    same = x[:1].expand(2, *x.shape[1:])
    first = decompose(model, guide, same, seed=0, first_image=1, **BUDGET)
    other = decompose(model, guide, same, seed=1, first_image=0, **BUDGET)
    assert not bool((first.elbo == other.elbo).any())


def test_an_optimum_that_has_not_converged_is_flagged():
    model, x = curved_model(), toy.images(12)
    torch.manual_seed(0)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    found = decompose(model, guide, x, max_optimum_steps=1, **BUDGET)
    left = int((~found.converged).sum())
    assert left > 0
    assert f"{left} of them not converged" in repr(found)
    mean = float(found.amortisation[found.converged].mean())
    assert f"amortisation gap {mean:10.2f}" in repr(found)
    assert max(map(len, repr(found).splitlines())) < 80


class Point(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.flatten(1)[:, :2]).to_event(1))


def test_what_cannot_be_decomposed():
    model, x = toy.linear_model(), toy.images(3)
    vae = GaussianGuide(model, toy.linear_encoder()).double()
    with pytest.raises(ValueError, match="Point are points, which have no density"):
        decompose(model, Point(), x)
    with pytest.raises(ValueError, match="num_train must be the number of training images"):
        decompose(model, GPGuide(model, toy.linear_encoder()).double(), x)
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        decompose(model, vae, x, num_samples=1)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
            decompose(model, vae, x, chunk_size=size)
    with pytest.raises(ValueError, match=r"expects images \(B, 1, 2, 3\)"):
        decompose(model, vae, x[0])
