"""Eq. (2) and identity (1) of the supplement, on a linear model where both are known exactly."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam
from torch import nn
from toy import expected_log_likelihood, images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import PerImage, elbo_terms, fit, log_weights, make_guide, pair

N = 50


def gp(model, seed=0, **options):
    """A GPVAE guide whose weights are far from their start."""
    torch.manual_seed(seed)
    guide = GPGuide(model, linear_encoder(), initial_scale=0.2, **options).double()
    for parameter in guide.parameters():
        with torch.no_grad():
            parameter += 0.2 * torch.randn_like(parameter)
    return guide


def exact_bound(model, guide, x):
    """Eq. (2), averaged over the images, in closed form."""
    a, v, b, r = guide.moments(x)
    reconstruction = expected_log_likelihood(model, x, a, v + (2 * b + 2 * r).exp())
    kl = 0.5 * (a**2 + v + (2 * b + 2 * r).exp() - 1 - 2 * b).sum(-1)
    return (reconstruction - kl).mean() - guide.kl_weights() / N


def estimates(objective, model, guide, x, repeats, particles=1000, gradient=False):
    """Independent estimates of the bound, and of its gradient if asked, one a row."""
    elbo = objective(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    parameters = [*model.parameters(), *guide.parameters()]
    programs = PerImage(pair(model, guide), N), PerImage(guide, N)
    rows = []
    for _ in range(repeats):
        with torch.set_grad_enabled(gradient):
            bound = -elbo.differentiable_loss(*programs, x)
        parts = [bound.detach().reshape(1)]
        if gradient:
            parts += torch.autograd.grad(
                bound, parameters, allow_unused=True, materialize_grads=True
            )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def mean_and_error(rows):
    return rows.mean(0), rows.std(0) / len(rows) ** 0.5


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("estimator", ["weights", "functions"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_estimators_have_the_value_and_gradient_of_eq_2(objective, estimator, covariance):
    model, x = linear_model(sigma=1.0), images(5)
    guide = gp(model, estimator=estimator, covariance=covariance)
    exact = exact_bound(model, guide, x)
    parameters = [*model.parameters(), *guide.parameters()]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    torch.manual_seed(1)
    mean, error = mean_and_error(estimates(objective, model, guide, x, 40, gradient=True))

    assert error[0] < 1e-3 * exact.abs()
    assert abs(mean[0] - exact) < 4 * error[0]
    # 40 repeats make it a t distribution, and there are about a hundred parameters
    assert bool(((mean[1:] - gradient).abs() <= 5 * error[1:] + 1e-10).all())


@torch.no_grad()
def test_the_marginal_estimator_is_tighter_by_the_information_in_the_weights():
    model, x = linear_model(), images(5)
    guide = gp(model, estimator="marginal", num_nodes=20)
    a, v, b, r = guide.moments(x)
    torch.manual_seed(0)
    mean, error = mean_and_error(estimates(Trace_ELBO, model, guide, x, 20))
    # I(z; (W, U) | x) = E[log q(z|x,W,U) - log q(z|x)], by sampling
    f = dist.Normal(a, v.sqrt()).sample((20_000,))
    log_h = dist.Normal(b, r.sqrt()).sample((20_000,))
    z = dist.Normal(f, log_h.exp()).sample()
    ratio = dist.Normal(f, log_h.exp()).log_prob(z).sum(-1) - guide.posterior(x).log_prob(z)
    information, information_error = mean_and_error(ratio.mean(1))
    assert information > 0.1
    difference = mean[0] - exact_bound(model, guide, x) - information
    assert abs(difference) < 4 * torch.hypot(error[0], information_error)


@torch.no_grad()
def test_minibatches_average_to_the_full_data():
    model, x = linear_model(), images(N)
    guide = gp(model)
    exact = exact_bound(model, guide, x)
    batches = torch.stack([exact_bound(model, guide, batch) for batch in x.split(10)])
    torch.testing.assert_close(batches.mean(), exact)
    # and so do the losses of the programs, whose weights carry 1/N in every batch
    torch.manual_seed(0)
    parts = [estimates(TraceMeanField_ELBO, model, guide, batch, 20, 200) for batch in x.split(10)]
    mean, error = mean_and_error(torch.stack(parts).mean(0))
    assert abs(mean - exact) < 4 * error


def test_per_image_is_pyros_subsampled_plate_under_a_scale():
    """The literal form: plate("data", N, subsample=index) under poutine.scale(scale=1/N)."""
    model, x = linear_model(), images(7)
    guide = gp(model, estimator="weights")
    index = torch.arange(7)

    def literal_model(x):
        for name, prior in guide.global_prior().items():
            pyro.sample(name, prior)
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", model.prior())
            pyro.sample("x", model.likelihood(z), obs=x)

    def literal_guide(x):
        W, U = pyro.sample("W", guide.W()), pyro.sample("U", guide.U())
        features, m, log_s = guide.encode(x)
        phi = torch.cat([features, torch.ones(len(x), 1).double()], -1)
        with pyro.plate("data", N, subsample=index):
            loc, scale = m + phi @ W.mT, (log_s + phi @ U.mT).exp()
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    scaled = [poutine.scale(p, scale=1 / N) for p in (literal_model, literal_guide)]
    ours = [PerImage(pair(model, guide), N), PerImage(guide, N)]
    for objective in (Trace_ELBO(), TraceMeanField_ELBO()):
        losses = []
        for programs in (scaled, ours):
            torch.manual_seed(3)
            losses.append(objective.differentiable_loss(*programs, x))
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_svi_trains_every_parameter_without_the_global_store():
    model, x = linear_model(), images(20)
    guide = gp(model)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    programs = PerImage(pair(model, guide), 20), PerImage(guide, 20)
    svi = SVI(*programs, Adam({"lr": 1e-2}), Trace_ELBO())
    start = exact_bound(model, guide, x).detach()
    for _ in range(200):
        svi.step(x)
    after = [*model.parameters(), *guide.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert exact_bound(model, guide, x) > start + 1
    assert not pyro.get_param_store().keys()


def test_elbo_module_has_the_parameters_of_both_programs():
    model = linear_model()
    guide = gp(model)
    module = Trace_ELBO()(PerImage(pair(model, guide), N), PerImage(guide, N))
    assert len(list(module.parameters())) == len([*model.parameters(), *guide.parameters()])
    assert torch.isfinite(module(images(4)))


@torch.no_grad()
def test_terms_add_up_to_the_bound():
    model, x = linear_model(), images(5)
    guide = gp(model)
    torch.manual_seed(0)
    rows = [elbo_terms(model, guide, x, N) for _ in range(200)]
    terms = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    for name, exact in (
        ("kl_z", guide.expected_kl(x).mean()),
        ("kl_global", guide.kl_weights() / N),
    ):
        error = terms[name].std() / len(rows) ** 0.5
        assert abs(terms[name].mean() - float(exact)) < 4 * error
    total = terms["log_likelihood"] - terms["kl_z"] - terms["kl_global"]
    error = total.std() / len(rows) ** 0.5
    assert abs(total.mean() - float(exact_bound(model, guide, x))) < 4 * error


@pytest.mark.parametrize("spec", ["gp", "gp:estimator=weights"])
def test_training_one_guide_does_not_change_the_terms_of_another(spec):
    model = linear_model()
    data = (images(6) * 255).to(torch.uint8)
    fit(model, make_guide(spec, model, encoder=linear_encoder()).double(), data, epochs=1)
    vae = GaussianGuide(model, linear_encoder()).double()
    assert elbo_terms(model, vae, images(6), N)["kl_global"] == 0


@torch.no_grad()
def test_identity_1():
    """Σ ELBO(x) + KL(q(W,U) ‖ p(W,U|D)) = log p̂(D), the right side by quadrature."""
    model, x = linear_model(latent_dim=1), images(3)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 1), nn.Tanh())
    guide = GPGuide(model, encoder, initial_scale=0.5).double()
    guide.W.loc += 0.4
    guide.U.loc -= 0.3

    # the left side in closed form, and it is what the program estimates (tests above)
    a, v, b, r = guide.moments(x)
    reconstruction = expected_log_likelihood(model, x, a, v + (2 * b + 2 * r).exp())
    bound = (reconstruction - guide.expected_kl(x)).sum() - guide.kl_weights()

    # Σ L(W, U; x) on grids of W and of U, from the q(z|x,W,U) of the program itself. With a linear
    # decoder L(W, U) = L(W, 0) + L(0, U) - L(0, 0), so that the two rows can be integrated apart.
    nodes = torch.linspace(-8, 8, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(nodes, nodes).reshape(-1, 1, 1, 2)  # a feature and the bias
    guide.estimator = "weights"

    def surrogate(W, U):
        trace = poutine.trace(poutine.condition(guide, data={"W": W, "U": U})).get_trace(x)
        f, h = trace.nodes["z"]["fn"].mean, trace.nodes["z"]["fn"].stddev
        kl_z = 0.5 * (f**2 + h**2 - 1 - 2 * h.log()).sum(-1)
        return (expected_log_likelihood(model, x, f, h**2) - kl_z).sum(-1)

    zero = torch.zeros_like(grid)
    log_evidence, kl = -surrogate(zero[:1], zero[:1]).squeeze(), 0.0
    area = float(nodes[1] - nodes[0]) ** 2
    for rows, at in ((guide.W, (grid, zero)), (guide.U, (zero, grid))):
        log_joint = surrogate(*at) + dist.Normal(0.0, 1.0).log_prob(grid).sum((1, 2, 3))
        log_mass = log_joint.logsumexp(0) + math.log(area)
        log_q = rows().log_prob(grid.squeeze(1))
        kl += (log_q.exp() * (log_q - (log_joint - log_mass))).sum() * area
        log_evidence += log_mass
    assert abs(bound + kl - log_evidence) < 1e-4


def test_num_images_must_be_positive():
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        PerImage(GaussianGuide(linear_model(), linear_encoder()), 0)


def test_enumerated_sites_train_with_svi():
    own = linear_model()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            kind = pyro.sample(
                "kind", dist.Categorical(torch.ones(3).double()), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(torch.eye(3).double()[kind][..., :2], 1.0).to_event(1))
            pyro.sample("x", own.likelihood(z), obs=x)

    guide = GaussianGuide(own, linear_encoder()).double()
    before = guide.head.weight.clone()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(PerImage(model, N), PerImage(guide, N), Adam({"lr": 0.1}), elbo)
    assert math.isfinite(svi.step(images(4)))
    assert not torch.equal(guide.head.weight, before)


class Components(nn.Module):
    """A model or guide with a site in a plate of its own beside the images'."""

    def __init__(self, program, plate="components", size=3, square=False):
        super().__init__()
        self.program, self.plate, self.size, self.square = program, plate, size, square
        self.loc = nn.Parameter(torch.zeros(()).double())

    def forward(self, x):
        with pyro.plate(self.plate, self.size or len(x)):
            a = pyro.sample("a", dist.Normal(self.loc, 1.0))
            if self.square:
                pyro.deterministic("square", a.square())
        return self.program(x)


