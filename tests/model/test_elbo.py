"""Eq. (2) and identity (1) of the supplement, on a linear model where both are known exactly; and
the project's estimators against Pyro's, on the same traces."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from pyro.optim import Adam
from torch import nn
from toy import expected_log_likelihood, images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import PerImage, elbo_terms, fit, log_weights, make_guide, pair
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, TraceELBO, without_host_sync
from pyro_gpvae.model.stratified import StratifiedELBO

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
    rows = [elbo_terms(model, guide, x, N) for _ in range(500)]
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


ONE = torch.ones((), dtype=torch.float64)
KEEP = torch.tensor([True, False, True, True])
DATA = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def param(name, value, **options):
    return pyro.param(name, value * ONE, **options)


class StickingTheLanding(dist.Normal):
    """A site whose entropy term is not its log density."""

    def score_parts(self, x, *args, **kwargs):
        fixed = dist.Normal(self.loc.detach(), self.scale.detach())
        return ScoreParts(self.log_prob(x), 0, fixed.log_prob(x))


class Programs:
    """Pairs of programs, each with the sites that its name says."""

    @staticmethod
    def model(prior=None, weight=lambda: param("weight", 0.7)):
        with pyro.plate("data", 4):
            z = pyro.sample("z", prior or dist.Normal(0 * ONE, ONE))
            pyro.sample("x", dist.Normal(weight() * z, ONE), obs=DATA)

    @staticmethod
    def local(q):
        with pyro.plate("data", 4):
            pyro.sample("z", q)

    @classmethod
    def reparametrised(cls):
        scale = lambda: param("scale", 0.5, constraint=dist.constraints.positive)  # noqa: E731
        return cls.model, lambda: cls.local(dist.Normal(param("loc", 0.4), scale()))

    @classmethod
    def own_entropy_term(cls):
        return cls.model, lambda: cls.local(StickingTheLanding(param("loc", 0.4), ONE))

    @classmethod
    def no_analytic_kl(cls):
        return cls.model, lambda: cls.local(dist.StudentT(5 * ONE, param("loc", 0.4), ONE))

    @classmethod
    def point(cls):
        return cls.model, lambda: cls.local(dist.Delta(param("loc", 0.4)))

    @classmethod
    def score_function(cls):
        model = lambda: cls.model(dist.Bernoulli(0.3 * ONE))  # noqa: E731
        probs = lambda: param("probs", 0.4, constraint=dist.constraints.unit_interval)  # noqa: E731
        return model, lambda: cls.local(dist.Bernoulli(probs()))

    @classmethod
    def rejection_sampler(cls):
        model = lambda: cls.model(dist.Gamma(2 * ONE, ONE))  # noqa: E731
        return model, lambda: cls.local(ShapeAugmentedGamma(param("shape", 2.5), ONE))

    @staticmethod
    def score_function_among_others():
        """A global choice and local ones: Rao-Blackwellisation sees the plates."""

        def model():
            g = pyro.sample("g", dist.Normal(0 * ONE, ONE))
            c = pyro.sample("c", dist.Bernoulli(0.5 * ONE))
            with pyro.plate("data", 4):
                k = pyro.sample("k", dist.Bernoulli(0.3 * ONE))
                z = pyro.sample("z", dist.Normal(g + c, ONE))
                pyro.sample("x", dist.Normal(param("weight", 0.7) * z + k, ONE), obs=DATA)

        def guide():
            pyro.sample("g", dist.Normal(param("g_loc", 0.1), ONE))
            pyro.sample("c", dist.Bernoulli(param("c_probs", 0.6)))
            with pyro.plate("data", 4), poutine.mask(mask=KEEP):
                pyro.sample("k", dist.Bernoulli(param("k_probs", 0.2)))
                pyro.sample("z", dist.Normal(param("loc", 0.4), ONE))

        return model, guide

    @staticmethod
    def scaled_and_masked():
        def model():
            with poutine.scale(scale=0.25), poutine.mask(mask=KEEP):
                Programs.model()
            with poutine.scale(scale=0.25), poutine.mask(mask=False):
                pyro.sample("y", dist.Normal(param("weight", 0.7), ONE), obs=ONE)

        def guide():
            with poutine.scale(scale=0.25), poutine.mask(mask=KEEP):
                Programs.local(dist.Normal(param("loc", 0.4), ONE))

        return model, guide

    @staticmethod
    def scaled_and_masked_without_kl():
        model, _ = Programs.scaled_and_masked()

        def guide():
            with poutine.scale(scale=0.25), poutine.mask(mask=KEEP):
                Programs.local(dist.StudentT(5 * ONE, param("loc", 0.4), ONE))

        return model, guide

    @staticmethod
    def masked_auxiliary_sites_and_global_ones():
        def model():
            w = pyro.sample("w", dist.Normal(torch.zeros(2, 3).double(), ONE).to_event(2))
            Programs.model(weight=lambda: w.sum((-1, -2)).unsqueeze(-1))

        def guide():
            loc = pyro.param("w_loc", torch.ones(2, 3).double())
            pyro.sample("w", dist.Normal(loc, ONE).to_event(2))
            with pyro.plate("data", 4):
                with poutine.mask(mask=False):
                    f = pyro.sample(
                        "f",
                        dist.Normal(param("f_loc", 0.2), param("f_scale", 0.5)),
                        infer={"is_auxiliary": True},
                    )
                pyro.sample("z", dist.Normal(f, ONE))

        return model, guide

    @staticmethod
    def auxiliary_site_that_counts():
        def guide():
            with pyro.plate("data", 4):
                f = pyro.sample(
                    "f", dist.Normal(param("f_loc", 0.2), ONE), infer={"is_auxiliary": True}
                )
                pyro.sample("z", dist.Normal(f, ONE))

        return Programs.model, guide

    @staticmethod
    def factors():
        def model():
            pyro.factor("bonus", param("weight", 0.7) * 2)
            Programs.model()

        def guide():
            pyro.factor("price", param("loc", 0.4).square(), has_rsample=True)
            Programs.local(dist.Normal(param("loc", 0.4), ONE))

        return model, guide

    @staticmethod
    def nested_plates():
        def model():
            with pyro.plate("groups", 3, dim=-2):
                g = pyro.sample("g", dist.Normal(0 * ONE, ONE))
                with pyro.plate("data", 4, dim=-1):
                    z = pyro.sample("z", dist.Normal(g, ONE))
                    pyro.sample("x", dist.Normal(param("weight", 0.7) * z, ONE), obs=DATA)

        def guide():
            with pyro.plate("groups", 3, dim=-2):
                g = pyro.sample("g", dist.Normal(param("g_loc", 0.1), ONE))
                with pyro.plate("data", 4, dim=-1):
                    pyro.sample("z", dist.Normal(g * param("slope", 0.4), 2 * ONE))

        return model, guide

    @staticmethod
    def subsampled_plate():
        def model():
            with pyro.plate("data", 4, subsample_size=2) as index:
                z = pyro.sample("z", dist.Normal(0 * ONE, ONE))
                pyro.sample("x", dist.Normal(param("weight", 0.7) * z, ONE), obs=DATA[index])

        def guide():
            with pyro.plate("data", 4, subsample_size=2):
                pyro.sample("z", dist.Normal(param("loc", 0.4), ONE))

        return model, guide


#: Programs whose sites are all reparametrised, and the others.
MEAN_FIELD = [
    Programs.reparametrised,
    Programs.no_analytic_kl,
    Programs.own_entropy_term,
    Programs.point,
    Programs.scaled_and_masked,
    Programs.scaled_and_masked_without_kl,
    Programs.masked_auxiliary_sites_and_global_ones,
    Programs.auxiliary_site_that_counts,
    Programs.factors,
    Programs.nested_plates,
    Programs.subsampled_plate,
]
SCORED = [
    Programs.score_function,
    Programs.rejection_sampler,
    Programs.score_function_among_others,
]
PAIRS = [(Trace_ELBO, TraceELBO, make) for make in (*MEAN_FIELD, *SCORED)]
PAIRS += [(TraceMeanField_ELBO, MeanFieldELBO, make) for make in MEAN_FIELD]
with_programs = pytest.mark.parametrize(
    ("theirs", "ours", "make"), PAIRS, ids=lambda value: value.__name__
)
PARTICLES = [
    {},
    {"num_particles": 3},
    {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
]


def value_and_gradients(objective, make):
    """The loss, and its gradient in every parameter of the store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    for program in (model, guide):  # creates the parameters
        poutine.trace(program).get_trace()
    torch.manual_seed(1)
    loss = objective.differentiable_loss(model, guide)
    leaves = {n: p.unconstrained() for n, p in pyro.get_param_store().items()}
    assert leaves
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"loss": loss.detach()} | dict(zip(leaves, gradients, strict=True))


