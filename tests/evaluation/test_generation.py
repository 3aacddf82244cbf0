import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import GaussianGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.evaluation._posteriors import posterior_mean
from pyro_gpvae.evaluation.generation import (
    decode,
    latent_path,
    latent_traversals,
    reconstruct,
    sample_images,
)
from pyro_gpvae.evaluation.information import active_units, mutual_information
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


def unused(model, dim):
    """Cuts a latent dimension off from the decoder."""
    with torch.no_grad():
        next(model.decoder.children()).weight[:, dim] = 0
    return model


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
    z = latent_traversals(reconstruct(model, guide, x).z, [2], steps=5)
    moved = decode(model, z)
    assert (z.shape, moved.shape) == ((4, 1, 5, 3), (4, 1, 5, *shape))
    if likelihood == "bernoulli":
        assert moved.min() > 0
        assert moved.max() < 1
        logits = model.decoder(z.reshape(-1, 3)).reshape(moved.shape)
        torch.testing.assert_close(moved, logits.sigmoid(), msg="probabilities, not logits")
        draws = sample_images(model, 5, noise=True).images
        assert set(draws.unique().tolist()) <= {0.0, 1.0}


def test_seeds():
    model = linear()
    guide, x = Exact(model), model.images(3)
    before = torch.random.get_rng_state()
    draw = reconstruct(model, guide, x, draw=True, seed=1).z
    assert torch.equal(draw, reconstruct(model, guide, x, draw=True, seed=1).z)
    assert not torch.equal(draw, reconstruct(model, guide, x, draw=True, seed=2).z)
    first = sample_images(model, 4, noise=True, seed=1).images
    assert torch.equal(first, sample_images(model, 4, noise=True, seed=1).images)
    assert not torch.equal(first, sample_images(model, 4, noise=True, seed=2).images)
    result = mutual_information(model, guide, x, seed=1)
    assert result == mutual_information(model, guide, x, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the global state is left alone"


def test_reconstructions_are_decoded_from_the_mean_of_the_posterior():
    model = linear()
    x = model.images(600)  # more than are encoded at once
    z, images = reconstruct(model, Exact(model), x)
    torch.testing.assert_close(z, model.posterior(x).mean)
    torch.testing.assert_close(images, model.decoder(z))
    draws = torch.stack([reconstruct(model, Exact(model), x, draw=True).z for _ in range(200)])
    error = (draws.mean(0) - z) / (draws.std(0) / math.sqrt(200))
    assert error.square().mean() == pytest.approx(1, abs=0.25), "draws from the same posterior"


def test_a_mean_that_is_known_has_no_error():
    model = linear()
    x = model.images(3)
    mean, variance = posterior_mean(Exact(model), x)
    assert torch.equal(mean, model.posterior(x).mean)
    assert torch.equal(variance, torch.zeros_like(mean))


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


def test_spherical_paths_keep_the_norm():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 7, 20, generator=generator, dtype=torch.float64)
    start, end = (3 * z / z.norm(dim=-1, keepdim=True) for z in (start, end))
    path = latent_path(start, end, 11)
    torch.testing.assert_close(path.norm(dim=-1), torch.full((7, 11), 3.0).double())
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, -1], end)
    steps = path.diff(dim=1).norm(dim=-1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), msg="at constant speed")
    line = latent_path(start, end, 3, "linear")
    torch.testing.assert_close(line[:, 1], (start + end) / 2)
    assert (line[:, 1].norm(dim=-1) < 2.5).all(), "the straight line leaves the sphere"


def test_paths_between_collinear_ends_are_straight():
    start = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    end = torch.tensor([[2.0, 4.0], [-1.0, -2.0], [1.0, 2.0], [0.0, 0.0]])
    path = latent_path(start, end, 5)
    assert path.isfinite().all()
    torch.testing.assert_close(path[:3], latent_path(start, end, 5, "linear")[:3])
    torch.testing.assert_close(path[3, [0, -1]], torch.stack([start[3], end[3]]))
    one = latent_path(torch.tensor([[2.0]]), torch.tensor([[-2.0]]), 3)
    assert one.flatten().tolist() == [2, 0, -2], "p = 1 has no other way"


