"""What float32 costs, and what happens far beyond the range of ordinary runs."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.linalg import LinAlgError
from torch.overrides import TorchFunctionMode

from guides import GaussianGuide, LaplaceGuide, instance, laplace
from guides.householder import _nonzero
from guides.instance import InstanceGuide
from pyro_gpvae import (
    ImageModel,
    available_guides,
    fit,
    load_data,
    log_evidence,
    log_weights,
    make_guide,
)
from pyro_gpvae.evaluation.importance import ParetoWarning
from pyro_gpvae.model.curvature import inverse_cholesky
from pyro_gpvae.model.likelihoods import LOG_SCALE_BOUND, bounded
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.stratified import gaussian_mixture

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class SameNoise(TorchFunctionMode):
    """Draws random numbers in float64 and rounds them, so that both precisions get the same."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        match func.__name__:
            case "randn":
                shape = args if isinstance(args[0], int) else args[0]
                return self.normal(shape).to(kwargs["dtype"])
            case "randn_like":
                return self.normal(args[0].shape).to(args[0])
            case "normal":
                mean, deviation = args
                noise = self.normal(torch.broadcast_shapes(mean.shape, deviation.shape))
                return mean + deviation * noise.to(mean)
            case "normal_":
                return args[0].copy_(self.normal(args[0].shape))
            case "multinomial":
                mass, count = args[:2]
                uniform = torch.rand(
                    *mass.shape[:-1], count, generator=self.generator, dtype=torch.float64
                )
                below = mass.double().cumsum(-1)[..., :-1].contiguous()
                return torch.searchsorted(below, uniform)
            case "rand" | "rand_like" | "uniform_" | "exponential_" | "bernoulli":
                raise NotImplementedError(func.__name__)
        return func(*args, **kwargs)


@cache
def trained():
    """A VAE trained for seconds on digits, with the σ that longer training arrives at."""
    data = load_data("mnist5k")
    torch.manual_seed(0)
    model = ImageModel(data.image_shape, 10, sigma=0.12)
    vae = GaussianGuide(model)
    options = {"epochs": 6, "batch_size": 64, "learning_rate": 2e-3}
    fit(model, vae, data.train[:1000], progress=False, **options)
    return model, vae, data.test


PRECISE = [
    "vae",
    "gp",
    "gp:covariance=full",
    "gp:features=own",
    "full",
    "lowrank:3",
    "iaf:2",
    "hf:4",
    "me:3",
    "rme:3",
    "sa:2",
    "sa:2,natural=False,line_search=False,step_size=1e-4",
    "iterative:2",
    "vlae:0",
    "vlae:2",
    "vlae:2,step=damped",
    "instance:num_starts=1",
    "instance:full,num_starts=1",
]


def test_every_registered_guide_is_in_both_precisions():
    assert set(available_guides()) == {spec.partition(":")[0] for spec in PRECISE}


