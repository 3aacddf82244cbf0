"""A posterior widened about its mean is an exact density, and an unbiased proposal."""

import math

import pytest
import torch
from toy import exact_evidence, exact_posterior, images, linear_encoder, linear_model

from guides import IAFGuide
from pyro_gpvae import log_weights
from pyro_gpvae.evaluation._common import estimated_mean
from pyro_gpvae.evaluation.reference import Widened
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.stratified import gaussian_mixture


def mixture():
    torch.manual_seed(0)
    logits, means = torch.randn(3, 2).double(), torch.randn(3, 2, 1).double()
    return gaussian_mixture(logits, means, 0.5 * torch.ones(3, 2, 1).double())


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_it_is_normalised_and_keeps_the_mean(factor):
    q = mixture()
    z = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    density = Widened(q, q.mean, factor).log_prob(z[:, None, None].expand(-1, 3, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, z, dim=0), torch.ones(3).double())
    mean = torch.trapezoid(density * z[:, None], z, dim=0)
    torch.testing.assert_close(mean, q.mean[:, 0])
    variance = torch.trapezoid(density * z[:, None].square(), z, dim=0) - mean.square()
    torch.testing.assert_close(variance, factor**2 * q.variance[:, 0])


def test_draws_are_scored_as_any_other_value():
    torch.manual_seed(1)
    model, x = linear_model(), images(6)
    iaf = IAFGuide(model, num_steps=2, encoder=linear_encoder()).double()
    for q in (mixture(), exact_posterior(model, x), iaf.posterior(x)):
        with torch.no_grad():
            wide = Widened(q, estimated_mean(q)[0], 1.7).expand((4, *q.batch_shape))
            z = wide.sample()
            remembered = wide.log_prob(z)
            torch.testing.assert_close(wide.log_prob(z.clone()), remembered, rtol=0, atol=1e-9)
        assert z.shape == (4, *q.batch_shape, *q.event_shape)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_wider_proposal_is_unbiased(factor):
    """The mean weight is p(x): within five standard errors."""
    model, x = linear_model(), images(6)
    q = exact_posterior(model, x)
    torch.manual_seed(0)
    wide = PrecomputedPosterior(Widened(q, q.mean, factor))
    ratio = (log_weights(model, wide, x, 20_000) - exact_evidence(model, x)).exp()
    error = 5 * ratio.std(0) / math.sqrt(len(ratio)) + 1e-9
    assert ((ratio.mean(0) - 1).abs() < error).all()


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_the_width_must_be_positive(factor):
    with pytest.raises(ValueError, match="must be positive and finite"):
        Widened(mixture(), mixture().mean, factor)
