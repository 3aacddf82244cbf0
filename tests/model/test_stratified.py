"""The stratified ELBO of a mixture: unbiased, without noise from the component index."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from toy import images, linear_encoder, linear_model

from guides import MixtureGuide
from pyro_gpvae import PerImage
from pyro_gpvae.model.stratified import StratifiedELBO, gaussian_mixture

N = 50


def build(model, count=3, seed=0):
    """A mixture whose components and weights are far from their start."""
    torch.manual_seed(seed)
    guide = MixtureGuide(model, count, linear_encoder()).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def quadrature_bound(model, q, x):
    """E_q[log p(x, z) - log q(z)] of each image for p = 1: (B,)."""
    points = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    z = points[:, None, None].expand(-1, len(x), 1)
    log_q = q.log_prob(z)
    return torch.trapezoid(log_q.exp() * (model.log_joint(x, z) - log_q), points, dim=0)


def assert_estimates(draws, exact, tolerance=5.0):
    """The mean of rows agrees with the exact values, in standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= tolerance * error + 1e-10).all()


def test_value_and_gradient_are_unbiased():
    model, x = linear_model(latent_dim=1), images(3)
    guide = build(model)
    parameters = [*model.parameters(), *guide.parameters()]
    programs = PerImage(model, N), PerImage(guide, N)

    def flat(value):
        gradient = torch.autograd.grad(value, parameters)
        return torch.cat([value.detach().reshape(1), *[g.flatten() for g in gradient]])

    exact = flat(quadrature_bound(model, guide.posterior(x), x).mean())
    elbo = StratifiedELBO(num_particles=100)
    draws = torch.stack([flat(-elbo.differentiable_loss(*programs, x)) for _ in range(150)])
    assert_estimates(draws, exact)
    # and precise enough to tell: a bias of one part in ten would be seen in the largest entries
    error = draws.std(0) / math.sqrt(len(draws))
    assert (10 * error < exact.abs()).double().mean() > 0.5


def test_the_component_index_adds_no_noise():
    """With q_k near points, a stratified estimate is exact; one of random components is not."""
    model, x = linear_model(latent_dim=1), images(3)
    guide = build(model)
    with torch.no_grad():
        for head in (guide.head, *guide.heads):
            head.weight[1:] = 0
            head.bias[1:] = -20
    programs = PerImage(model, N), PerImage(guide, N)
    log_mass, loc, _ = guide.components(x)
    z = loc.movedim(1, 0)
    terms = model.log_joint(x, z) - log_mass.mT + 0.5 * math.log(2 * math.pi) - 20
    expected = (log_mass.mT.exp() * terms).sum(0).mean() + 0.5  # E[ε²/2] = 1/2
    stratified = [-StratifiedELBO(1000).loss(*programs, x) for _ in range(3)]
    torch.testing.assert_close(
        torch.tensor(stratified).double(), expected.detach().expand(3), rtol=0, atol=0.1
    )
    random = torch.tensor([-Trace_ELBO().loss(*programs, x) for _ in range(30)])
    assert random.std() > 1


def test_global_sites_count_once_and_for_one_image_in_n():
    model, x = linear_model(), images(4)
    guide = build(model)
    prior, posterior = dist.Normal(0.0, 1.0), dist.Normal(0.3, 0.5)

    def model_with_weight(x):
        pyro.sample("w", prior)
        return model(x)

    def guide_with_weight(x):
        pyro.sample("w", posterior)
        return guide(x)

    def loss(num_images):
        torch.manual_seed(0)
        programs = PerImage(model_with_weight, num_images), PerImage(guide_with_weight, num_images)
        return StratifiedELBO(3, max_plate_nesting=1).loss(*programs, x)

    torch.manual_seed(0)
    w = posterior.sample()
    cost = posterior.log_prob(w) - prior.log_prob(w)
    assert loss(1) - loss(1000) == pytest.approx(float(cost) * (1 - 1 / 1000), abs=1e-5)


def test_more_plates_and_a_subsampled_one():
    """Pixels in a plate of their own, images in a subsampled one: the same bound, N times."""
    model, x = linear_model(latent_dim=1), images(4)
    guide = build(model)
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


def nothing_mixed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def two_mixtures(x):
    for name in "ab":
        pyro.sample(name, gaussian_mixture(torch.zeros(2), torch.zeros(2, 1), torch.ones(2, 1)))


def mixture(x):
    with pyro.plate("data", len(x)):
        zeros = torch.zeros(len(x), 2, 2).double()
        pyro.sample("z", gaussian_mixture(zeros[..., 0], zeros, zeros + 1))


def coin(x):
    pyro.sample("coin", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
    mixture(x)


def penalised(x):
    pyro.factor("penalty", -linear_model()(x).square().sum(-1).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (linear_model(), nothing_mixed, "no site whose distribution is a MixtureSameFamily"),
        (linear_model(), two_mixtures, "both mixtures"),
        (linear_model(), coin, "'coin' has no reparametrised samples"),
        (penalised, mixture, "'penalty' depends on the mixture 'z'"),
    ],
)
def test_unusable_programs_are_refused(model, guide, message):
    with pytest.raises(ValueError, match=message):
        StratifiedELBO(max_plate_nesting=1).differentiable_loss(model, guide, images(3))


def test_num_particles_must_be_positive():
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        StratifiedELBO(num_particles=0)
