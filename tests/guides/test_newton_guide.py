"""Newton: steps by the learned curvature, their gradients, their safeguard, and bad input."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from toy import SHAPE, exact_posterior, images, linear_encoder, linear_model

from guides import FullCovarianceGuide, GaussianGuide, NewtonGuide
from guides.refinement import RefinementELBO
from pyro_gpvae import (
    ImageModel,
    NonFiniteError,
    fit,
    initial_sigma,
    load_data,
    log_evidence,
)
from pyro_gpvae.testing import check_guide


def curved_model(likelihood="gaussian", seed=3):
    """A smooth decoder that is far from linear."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, math.prod(SHAPE)), nn.Unflatten(1, SHAPE)
    )
    with torch.no_grad():
        decoder[0].weight *= 3
        decoder[2].weight *= 3
    sigma = {"sigma": 0.1} if likelihood == "gaussian" else {}
    return ImageModel(SHAPE, 2, decoder, likelihood=likelihood, **sigma).double()


def build(model, num_steps=1, seed=2, **options):
    """A guide in float64 whose networks do something from the start."""
    torch.manual_seed(seed)
    guide = NewtonGuide(model, num_steps, linear_encoder(), hidden=16, **options).double()
    for network in filter(None, (guide.curvature, guide.rate)):
        with torch.no_grad():
            for parameter in network[-1].parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():  # about the scale of the posterior
        guide.head.bias[2:] -= 3
        if num_steps:
            guide.log_scale -= 3
    return guide


def binary_images(count):
    return (images(count) > 0.5).double()


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"covariance": "diagonal", "safeguard": True}])
def test_it_keeps_the_promises_of_the_contract(num_steps, options):
    torch.manual_seed(0)
    model = ImageModel((1, 8, 8), latent_dim=2, sigma=0.3)

    def make(model):
        return NewtonGuide(model, num_steps, hidden=16, **options)

    assert not check_guide(make(model), model, torch.rand(4, 1, 8, 8), make=make).broken


def test_without_steps_it_is_the_gaussian_with_full_covariance():
    pixels = (images(12) * 255).to(torch.uint8)
    results = []
    for family, args in ((FullCovarianceGuide, ()), (NewtonGuide, (0,))):
        model = linear_model()
        torch.manual_seed(2)
        guide = family(model, *args, linear_encoder()).double()
        fit(model, guide, pixels, epochs=2, batch_size=5, progress=False)
        evidence = log_evidence(model, guide, images(3), 7, seed=1).log_evidence
        results.append({**model.state_dict(), **guide.state_dict(), "evidence": evidence})
    full, zero = results
    assert full.keys() == zero.keys()
    assert all(torch.equal(full[name], zero[name]) for name in full)


def test_a_step_with_the_exact_covariance_lands_on_the_posterior_mean():
    model, x = linear_model(), images(5)
    guide, exact = build(model), exact_posterior(model, x)
    with torch.no_grad():
        guide.rate[-1].weight.zero_()
        guide.rate[-1].bias.fill_(50.0)  # ρ = 1
        z = exact.mean + exact.scale_tril @ torch.tensor([1.0, -2.0]).double()
        landed = guide.step(x, z, exact.scale_tril.expand(5, 2, 2))
    torch.testing.assert_close(landed, exact.mean, rtol=0, atol=1e-10)


