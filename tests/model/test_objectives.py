"""The ELBO estimators of the library have the value and the gradient of Pyro's."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import (
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import fit
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, TraceELBO
from pyro_gpvae.model.stratified import StratifiedELBO
from pyro_gpvae.training._objectives import without_host_sync

ONE = torch.ones((), dtype=torch.float64)
KEEP = torch.tensor([True, False, True, True])
AUXILIARY = {"is_auxiliary": True}
DATA = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def param(name, value, **options):
    return pyro.param(name, value * ONE, **options)


def model(prior=None, weight=lambda: param("weight", 0.7)):
    with pyro.plate("data", 4):
        z = pyro.sample("z", prior or dist.Normal(0 * ONE, ONE))
        pyro.sample("x", dist.Normal(weight() * z, ONE), obs=DATA)


def local(q, name="z"):
    with pyro.plate("data", 4):
        pyro.sample(name, q)


def loc():
    return param("loc", 0.4)


def guides_of(q, prior=lambda: None):
    """Makes the model and a guide of one local site."""
    return lambda: (lambda: model(prior()), lambda: local(q()))


def positive(name, value):
    return param(name, value, constraint=dist.constraints.positive)


def probs():
    return param("probs", 0.4, constraint=dist.constraints.unit_interval)


def scaled_and_masked(q=dist.Normal):
    def masked_model():
        with poutine.scale(scale=0.25), poutine.mask(mask=KEEP):
            model()
        with poutine.scale(scale=0.25), poutine.mask(mask=False):
            pyro.sample("y", dist.Normal(param("weight", 0.7), ONE), obs=ONE)

    def guide():
        with poutine.scale(scale=0.25), poutine.mask(mask=KEEP):
            local(q(loc(), ONE))

    return masked_model, guide


def masked_auxiliary_sites_and_global_ones():
    def global_model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3).double(), ONE).to_event(2))
        model(weight=lambda: w.sum((-1, -2)).unsqueeze(-1))

    def guide():
        w_loc = pyro.param("w_loc", torch.ones(2, 3).double())
        pyro.sample("w", dist.Normal(w_loc, ONE).to_event(2))
        with pyro.plate("data", 4):
            with poutine.mask(mask=False):
                q = dist.Normal(param("f_loc", 0.2), param("f_scale", 0.5))
                f = pyro.sample("f", q, infer=AUXILIARY)
            pyro.sample("z", dist.Normal(f, ONE))

    return global_model, guide


def factors():
    def factor_model():
        pyro.factor("bonus", param("weight", 0.7) * 2)
        model()

    def guide():
        pyro.factor("price", loc().square(), has_rsample=True)
        local(dist.Normal(loc(), ONE))

    return factor_model, guide


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


#: Programs whose sites are all reparametrised, and the others.
MEAN_FIELD = {
    "reparametrised": guides_of(lambda: dist.Normal(loc(), positive("scale", 0.5))),
    "no analytic KL": guides_of(lambda: dist.StudentT(5 * ONE, loc(), ONE)),
    "point": guides_of(lambda: dist.Delta(loc())),
    "scaled and masked": scaled_and_masked,
    "masked distributions": guides_of(
        lambda: dist.Normal(loc(), ONE).mask(False), lambda: dist.Normal(0 * ONE, ONE).mask(False)
    ),
    "scaled and masked without KL": lambda: scaled_and_masked(partial(dist.StudentT, 5 * ONE)),
    "masked auxiliary sites": masked_auxiliary_sites_and_global_ones,
    "factors": factors,
    "nested plates": nested_plates,
}
SCORED = {
    "score function": guides_of(lambda: dist.Bernoulli(probs()), lambda: dist.Bernoulli(0.3 * ONE)),
    "rejection sampler": guides_of(
        lambda: ShapeAugmentedGamma(param("shape", 2.5), ONE), lambda: dist.Gamma(2 * ONE, ONE)
    ),
}
PAIRS = [(Trace_ELBO, TraceELBO, name) for name in MEAN_FIELD | SCORED]
PAIRS += [(TraceMeanField_ELBO, MeanFieldELBO, name) for name in MEAN_FIELD]
with_programs = pytest.mark.parametrize(("theirs", "ours", "name"), PAIRS)
PARTICLES = [
    {},
    {"num_particles": 3},
    {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
]


def value_and_gradients(objective, name):
    """The loss, and its gradient in every parameter of the store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = (MEAN_FIELD | SCORED)[name]()
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
def test_same_value_and_gradient_as_pyros(theirs, ours, name, options, validate):
    with pyro.validation_enabled(validate):
        expected = value_and_gradients(theirs(**options), name)
        found = value_and_gradients(ours(**options), name)
    assert any(bool(g.abs() > 1e-3) for n, g in expected.items() if n != "loss" and g.dim() == 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_mean_field_refuses_sites_that_are_not_reparametrised():
    with pytest.raises(NotImplementedError, match="reparametrised"):
        value_and_gradients(MeanFieldELBO(), "score function")


@pytest.mark.parametrize("names", ["az", ""])
def test_mean_field_refuses_guides_with_other_sites_than_the_model(names):
    def guide():
        with pyro.plate("data", 4):
            for name in names:
                pyro.sample(name, dist.Normal(loc(), ONE))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="is in the model or in"):
        MeanFieldELBO().differentiable_loss(model, guide)


