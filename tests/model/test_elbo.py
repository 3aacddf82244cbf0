"""Eq. (2) and identity (1) of the supplement, on a linear model where both are known exactly."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from toy import expected_log_likelihood, images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import PerImage, elbo_terms, log_weights, pair

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


@torch.no_grad()
def test_terms_add_up_to_the_bound():
    model, x = linear_model(), images(5)
    guide = gp(model)
    torch.manual_seed(0)
    rows = torch.tensor([[*elbo_terms(model, guide, x, N).values()] for _ in range(200)]).double()
    rows = torch.column_stack([rows[:, 1:], rows @ torch.tensor([1.0, -1.0, -1.0]).double()])
    exact = guide.expected_kl(x).mean(), guide.kl_weights() / N, exact_bound(model, guide, x)
    mean, error = mean_and_error(rows)
    assert ((mean - torch.stack(exact)).abs() < 4 * error).all()


@pytest.mark.parametrize("x", [255 * images(5), images(0), images(5)[0]])
def test_terms_refuse_what_is_no_batch_of_images(x):
    model = linear_model()
    with pytest.raises(ValueError, match=r"images|at least one member"):
        elbo_terms(model, gp(model), x, N)


def test_terms_keep_running_statistics():
    model, norm = linear_model(), nn.BatchNorm1d(3)
    guide = GaussianGuide(model, nn.Sequential(linear_encoder(), norm)).double()
    elbo_terms(model, guide, images(5), N)
    assert norm.running_mean.eq(0).all()


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
        PerImage(linear_model(), 0)


class Wider(nn.Module):
    """A program with a site in another plate than the images'."""

    def __init__(self, program, plate="components", size=3, square=False):
        super().__init__()
        self.program, self.plate, self.size, self.square = program, plate, size, square

    def forward(self, x):
        with pyro.plate(self.plate, self.size or len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            if self.square:
                pyro.deterministic("square", a.square())
        return self.program(x)


def test_sites_in_another_plate_are_global():
    model, guide = linear_model(), GaussianGuide(linear_model(), linear_encoder()).double()
    wider = Wider(model, square=True), Wider(guide)
    assert elbo_terms(*wider, images(5), N)["kl_global"] == 0
    for proposal in (wider[1], guide):  # replayed, and by its posterior
        assert log_weights(wider[0], proposal, images(5), 4).isfinite().all()
    wider = Wider(model, "images", None), Wider(guide, "images", None)  # "data" is the data plate
    assert elbo_terms(*wider, images(5), N)["kl_global"] == 0
