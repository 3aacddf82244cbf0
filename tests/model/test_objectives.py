"""The ELBO estimators of the library have the value and the gradient of Pyro's."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam

from pyro_gpvae.model.elbo import MeanFieldELBO, TraceELBO

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
