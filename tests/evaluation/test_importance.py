import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from toy import exact_evidence, exact_posterior, images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import (
    NonFiniteError,
    evidence_curve,
    log_evidence,
    log_weights,
    pair,
)
from pyro_gpvae.evaluation.importance import Evidence, ParetoWarning, pareto_k
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.testing._noise import ConstantNoise


class ExactGuide(nn.Module):
    """The true posterior of the linear model."""

    def __init__(self, model):
        super().__init__()
        self._model = (model,)

    def posterior(self, x):
        return exact_posterior(self._model[0], x)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))


class ReplayedGuide(nn.Module):
    """A guide without ``posterior``."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self, x):
        return self.guide(x)


def gaussian(model, seed=2):
    torch.manual_seed(seed)
    return GaussianGuide(model, linear_encoder()).double()


@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize("wrap", [lambda guide: guide, ReplayedGuide], ids=["posterior", "replay"])
def test_the_exact_posterior_gives_the_exact_evidence(num_samples, wrap):
    model, x = linear_model(), images(5)
    result = log_evidence(model, wrap(ExactGuide(model)), x, num_samples)
    torch.testing.assert_close(result.log_evidence, exact_evidence(model, x), rtol=0, atol=1e-8)
    torch.testing.assert_close(result.effective_sample_size, torch.full((5,), num_samples).double())
    if num_samples > 1:
        assert float(result.standard_error.max()) < 1e-7


class NoisyGuide(PyroModule):
    """Auxiliary variables, and global weights that it really uses."""

    def __init__(self, model):
        super().__init__()
        self.encoder = linear_encoder()
        self.head = nn.Linear(3, model.latent_dim)

    def forward(self, x):
        W = pyro.sample("W", dist.Normal(torch.zeros(2, 3).double(), 0.3).to_event(2))
        phi = self.encoder(x)
        shift = phi @ W.mT
        with pyro.plate("data", len(x)):
            loc = self.head(phi) + (shift if W.dim() == 2 else shift.squeeze(-3))
            u = pyro.sample("u", dist.Normal(loc, 0.2).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 0.7).to_event(1))
        return W


@pytest.mark.parametrize(
    "make",
    [
        gaussian,
        lambda model: ReplayedGuide(gaussian(model)),
        lambda model: GPGuide(model, linear_encoder(), initial_scale=0.3).double(),
        lambda model: ReplayedGuide(
            GPGuide(model, linear_encoder(), initial_scale=0.3, estimator="weights").double()
        ),
        lambda model: NoisyGuide(model).double(),
    ],
    ids=["gaussian", "gaussian replayed", "gp", "gp replayed", "auxiliary variables"],
)
def test_weights_are_unbiased_and_the_bound_rises_with_the_samples(make):
    model, x = linear_model(sigma=1.0), images(4)  # a posterior that a wrong guide still covers
    torch.manual_seed(0)
    guide = make(model)
    weights = log_weights(model, guide, x, 40_000, chunk_size=40_000)
    ratio = (weights - exact_evidence(model, x)).exp()
    z_score = (ratio.mean(0) - 1) / (ratio.std(0) / len(ratio) ** 0.5)
    assert float(z_score.abs().max()) < 4
    curve = evidence_curve(weights, [1, 4, 16, 64, 256, 1024])
    means = torch.stack([value.mean() for value in curve.values()])
    assert bool((means.diff() > 0).all())
    assert bool((means < exact_evidence(model, x).mean() + 0.01).all())


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 20, 1000])
@pytest.mark.parametrize("wrap", [lambda guide: guide, ReplayedGuide], ids=["posterior", "replay"])
def test_any_chunks_and_any_order_give_the_same_weights(wrap, chunk_size):
    model, x, order = linear_model(), images(5), [3, 1, 4, 0, 2]
    guide = wrap(gaussian(model))
    with ConstantNoise():
        expected = torch.cat([log_weights(model, guide, image[None], 7) for image in x], dim=1)
        found = log_weights(model, guide, x[order], 7, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected[:, order], rtol=0, atol=1e-10)


class UnusedWeights(nn.Module):
    """Thousands of random weights that do nothing."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def global_prior(self):
        zero = torch.zeros(3000).double()
        return {**self.guide.global_prior(), "V": dist.Normal(zero, 1.0).to_event(1)}

    def forward(self, x):
        z = self.guide(x)
        pyro.sample("V", dist.Normal(torch.ones(3000).double(), 0.1).to_event(1))
        return z