def test_extreme_outputs_of_the_curvature_network_leave_log_q_exact():
    """An L that is almost singular made log q rounding noise, and log p(x) 1e15 in float32."""
    guide = NewtonGuide(ImageModel((1, 8, 8), latent_dim=5))
    torch.manual_seed(0)
    nn.init.normal_(guide.curvature[-1].bias, std=1e4)
    q = guide.posterior(torch.rand(20, 1, 8, 8))
    noise = torch.randn(20, 5)
    z = q.mean + (q.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    log_volume = q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    exact = -(noise.square().sum(-1) + 5 * math.log(2 * math.pi)) / 2 - log_volume
    torch.testing.assert_close(q.log_prob(z), exact, rtol=0, atol=0.5)


def test_the_untrained_step_is_a_short_step_by_a_diagonal_covariance():
    model, x = curved_model(), images(4)
    vae = GaussianGuide(model, linear_encoder()).double()
    with torch.no_grad():
        vae.head.bias[2:] = -7  # no gradient is clipped
    guide = NewtonGuide(model, 1, warm_start=vae).double()
    q, log_scale = guide.posterior(x), vae.encode(torch.zeros(1, *SHAPE).double())[2]
    z = vae.encode(x)[1].detach().requires_grad_()
    model.log_joint(x, z).sum().backward()
    by_hand = z + torch.tensor(-3.0).double().sigmoid() * (2 * log_scale).exp() * z.grad
    torch.testing.assert_close(q.mean, by_hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(q.scale_tril, torch.diag_embed(log_scale.exp()).expand(4, 2, 2))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_untrained_steps_do_not_spoil_a_vae_of_two_epochs(num_steps):
    """Steps of 5 standard deviations, by a Σ that is hardly trained, lost 180 nats."""
    digits = load_data("mnist5k").train[:2048]
    torch.manual_seed(0)
    model = ImageModel((1, 28, 28), latent_dim=10, sigma=initial_sigma(digits))
    vae = GaussianGuide(model)
    fit(model, vae, digits, epochs=2, batch_size=64, progress=False)
    guides = vae, NewtonGuide(model, num_steps, warm_start=vae)
    before, after = (log_evidence(model, guide, digits[:50], 20).elbo.mean() for guide in guides)
    assert after > before - 10


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("options", [{}, {"covariance": "diagonal"}])
def test_gradients_equal_finite_differences(likelihood, options):
    model = curved_model(likelihood)
    x = images(6) if likelihood == "gaussian" else binary_images(6)
    guide = build(model, 2, **options)

    def objective():
        torch.manual_seed(0)
        q = guide.posterior(x)
        z = q.rsample((3,))
        return (model.log_joint(x, z) - q.log_prob(z)).mean()

    objective().backward()
    generator = torch.Generator().manual_seed(5)
    for parameter in (*model.parameters(), *guide.parameters()):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1e-6, -2e-6):
                parameter += sign * direction
                values.append(objective())
            parameter += 1e-6 * direction
        analytic = (parameter.grad * direction).sum()
        assert analytic != 0
        numeric = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(numeric, analytic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0.01, 1.0])
def test_its_objective_is_the_elbo_and_has_no_noise_at_the_posterior(shift):
    model, x = linear_model(), images(5)
    guide, exact = build(model), exact_posterior(model, x)
    q = dist.MultivariateNormal(exact.mean, scale_tril=exact.scale_tril.expand(5, 2, 2))
    loc, factor = q.loc.clone().requires_grad_(), q.scale_tril.clone().requires_grad_()
    guide._refine = lambda x: (dist.MultivariateNormal(loc, scale_tril=factor), [loc - shift])
    for weight in (0, 1):
        loss = RefinementELBO(weight).differentiable_loss(model, guide, x)
        # every draw gives log p(x), as q is the posterior
        evidence = (model.log_joint(x, loc) - q.log_prob(loc)).sum()
        torch.testing.assert_close(loss, -evidence, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(loss, (loc, factor))
    away = torch.full((5, 2, 1), -shift).double()
    start = torch.linalg.solve(q.covariance_matrix, away)
    distance = (away.mT @ start).sqrt()  # in posterior standard deviations
    assert (distance < 1).all() if shift < 1 else (distance > 1).all()
    slope = (start / distance.clamp(min=1)).squeeze(-1)
    torch.testing.assert_close(gradients[0], slope, rtol=0, atol=1e-8)
    torch.testing.assert_close(gradients[1], torch.zeros(5, 2, 2).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"covariance": "diagonal"}])