def test_traversals_move_one_dimension():
    z = torch.tensor([[0.1, 0.2, 0.3]])
    moved = latent_traversals(z, [2, 0], span=2, steps=5)
    assert moved.shape == (1, 2, 5, 3)
    assert moved[0, 0, :, 2].tolist() == [-2, -1, 0, 1, 2]
    assert moved[0, 1, :, 0].tolist() == [-2, -1, 0, 1, 2]
    assert (moved[0, 0, :, :2] == z[0, :2]).all()
    assert (moved[0, 1, :, 1:] == z[0, 1:]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g, x: sample_images(m, 0), "num_images must be at least 1, got 0"),
        (lambda m, g, x: reconstruct(m, g, x[:0]), "at least one image"),
        (lambda m, g, x: reconstruct(m, g, x[:, :, 1:]), "the model expects images"),
        (lambda m, g, x: latent_path(x, x, 1), "steps must be at least 2"),
        (lambda m, g, x: latent_path(x, x, 3, kind="cubic"), "kind must be one of"),
        (lambda m, g, x: latent_traversals(x[0, 0], [4]), "dims must be between 0 and 3, got 4"),
        (lambda m, g, x: latent_traversals(x[0, 0], span=0), "span must be positive"),
        (lambda m, g, x: latent_traversals(x[0, 0], steps=1), "steps must be at least 2"),
        (lambda m, g, x: decode(m, torch.full((2, 2), math.inf)), "2 of 2 decoded images"),
        (lambda m, g, x: active_units(m, g, x[:1]), "num_images must be at least 2, got 1"),
        (lambda m, g, x: active_units(m, g, x, threshold=-1), "threshold must be"),
        (lambda m, g, x: mutual_information(m, g, x, 0), "num_samples must be at least 1"),
        (lambda m, g, x: mutual_information(m, g, x, chunk_size=0), "chunk_size must be"),
        (lambda m, g, x: mutual_information(m, Replayed(m), x), "Replayed has no posterior"),
    ],
)
def test_errors(call, message):
    model = linear()
    with pytest.raises(ValueError, match=message):
        call(model, Exact(model), model.images(3))


# ---------------------------------------------------------------- what z says


@pytest.mark.parametrize("kind", [Exact, Replayed, WithoutMean])
def test_active_units_of_a_linear_model(kind):
    model = unused(linear(latent_dim=3), dim=1)
    x = model.images(2000)
    found = active_units(model, kind(model), x, seed=0)
    # Cov(E[z|x]) = I - Cov(z|x) under the model
    exact = 1 - model.posterior(x[:1]).covariance_matrix[0].diagonal()
    assert exact[1] == 0
    # the variance of 2000 images has a relative standard error of √(2/2000) = 0.03
    torch.testing.assert_close(found.variances, exact.detach(), rtol=0.15, atol=0.003)
    assert found.variances[1] < 0.005, "100 draws alone would leave 1/100"
    assert found.count == 2
    assert active_units(model, kind(model), x, threshold=2.0).count == 0
    assert found.num_images == 2000


def test_random_weights_move_all_images_at_once():
    model = linear(latent_dim=1)
    x = model.images(2000)
    exact = float(model.posterior(x).mean.var(0))

    def guide(x):
        shift = pyro.sample("W", dist.Normal(0.0, 2.0).expand([1]).to_event(1))
        q = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q.mean + shift, q.stddev).to_event(1))

    found = active_units(model, guide, x, seed=0)
    # √(2/2000) = 0.03; the mean of 100 draws of W alone would take 0.04 away
    assert float(found.variances) == pytest.approx(exact, rel=0.15)
    # images that are the same have no variance, however the weights move them
    assert float(active_units(model, guide, x[:1].expand(500, *SHAPE), seed=0).variances) < 0.003


