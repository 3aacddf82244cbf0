"""GPVAE: closed forms of f and log h, the marginal posterior, and the VAE at W = U = 0."""

from itertools import product

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch.distributions import MultivariateNormal, kl_divergence
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, fit, log_evidence

ESTIMATORS = ["functions", "weights", "marginal"]
every_covariance = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def gp(model, **options):
    torch.manual_seed(0)
    return GPGuide(model, linear_encoder(), **({"initial_scale": 0.2} | options)).double()


@torch.no_grad()
def disturbed(guide):
    for parameter in (*guide.W.parameters(), *guide.U.parameters()):
        parameter += 0.3 * torch.randn_like(parameter)
    return guide


@torch.no_grad()
@every_covariance
@pytest.mark.parametrize("features", ["shared", "own"])
def test_moments_are_those_of_the_random_functions(covariance, features):
    model, x = linear_model(), images(4)
    guide = disturbed(gp(model, covariance=covariance, features=features))
    if features == "own":
        guide.own_encoder[1].bias += 1
    _, m, log_s = guide.encode(x)
    phi = (guide.encoder if features == "shared" else guide.own_encoder)(x)
    phi = torch.cat([phi, torch.ones(4, 1).double()], -1)
    W, U = guide.W().sample((100_000,)), guide.U().sample((100_000,))
    f, log_h = m + phi @ W.mT, log_s + phi @ U.mT
    a, v, b, r = guide.moments(x)
    for samples, mean, variance in ((f, a, v), (log_h, b, r)):
        error = (variance / len(samples)).sqrt()
        assert float(((samples.mean(0) - mean) / error).abs().max()) < 4.5
        assert float((samples.var(0) / variance - 1).abs().max()) < 4.5 * (2 / 1e5) ** 0.5
    # the closed form of the second term of eq. (2)
    kl = 0.5 * (f**2 + (2 * log_h).exp() - 1 - 2 * log_h).sum(-1)
    error = kl.std(0) / len(kl) ** 0.5
    assert float(((kl.mean(0) - guide.expected_kl(x)) / error).abs().max()) < 4.5
    scores = (v / (2 * b).exp() + r).sum(-1)
    torch.testing.assert_close(guide.uncertainty(x), scores)


@torch.no_grad()
@every_covariance
def test_marginal_posterior_is_that_of_the_sampled_weights(covariance):
    model, x = linear_model(latent_dim=1), images(2)
    guide = gp(model, covariance=covariance, estimator="weights")
    q = guide.posterior(x)
    # average the program's q(z | x, W, U) over draws of W and U
    W, U = guide.W().sample((50_000, 1)), guide.U().sample((50_000, 1))
    trace = poutine.trace(poutine.condition(guide, data={"W": W, "U": U})).get_trace(x)
    z = q.sample((5,))
    densities = trace.nodes["z"]["fn"].log_prob(z.unsqueeze(1)).exp()
    error = densities.std(1) / 50_000**0.5
    assert float(((densities.mean(1) - q.log_prob(z).exp()) / error).abs().max()) < 4.5


def test_kl_of_the_weights():
    guide = disturbed(gp(linear_model(), covariance="full"))
    prior = MultivariateNormal(torch.zeros(2, 4).double(), torch.eye(4).double())
    expected = 0.0
    for rows in (guide.W, guide.U):
        tril = rows.log_scale.exp().unsqueeze(-1) * (rows.lower.tril(-1) + torch.eye(4))
        q = MultivariateNormal(rows.loc, scale_tril=tril)
        expected = expected + kl_divergence(q, prior).sum()
    torch.testing.assert_close(guide.kl_weights(), expected)


class SeedBeforeZ(Messenger):
    """Gives z the same noise, whatever a program samples before it."""

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            torch.manual_seed(1)


@every_covariance
@pytest.mark.parametrize(
    ("estimator", "objective"),
    [*product(ESTIMATORS, [Trace_ELBO]), *product(ESTIMATORS[:2], [TraceMeanField_ELBO])],
)
def test_with_weights_at_zero_it_is_the_vae(estimator, covariance, objective):
    # q(W, U) is nearly a point mass at zero: its scales are at their lower bound, e^-20
    model, x = ImageModel((1, 28, 28), 3).double(), torch.rand(6, 1, 28, 28).double()
    torch.manual_seed(0)
    vae = GaussianGuide(model).double()
    options = {"covariance": covariance, "estimator": estimator, "initial_scale": 1e-30}
    guide = GPGuide(model, warm_start=vae, **options).double()
    results = []
    for g in (vae, guide):
        with SeedBeforeZ():
            local = poutine.block(g, hide=["W", "U"])  # the terms of z and x alone
            loss = objective().differentiable_loss(model, local, x)
        gradient = torch.autograd.grad(loss, [*g.encoder.parameters(), *g.head.parameters()])
        evidence = log_evidence(model, g, x, 10, seed=0)
        results.append([loss, *gradient, evidence.log_evidence, evidence.elbo])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_warm_start_is_copied_and_own_features_train_beside_a_frozen_encoder():
    model, x = linear_model(), images(5)
    vae = GaussianGuide(model, linear_encoder()).double().requires_grad_(False)
    guide = GPGuide(model, warm_start=vae, features="own").double()
    torch.testing.assert_close(guide.posterior(x).mean, vae.posterior(x).mean, rtol=0, atol=1e-12)
    pixels = (x * 255).to(torch.uint8)
    history = fit(model, guide, pixels, epochs=3, batch_size=2, progress=False).frame()
    assert {"v_over_h2", "r", "kl_weights", "kl_global", "sigma"} <= set(history.columns)
    for name, value in vae.encoder.state_dict().items():
        assert torch.equal(value, guide.encoder.state_dict()[name])
        assert not torch.equal(value, guide.own_encoder.state_dict()[name])
    assert not guide.W.loc.equal(torch.zeros_like(guide.W.loc))
    assert vae.encoder[1].weight is not guide.encoder[1].weight


@torch.no_grad()
def test_the_initial_spread_is_a_tenth_of_h_at_most():
    _, v, b, _ = GPGuide(ImageModel((1, 28, 28), 10)).moments(torch.rand(20, 1, 28, 28))
    assert float((v.sqrt() / b.exp()).max()) < 0.1