def test_the_gradient_of_its_objective_has_the_mean_of_the_elbos(options):
    model, x = curved_model(), images(1).expand(50_000, -1, -1, -1)
    guide = build(model, 1, **options)
    loc, spread = torch.tensor([0.3, -0.2]).double().requires_grad_(), torch.tensor(0.1).double()
    spread.requires_grad_()
    full = torch.stack([spread, 0 * spread, -spread / 2, 2 * spread]).view(2, 2)
    q = dist.MultivariateNormal(loc.expand(len(x), 2), scale_tril=full)
    if options:
        q = dist.Normal(loc.expand(len(x), 2), spread).to_event(1)
    guide._refine = lambda x: (q, [])
    means = []
    for objective in (RefinementELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        loss = objective.differentiable_loss(model, guide, x) / len(x)
        means.append([loss, *torch.autograd.grad(loss, (loc, spread), retain_graph=True)])
    for path, reference in zip(*means, strict=True):
        torch.testing.assert_close(path, reference, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"safeguard": True}])
def test_result_of_an_image_does_not_depend_on_its_batch(options):
    guide, x = build(curved_model(), 2, **options), images(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        q, shuffled, alone = (guide.posterior(part) for part in (x, x[order], x[2:3]))
    torch.testing.assert_close(shuffled.mean, q.mean[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(shuffled.scale_tril, q.scale_tril[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(alone.mean, q.mean[2:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [-6.0, -2.0, 0.0, 5.0])
def test_the_safeguard_never_lowers_the_log_joint(width):
    model, x = curved_model(), images(50)
    guide = build(model, safeguard=True)
    with torch.no_grad():
        guide.log_scale += width
        z = guide.encode(x)[1]
        for _ in range(5):
            factor = guide.factor(z)
            moved = guide.step(x, z, factor)
            taken = (moved != z).any(-1)
            assert (model.log_joint(x, moved) > model.log_joint(x, z))[taken].all()
            z = moved
        guide.safeguard = False
        free = guide.step(x, z, factor)
    if width == 5:
        assert (model.log_joint(x, free) < model.log_joint(x, z)).any()


def test_the_number_of_steps_can_be_changed():
    model, x = curved_model(), images(3)
    one, two = build(model, 1), build(model, 2)
    one.num_steps = 2
    torch.testing.assert_close(one.posterior(x).mean, two.posterior(x).mean, rtol=0, atol=0)


def test_steps_work_under_no_grad_and_leave_no_sites():
    model, x = curved_model(), images(3)
    guide = build(model, 2)
    with torch.no_grad():
        frozen = guide.posterior(x)
    assert not frozen.mean.requires_grad
    torch.testing.assert_close(frozen.mean, guide.posterior(x).mean.detach())
    trace = poutine.trace(guide).get_trace(x)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z"]
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"covariance": "lowrank"}, "covariance must be one of .* got 'lowrank'"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        NewtonGuide(linear_model(), encoder=linear_encoder(), **option)


def test_bad_arguments_of_its_objective_are_named():
    with pytest.raises(ValueError, match="start_weight must not be negative, got -1"):
        RefinementELBO(-1)
    model = linear_model()
    vae = GaussianGuide(model, linear_encoder()).double()
    with pytest.raises(ValueError, match="the guide's site 'z' was not drawn by sample_refined"):
        RefinementELBO().differentiable_loss(model, vae, images(2))


def test_a_model_without_log_joint_is_named():
    class Model(nn.Module):
        image_shape, latent_dim = SHAPE, 2

    with pytest.raises(ValueError, match=r"differentiates model.log_joint.*Model does not have"):
        NewtonGuide(Model(), 1, linear_encoder())


def test_a_curvature_that_is_not_finite_is_named():
    guide, x = build(linear_model()), images(4)
    with torch.no_grad():
        guide.curvature[-1].bias[-1] = math.nan
    with pytest.raises(NonFiniteError, match="the predicted curvature is not finite for image 0"):
        guide.posterior(x)
