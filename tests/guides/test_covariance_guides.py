import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal, kl_divergence
from toy import (
    exact_evidence,
    exact_posterior,
    images,
    linear_encoder,
    linear_model,
)

from guides import GaussianGuide
from guides.covariance import FullCovarianceGuide, LowRankGuide, LowRankNormal
from pyro_gpvae import log_weights

FAMILIES = {
    "full": FullCovarianceGuide,
    "rank1": lambda model, *args, **kwargs: LowRankGuide(model, 1, *args, **kwargs),
    "rank2": lambda model, *args, **kwargs: LowRankGuide(model, 2, *args, **kwargs),
    "rank p": lambda m, *args, **kwargs: LowRankGuide(m, m.latent_dim, *args, **kwargs),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(model, name, seed=2):
    torch.manual_seed(seed)
    guide = FAMILIES[name](model, linear_encoder()).double()
    with torch.no_grad():
        for parameter in guide.parameters():  # the full covariance starts at a diagonal one
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def by_hand(guide, x):
    """Mean and covariance, element by element from the formulas."""
    features, loc, log_scale = guide.encode(x)
    p = loc.shape[-1]
    covariance = []
    for i in range(len(x)):
        if isinstance(guide, FullCovarianceGuide):
            elements = iter(guide.lower(features[i]))
            lower = torch.zeros(p, p).double()
            for row in range(p):
                for column in range(row):
                    lower[row, column] = next(elements)
                lower[row, row] = log_scale[i, row].exp()
            covariance.append(lower @ lower.mT)
        else:
            scale = log_scale[i].exp().diag()
            factor = scale @ guide.factor(features[i]).reshape(p, guide.rank)
            covariance.append(scale @ scale + factor @ factor.mT)
    return loc, torch.stack(covariance)


def test_full_covariance_starts_as_the_vae():
    model, x = linear_model(3), images(4)
    vae = GaussianGuide(model, linear_encoder()).double()
    for option in ({"warm_start": vae}, {"encoder": linear_encoder()}):
        guide = FullCovarianceGuide(model, **option).double()
        _, loc, log_scale = guide.encode(x)
        z = torch.randn(5, 4, 3).double()
        expected = dist.Normal(loc, log_scale.exp()).to_event(1)
        close(guide.posterior(x).log_prob(z), expected.log_prob(z))
    close(FullCovarianceGuide(model, warm_start=vae).double().encode(x)[1], vae.encode(x)[1])


@every_family
def test_density_and_samples_are_those_of_the_formula(name):
    model, x = linear_model(3), images(4)
    guide = build(model, name)
    q, (mean, covariance) = guide.posterior(x), by_hand(guide, x)
    assert (q.batch_shape, q.event_shape) == ((4,), (3,))
    assert not torch.allclose(covariance, covariance.diagonal(0, 1, 2).diag_embed())
    z = torch.randn(7, 4, 3).double()
    expected = dist.MultivariateNormal(mean, covariance).log_prob(z)
    close(q.log_prob(z), expected)
    close(q.expand((7, 4)).log_prob(z), expected)
    torch.manual_seed(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance),
        (q.sample((20_000,)) - mean).permute(1, 2, 0),
        upper=False,
    )
    # second moments of white noise: standard errors 1/√n off the diagonal, √(2/n) on it
    moments = white @ white.mT / 20_000
    error = 5 * math.sqrt(2 / 20_000)
    close(moments, torch.eye(3).double().expand(4, 3, 3), error)
    close(white.mean(-1), torch.zeros(4, 3).double(), error)


@every_family
def test_kl_is_analytic(name):
    model, x = linear_model(3), images(4)
    guide = build(model, name)
    q, (mean, covariance) = guide.posterior(x), by_hand(guide, x)
    dense = dist.MultivariateNormal(mean, covariance)
    loc, scale = torch.randn(3).double(), torch.rand(3).double() + 0.5
    for prior in (model.prior(), dist.Normal(loc, scale).to_event(1)):
        independent = prior.expand((4,))
        same = dist.MultivariateNormal(prior.mean, prior.variance.diag())
        close(kl_divergence(q, independent), kl_divergence(dense, same))
    for other in (dist.Laplace(loc, scale).to_event(1), dist.Normal(mean, 1.0).to_event(2)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, other)
    # and the objective uses it: what remains random is the likelihood
    torch.manual_seed(5)
    loss = guide.elbo().differentiable_loss(model, guide, x)
    torch.manual_seed(5)
    log_likelihood = model.likelihood(guide(x)).log_prob(x)
    kl = kl_divergence(q, model.prior().expand((4,)))
    close(loss, (kl - log_likelihood).sum())


@pytest.mark.parametrize("name", ["full", "rank2"])
def test_the_exact_posterior_is_in_the_family(name):
    # a correlated Gaussian posterior: then every weight is p(x)
    model, x = linear_model(), images(5)
    layer, exact = model.decoder[0], exact_posterior(model, x)
    covariance = exact.covariance_matrix[0]
    gain = covariance @ layer.weight.mT / model.log_sigma.exp() ** 2
    guide = FAMILIES[name](model, nn.Flatten()).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
        guide.head.weight[:2] = gain
        guide.head.bias[:2] = -gain @ layer.bias
        if name == "full":
            lower = torch.linalg.cholesky(covariance)
            guide.head.bias[2:] = lower.diagonal().log()
            guide.lower.bias[0] = lower[1, 0]
        else:
            values, vectors = torch.linalg.eigh(covariance)
            noise = values[0] / 2
            guide.head.bias[2:] = noise.log() / 2
            guide.factor.bias.copy_((vectors * (values / noise - 1).sqrt()).flatten())
    weights = log_weights(model, guide, x, 10)
    close(weights, exact_evidence(model, x).expand(10, 5), 1e-8)


@pytest.mark.parametrize("rank", [-1, 1.5, 3, 99])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=f"rank must be an integer from 0 to p = 2, got {rank}"):
        LowRankGuide(linear_model(), rank)


def test_low_rank_normal_is_that_of_torch():
    torch.manual_seed(0)
    loc, factor, diagonal = torch.randn(3), torch.randn(5, 3, 2), torch.rand(5, 3) + 0.1
    ours, theirs = (
        kind(loc, factor, diagonal) for kind in (LowRankNormal, LowRankMultivariateNormal)
    )
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    z = torch.randn(4, 5, 3)
    for attribute in ("mean", "variance", "covariance_matrix", "precision_matrix", "scale_tril"):
        torch.testing.assert_close(getattr(ours, attribute), getattr(theirs, attribute))
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    wide, other = ours.expand((4, 5)), theirs.expand((4, 5))
    torch.testing.assert_close(wide.log_prob(z), other.log_prob(z))
    samples = []
    for q in (wide, other):
        torch.manual_seed(1)
        samples.append(q.sample((2,)))
    torch.testing.assert_close(*samples)