@pytest.fixture
def one_thread():
    """Sums in one order: several threads round differently."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("spec", PRECISE)
def test_float32_evidence_is_that_of_float64(spec, one_thread):
    # An image for which a line search has to choose between two steps that are equal to rounding
    # may take the other one, and so another proposal: one in 800 such choices, on digits.
    model, vae, digits = trained()
    x = digits[:2] if spec.startswith("instance") else digits[:10]
    assert 0.1 < float(model.log_sigma.detach().exp()) < 0.2
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    guide = make_guide(spec, model, **({} if "instance" in spec else {"warm_start": vae}))
    with torch.no_grad():  # away from initial values, where much is zero
        for parameter in guide.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter += 0.05 / math.sqrt(fan_in) * torch.randn_like(parameter)
    model64, guide64 = copy.deepcopy((model, guide))
    results = []
    for pair in ((model, guide), (model64.double(), guide64.double())):
        with SameNoise(0), warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)
            results.append(log_evidence(*pair, x, 100))
    single, double = results
    assert (single.log_evidence.dtype, double.log_evidence.dtype) == (torch.float32, torch.float64)
    for name in ("log_evidence", "elbo"):
        gap = (getattr(single, name).double() - getattr(double, name)).abs()
        assert 0 < float(gap.max()) < 1e-3


class TestCholesky:
    @staticmethod
    def matrices(condition, dtype, dim=10, count=8):
        """Symmetric positive definite in float64, with eigenvalues from 1 to the condition."""
        generator = torch.Generator().manual_seed(dim)
        normal = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
        Q = torch.linalg.qr(normal).Q
        values = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)
        matrix = (Q * values) @ Q.mT
        return ((matrix + matrix.mT) / 2).to(dtype)

    @BOTH
    @pytest.mark.parametrize("dim", [2, 10, 50])
    @pytest.mark.parametrize("condition", [1, 1e5, 1e10])
    def test_the_jitter_is_as_large_as_needed_and_told(self, condition, dim, dtype):
        precision = self.matrices(condition, dtype, dim)
        factor, jitter = inverse_cholesky(precision)
        assert factor.isfinite().all()
        assert jitter.shape == (8,)
        if dtype == torch.float64 or condition < 1e10:
            assert (jitter == 0).all()
        else:
            assert bool(((jitter == 0) | ((jitter >= 1e-8) & (jitter <= 1e-4))).all())
        # what is factorised is Λ with that jitter, to the precision of the arithmetic
        scale = precision.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(dim, dtype=torch.float64)
        jittered = precision.double() + (jitter * scale).double()[:, None, None] * eye
        whitened = factor.double().mT @ jittered @ factor.double()
        error = (whitened - eye).abs().amax((-2, -1))
        # Λ's own rounding, magnified by the condition number that the jitter leaves
        left = torch.linalg.cond(jittered).clamp(max=1e10)
        assert bool((error < 10 * dim * torch.finfo(dtype).eps * left).all())

    def test_float32_needs_jitter_at_1e10(self):
        _, jitter = inverse_cholesky(self.matrices(1e10, torch.float32, 50))
        assert (jitter > 0).any()

    @BOTH
    def test_an_image_that_cannot_be_helped_is_named(self, dtype):
        precision = self.matrices(10, dtype)
        precision[5, 0, 0] = math.nan
        with pytest.raises(LinAlgError, match="precision of image 5 is not finite"):
            inverse_cholesky(precision)
        precision[5] = -torch.eye(10)
        with pytest.raises(LinAlgError, match="precision of image 5 is singular"):
            inverse_cholesky(precision)

    def test_posteriors_tell_their_jitter(self, monkeypatch):
        model, x = toy(torch.float64), black_white_grey(torch.float64)
        guide = LaplaceGuide(model, 1, encoder()).double()
        q = guide.posterior(x)
        assert torch.equal(q.jitter, torch.zeros(3).double())
        assert q.expand((4, 3)).log_prob(q.sample((4,))).shape == (4, 3)
        assert torch.equal(InstanceGuide(model).optimise(x).jitter, torch.zeros(3).double())

        def singular(model, x, z):
            gradient, precision = true(model, x, z)
            return gradient, torch.where(torch.arange(3)[:, None, None] == 1, ones, precision)

        true, ones = laplace.linearize, torch.ones(P, P).double()
        monkeypatch.setattr(laplace, "linearize", singular)
        jitter = guide.posterior(x).jitter
        assert (jitter > 0).tolist() == [False, True, False]
        monkeypatch.setattr(
            instance,
            "linearize",
            lambda model, x, z: (true(model, x, z)[0], ones.expand(len(x), P, P)),
        )
        assert (InstanceGuide(model, num_starts=1).optimise(x).jitter > 0).all()


# ---------------------------------------------------------------- overflow

SHAPE, P = (1, 2, 3), 3

EXTREME = [
    "vae",
    "gp",
    "gp:covariance=full",
    "gp:estimator=weights",
    "gp:estimator=marginal",
    "full",
    "lowrank:2",
    "iaf:2",
    "hf:3",
    "me:2",
    "rme:3",
    "sa:2",
    "sa:2,natural=False,line_search=False",
    "iterative:2",
    "vlae:0",
    "vlae:2",
    "vlae:2,step=damped",
    "instance:max_steps=10",
    "instance:full,max_steps=10",
]


def toy(dtype, likelihood="gaussian"):
    torch.manual_seed(0)
    layers = [nn.Linear(P, 8), nn.ReLU(), nn.Linear(8, math.prod(SHAPE)), nn.Unflatten(1, SHAPE)]
    return ImageModel(SHAPE, P, nn.Sequential(*layers), likelihood=likelihood).to(dtype)


def encoder():
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5), nn.ReLU())


def black_white_grey(dtype):
    return torch.stack([torch.full(SHAPE, value, dtype=dtype) for value in (0.0, 1.0, 0.5)])


def scale_weights(model, guide, value):
    for parameter in guide.parameters():
        parameter.mul_(value)


def shift_log_scales(model, guide, value):
    for head in filter(None, [getattr(guide, "head", None), *getattr(guide, "heads", [])]):
        head.bias[P:] += value


def shift_means(model, guide, value):
    for head in filter(None, [getattr(guide, "head", None), *getattr(guide, "heads", [])]):
        head.bias[:P] += value


def set_log_sigma(model, guide, value):
    if model.log_sigma is not None:
        model.log_sigma.fill_(value)


def set_weight_deviations(model, guide, value):
    for name, parameter in guide.named_parameters():
        if name.endswith("log_scale"):
            parameter.fill_(value)


def set_mixture_logits(model, guide, value):
    for gate in getattr(guide, "gates", [])[:1]:
        gate.bias.fill_(value)


def scale_decoder(model, guide, value):
    for parameter in model.decoder.parameters():
        parameter.mul_(value)


def saturate_gates(model, guide, value):
    for step in getattr(guide, "steps", []):
        if hasattr(step, "nn"):
            last = step.nn.layers[-1]
            last.bias.view(2, P)[1].fill_(value)


CHANGES = {
    scale_weights: [0.0, 1e3, 1e6, 1e12, 1e20, 1e30],
    shift_log_scales: [-1e30, -1e4, 1e4, 1e30],
    shift_means: [-1e20, 1e4, 1e10, 1e30],
    set_log_sigma: [-1e30, -50.0, 50.0, 1e30],
    set_weight_deviations: [-50.0, 50.0, 1e30],
    set_mixture_logits: [-1e30, 1e30],
    scale_decoder: [0.0, 1e3, 1e6, 1e10, 1e20],
    saturate_gates: [-1e4, 1e4, -1e30, 1e30],
}


@pytest.mark.parametrize("spec", EXTREME)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
)
@given(data=st.data())
def test_extreme_parameters_give_finite_numbers_or_a_clear_error(spec, data):
    changes = data.draw(
        st.lists(
            st.sampled_from(list(CHANGES)).flatmap(
                lambda change: st.tuples(st.just(change), st.sampled_from(CHANGES[change]))
            ),
            min_size=1,
            max_size=2,
        )
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    likelihood = data.draw(st.sampled_from(["gaussian", "bernoulli"]))
    check_extreme(spec, changes, dtype, likelihood)


@pytest.mark.parametrize("spec", EXTREME)
def test_the_extremes_that_were_named(spec):
    for change, values in CHANGES.items():
        for value in (values[0], values[-1]):
            check_extreme(spec, [(change, value)], torch.float32, "gaussian")


def check_extreme(spec, changes, dtype, likelihood):
    model = toy(dtype, likelihood)
    torch.manual_seed(1)
    guide = make_guide(spec, model, **({} if "instance" in spec else {"encoder": encoder()}))
    guide.to(dtype)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for change, value in changes:
            change(model, guide, value)
    finite = all(bool(p.isfinite().all()) for p in guide.parameters())
    x = black_white_grey(dtype)
    x = x.round() if likelihood == "bernoulli" else x

    weights = outcome(lambda: log_weights(model, guide, x, 4))
    # -inf is a draw that the model takes for impossible
    assert weights is None or (finite and bool((weights < math.inf).all()))

    with torch.no_grad():
        z = outcome(lambda: guide.posterior(x).sample((4,)))
    assert z is None or z.isfinite().all()

    if not spec.startswith("instance"):
        images = (255 * x).round().to(torch.uint8)
        options = {"epochs": 1, "batch_size": 2, "progress": False}
        history = outcome(lambda: fit(model, guide, images, **options))
        assert history is None or math.isfinite(history.rows[0]["loss"])
        assert history is None or all(bool(p.isfinite().all()) for p in guide.parameters())


def outcome(function):
    """What a function returns; None if it raises an error of ours that names what is wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*images are not within")  # the instance-wise optimum
        warnings.filterwarnings("ignore", "Encountered .*inf")  # Pyro, before our error
        try:
            return function()
        except (ArithmeticError, LinAlgError) as error:
            found = error
    text = str(found)
    assert isinstance(found, ArithmeticError) or "precision of image" in text, text
    assert "not finite" in text or "singular" in text
    assert "image" in text
    return None