def test_deterministic_values_in_a_global_plate():
    model, guide = linear_model(), GaussianGuide(linear_model(), linear_encoder()).double()
    model, guide = Components(model, square=True), Components(guide)
    terms = elbo_terms(model, guide, images(5), N)
    assert terms["kl_global"] == 0
    for proposal in (guide, guide.program):  # replayed, and by its posterior
        assert log_weights(model, proposal, images(5), 4).isfinite().all()


def test_a_site_that_may_be_an_images_is_named():
    model, guide = linear_model(), GaussianGuide(linear_model(), linear_encoder()).double()
    programs = Components(model, "images", None), Components(guide, "images", None)
    with pytest.warns(UserWarning, match=r"'a' lies in plate\('images', 5\), which has as many"):
        elbo_terms(*programs, images(5), N)


class Pixels(nn.Module):
    """The linear model with a plate of pixels, or with pixels as dimensions of an event."""

    def __init__(self, nested):
        super().__init__()
        self.own, self.nested = linear_model(), nested

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.own.prior())
            loc, x = self.own.decoder(z.reshape(-1, z.shape[-1])).flatten(1), x.flatten(1)
            loc = loc.reshape(*z.shape[:-1], -1)
            if not self.nested:
                pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)
                return
            loc = (loc.squeeze(-3) if loc.dim() > 2 else loc).mT
            with pyro.plate("pixels", x.shape[1], dim=-2):
                pyro.sample("x", dist.Normal(loc, 0.3), obs=x.mT)


@pytest.mark.parametrize("vectorize", [None, False, True])
def test_a_plate_of_pixels_inside_that_of_images(vectorize):
    data, rows = (images(7) * 255).to(torch.uint8), []
    for nested in (True, False):
        model = Pixels(nested)
        torch.manual_seed(1)
        guide = GaussianGuide(model.own, linear_encoder()).double()
        elbo = None
        if vectorize is not None:
            elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
        history = fit(
            model, guide, data, epochs=2, batch_size=4, elbo=elbo, validation=data[:2],
            progress=False,
        )  # fmt: skip
        rows.append(history.frame().drop(columns="seconds").to_numpy())
    np.testing.assert_allclose(*rows, rtol=1e-12)
