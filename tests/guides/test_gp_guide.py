import copy

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, PerImage, fit, log_evidence, pair
from pyro_gpvae.model.marginal_posterior import MarginalPosterior


def gp(model, **options):
    torch.manual_seed(0)
    return GPGuide(model, linear_encoder(), **({"initial_scale": 0.2} | options)).double()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale_features", [True, False])
def test_moments_are_those_of_the_random_functions(covariance, bias, scale_features):
    model, x = linear_model(), images(4)
    guide = gp(model, covariance=covariance, bias=bias, scale_features=scale_features)
    with torch.no_grad():
        for parameter in (*guide.W.parameters(), *guide.U.parameters()):
            parameter += 0.3 * torch.randn_like(parameter)
        features, m, log_s = guide.encode(x)
        phi = features / 3**0.5 if scale_features else features
        phi = torch.cat([phi, torch.ones(4, 1).double()], -1) if bias else phi
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


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_marginal_posterior_is_that_of_the_sampled_weights(covariance):
    model, x = linear_model(latent_dim=1), images(2)
    guide = gp(model, covariance=covariance, estimator="weights")
    q = guide.posterior(x)
    assert isinstance(q.base_dist, MarginalPosterior)
    assert (q.batch_shape, q.event_shape) == ((2,), (1,))
    # average the program's q(z | x, W, U) over draws of W and U
    with torch.no_grad():
        W, U = guide.W().sample((50_000, 1)), guide.U().sample((50_000, 1))
        trace = poutine.trace(poutine.condition(guide, data={"W": W, "U": U})).get_trace(x)
        z = q.sample((5,))
        densities = trace.nodes["z"]["fn"].log_prob(z.unsqueeze(1)).exp()
        error = densities.std(1) / 50_000**0.5
        assert float(((densities.mean(1) - q.log_prob(z).exp()) / error).abs().max()) < 4.5


def test_kl_of_the_weights():
    guide = gp(linear_model(), covariance="full")
    with torch.no_grad():
        for rows in (guide.W, guide.U):
            rows.loc.normal_()
            rows.lower.normal_()
    expected = 0.0
    for rows in (guide.W, guide.U):
        q = torch.distributions.MultivariateNormal(rows.loc, scale_tril=rows._scale_tril())
        eye = torch.eye(4).double().expand(2, 4, 4)
        prior = torch.distributions.MultivariateNormal(torch.zeros(2, 4).double(), scale_tril=eye)
        expected = expected + kl_divergence(q, prior).sum()
    torch.testing.assert_close(guide.kl_weights(), expected)
    assert gp(linear_model(), covariance="point").kl_weights() == 0


@pytest.mark.parametrize("estimator", ["functions", "weights", "marginal"])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_point_mass_at_zero_is_the_vae_bit_for_bit(estimator, objective):
    model, x = ImageModel((1, 28, 28), 3), torch.rand(6, 1, 28, 28)
    torch.manual_seed(0)
    vae = GaussianGuide(model)
    torch.manual_seed(0)
    guide = GPGuide(model, covariance="point", estimator=estimator)
    results = []
    for g in (vae, guide):
        programs = PerImage(pair(model, g), 100), PerImage(g, 100)
        torch.manual_seed(1)
        loss = objective().differentiable_loss(*programs, x)
        gradient = torch.autograd.grad(loss, [*g.encoder.parameters(), *g.head.parameters()])
        evidence = log_evidence(model, g, x, 10, seed=0)
        results.append([loss, *gradient, evidence.log_evidence, evidence.elbo])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("estimator", ["functions", "weights", "marginal"])
@pytest.mark.parametrize("covariance", ["diagonal", "full", "point"])
@pytest.mark.parametrize("features", ["shared", "own"])
def test_every_parameter_trains(estimator, covariance, features):
    model = linear_model().float()
    guide = gp(model, estimator=estimator, covariance=covariance, features=features).float()
    before = copy.deepcopy(guide.state_dict())
    x = (images(30) * 255).to(torch.uint8)
    history = fit(model, guide, x, epochs=2, batch_size=8, progress=False).frame()
    assert {"v_over_h2", "r", "kl_weights", "kl_global", "sigma"} <= set(history.columns)
    unchanged = {name for name, value in guide.state_dict().items() if value.equal(before[name])}
    # a point's own features get a gradient only once its weights have left zero
    assert not unchanged


def test_warm_start_and_frozen_mean():
    model = linear_model()
    vae = GaussianGuide(model, linear_encoder()).double()
    guide = GPGuide(model, warm_start=vae, freeze_mean=True, features="own").double()
    x = images(5)
    torch.testing.assert_close(guide.posterior(x).mean, vae.posterior(x).mean, rtol=0, atol=1e-12)
    frozen = copy.deepcopy(guide.encoder.state_dict())
    fit(model, guide, (x * 255).to(torch.uint8), epochs=3, batch_size=2, progress=False)
    for name, value in guide.encoder.state_dict().items():
        assert torch.equal(value, frozen[name])
        assert not torch.equal(value, guide.own_encoder.state_dict()[name])
    assert not guide.W.loc.equal(torch.zeros_like(guide.W.loc))
    assert vae.encoder[1].weight is not guide.encoder[1].weight


@torch.no_grad()
def test_the_initial_spread_is_a_tenth_of_h_at_most():
    model = ImageModel((1, 28, 28), 10)
    x = torch.rand(20, 1, 28, 28)
    for scale_features in (False, True):
        guide = GPGuide(model, scale_features=scale_features)
        _, v, b, _ = guide.moments(x)
        assert float((v.sqrt() / b.exp()).max()) < 0.1


@torch.no_grad()
def test_uncertainty_grows_with_the_spread():
    model, x = linear_model(), images(5)
    small, large = (gp(model, initial_scale=s).uncertainty(x) for s in (0.01, 0.1))
    assert small.shape == (5,)
    torch.testing.assert_close(large, 100 * small)
    assert bool((gp(model, covariance="point").uncertainty(x) == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "dense"}, "covariance must be one of .*got 'dense'"),
        ({"estimator": "analytic"}, "estimator must be one of .*got 'analytic'"),
        ({"features": "none"}, "features must be one of .*got 'none'"),
        ({"initial_scale": 0.0}, "initial_scale must be positive, got 0.0"),
        ({"initial_scale": float("nan")}, "initial_scale must be positive, got nan"),
        ({"num_nodes": -1}, "num_nodes must be an integer of at least 1, got -1"),
        ({"num_nodes": 0}, "num_nodes must be an integer of at least 1, got 0"),
        ({"num_nodes": 1.5}, "num_nodes must be an integer of at least 1, got 1.5"),
        ({"warm_start": nn.Linear(1, 1), "encoder": None}, "trained guide .*got Linear"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GPGuide(linear_model(), **({"encoder": linear_encoder()} | options))


def test_warm_start_must_fit():
    vae = GaussianGuide(linear_model(latent_dim=3), linear_encoder())
    with pytest.raises(ValueError, match="warm start has 3 latent dimensions, the model 2"):
        GPGuide(linear_model(), warm_start=vae)
    with pytest.raises(ValueError, match="either an encoder or a warm start"):
        GPGuide(linear_model(latent_dim=3), linear_encoder(), warm_start=vae)
