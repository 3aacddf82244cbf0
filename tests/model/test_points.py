"""Latents that are points of auxiliary draws: their density is checked against the log-Jacobian."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer import autoguide

from pyro_gpvae import decompose, elbo_terms, fit, log_evidence
from pyro_gpvae.model._points import check_points
from pyro_gpvae.testing import GuideError, check_guide

X = torch.tensor([0.3, -0.8, 1.5])
EXACT = dist.Normal(0.0, 1.25**0.5).log_prob(X)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)


def guide_of(point):
    """The exact posterior of u = log z, and z as a function of it."""

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(x / 1.25, 0.2**0.5)
            u = pyro.sample("u", q, infer={"is_auxiliary": True})
            pyro.sample("z", point(u))

    return guide


EVALUATORS = {
    "log_evidence": lambda guide: log_evidence(model, guide, X, 5),
    "decompose": lambda guide: decompose(model, guide, X, num_samples=5, reference_samples=5),
    "elbo_terms": lambda guide: elbo_terms(model, guide, X, 3),
    "fit": lambda guide: fit(model, guide, X, epochs=1, progress=False),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_point_without_the_log_jacobian_is_refused(name):
    with pytest.raises(ValueError, match=r"\['z'\].*of its auxiliary sites \['u'\].*log_jacobian"):
        EVALUATORS[name](guide_of(lambda u: dist.Delta(u.exp())))
    with pytest.raises(ValueError, match="wrong"):  # of the other sign
        EVALUATORS[name](guide_of(lambda u: dist.Delta(u.exp(), log_density=u)))
    constant = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="no invertible function"):
        EVALUATORS[name](guide_of(lambda u: dist.Delta(constant + 0 * u)))


def test_a_point_with_the_log_jacobian_has_the_exact_evidence():
    found = log_evidence(model, guide_of(lambda u: dist.Delta(u.exp(), log_density=-u)), X, 5)
    torch.testing.assert_close(found.log_evidence, EXACT)
    detached = log_evidence(model, guide_of(lambda u: dist.Delta(u.detach().exp(), -u)), X, 5)
    torch.testing.assert_close(detached.log_evidence, EXACT)


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_continuous_point_of_a_discrete_draw_is_refused(name):
    """Its probability is no density, so that the weights would not estimate log p(x)."""

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(1 + k))

    with pytest.raises(ValueError, match="discrete where the others are continuous"):
        EVALUATORS[name](guide)


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_discrete_guide_of_a_continuous_site_is_refused(name):
    """A probability over a density would give a number, which estimates nothing."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones_like(x)))

    with pytest.raises(ValueError, match=r"'z' from a discrete distribution.*continuous one"):
        EVALUATORS[name](guide)


def test_a_discrete_posterior_of_a_continuous_site_is_refused():
    class Guide:
        def posterior(self, x):
            return dist.Poisson(torch.ones_like(x))

    for evaluate in (EVALUATORS["log_evidence"], EVALUATORS["decompose"]):
        with pytest.raises(ValueError, match=r"'z' from a discrete distribution"):
            evaluate(Guide())


