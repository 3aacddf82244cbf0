"""ME and RME: the mixture, its stratified ELBO, the recursive blocks, and the VAE as M = 1."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence
from toy import SHAPE, exact_evidence, images, linear_encoder, linear_model

from guides.gaussian import GaussianGuide
from guides.mixture import MixtureGuide
from guides.recursive_mixture import RecursiveMixtureGuide
from pyro_gpvae import ImageModel, PerImage, fit, log_evidence, log_weights
from pyro_gpvae.model.stratified import StratifiedELBO, gaussian_mixture

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


# one component is the VAE


@both
def test_one_component_is_the_vae(family):
    x = pixels()
    rows, evidence = [], []
    for build_guide in (GaussianGuide, lambda *args: family(args[0], 1, args[1])):
        model = linear_model()
        torch.manual_seed(3)
        guide = build_guide(model, linear_encoder()).double()
        history = fit(model, guide, x, epochs=2, batch_size=16, progress=False, device="cpu")
        rows.append([row["loss"] for row in history.rows])
        evidence.append(log_evidence(model, guide, x, 7, seed=0).log_evidence)
    assert rows[0] == rows[1]
    assert torch.equal(*evidence)


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
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_density_is_normalised(family, latent_dim):
    model = linear_model(latent_dim)
    guide, x = build(family, model), images(3)
    q = guide.posterior(x)
    assert (q.batch_shape, q.event_shape) == ((3,), (latent_dim,))
    points, step = grid(-15, 15, 301)
    z = torch.cartesian_prod(*[points] * latent_dim).reshape(-1, 1, latent_dim)
    total = q.log_prob(z.expand(-1, 3, -1)).exp().sum(0) * step**latent_dim
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_samples_fit_the_density(latent_dim):
    torch.manual_seed(4)
    loc, scale = 2 * torch.randn(3, latent_dim), torch.rand(3, latent_dim) + 0.1
    q = gaussian_mixture(torch.tensor([0.0, 1.0, -1.0]), loc, scale)
    z = q.sample((20_000,))
    assert auto_goodness_of_fit(z, q.log_prob(z).exp()) > 2e-5


@both
def test_an_image_does_not_depend_on_its_batch(family):
    model, x = linear_model(), images(5)
    guide = build(family, model)
    z = torch.randn(3, 5, 2, dtype=torch.float64)
    together = guide.posterior(x).log_prob(z)
    alone = [guide.posterior(x[i : i + 1]).log_prob(z[:, i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


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


# the stratified ELBO


@both
def test_value_and_gradient_are_unbiased(family):
    model, x = linear_model(latent_dim=1), images(3)
    guide = build(family, model)
    parameters = [*model.parameters(), *guide.parameters()]
    pair = PerImage(model, N), PerImage(guide, N)

    def flat(value):
        gradient = torch.autograd.grad(value, parameters)
        return torch.cat([value.detach().reshape(1), *[g.flatten() for g in gradient]])

    exact = flat(quadrature_bound(model, guide.posterior(x), x).mean())
    elbo = StratifiedELBO(num_particles=100)
    draws = torch.stack([flat(-elbo.differentiable_loss(*pair, x)) for _ in range(150)])
    assert_estimates(draws, exact)
    # and precise enough to tell: a bias of one part in ten would be seen in the largest entries
    error = draws.std(0) / math.sqrt(len(draws))
    assert (10 * error < exact.abs()).double().mean() > 0.5


def test_the_component_index_adds_no_noise():
    """With q_k near points, a stratified estimate is exact; one of random components is not."""
    model, x = linear_model(latent_dim=1), images(3)
    guide = build(MixtureGuide, model)
    with torch.no_grad():
        for head in (guide.head, *guide.heads):
            head.weight[1:] = 0
            head.bias[1:] = -20
    pair = PerImage(model, N), PerImage(guide, N)
    log_mass, loc, _ = guide.components(x)
    z = loc.movedim(1, 0)
    terms = model.log_joint(x, z) - log_mass.mT + 0.5 * math.log(2 * math.pi) - 20
    expected = (log_mass.mT.exp() * terms).sum(0).mean() + 0.5  # E[ε²/2] = 1/2
    stratified = [-StratifiedELBO(1000).loss(*pair, x) for _ in range(3)]
    torch.testing.assert_close(
        torch.tensor(stratified).double(), expected.detach().expand(3), rtol=0, atol=0.1
    )
    random = torch.tensor([-Trace_ELBO().loss(*pair, x) for _ in range(30)])
    assert random.std() > 1


def test_global_sites_count_once_and_for_one_image_in_n():
    model, x = linear_model(), images(4)
    guide = build(MixtureGuide, model)
    prior, posterior = dist.Normal(0.0, 1.0), dist.Normal(0.3, 0.5)

    def model_with_weight(x):
        pyro.sample("w", prior)
        return model(x)

    def guide_with_weight(x):
        pyro.sample("w", posterior)
        return guide(x)

    def loss(num_images):
        torch.manual_seed(0)
        pair = PerImage(model_with_weight, num_images), PerImage(guide_with_weight, num_images)
        return StratifiedELBO(3, max_plate_nesting=1).loss(*pair, x)

    torch.manual_seed(0)
    w = posterior.sample()
    cost = posterior.log_prob(w) - prior.log_prob(w)
    assert loss(1) - loss(1000) == pytest.approx(float(cost) * (1 - 1 / 1000), abs=1e-5)


def test_more_plates_and_a_subsampled_one():
    """Pixels in a plate of their own, images in a subsampled one: the same bound, N times."""
    model, x = linear_model(latent_dim=1), images(4)
    guide = build(MixtureGuide, model)
    layer = model.decoder[0]
    index = torch.arange(4)

    def wide_model(x):
        with pyro.plate("data", N, subsample=index, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            with pyro.plate("pixels", 6, dim=-1):
                loc = z @ layer.weight.mT + layer.bias
                loc = loc.squeeze(-2) if z.dim() == 2 else loc[..., 0, :]
                pyro.sample("x", dist.Normal(loc, model.log_sigma.exp()), obs=x.flatten(1))

    def wide_guide(x):
        log_mass, loc, log_scale = guide.components(x)
        q = gaussian_mixture(log_mass[:, None], loc[:, None], log_scale.exp()[:, None])
        with pyro.plate("data", N, subsample=index, dim=-2):
            pyro.sample("z", q)

    exact = quadrature_bound(model, guide.posterior(x), x).mean()
    elbo = StratifiedELBO(num_particles=500)
    draws = torch.tensor([-elbo.loss(wide_model, wide_guide, x) / N for _ in range(20)])
    assert elbo.max_plate_nesting == 2
    assert_estimates(draws.double(), exact)


def sample_nothing_mixed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def sample_two_mixtures(x):
    q = gaussian_mixture(torch.zeros(2), torch.zeros(2, 1), torch.ones(2, 1))
    pyro.sample("a", q)
    pyro.sample("b", q)


def sample_a_coin(x):
    pyro.sample("coin", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        zeros = torch.zeros(len(x), 2, 2).double()
        pyro.sample("z", gaussian_mixture(zeros[..., 0], zeros, zeros + 1))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (sample_nothing_mixed, "no site whose distribution is a MixtureSameFamily"),
        (sample_two_mixtures, "both mixtures"),
        (sample_a_coin, "'coin' has no reparametrised samples"),
    ],
)
def test_unusable_guides_are_refused(guide, message):
    elbo = StratifiedELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match=message):
        elbo.differentiable_loss(linear_model(), guide, images(3))


def test_a_site_outside_the_plate_must_not_depend_on_the_mixture():
    model, x = linear_model(), images(3)
    guide = build(MixtureGuide, model)

    def total_penalised(x):
        z = model(x)
        pyro.factor("penalty", -z.square().sum(-1).sum(-1, keepdim=True))

    elbo = StratifiedELBO(max_plate_nesting=1)
    with pytest.raises(ValueError, match="'penalty' depends on the mixture 'z'"):
        elbo.differentiable_loss(total_penalised, guide, x)


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
    fit(model, guide, pixels(), epochs=1, batch_size=20, progress=False, device="cpu")
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
        progress=False, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        bound = quadrature_bound(model, guide.posterior(x.double() / 255), x.double() / 255)
    iwae = log_evidence(model, guide, x.repeat(20, 1, 1, 1), 5, seed=0).mean
    return guide, bound, iwae


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


# use


@both
def test_weights_average_to_the_evidence(family):
    model, x = linear_model(), images(4)
    guide = build(family, model)
    with torch.no_grad():  # broad components, so that the weights are bounded
        for head in (guide.head, *guide.heads):
            head.bias[2:] = 0.3
    torch.manual_seed(1)
    weights = (log_weights(model, guide, x, 20_000) - exact_evidence(model, x)).exp()
    z = (weights.mean(0) - 1) / (weights.std(0) / math.sqrt(len(weights)))
    assert (z.abs() < 4).all()


@both
@pytest.mark.parametrize("num_images", [1, N])
def test_plain_svi(family, num_images):
    model, x = linear_model(), images(6)
    guide = build(family, model)
    pair = PerImage(model, num_images), PerImage(guide, num_images)
    before = copy.deepcopy([p.detach() for p in (*model.parameters(), *guide.parameters())])
    svi = SVI(*pair, Adam({"lr": 0.02}), guide.elbo())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(p, old) for p, old in zip(after, before, strict=True))


@both
def test_any_pyro_objective_takes_the_guide(family):
    model, x = linear_model(latent_dim=1), images(3)
    guide = build(family, model)
    pair = PerImage(model, N), PerImage(guide, N)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.tensor([-elbo.loss(*pair, x) for _ in range(30)], dtype=torch.float64)
    assert_estimates(draws, quadrature_bound(model, guide.posterior(x), x).mean().detach())


@both
@pytest.mark.parametrize("double", [False, True])
def test_fit_reaches_every_parameter(family, double):
    torch.manual_seed(0)
    model = linear_model() if double else linear_model().float()
    guide = family(model, 3, linear_encoder())
    guide = guide.double() if double else guide
    before = copy.deepcopy(guide.state_dict())
    history = fit(model, guide, pixels(), epochs=8, batch_size=16, progress=False, device="cpu")
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert sum(history.rows[-1][f"mass_{k}"] for k in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    for name, value in guide.state_dict().items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, before[name]), name


@both
def test_save_and_reload(family, tmp_path):
    model, x = linear_model(), images(4)
    guide = build(family, model)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    other = build(family, model, seed=9)
    other.load_state_dict(torch.load(tmp_path / "guide.pt"))
    results = [log_evidence(model, g, x, 5, seed=0).log_evidence for g in (guide, other)]
    assert torch.equal(*results)


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


def test_other_bad_input():
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        StratifiedELBO(num_particles=0)
    with pytest.raises(ValueError, match="logits"):
        gaussian_mixture(torch.tensor([0.0, math.nan]), torch.zeros(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got function"):
        build(RecursiveMixtureGuide, linear_model()).blocks(lambda x: None)