@with_programs
@pytest.mark.parametrize("options", PARTICLES, ids=["one", "loop", "vectorised"])
@pytest.mark.parametrize("validate", [True, False], ids=["checked", "unchecked"])
def test_same_value_and_gradient_as_pyros(theirs, ours, make, options, validate):
    with pyro.validation_enabled(validate):
        expected = value_and_gradients(theirs(**options), make)
        found = value_and_gradients(ours(**options), make)
    assert any(bool(g.abs() > 1e-3) for n, g in expected.items() if n != "loss" and g.dim() == 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@with_programs
def test_same_steps_of_svi_as_pyros(theirs, ours, make):
    results = []
    for kind in (theirs, ours):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(*make(), Adam({"lr": 0.05}), kind(num_particles=2))
        losses = torch.tensor([svi.step() for _ in range(3)] + [svi.evaluate_loss()])
        named = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
        results.append({"losses": losses, **named})
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("theirs", "ours", "_"), PAIRS[:1] + PAIRS[-1:])
def test_max_plate_nesting_is_guessed_as_by_pyro(theirs, ours, _):
    options = {"num_particles": 3, "vectorize_particles": True}
    expected = value_and_gradients(theirs(**options), Programs.nested_plates)
    found = value_and_gradients(ours(**options), Programs.nested_plates)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Programs.score_function, Programs.score_function_among_others])
