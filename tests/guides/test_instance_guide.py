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
from pyro_gpvae.evaluation.optimum import climb, laplace_start, optimise_gaussian
from pyro_gpvae.model.image_model import ImageModel


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


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestLinearGaussian:
    def test_full_covariance_is_the_posterior(self):
        model, x = toy.linear_model(3), toy.images(4)
        optimum = InstanceGuide(model, "full").optimise(x)
        exact = toy.exact_posterior(model, x)
        close(optimum.posterior.mean, exact.mean, 1e-8)
        close(optimum.posterior.covariance_matrix, exact.covariance_matrix.expand(4, 3, 3), 1e-8)
        close(optimum.elbo, toy.exact_evidence(model, x), 1e-8)
        assert optimum.gap.max() < 1e-8
        assert optimum.converged.all()

    def test_its_weights_are_the_evidence(self):
        model, x = toy.linear_model(3), toy.images(4)
        result = log_evidence(model, InstanceGuide(model, "full"), x, 5, seed=0)
        close(result.log_evidence, toy.exact_evidence(model, x), 1e-8)
        close(result.elbo, toy.exact_evidence(model, x), 1e-8)

    def test_diagonal_is_the_mean_field_optimum(self):
        model, x = toy.linear_model(3), toy.images(4)
        optimum = InstanceGuide(model).optimise(x)
        exact = toy.exact_posterior(model, x)
        variance = 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1)
        close(optimum.posterior.mean, exact.mean, 1e-8)
        close(optimum.posterior.variance, variance.expand(4, 3), 1e-8)
        q = dist.MultivariateNormal(exact.mean, torch.diag_embed(variance.expand(4, 3)))
        gap = torch.distributions.kl_divergence(q, exact)
        assert gap.min() > 0.01
        close(optimum.elbo, toy.exact_evidence(model, x) - gap, 1e-8)

    @pytest.mark.parametrize("covariance", ["diagonal", "full"])
    def test_the_ascent_finds_the_optimum_from_elsewhere(self, covariance):
        model, x = toy.linear_model(3), toy.images(4)
        guide = InstanceGuide(model, covariance, tolerance=1e-6, max_steps=1000)
        best = guide.optimise(x)
        loc = best.posterior.mean + torch.tensor([0.5, -0.3, 0.2]).double()
        factor = 2 * torch.eye(3).double().repeat(4, 1, 1)
        with torch.no_grad():
            found = climb(model, x, (loc, factor, torch.zeros(len(x))), covariance, 1e-6, 1000, 640)
        assert found.converged.all()
        assert found.steps.min() > 5
        close(found.posterior.mean, best.posterior.mean, 1e-3)
        close(found.posterior.variance, best.posterior.variance, 1e-3)


class TestOptimum:
    @pytest.mark.slow
    def test_equals_brute_force(self):
        """p = 1: the ELBO by Gauss-Hermite quadrature, maximised by SciPy from many starts."""
        model, x = curved_model(1), toy.images(6)
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())

        def elbo(loc, log_scale, image):
            z = (loc + math.exp(log_scale) * nodes)[:, None, None]
            with torch.no_grad():
                expected = weights @ model.log_joint(image[None], z)[:, 0]
            return float(expected) + log_scale + 0.5 * math.log(2 * math.pi * math.e)

        optimum = InstanceGuide(model).optimise(x)
        assert optimum.converged.all()
        for image, mean, variance, estimate in zip(
            x, optimum.posterior.mean, optimum.posterior.variance, optimum.elbo, strict=True
        ):
            best = max(
                -optimize.minimize(
                    lambda v, image=image: -elbo(*v, image), (start, -1.0), method="Nelder-Mead"
                ).fun
                for start in (-2.0, 0.0, 2.0)
            )
            found = elbo(mean.item(), 0.5 * variance.log().item(), image)
            assert best - 0.05 < found < best + 1e-6
            assert float(estimate) == pytest.approx(found, abs=0.05)

    @pytest.mark.parametrize("covariance", ["diagonal", "full"])
    def test_beats_the_laplace_approximation_and_the_encoder(self, covariance):
        model, x = curved_model(), toy.images(8)
        vae = encoder_of(model)
        guide = InstanceGuide(model, covariance, warm_start=vae, tolerance=0.01)
        optimum = guide.optimise(x)
        assert optimum.converged.all()
        with torch.no_grad():
            loc, factor, _ = laplace_start(model, x, covariance, vae, 2)
        laplace = dist.MultivariateNormal(loc, factor @ factor.mT)
        torch.manual_seed(0)
        elbos = []
        for q in (optimum.posterior, laplace, vae.posterior(x)):
            z = q.sample((4000,))
            elbos.append((model.log_joint(x, z) - q.log_prob(z)).mean(0))
        assert elbos[0].mean() > elbos[1].mean() + 0.05
        assert (elbos[0] > elbos[2] + 0.1).all()
        close(optimum.elbo, elbos[0], 0.1)

    def test_an_image_does_not_depend_on_its_batch_and_chunk(self):
        model, x = curved_model(), toy.images(5)
        start = encoder_of(model)
        together = optimise_gaussian(model, x, start=start)
        for i in (0, 3):
            alone = optimise_gaussian(model, x[i : i + 1], start=start, chunk_size=2)
            close(alone.posterior.mean[0], together.posterior.mean[i], 1e-8)
            close(
                alone.posterior.covariance_matrix[0], together.posterior.covariance_matrix[i], 1e-8
            )
            assert alone.steps[0] == together.steps[i]

    def test_deterministic_and_leaves_no_trace(self):
        model, x = curved_model(), toy.images(3)
        guide = InstanceGuide(model)
        state = torch.get_rng_state()
        first = guide.posterior(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.mean, guide.posterior(x).mean)
        assert not first.mean.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not list(guide.parameters())

    def test_says_which_images_have_not_converged(self):
        model, x = curved_model(), toy.images(4)
        guide = InstanceGuide(model, tolerance=1e-9, max_steps=2)
        optimum = guide.optimise(x)
        assert not optimum.converged.any()
        assert (optimum.steps == 2).all()
        with pytest.warns(UserWarning, match="4 of 4 images are not within 1e-09 nats.* 2 steps"):
            guide.posterior(x)

    def test_more_starts_find_the_better_mode(self):
        # two z explain each image equally well, and the prior prefers the positive one
        decoder = nn.Sequential(nn.Linear(1, 8), nn.Unflatten(1, (1, 2, 4))).double()

        class Even(nn.Module):
            def forward(self, z):
                return decoder(z.square() + 0.3 * z)

        model = ImageModel((1, 2, 4), 1, Even(), sigma=0.05).double()
        with torch.no_grad():
            x = decoder(torch.tensor([[1.0]]).double())
        few, many = (
            InstanceGuide(model, warm_start=_Fixed(-0.3), num_starts=n).optimise(x) for n in (1, 12)
        )
        assert few.posterior.mean.item() < 0 < many.posterior.mean.item()
        assert many.elbo > few.elbo

    def test_starts_from_a_posterior_without_a_mean(self):
        model, x = curved_model(), toy.images(3)
        guide = InstanceGuide(model, warm_start=_Flow(encoder_of(model)))
        together = guide.optimise(x)
        assert together.converged.all()
        close(guide.optimise(x[2:]).posterior.mean[0], together.posterior.mean[2], 1e-8)


