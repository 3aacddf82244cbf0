import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import GaussianGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.evaluation.generation import (
    decode,
    reconstruct,
    sample_images,
)
from pyro_gpvae.testing.linear_gaussian import linear_gaussian

SHAPE = (1, 3, 4)


class Exact:
    """The exact posterior of a linear-Gaussian model, as a guide."""

    def __init__(self, model):
        self.posterior = model.posterior

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


class Replayed:
    """The same, as a user might write it: a function without a density."""

    def __init__(self, model):
        self.inner = Exact(model)

    def __call__(self, x):
        self.inner(x)


class WithoutMean(Exact):
    """The same, with a posterior that does not tell its mean, as a flow's does not."""

    def __init__(self, model):
        def posterior(x):
            return dist.TransformedDistribution(model.posterior(x), [])

        self.posterior = posterior


class Mute(dist.TransformedDistribution):
    """Has no attribute of that name, as a class of the user's own may not."""

    @property
    def mean(self):
        raise AttributeError("mean")


class WithMutePosterior(Exact):
    def __init__(self, model):
        self.posterior = lambda x: Mute(model.posterior(x), [])


def linear(latent_dim=2, **options):
    model = linear_gaussian(SHAPE, latent_dim, sigma=0.05, **options)
    return model.double().requires_grad_(False)


# ---------------------------------------------------------------- images


def test_samples_have_the_moments_of_the_model():
    model = linear()
    z, means = sample_images(model, 20_000, seed=0)
    again, noisy = sample_images(model, 20_000, noise=True, seed=0)
    assert torch.equal(z, again), "the same z with and without noise"
    assert torch.equal(means, model.decoder(z))
    loadings, bias, sigma = model._linear()
    covariance = loadings @ loadings.mT
    for images, exact in ((means, covariance), (noisy, covariance + sigma**2 * torch.eye(12))):
        assert images.dtype == torch.float64
        found = torch.cov(images.flatten(1).mT)
        # the standard error of a variance s is s √(2/n) = 0.01 s; 6 of them
        assert (found - exact).abs().max() < 0.06 * exact.diagonal().max()
        error = (images.flatten(1).mean(0) - bias).abs()
        assert (error < 6 * (exact.diagonal() / 20_000).sqrt()).all()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_colour_and_likelihoods(channels, likelihood):
    shape = (channels, 32, 32)
    model = ImageModel(shape, latent_dim=3, likelihood=likelihood)
    guide = GaussianGuide(model)
    x = torch.randint(2, (4, *shape), dtype=torch.uint8) * 255
    assert sample_images(model, 5).images.shape == (5, *shape)
    assert reconstruct(model, guide, x).images.shape == (4, *shape)
    z = torch.randn(4, 1, 5, 3)
    moved = decode(model, z)
    assert moved.shape == (4, 1, 5, *shape)
    if likelihood == "bernoulli":
        assert moved.min() > 0
        assert moved.max() < 1
        logits = model.decoder(z.reshape(-1, 3)).reshape(moved.shape)
        torch.testing.assert_close(moved, logits.sigmoid(), msg="probabilities, not logits")
        draws = sample_images(model, 5, noise=True).images
        assert set(draws.unique().tolist()) <= {0.0, 1.0}


def test_reconstructions_are_decoded_from_the_mean_of_the_posterior():
    model = linear()
    x = model.images(600)  # more than are encoded at once
    z, images = reconstruct(model, Exact(model), x)
    torch.testing.assert_close(z, model.posterior(x).mean)
    torch.testing.assert_close(images, model.decoder(z))
    draws = torch.stack([reconstruct(model, Exact(model), x, draw=True).z for _ in range(200)])
    error = (draws.mean(0) - z) / (draws.std(0) / math.sqrt(200))
    assert error.square().mean() == pytest.approx(1, abs=0.25), "draws from the same posterior"


@pytest.mark.parametrize("kind", [Replayed, WithoutMean, WithMutePosterior])
def test_without_a_mean_that_of_draws_is_taken(kind):
    model = linear()
    x = model.images(300)
    z = reconstruct(model, kind(model), x, seed=0).z
    exact = model.posterior(x)
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt() / 10  # 100 draws
    # 600 squares of standard normals: their mean has standard deviation 0.06
    assert ((z - exact.mean) / scale).square().mean() == pytest.approx(1, abs=0.3)


def flat_model(x):
    """A Pyro model of the user's own: no methods, flattened pixels, a factor, a global site."""
    pyro.sample("global", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor([5.0, 7.0]), 0.1).to_event(1))
        pyro.factor("nothing", torch.zeros(len(x)))
        pixels = z.sum(-1, keepdim=True).expand(-1, 4)
        pyro.sample("pixels", dist.Normal(pixels, 0.01).to_event(1), obs=x.flatten(1))


def test_any_pyro_model_will_do():
    z, images = sample_images(flat_model, 1000, image_shape=(1, 2, 2), seed=0)
    assert images.shape == (1000, 1, 2, 2)
    torch.testing.assert_close(images[:, 0, 0, 0], z.sum(-1))
    assert z.mean(0).tolist() == pytest.approx([5, 7], abs=0.02), "the model's own prior"

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 1e-6).to_event(1))

    x = torch.rand(3, 1, 2, 2)
    z, images = reconstruct(flat_model, guide, x)
    torch.testing.assert_close(images[:, 0, 0, 0], z.sum(-1))
    with pytest.raises(ValueError, match="pass image_shape"):
        sample_images(flat_model, 2)
    with pytest.raises(ValueError, match="one observed site"):
        sample_images(lambda x: guide(x), 2, image_shape=(1, 2, 2))
    with pytest.raises(ValueError, match="the guide must have a site 'z'"):
        reconstruct(flat_model, lambda x: None, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, x: sample_images(m, 0), "num_images must be at least 1, got 0"),
        (lambda m, g, x: reconstruct(m, g, x[:0]), "at least one member"),
        (lambda m, g, x: reconstruct(m, g, x[:, :, 1:]), "the model expects images"),
        (lambda m, g, x: decode(m, torch.full((2, 2), math.inf)), "2 of 2 decoded images"),
    ],
)
def test_errors(call, message):
    model = linear()
    with pytest.raises(ValueError, match=message):
        call(model, Exact(model), model.images(3))