@pytest.mark.parametrize("estimator", ["functions", "weights", "marginal"])
def test_unused_random_weights_do_not_change_the_evidence(estimator):
    model, x = linear_model(), images(5)
    guide = GPGuide(model, linear_encoder(), estimator=estimator).double()
    results = []
    for g in (ReplayedGuide(guide), UnusedWeights(guide)):
        results.append(log_evidence(model, g, x, 10, seed=0, chunk_size=1000).log_evidence)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    # nor do the weights of the GP itself: only q(z|x) matters
    paired = log_evidence(pair(model, guide), guide, x, 10, seed=0).log_evidence
    torch.testing.assert_close(log_evidence(model, guide, x, 10, seed=0).log_evidence, paired)


def test_the_marginal_is_tighter_than_replaying_the_weights():
    model, x = linear_model(), images(50)
    torch.manual_seed(0)
    guide = GPGuide(model, linear_encoder(), initial_scale=0.5, estimator="weights").double()
    with pytest.warns(ParetoWarning, match=r"Pareto k above 0.7 for \d+ of 50 images"):
        tight = log_evidence(model, guide, x, 100, seed=0).mean
    with pytest.warns(ParetoWarning):
        loose = log_evidence(model, ReplayedGuide(guide), x, 100, seed=0).mean
    assert tight > loose


def test_same_seed_same_numbers_and_the_global_state_is_untouched():
    model, x = linear_model(), images(5)
    guide = gaussian(model)
    state = torch.random.get_rng_state()
    first = log_evidence(model, guide, x, 10, seed=3).log_evidence
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(10)
    assert torch.equal(log_evidence(model, guide, x, 10, seed=3).log_evidence, first)
    assert not torch.equal(log_evidence(model, guide, x, 10, seed=4).log_evidence, first)


def test_summary_of_weights():
    torch.manual_seed(0)
    weights = torch.randn(10_000, 3).double()
    result = Evidence.from_log_weights(weights)
    mean, sd = weights.exp().mean(0), weights.exp().std(0)
    torch.testing.assert_close(result.log_evidence, mean.log())
    torch.testing.assert_close(result.standard_error, sd / (100 * mean))
    torch.testing.assert_close(result.elbo, weights.mean(0))
    torch.testing.assert_close(
        result.effective_sample_size, weights.exp().sum(0) ** 2 / weights.exp().square().sum(0)
    )
    expected = (result.standard_error**2).sum().sqrt() / 3
    assert result.monte_carlo_error == pytest.approx(float(expected))
    # huge and tiny weights neither overflow nor underflow
    shifted = Evidence.from_log_weights(weights - 5000)
    torch.testing.assert_close(shifted.log_evidence, result.log_evidence - 5000)
    torch.testing.assert_close(shifted.standard_error, result.standard_error)