def test_information_of_finitely_many_images_against_an_integral():
    model = linear(latent_dim=1, signal=2.0)
    x = model.images(12)
    q, grid = model.posterior(x), torch.linspace(-12, 12, 40_001).double()
    log_q = q.log_prob(grid[:, None, None].expand(-1, 12, 1))
    log_marginal = log_q.logsumexp(1) - math.log(12)
    log_prior = dist.Normal(0.0, 1.0).log_prob(grid)

    def integral(values):
        return torch.trapezoid(values, grid, dim=0).mean().item()

    exact = (
        integral(log_q.exp() * (log_q - log_marginal[:, None])),
        integral(log_marginal.exp() * (log_marginal - log_prior)),
    )
    found = mutual_information(model, Exact(model), x, 4000, seed=0)
    # four standard errors: a right estimator fails once in 16,000 seeds
    for name, value in zip(("mutual_information", "marginal_kl"), exact, strict=True):
        error = getattr(found, f"{name}_error")
        assert 0 < error < 0.01
        assert abs(getattr(found, name) - value) < 4 * error
    analytic = torch.distributions.kl_divergence(
        q, dist.MultivariateNormal(torch.zeros(1).double(), torch.eye(1).double())
    )
    assert abs(found.kl - analytic.mean().item()) < 4 * found.kl_error
    assert found.kl == pytest.approx(found.mutual_information + found.marginal_kl)


def test_standard_errors_are_those_of_repetitions():
    model = linear(latent_dim=1, signal=2.0)
    guide, x = Exact(model), model.images(12)
    found = [mutual_information(model, guide, x, 5, seed=seed) for seed in range(300)]
    for name in ("mutual_information", "marginal_kl", "kl"):
        spread = np.std([getattr(f, name) for f in found])
        claimed = np.sqrt(np.mean([getattr(f, f"{name}_error") ** 2 for f in found]))
        assert claimed == pytest.approx(spread, rel=0.2)  # of 300: 0.04


def test_information_of_many_images_is_that_of_the_model():
    model = linear(latent_dim=2, signal=1.5)
    loadings, _, sigma = model._linear()
    exact = 0.5 * torch.logdet(torch.eye(2) + loadings.mT @ loadings / sigma**2).item()
    # another seed than that of the images, whose noise the draws would otherwise repeat
    found = mutual_information(model, Exact(model), model.images(1500), 2, seed=1)
    assert exact < 0.3 * found.bound, "far from its bound"
    # the errors from the choice of images and from the draws are both about 0.02
    assert found.mutual_information == pytest.approx(exact, abs=0.08)
    assert found.marginal_kl == pytest.approx(0, abs=0.08), "the exact posterior averages to p(z)"


def test_information_is_at_most_log_n():
    model = linear_gaussian(SHAPE, 2, signal=1e6, sigma=1e-5).double().requires_grad_(False)
    found = mutual_information(model, Exact(model), model.images(7), 3, seed=0)
    assert found.bound == math.log(7)
    assert found.mutual_information <= found.bound * (1 + 1e-12)
    assert found.mutual_information == pytest.approx(math.log(7))
    assert mutual_information(model, Exact(model), model.images(1)).mutual_information == 0
    one = mutual_information(model, Exact(model), model.images(7), 1)
    assert math.isnan(one.mutual_information_error)


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch):
    model = linear()
    x = model.images(600)  # two batches of the encoder
    whole = mutual_information(model, Exact(model), x, seed=0, chunk_size=10**9)
    sizes = []
    density = dist.MultivariateNormal.log_prob

    def watched(self, value):
        sizes.append(value.shape[:-1].numel())
        return density(self, value)

    monkeypatch.setattr(dist.MultivariateNormal, "log_prob", watched)
    parts = mutual_information(model, Exact(model), x, seed=0, chunk_size=3000)
    assert max(sizes) <= 3000
    assert parts.mutual_information == pytest.approx(whole.mutual_information, rel=1e-12)
    assert parts.marginal_kl == pytest.approx(whole.marginal_kl, rel=1e-12)


class Far(dist.Normal):
    """As a flow whose inverse overflows where z is from a distant image."""

    def log_prob(self, value):
        return super().log_prob(torch.where((value - self.loc).abs() > 50, math.nan, value))


@pytest.mark.parametrize(("distance", "finite"), [(100.0, True), (math.inf, False)])
def test_densities_that_overflow(distance, finite):
    class Guide:
        def posterior(self, x):
            loc = distance * torch.arange(1.0, 4)[:, None].expand(-1, 2).double()
            return Far(loc, 1.0, validate_args=False).to_event(1)

    model = linear()
    if finite:
        found = mutual_information(model, Guide(), model.images(3))
        assert found.mutual_information == pytest.approx(math.log(3))
    else:
        with pytest.raises(ValueError, match="not finite"):
            mutual_information(model, Guide(), model.images(3))