def test_mean_field_refuses_sites_that_are_not_reparametrised(make):
    for kind in (TraceMeanField_ELBO, MeanFieldELBO):
        with pytest.raises(NotImplementedError, match=r"reparametrised|fully reparameterized"):
            value_and_gradients(kind(), make)


def test_mean_field_refuses_guides_with_other_sites_than_the_model():
    def one_more():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(param("loc", 0.4), ONE))
            pyro.sample("more", dist.Normal(param("loc", 0.4), ONE))

    def one_less():
        with pyro.plate("data", 4):
            pyro.sample("f", dist.Normal(param("loc", 0.4), ONE), infer={"is_auxiliary": True})

    for guide in (one_more, one_less):
        for kind in (TraceMeanField_ELBO, MeanFieldELBO):
            with (
                pytest.warns(UserWarning, match="Found vars in|Found non-auxiliary vars"),
                pytest.raises((AssertionError, KeyError, ValueError)),
            ):
                value_and_gradients(kind(), lambda guide=guide: (Programs.model, guide))


def test_mean_field_warns_about_sites_in_another_order():
    def model():
        a = pyro.sample("a", dist.Normal(0 * ONE, ONE))
        pyro.sample("b", dist.Normal(a, ONE))

    def guide():
        b = pyro.sample("b", dist.Normal(param("loc", 0.4), ONE))
        pyro.sample("a", dist.Normal(b, ONE))

    for kind in (TraceMeanField_ELBO, MeanFieldELBO):
        with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
            kind().differentiable_loss(model, guide)


def test_wrong_shapes_are_refused_as_by_pyro():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    for kind in (TraceMeanField_ELBO, MeanFieldELBO, Trace_ELBO, TraceELBO):
        with pytest.raises(ValueError, match='at site "z", invalid log_prob shape'):
            kind().differentiable_loss(model, model)


def test_sites_with_an_analytic_kl_are_not_scored():
    scored = []

    class Counting(dist.Normal):
        def log_prob(self, value):
            scored.append(self.name)
            return super().log_prob(value)

    def named(name, loc):
        distribution = Counting(loc, ONE)
        distribution.name = name
        return distribution

    def model():
        z = pyro.sample("z", named("prior", 0 * ONE))
        pyro.sample("x", named("likelihood", z), obs=ONE)

    def guide():
        with poutine.mask(mask=False):
            pyro.sample("f", named("masked", ONE), infer={"is_auxiliary": True})
        pyro.sample("z", named("posterior", ONE))

    with pyro.validation_enabled(False):
        MeanFieldELBO().differentiable_loss(model, guide)
        assert scored == ["likelihood"]
        TraceELBO().differentiable_loss(model, guide)
    assert sorted(scored[1:]) == ["likelihood", "masked", "posterior", "prior"]


class _OwnTrace(Trace_ELBO):
    pass


@pytest.mark.parametrize(
    "objective",
    [_OwnTrace(), StratifiedELBO()],
    ids=lambda objective: type(objective).__name__,
)
def test_without_syncs_leaves_other_objectives_alone(objective):
    assert without_host_sync(objective) is objective


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TraceGraph_ELBO(), "elbo must have differentiable_loss, .*; TraceGraph_ELBO has not"),
        (RenyiELBO(num_particles=2), "elbo must have differentiable_loss, .*; RenyiELBO has not"),
        (TraceEnum_ELBO(max_plate_nesting=1), "TraceEnum_ELBO enumerates sites .*MixtureSameFam"),
        (TraceTMC_ELBO(max_plate_nesting=1), "TraceTMC_ELBO enumerates sites .*SVI"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "guide", "block"])
def test_objectives_that_fit_cannot_use_are_refused_by_name(where, objective, message):
    model = linear_model()
    guide = GaussianGuide(model, linear_encoder()).double()
    if where == "guide":
        guide.elbo = lambda: objective
    if where == "block":
        guide.blocks = lambda model: [Block(objective, list(guide.parameters()))]
    data = (images(4) * 255).to(torch.uint8)
    options = {"elbo": objective} if where == "argument" else {}
    with pytest.raises(ValueError, match=message):
        fit(model, guide, data, epochs=1, progress=False, **options)


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


@pytest.mark.parametrize(
    ("theirs", "ours"), [(Trace_ELBO, TraceELBO), (TraceMeanField_ELBO, MeanFieldELBO)]
)
def test_without_syncs_keeps_every_option(theirs, ours):
    options = {
        "num_particles": 7,
        "max_plate_nesting": 3,
        "vectorize_particles": True,
        "strict_enumeration_warning": False,
        "retain_graph": True,
        "tail_adaptive_beta": -0.5,
    }
    objective = theirs(**options)
    twin = without_host_sync(objective)
    assert type(twin) is ours
    assert vars(twin) == vars(objective)
    assert twin.num_particles == 7
    assert without_host_sync(twin) is twin
    twin.num_particles = 1  # its own
    assert objective.num_particles == 7