def test_a_discrete_point_of_a_discrete_draw_has_the_exact_evidence():
    def counts(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            log_p = torch.stack([dist.Normal(k, 0.5).log_prob(x) for k in (0.0, 1.0)])
            odds = log_p[1] - log_p[0] + math.log(0.3 / 0.7)
            other = pyro.sample("other", dist.Bernoulli(logits=-odds), infer={"is_auxiliary": True})
            pyro.sample("k", dist.Delta(1 - other))

    parts = [dist.Normal(k, 0.5).log_prob(X) + math.log(p) for k, p in ((0.0, 0.7), (1.0, 0.3))]
    exact = torch.stack(parts).logsumexp(0)
    torch.testing.assert_close(log_evidence(counts, guide, X, 5).log_evidence, exact)


def test_check_guide_names_the_remedy():
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = dist.Normal(x / 1.25, self.scale.abs())
                u = pyro.sample("u", q, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(u.exp()))

    with pytest.raises(GuideError, match=r"log_density=-log_jacobian") as caught:
        check_guide(Guide(), model, X)
    assert "overflows" not in str(caught.value)


def test_supports_of_both_sites_count():
    """r = g², where g has a Gamma distribution: q(r) = q(g) / 2g."""
    counts = torch.tensor([2.0, 0.0, 7.0])

    def squared(x):
        with pyro.plate("data", len(x)):
            r = pyro.sample("r", dist.Exponential(1.0))
            pyro.sample("x", dist.Poisson(r), obs=x)

    def guide(x, log_density=lambda g: -(2 * g).log()):
        with pyro.plate("data", len(x)):
            g = pyro.sample("g", dist.Gamma(3.0, 2.0), infer={"is_auxiliary": True})
            pyro.sample("r", dist.Delta(g**2, log_density(g)))

    found = log_evidence(squared, guide, counts, 20_000, seed=0)
    error = found.log_evidence - dist.GammaPoisson(1.0, 1.0).log_prob(counts)
    assert float((error / found.standard_error).abs().max()) < 4
    with pytest.raises(ValueError, match="log-Jacobian"):
        log_evidence(squared, partial(guide, log_density=lambda g: 0.0 * g), counts, 5)


def test_points_may_depend_on_each_other_and_on_other_latents():
    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 2, dim=-2):
                b = pyro.sample("b", dist.LogNormal(a, 1.0))
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(c + b.log().sum(0), 1.0), obs=x)

    def guide(x, sign=-1):
        auxiliary = {"is_auxiliary": True}
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Normal(x / 4, 0.9))
            u = pyro.sample("u", dist.Normal(x / 4, 0.9), infer=auxiliary)
            a = pyro.sample("a", dist.Delta(c.exp() * u, sign * c))
            with pyro.plate("inner", 2, dim=-2):
                v = pyro.sample("v", dist.Normal(a, 1.0), infer=auxiliary)
                log_scale = torch.tanh(a)
                w = v * log_scale.exp()
                pyro.sample("b", dist.Delta(w.exp(), -w - log_scale))

    log_evidence(two, guide, X, 5, vectorized=False)
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*of its auxiliary sites \['u', 'v'\]"):
        log_evidence(two, partial(guide, sign=1), X, 5)


def constrained(x):
    with pyro.plate("data", len(x)):
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", dist.Uniform(-1.0, 4.0))
        s = pyro.sample("s", dist.Dirichlet(torch.ones(3)))
        c = pyro.sample("c", dist.LKJCholesky(3, 1.0))
        with pyro.plate("inner", 2, dim=-2):
            h = pyro.sample("h", dist.LogNormal(0.0, 1.0))
        mean = r + b + s[..., 0] + c[..., 1, 0] + h.sum(-2)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    [
        "AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoGaussian",
        "AutoLowRankMultivariateNormal", "AutoIAFNormal", "AutoNormalizingFlow", "AutoStructured",
    ],
)  # fmt: skip
def test_pyros_own_points_have_the_right_density(name, dtype):
    """And another one is noticed: their sites without the log-Jacobian of the constraints."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    flow = {"init_transform_fn": partial(iterated, 1, affine_coupling)}
    x = X[:1].to(dtype)
    try:
        guide = getattr(autoguide, name)(
            constrained, **(flow if name == "AutoNormalizingFlow" else {})
        )
        guide(x)

        class Without(poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                if isinstance(msg["fn"], dist.Delta):
                    msg["fn"] = dist.Delta(msg["fn"].v, event_dim=msg["fn"].event_dim)

        q = poutine.trace(guide).get_trace(x)
        p = poutine.trace(poutine.replay(constrained, trace=q)).get_trace(x)
        check_points(guide, (x,), q, p, "data")
        with pytest.raises(ValueError, match="log-Jacobian"):
            check_points(lambda x: Without()(guide)(x), (x,), q, p, "data")
    finally:
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()