class _Fixed:
    def __init__(self, loc):
        self.loc = torch.as_tensor(loc).double()

    def posterior(self, x):
        return dist.Delta(self.loc.expand(len(x), 1)).to_event(1)


class _Flow:
    def __init__(self, guide):
        self.guide = guide

    def posterior(self, x):
        q = self.guide.posterior(x)
        return dist.TransformedDistribution(q, [AffineTransform(0.1, 1.5, event_dim=1)])


class TestAutoguides:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("autoguide", "slack"),
        [(AutoNormal, 0.1), ("AutoMultivariateNormal", 0.1), (AutoIAFNormal, 0.3)],
    )
    def test_any_autoguide_is_a_reference(self, autoguide, slack):
        model, x = toy.linear_model(), toy.images(2)
        guide = InstanceGuide(model, autoguide=autoguide)
        optimum = guide.optimise(x)
        assert optimum.converged.all()
        assert optimum.posterior.batch_shape == (2,)
        assert optimum.posterior.event_shape == (2,)
        exact = toy.exact_evidence(model, x)
        best = exact
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

    def test_in_the_evidence(self):
        model, x = toy.linear_model(), toy.images(2)
        guide = InstanceGuide(model, autoguide="AutoMultivariateNormal", tolerance=0.5)
        result = log_evidence(model, guide, x, 100, chunk_size=16, seed=0)
        close(result.log_evidence, toy.exact_evidence(model, x), 0.2)
        alone = guide.optimise(x[1:]).elbo
        close(alone[0], guide.optimise(x).elbo[1], 1e-8)

    def test_running_out_of_steps_is_reported(self):
        model, x = toy.linear_model(), toy.images(1)
        guide = InstanceGuide(model, autoguide=AutoNormal, max_steps=50)
        assert not guide.optimise(x).converged.any()


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"covariance": "banded"}, "covariance must be one of .*, got 'banded'"),
            ({"tolerance": 0.0}, "tolerance must be positive and finite, got 0.0"),
            ({"tolerance": math.nan}, "tolerance must be positive and finite, got nan"),
            ({"max_steps": -1}, "max_steps must be at least 1, got -1"),
            ({"num_starts": 0}, "num_starts must be at least 1, got 0"),
            ({"autoguide": "AutoNorml"}, "unknown autoguide 'AutoNorml'"),
            ({"covariance": "full", "autoguide": "AutoNormal"}, "with an autoguide"),
            ({"warm_start": nn.Identity()}, r"the guide Identity has no posterior\(x\)"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            InstanceGuide(toy.linear_model(), **options)

    def test_an_image_that_cannot_be_optimised_is_named(self):
        start = torch.tensor([0.0, 0.0, torch.nan, 0.0]).double()[:, None]
        guide = InstanceGuide(curved_model(1), warm_start=_Fixed(start))
        with pytest.raises(torch.linalg.LinAlgError, match="precision of image 2 is not finite"):
            guide.optimise(toy.images(4))


def test_autoguides_of_different_images_share_nothing():
    model, x = curved_model(), toy.images(3)
    guide = InstanceGuide(model, autoguide="AutoNormal")
    alone = [guide.posterior(image[None]).members[0] for image in x]
    together = guide.posterior(x).members
    z = torch.zeros(2, dtype=torch.float64)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.log_prob(z), other.log_prob(z), rtol=0, atol=1e-8)
    assert not pyro.get_param_store().keys()
