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


def grid(low=-12.0, high=12.0, count=4001):
    points = torch.linspace(low, high, count, dtype=torch.float64)
    return points, points[1] - points[0]


def quadrature_bound(model, q, x, low=-12.0, high=12.0):
    """E_q[log p(x, z) - log q(z)] of each image for p = 1: (B,)."""
    points, step = grid(low, high)
    z = points[:, None, None].expand(-1, len(x), 1)
    log_q = q.log_prob(z)
    return (log_q.exp() * (model.log_joint(x, z) - log_q)).sum(0) * step


def assert_estimates(draws, exact, tolerance=5.0):
    """The mean of rows agrees with the exact values, in standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= tolerance * error + 1e-10).all()


@both
def test_components_of_equal_parameters_are_one_gaussian(family):
    model, x = linear_model(), images(4)
    guide = build(family, model)
    for encoder, head in zip(guide.encoders, guide.heads, strict=True):
        encoder.load_state_dict(guide.encoder.state_dict())
        head.load_state_dict(guide.head.state_dict())
    z = torch.randn(6, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(
        guide.posterior(x).log_prob(z), GaussianGuide.posterior(guide, x).log_prob(z)
    )


# the distribution


@both
def test_weights_are_a_distribution_and_start_equal(family):
    model, x = linear_model(), images(4)
    for spread in (0.0, 1.0):
        guide = build(family, model, 4, spread=spread)
        mass = guide.components(x)[0].exp()
        assert mass.shape == (4, 4)
        torch.testing.assert_close(mass.sum(-1), torch.ones(4, dtype=torch.float64))
        assert torch.allclose(mass, torch.full_like(mass, 0.25)) == (spread == 0)


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


@pytest.mark.slow
def test_repulsion_moves_a_component_away():
    model, x = linear_model(latent_dim=1), images(8)
    distances = []
    for repulsion in (0.0, 0.9):
        guide = build(RecursiveMixtureGuide, model, 2, spread=0.0, repulsion=repulsion)
        blocks = guide.blocks(model)
        for _ in range(80):
            for block in blocks[:2]:
                step(block, model, guide, x, 0.02)
        _, loc, log_scale = guide.components(x)
        q = [dist.Normal(loc[:, k], log_scale[:, k].exp()).to_event(1) for k in range(2)]
        distances.append(kl_divergence(q[1], q[0]).mean().item())
    assert distances[1] > distances[0] + 0.5


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


@pytest.fixture(scope="module")
def bimodal():
    """The model, images, their log p(x), and the best ELBO any Gaussian can have."""
    model = ImageModel((1, 1, 1), 1, Absolute(), sigma=0.25).double().requires_grad_(False)
    x = torch.arange(160, 256, 5, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    points, width = grid(-5, 5, 1001)
    z = points[:, None, None].expand(-1, len(x), 1)
    log_joint = model.log_joint(x.double() / 255, z)
    evidence = log_joint.logsumexp(0) + width.log()
    best = torch.full_like(evidence, -math.inf)
    for scale in torch.logspace(-1.5, 0.5, 161, dtype=torch.float64):
        loc = torch.linspace(0, 1.5, 76, dtype=torch.float64)[:, None]  # by symmetry, m >= 0
        log_q = dist.Normal(loc, scale).log_prob(points)
        bound = (log_q.exp() @ log_joint - (log_q.exp() * log_q).sum(-1, keepdim=True)) * width
        best = torch.maximum(best, bound.max(0).values)
    return model, x, evidence, best


def fitted(family, bimodal, count, **options):
    model, x, _, _ = bimodal
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(1, 16), nn.Tanh())
    guide = family(model, count, encoder, **options).double()
    fit(
        model, guide, x.repeat(50, 1, 1, 1), epochs=6, batch_size=25, learning_rate=0.03,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        bound = quadrature_bound(model, guide.posterior(x.double() / 255), x.double() / 255)
    iwae = log_evidence(model, guide, x.repeat(20, 1, 1, 1), 5, seed=0).mean
    return guide, bound, iwae


@pytest.mark.slow
def test_mixtures_find_two_modes(bimodal):
    _, x, evidence, best_gaussian = bimodal
    assert (evidence - best_gaussian).min() > 0.4  # what no Gaussian can do
    _, one, iwae_of_one = fitted(MixtureGuide, bimodal, 1)
    assert (one <= best_gaussian + 1e-3).all()
    for family, options in ((MixtureGuide, {}), (RecursiveMixtureGuide, {"max_divergence": 5.0})):
        guide, two, iwae_of_two = fitted(family, bimodal, 2, **options)
        assert (two > best_gaussian + 0.2).all()
        assert (two <= evidence + 1e-6).all()
        assert (evidence - two).mean() < 0.1
        assert iwae_of_two > iwae_of_one + 0.1
        assert iwae_of_two == pytest.approx(float(evidence.mean()), abs=0.1)
        assert all(value > 0.3 for value in guide.diagnostics(x.double() / 255).values())


@both
def test_components_start_differently(family):
    model, x = linear_model(), images(4)
    torch.manual_seed(0)
    guide = family(model, 3, linear_encoder()).double()
    assert not torch.equal(guide.encoders[0][1].weight, guide.encoder[1].weight)
    _, loc, _ = guide.components(x)
    assert torch.pdist(loc.detach().flatten(0, 1)).min() > 0
    assert (loc[:, 1:] - loc[:, :1]).abs().mean() > 0.05


@both
def test_warm_start(family):
    """The first component is the trained encoder, the others are near it."""
    model, x = linear_model(), images(4)
    torch.manual_seed(0)
    trained = GaussianGuide(model, linear_encoder()).double()
    guide = family(model, 3, warm_start=trained).double()
    _, m, log_s = trained.encode(x)
    _, loc, log_scale = guide.components(x)
    assert torch.equal(loc[:, 0], m)
    assert torch.equal(log_scale[:, 0], log_s)
    distance = (loc[:, 1:] - m[:, None]).abs()
    assert distance.min() > 0
    assert distance.max() < 0.2
    assert guide.encoders[0][1].weight is not guide.encoder[1].weight


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (MixtureGuide, {"num_components": 0}, "num_components must be at least 1, got 0"),
        (RecursiveMixtureGuide, {"num_components": -1}, "num_components"),
        (RecursiveMixtureGuide, {"repulsion": -0.1}, "repulsion .* got -0.1"),
        (RecursiveMixtureGuide, {"repulsion": math.nan}, "repulsion"),
        (RecursiveMixtureGuide, {"max_divergence": 0}, "max_divergence must be positive, got 0"),
        (RecursiveMixtureGuide, {"max_divergence": math.nan}, "max_divergence"),
    ],
)
def test_bad_options_are_named(family, options, message):
    with pytest.raises(ValueError, match=message):
        family(linear_model(), encoder=linear_encoder(), **options)


def test_the_model_of_blocks_must_be_a_module():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got function"):
        build(RecursiveMixtureGuide, linear_model()).blocks(lambda x: None)