def test_mean_field_warns_about_sites_in_another_order():
    def program(first, second):
        pyro.sample(second, dist.Normal(pyro.sample(first, dist.Normal(loc(), ONE)), ONE))

    model, guide = (lambda: program("a", "b")), (lambda: program("b", "a"))
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        MeanFieldELBO().differentiable_loss(model, guide)


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
            pyro.sample("f", named("masked", ONE), infer=AUXILIARY)
        pyro.sample("z", named("posterior", ONE))

    with pyro.validation_enabled(False):
        MeanFieldELBO().differentiable_loss(model, guide)
        assert scored == ["likelihood"]
        TraceELBO().differentiable_loss(model, guide)
    assert sorted(scored[1:]) == ["likelihood", "masked", "posterior", "prior"]


class OwnTrace(Trace_ELBO):
    pass


def test_training_replaces_pyros_objectives_and_keeps_their_options():
    options = {"num_particles": 7, "max_plate_nesting": 3, "vectorize_particles": True}
    options |= {"retain_graph": True, "tail_adaptive_beta": -0.5}
    for theirs, ours in ((Trace_ELBO, TraceELBO), (TraceMeanField_ELBO, MeanFieldELBO)):
        objective = theirs(**options)
        twin = without_host_sync(objective)
        assert type(twin) is ours
        assert vars(twin) == vars(objective)
        twin.num_particles = 1  # its own
        assert objective.num_particles == 7
        assert without_host_sync(twin) is twin
    for other in (OwnTrace(), StratifiedELBO()):
        assert without_host_sync(other) is other


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TraceGraph_ELBO(), "elbo must have differentiable_loss, .*; TraceGraph_ELBO has not"),
        (JitTrace_ELBO(), "needs torch.jit, .*: use Trace_ELBO and backend='compiled'"),
        (TraceEnum_ELBO(max_plate_nesting=1), "TraceEnum_ELBO enumerates sites .*MixtureSameFam"),
        (TraceTMC_ELBO(max_plate_nesting=1), "TraceTMC_ELBO enumerates sites"),
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
    options = {"elbo": objective} if where == "argument" else {}
    with pytest.raises(ValueError, match=message):
        fit(model, guide, (images(4) * 255).to(torch.uint8), epochs=1, progress=False, **options)


def test_a_divergence_of_another_batch_shape_is_refused_without_validation():
    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.ones(2, 3)))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.ones(3)))

    with pyro.validation_enabled(False):
        with pytest.raises(AssertionError):
            TraceMeanField_ELBO().loss(model, guide)
        with pytest.raises(ValueError, match=r"'z' has the shape \(2, 3\), .* batch shape \(3,\)"):
            MeanFieldELBO().loss(model, guide)


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceELBO, TraceMeanField_ELBO, MeanFieldELBO])
def test_programs_without_sites_have_the_loss_zero(kind):
    for evaluate in ("loss", "differentiable_loss", "loss_and_grads"):
        assert float(getattr(kind(), evaluate)(lambda: None, lambda: None)) == 0


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceELBO, TraceMeanField_ELBO, MeanFieldELBO])
def test_a_loss_that_is_not_a_number_is_warned_of(kind):
    def program():
        pyro.sample("z", dist.Normal(ONE, ONE))
        pyro.factor("nan", ONE * torch.nan, has_rsample=True)

    with pyro.validation_enabled(False):
        for evaluate in ("loss", "differentiable_loss", "loss_and_grads"):
            with pytest.warns(UserWarning, match="Encountered NaN"):
                getattr(kind(), evaluate)(program, program)