def test_curve_uses_disjoint_groups():
    weights = torch.randn(10, 2).double()
    curve = evidence_curve(weights, [1, 3, 10])
    torch.testing.assert_close(curve[1], weights.mean(0))
    torch.testing.assert_close(curve[10], weights.exp().mean(0).log())
    groups = [weights[i : i + 3].exp().mean(0).log() for i in (0, 3, 6)]
    torch.testing.assert_close(curve[3], torch.stack(groups).mean(0))
    with pytest.raises(ValueError, match="between 1 and 10, got 11"):
        evidence_curve(weights, [11])


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (images(2), {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (images(2), {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        (images(2) * 255, {}, "255|range|0, 1"),
        (images(2) * math.nan, {}, "(?i)nan"),
        (images(2)[0], {}, r"expects images \(B, 1, 2, 3\), got \(1, 2, 3\)"),
        (images(2)[:0], {}, "at least one member"),
        (images(2) * 255 - 128, {}, "divide values 0 to 255 by 255"),
        ((images(2) * 255).long(), {}, "images must be uint8"),
        (torch.rand(2, 1, 5, 5), {}, r"expects images \(B, 1, 2, 3\), got \(2, 1, 5, 5\)"),
    ],
)
def test_bad_input(x, options, message):
    model = linear_model()
    with pytest.raises(ValueError, match=message):
        log_evidence(model, gaussian(model), x, **({"num_samples": 2} | options))


def test_the_tail_of_known_weights():
    generator = torch.Generator().manual_seed(0)
    exponential = -torch.rand(5000, 40, generator=generator).double().log()
    for shape in (0.3, 0.6, 0.9, 1.5):  # Pareto: P(w > t) = t^(-1/k)
        k = pareto_k(shape * exponential)
        assert abs(float(k.mean()) - shape) < 0.1
    assert bool((pareto_k(0.3 * exponential) < 0.7).all())
    assert bool((pareto_k(1.5 * exponential) > 0.7).all())
    # bounded weights, and any factor
    bounded = torch.rand(5000, 40, generator=generator).double().log()
    assert bool((pareto_k(bounded) < 0).all())
    torch.testing.assert_close(pareto_k(exponential - 700), pareto_k(exponential))
    torch.testing.assert_close(
        pareto_k(exponential.float()).double(), pareto_k(exponential), rtol=0, atol=1e-4
    )


def test_the_tail_of_odd_weights():
    assert bool(pareto_k(torch.randn(24, 2)).isnan().all())
    assert not bool(pareto_k(torch.randn(25, 2)).isnan().any())
    few = torch.full((100, 5), -math.inf).double()  # the last: no draw was possible
    few[:3, 0] = 0.0  # only three weights at all
    few[:, 1] = 0.0  # all equal
    few[:, 2] = torch.arange(100) * -1000.0  # a span that has no exponential
    few[:, 3] = math.nan
    k = pareto_k(few)
    assert float(k[0]) == math.inf
    assert float(k[1]) == 0.0
    assert float(k[2]) == math.inf
    assert bool(k[3].isnan())
    assert float(k[4]) == math.inf


def test_heavy_tails_are_warned_of_and_light_ones_are_not():
    model, x = linear_model(), images(4)
    guide = ExactGuide(model)
    assert bool((log_evidence(model, guide, x, 100, seed=0).pareto_k <= 0.7).all())
    narrow = gaussian(model)
    with torch.no_grad():
        narrow.head.bias[2:] = -8.0
    with pytest.warns(ParetoWarning, match=r"for [1-4] of 4 images: .*\(K = 200\)") as caught:
        result = log_evidence(model, narrow, x, 200, seed=0)
    assert f"for {int((result.pareto_k > 0.7).sum())} of 4 images" in str(caught[0].message)
    assert caught[0].filename == __file__  # the line of the caller


def test_posteriors_of_one_batch_refuse_another():
    model, x = linear_model(), images(5)
    q = PrecomputedPosterior(gaussian(model).posterior(x))
    assert log_weights(model, q, x, 2, chunk_size=5).shape == (2, 5)
    for wrong, chunk_size in ((x, 2), (x[:3], None)):
        with pytest.raises(ValueError, match=r"knows the posteriors of 5 images, and was asked"):
            log_weights(model, q, wrong, 2, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="asked for 3: pass fewer images at a time, or a larger"):
        q(x[:3])


def masked_out(x):
    with pyro.poutine.mask(mask=False):
        pyro.sample("y", dist.Normal(torch.zeros(len(x)).double(), 1.0), obs=x[:, 0, 0, 0])


def not_observed(x):
    normal = dist.Normal(torch.zeros(len(x)).double(), 1.0)
    pyro.sample("y", normal, obs=x[:, 0, 0, 0], obs_mask=torch.zeros(len(x), dtype=torch.bool))


def without_a_proposal(x):
    pyro.sample("u", dist.Normal(torch.zeros(len(x)).double(), 1.0))


class Also(nn.Module):
    """A model with more sites."""

    def __init__(self, model, sites):
        super().__init__()
        self.model, self.sites = model, sites

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.model.prior())
            pyro.sample("x", self.model.likelihood(z), obs=x)
            self.sites(x)


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("wrap", [lambda guide: guide, ReplayedGuide], ids=["posterior", "replay"])
@pytest.mark.parametrize("sites", [masked_out, not_observed, without_a_proposal])
def test_sites_that_say_nothing_weigh_nothing(sites, wrap):
    """What a mask hides, and what is drawn from its prior."""
    model, x = linear_model(), images(4)
    result = log_evidence(Also(model, sites), wrap(ExactGuide(model)), x, 30, seed=0)
    torch.testing.assert_close(result.log_evidence, exact_evidence(model, x))


def test_a_function_as_model_has_the_dtype_of_the_guide():
    model, x = linear_model(), images(4)
    found = log_weights(lambda x: model(x), gaussian(model), x, 3)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_draws_outside_the_support_of_the_prior_are_refused_in_every_chunk(chunk_size):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones(1)).to_event(1))
            mean = z[..., None, None] * torch.ones(1, 1, 1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x), 1), 2.0), 1.0).to_event(1))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"outside the support|Error while computing log_prob"):
        log_weights(model, guide, torch.zeros(1, 1, 1, 1), 100, chunk_size=chunk_size)


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 4}, {}])
def test_images_are_named_wherever_a_density_is_not_a_number(options):
    class Broken(GaussianGuide):
        def posterior(self, x):
            q = super().posterior(x)
            bad = x.flatten(1)[:, :1] == 1
            return dist.Normal(torch.where(bad, torch.nan, q.mean), q.stddev).to_event(1)

    model = linear_model().float()
    x = images(6).float().clamp(max=0.9)
    x[4, 0, 0, 0] = 1
    with pytest.raises(NonFiniteError, match="not finite for image 4") as caught:
        log_weights(model, Broken(model, linear_encoder()), x, 3, **options)
    assert caught.value.images == (4,)