class TestBounds:
    def test_the_clamp_does_nothing_in_ordinary_runs(self):
        values = torch.linspace(-LOG_SCALE_BOUND, LOG_SCALE_BOUND, 1001)[1:-1].requires_grad_()
        assert torch.equal(bounded(values), values)
        (gradient,) = torch.autograd.grad(bounded(values).sum(), values)
        assert torch.equal(gradient, torch.ones(999))

    @BOTH
    def test_squares_and_their_inverses_have_room(self, dtype):
        ends = bounded(torch.tensor([-1e30, 1e30], dtype=dtype))
        for power in (-2, 2):
            assert (1e6 * (power * ends).exp()).isfinite().all()

    @BOTH
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        loc=st.floats(-1e4, 1e4),
        spread=st.floats(0, 1e10),
        log_scale=st.floats(-1e30, 1e30),
        log_spread=st.floats(0, 1e10),
    )
    def test_the_marginal_posterior(self, dtype, loc, spread, log_scale, log_spread):
        values = (loc, spread, log_scale, log_spread)
        q = MarginalPosterior(*(torch.full((3,), value, dtype=dtype) for value in values))
        torch.manual_seed(0)
        z = q.sample((20,))
        assert z.isfinite().all()
        assert q.log_prob(z).isfinite().all()
        assert q.variance.isfinite().all()

    @BOTH
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        logits=st.lists(st.sampled_from([-1e30, -50.0, 0.0, 50.0, 1e30]), min_size=1, max_size=4)
    )
    def test_mixture_weights(self, dtype, logits):
        logits = torch.tensor(logits, dtype=dtype)
        loc = torch.arange(len(logits), dtype=dtype)[:, None]
        q = gaussian_mixture(logits, loc, torch.ones_like(loc))
        share = q.mixture_distribution.probs
        torch.testing.assert_close(share, logits.double().softmax(-1).to(dtype))
        torch.testing.assert_close(share.sum(), torch.ones((), dtype=dtype))
        torch.manual_seed(0)
        assert q.log_prob(q.sample((20,))).isfinite().all()

    @BOTH
    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 1e10, 1e25, 1e35])
    def test_reflections(self, dtype, size):
        v = torch.tensor([[3.0, -4.0, 0.0]], dtype=dtype) * size
        u = _nonzero(v)
        norm = u.norm(dim=-1, keepdim=True)
        assert bool(((norm > 0) & norm.isfinite()).all())
        if size >= 1e-3:
            torch.testing.assert_close(u / norm, torch.tensor([[0.6, -0.8, 0.0]], dtype=dtype))

    @BOTH
    def test_a_low_rank_factor_that_drowns_the_diagonal(self, dtype):
        guide = make_guide("lowrank:2", toy(dtype), encoder=encoder()).to(dtype)
        x = black_white_grey(dtype)
        with torch.no_grad():
            before = guide.posterior(x).cov_diag
            torch.testing.assert_close(before, guide.encode(x)[2].exp().square(), rtol=0, atol=0)
            guide.factor.weight.mul_(1e8)
            guide.factor.bias.mul_(1e8)
            q = guide.posterior(x)
            torch.manual_seed(0)
            assert q.log_prob(q.sample((20,))).isfinite().all()
            # wider than it was, and by little of the factor's own variance
            assert (q.cov_diag > before).all()
            assert (q.cov_diag.sum(-1) < 0.01 * q.variance.sum(-1)).all()
