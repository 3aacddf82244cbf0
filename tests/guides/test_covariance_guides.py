import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal, kl_divergence
from toy import exact_evidence, exact_posterior, images, linear_encoder, linear_model

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
    """Mean and covariance from the formulas."""
    features, loc, log_scale = guide.encode(x)
    scale, p = log_scale.exp().diag_embed(), loc.shape[-1]
    if isinstance(guide, FullCovarianceGuide):
        lower = scale.clone()
        lower[:, *torch.tril_indices(p, p, -1)] = guide.lower(features)
        return loc, lower @ lower.mT
    factor = scale @ guide.factor(features).unflatten(-1, (p, guide.rank))
    return loc, scale @ scale + factor @ factor.mT


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
def test_kl_is_analytic(name):
    model, x = linear_model(3), images(4)
    guide = build(model, name)
    q, (mean, covariance) = guide.posterior(x), by_hand(guide, x)
    dense = dist.MultivariateNormal(mean, covariance)
    z = torch.randn(7, 4, 3).double()
    close(q.log_prob(z), dense.log_prob(z))
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
