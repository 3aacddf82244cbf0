"""ME and RME: the mixture, the recursive blocks, and two modes."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence
from toy import SHAPE, images, linear_encoder, linear_model

from guides.gaussian import GaussianGuide
from guides.mixture import MixtureGuide
from guides.recursive_mixture import RecursiveMixtureGuide
from pyro_gpvae import ImageModel, PerImage, fit, log_evidence

FAMILIES = [MixtureGuide, RecursiveMixtureGuide]
both = pytest.mark.parametrize("family", FAMILIES)
N = 50


def build(family, model, count=3, seed=0, spread=0.3, **options):
    """A mixture whose components and weights are far from their start."""
    torch.manual_seed(seed)
    guide = family(model, count, linear_encoder(), **options).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += spread * torch.randn_like(parameter)
    return guide


def pixels(count=40, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


def quadrature_bound(model, q, x):
    """E_q[log p(x, z) - log q(z)] of each image for p = 1: (B,)."""
    points = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    z = points[:, None, None].expand(-1, len(x), 1)
    log_q = q.log_prob(z)
    return torch.trapezoid(log_q.exp() * (model.log_joint(x, z) - log_q), points, dim=0)


def assert_estimates(draws, exact):
    """The mean of rows agrees with the exact values, in standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-10).all()


def test_the_recursion_of_rme():
    """Q_m = (1 - ε_m) Q_{m-1} + ε_m q_m."""
    model, x = linear_model(), images(4)
    guide = build(RecursiveMixtureGuide, model, 4)
    z = torch.randn(4, 2, dtype=torch.float64)
    features = [encoder(x) for encoder in (guide.encoder, *guide.encoders)]
    density = torch.zeros(4, dtype=torch.float64)
    for m, phi in enumerate(features):
        epsilon = torch.sigmoid(guide.gates[m - 1](phi)).squeeze(-1) if m else 1.0
        head = (guide.head, *guide.heads)[m]
        loc, log_scale = head(phi).chunk(2, dim=-1)
        q = dist.Normal(loc, log_scale.exp()).to_event(1)
        density = (1 - epsilon) * density + epsilon * q.log_prob(z).exp()
    torch.testing.assert_close(guide.posterior(x).log_prob(z).exp(), density)


@both
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_a_component_without_mass_does_no_harm(family, logit):
    model = linear_model().float()
    guide, x = build(family, model).float(), images(4).float()
    with torch.no_grad():
        guide.gates[1].bias.fill_(logit)
    assert guide.components(x)[0].exp().min() == 0
    loss = guide.elbo().differentiable_loss(PerImage(model, N), PerImage(guide, N), x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())
    assert torch.isfinite(log_evidence(model, guide, x, 5, seed=0).log_evidence).all()


# RME's blocks


def step(block, model, guide, x, learning_rate=0.1):
    """One step of a block, as in fit; returns the loss."""
    pair = PerImage(block.model or model, N), PerImage(block.guide or guide, N)
    optimizer = torch.optim.Adam(block.parameters, learning_rate)
    loss = block.elbo.differentiable_loss(*pair, x)
    loss.backward(inputs=list(block.parameters))
    optimizer.step()
    return loss.detach()


def test_a_block_changes_its_own_parameters_alone():
    model, x = linear_model(), images(5)
    guide = build(RecursiveMixtureGuide, model, 3)
    encoders = zip((guide.encoder, *guide.encoders), (guide.head, *guide.heads), strict=True)
    expected = [[*encoder.parameters(), *head.parameters()] for encoder, head in encoders]
    expected += [[*guide.gates.parameters()], [*model.parameters()]]
    everything = [*model.parameters(), *guide.parameters()]
    blocks = guide.blocks(model)
    assert len(blocks) == len(expected)
    for block, own in zip(blocks, expected, strict=True):
        before = [p.detach().clone() for p in everything]
        step(block, model, guide, x)
        changed = {
            id(p) for p, old in zip(everything, before, strict=True) if not torch.equal(p, old)
        }
        assert changed == {id(p) for p in own}
        assert all(p.grad is None for p in everything if id(p) not in changed) or block != blocks[0]


