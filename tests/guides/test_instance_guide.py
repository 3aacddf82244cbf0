"""The instance-wise optimum: exact on linear-Gaussian models, converged on others, and says so."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import toy
from pyro.distributions.transforms import AffineTransform
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from scipy import optimize
from torch import nn

from guides.gaussian import GaussianGuide
from guides.instance import InstanceGuide
from pyro_gpvae.evaluation.importance import log_evidence
from pyro_gpvae.evaluation.optimum import climb, optimise_gaussian
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.image_model import ImageModel

both_covariances = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def curved_model(latent_dim=2):
    """A nonlinear decoder whose posteriors are clearly not Gaussian."""
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, toy.SHAPE)
    )
    decoder[0].weight.data *= 3
    return ImageModel(toy.SHAPE, latent_dim, decoder, sigma=0.3).double()


def encoder_of(model):
    torch.manual_seed(1)
    return GaussianGuide(model, toy.linear_encoder()).double()


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_full_covariance_is_the_posterior():
    model, x = toy.linear_model(3), toy.images(4)
    guide = InstanceGuide(model, "full")
    optimum, exact = guide.optimise(x), toy.exact_posterior(model, x)
    close(optimum.posterior.mean, exact.mean)
    close(optimum.posterior.covariance_matrix, exact.covariance_matrix.expand(4, 3, 3))
    result, log_p = log_evidence(model, guide, x, 5, seed=0), toy.exact_evidence(model, x)
    for value in (optimum.elbo, result.log_evidence, result.elbo):
        close(value, log_p)
    assert optimum.gap.max() < 1e-8
    assert optimum.converged.all()


def test_diagonal_is_the_mean_field_optimum():
    model, x = toy.linear_model(3), toy.images(4)
    optimum, exact = InstanceGuide(model).optimise(x), toy.exact_posterior(model, x)
    variance = 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1).expand(4, 3)
    close(optimum.posterior.mean, exact.mean)
    close(optimum.posterior.variance, variance)
    q = dist.MultivariateNormal(exact.mean, torch.diag_embed(variance))
    gap = torch.distributions.kl_divergence(q, exact)
    assert gap.min() > 0.01
    close(optimum.elbo, toy.exact_evidence(model, x) - gap)


@torch.no_grad()
@both_covariances
def test_the_ascent_finds_the_optimum_from_elsewhere(covariance):
    model, x = toy.linear_model(3), toy.images(4)
    best = InstanceGuide(model, covariance, tolerance=1e-6, max_steps=1000).optimise(x).posterior
    loc = best.mean + torch.tensor([0.5, -0.3, 0.2]).double()
    factor = 2 * torch.eye(3).double().repeat(4, 1, 1)
    begin = loc, factor, torch.zeros(len(x))
    found = climb(JointDensity(model, (x,)), begin, covariance, 1e-6, 1000, 640)
    assert found.converged.all()
    assert found.steps.min() > 5
    close(found.posterior.mean, best.mean, 1e-3)
    close(found.posterior.variance, best.variance, 1e-3)


@pytest.mark.slow
def test_it_equals_brute_force():
    """p = 1: the ELBO by Gauss-Hermite quadrature, maximised by SciPy from many starts."""
    model, x = curved_model(1), toy.images(6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())

    @torch.no_grad()
    def loss(at, image):
        loc, log_scale = map(float, at)
        z = (loc + math.exp(log_scale) * nodes)[:, None, None]
        expected = float(weights @ model.log_joint(image[None], z)[:, 0])
        return -expected - log_scale - 0.5 * math.log(2 * math.pi * math.e)

    optimum = InstanceGuide(model).optimise(x)
    assert optimum.converged.all()
    at = torch.cat([optimum.posterior.mean, 0.5 * optimum.posterior.variance.log()], -1)
    for image, values, estimate in zip(x, at, optimum.elbo, strict=True):
        fits = [
            optimize.minimize(loss, (start, -1.0), (image,), "Nelder-Mead").fun
            for start in (-2.0, 0.0, 2.0)
        ]
        assert -min(fits) - 0.05 < -loss(values, image) < -min(fits) + 1e-6
        assert float(estimate) == pytest.approx(-loss(values, image), abs=0.05)


def test_an_image_does_not_depend_on_its_batch_and_chunk():
    model, x = curved_model(), toy.images(5)
    start = encoder_of(model)
    together = optimise_gaussian(model, x, start=start)
    for i in (0, 3):
        alone = optimise_gaussian(model, x[i : i + 1], start=start, chunk_size=2)
        close(alone.posterior.mean[0], together.posterior.mean[i])
        close(alone.posterior.covariance_matrix[0], together.posterior.covariance_matrix[i])
        assert alone.steps[0] == together.steps[i]


def test_deterministic_and_leaves_no_trace():
    model, x = curved_model(), toy.images(3)
    guide = InstanceGuide(model)
    state = torch.get_rng_state()
    first = guide.posterior(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.mean, guide.posterior(x).mean)
    assert not first.mean.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not list(guide.parameters())


def test_says_which_images_have_not_converged():
    model, x = curved_model(), toy.images(4)
    guide = InstanceGuide(model, tolerance=1e-9, max_steps=2)
    optimum = guide.optimise(x)
    assert not optimum.converged.any()
    assert (optimum.steps == 2).all()
    with pytest.warns(UserWarning, match="4 of 4 images are not within 1e-09 nats.* 2 steps"):
        guide.posterior(x)
    auto = InstanceGuide(model, autoguide=AutoNormal, max_steps=50)
    assert not auto.optimise(x[:1]).converged.any()


class Posterior:
    def __init__(self, posterior):
        self.posterior = posterior


def at(loc):
    loc = torch.as_tensor(loc).double()
    return Posterior(lambda x: dist.Delta(loc.expand(len(x), 1)).to_event(1))


def test_more_starts_find_the_better_mode():
    # two z explain each image equally well, and the prior prefers the positive one
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Unflatten(1, (1, 2, 4))).double()

    class Even(nn.Module):
        def forward(self, z):
            return decoder(z.square() + 0.3 * z)

    model = ImageModel((1, 2, 4), 1, Even(), sigma=0.05).double()
    x = decoder(torch.tensor([[1.0]]).double()).detach()
    few, many = (
        InstanceGuide(model, warm_start=at(-0.3), num_starts=n).optimise(x) for n in (1, 12)
    )
    assert few.posterior.mean.item() < 0 < many.posterior.mean.item()
    assert many.elbo > few.elbo


def test_starts_from_a_posterior_without_a_mean():
    model, x = curved_model(), toy.images(3)
    vae, flow = encoder_of(model), [AffineTransform(0.1, 1.5, event_dim=1)]
    start = Posterior(lambda x: dist.TransformedDistribution(vae.posterior(x), flow))
    guide = InstanceGuide(model, warm_start=start)
    together = guide.optimise(x)
    assert together.converged.all()
    close(guide.optimise(x[2:]).posterior.mean[0], together.posterior.mean[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("autoguide", "slack"),
    [(AutoNormal, 0.1), ("AutoMultivariateNormal", 0.1), (AutoIAFNormal, 0.3)],
)
def test_any_autoguide_is_a_reference(autoguide, slack):
    model, x = toy.linear_model(), toy.images(2)
    optimum = InstanceGuide(model, autoguide=autoguide).optimise(x)
    assert optimum.converged.all()
    best = exact = toy.exact_evidence(model, x)
    if autoguide is AutoNormal:
        best = InstanceGuide(model).optimise(x).elbo
        assert (best < exact - 0.01).all()
    torch.manual_seed(0)
    with torch.no_grad():
        z = optimum.posterior.sample((2000,))
        weights = model.log_joint(x, z) - optimum.posterior.log_prob(z)
    assert z.shape == (2000, 2, 2)
    assert ((weights.mean(0) - best).abs() < slack).all()
    close(optimum.elbo, weights.mean(0), slack)
    # normalised: the weights average to p(x)
    close(weights.logsumexp(0) - math.log(2000), exact, 0.1)


@pytest.mark.slow
def test_autoguides_of_different_images_share_nothing():
    model, x = curved_model(), toy.images(3)
    guide = InstanceGuide(model, autoguide="AutoNormal")
    alone = [guide.posterior(image[None]).members[0] for image in x]
    z = torch.zeros(2, dtype=torch.float64)
    for one, other in zip(alone, guide.posterior(x).members, strict=True):
        close(one.log_prob(z), other.log_prob(z))
    assert not pyro.get_param_store().keys()


def test_an_image_that_cannot_be_optimised_is_named():
    guide = InstanceGuide(curved_model(1), warm_start=at([[0.0], [0.0], [torch.nan], [0.0]]))
    with pytest.raises(torch.linalg.LinAlgError, match="precision of image 2 is not finite"):
        guide.optimise(toy.images(4))