@pytest.mark.slow
def test_the_objective_of_a_component():
    """ELBO(q_m) + η min(KL(q_m ‖ Q_{m-1}), C), below the bound C and beyond it."""
    model, x = linear_model(latent_dim=1), images(4)
    guide = build(RecursiveMixtureGuide, model, 2)
    first, second = (guide.component(m) for m in (1, 2))

    def mean_loss(program, repulsion, max_divergence, count=200):
        guide.repulsion, guide.max_divergence = repulsion, max_divergence
        block = guide.blocks(model)[0]
        torch.manual_seed(0)
        pair = PerImage(model, N), PerImage(program, N)
        return torch.stack(
            [block.elbo.differentiable_loss(*pair, x).detach() for _ in range(count)]
        )

    _, loc, log_scale = guide.components(x)
    q = [dist.Normal(loc[:, k], log_scale[:, k].exp()).to_event(1) for k in range(2)]
    bounds = [quadrature_bound(model, each, x).mean() for each in q]
    assert_estimates(-mean_loss(first, 1.0, 20.0), bounds[0].detach())
    assert_estimates(-mean_loss(second, 0.0, 20.0), bounds[1].detach())
    divergence = kl_divergence(q[1], q[0]).mean().detach()
    reward = mean_loss(second, 0.0, 1e6) - mean_loss(second, 0.7, 1e6)
    assert_estimates(reward, 0.7 * divergence)
    with torch.no_grad():
        guide.heads[0].bias[0] += 30
    capped = mean_loss(second, 0.0, 20.0, 5) - mean_loss(second, 0.7, 20.0, 5)
    torch.testing.assert_close(capped, torch.full_like(capped, 14.0))


def test_blocks_leave_out_what_is_frozen():
    model = linear_model().requires_grad_(False)
    guide = build(RecursiveMixtureGuide, model, 3)
    guide.encoder.requires_grad_(False)
    guide.head.requires_grad_(False)
    before = copy.deepcopy(guide.state_dict())
    assert len(guide.blocks(model)) == 3
    fit(model, guide, pixels(), epochs=1, batch_size=20, progress=False)
    after = guide.state_dict()
    assert torch.equal(before["encoder.1.weight"], after["encoder.1.weight"])
    assert not torch.equal(before["encoders.0.1.weight"], after["encoders.0.1.weight"])


# more components are better where the posterior has two modes


class Absolute(nn.Module):
    """g(z) = |z|: the posterior of z is symmetric, and has two modes."""

    def forward(self, z):
        return z.abs().reshape(-1, 1, 1, 1)


@pytest.mark.slow
def test_mixtures_find_two_modes():
    model = ImageModel((1, 1, 1), 1, Absolute(), sigma=0.25).double().requires_grad_(False)
    x = torch.arange(160, 256, 5, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    pixels = x.double() / 255
    z = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    log_joint = model.log_joint(pixels, z[:, None, None].expand(-1, len(x), 1))
    evidence = log_joint.logsumexp(0) + math.log(10 / 1000)

    def gap(family, count, **options):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(1, 16), nn.Tanh())
        guide = family(model, count, encoder, **options).double()
        options = {"epochs": 6, "batch_size": 25, "learning_rate": 0.03, "progress": False}
        fit(model, guide, x.repeat(50, 1, 1, 1), **options)
        with torch.no_grad():
            gap = evidence - quadrature_bound(model, guide.posterior(pixels), pixels)
        assert (gap >= -1e-6).all()
        return guide, gap

    assert gap(MixtureGuide, 1)[1].min() > 0.4  # as of any Gaussian
    for family, options in ((MixtureGuide, {}), (RecursiveMixtureGuide, {"max_divergence": 5.0})):
        guide, two = gap(family, 2, **options)
        assert two.mean() < 0.1
        assert all(value > 0.3 for value in guide.diagnostics(pixels).values())


@both
def test_warm_start(family):
    """The first component is the trained encoder, the others near it, all of equal weight."""
    model, x = linear_model(), images(4)
    torch.manual_seed(0)
    trained = GaussianGuide(model, linear_encoder()).double()
    guide = family(model, 3, warm_start=trained).double()
    _, m, log_s = trained.encode(x)
    _, loc, log_scale = guide.components(x)
    assert torch.equal(loc[:, 0], m)
    assert torch.equal(log_scale[:, 0], log_s)
    equal = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(guide.components(x)[0].exp(), equal)
    distance = (loc[:, 1:] - m[:, None]).abs()
    assert distance.min() > 0
    assert distance.max() < 0.2
    assert guide.encoders[0][1].weight is not guide.encoder[1].weight


def test_the_model_of_blocks_must_be_a_module():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got function"):
        build(RecursiveMixtureGuide, linear_model()).blocks(lambda x: None)
