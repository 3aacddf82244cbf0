"""Evidence in float32 is that of float64; extreme parameters give numbers or a clear error."""

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

from guides import GaussianGuide
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
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.stratified import gaussian_mixture
from pyro_gpvae.testing._noise import ConstantNoise

pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SHAPE, P = (1, 2, 3), 3
COMMON = [
    *("vae", "gp", "gp:covariance=full", "full", "lowrank:2", "iaf:2", "hf:3", "me:2", "rme:3"),
    *("sa:2", "iterative:2", "vlae:0", "vlae:2", "newton:1", "vlae:2,step=damped"),
]
PRECISE = [
    *(*COMMON, "gp:features=own", "sa:2,natural=False,line_search=False,step_size=1e-4"),
    *("instance:num_starts=1", "instance:full,num_starts=1"),
]
EXTREME = [
    *(*COMMON, "gp:estimator=weights", "gp:estimator=marginal", "sa:2,line_search=False"),
    *(
        "sa:2,natural=False,line_search=False",
        "instance:max_steps=10",
        "instance:full,max_steps=10",
    ),
]


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


@pytest.fixture
def one_thread():
    """Sums in one order: several threads round differently."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_every_registered_guide_is_here():
    assert set(available_guides()) == {spec.partition(":")[0] for spec in PRECISE}


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
        with ConstantNoise(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)
            results.append(log_evidence(*pair, x, 100))
    single, double = results
    assert (single.log_evidence.dtype, double.log_evidence.dtype) == (torch.float32, torch.float64)
    for name in ("log_evidence", "elbo"):
        gap = (getattr(single, name).double() - getattr(double, name)).abs()
        assert 0 < float(gap.max()) < 1e-3


def toy(dtype, likelihood="gaussian"):
    torch.manual_seed(0)
    layers = [nn.Linear(P, 8), nn.ReLU(), nn.Linear(8, math.prod(SHAPE)), nn.Unflatten(1, SHAPE)]
    return ImageModel(SHAPE, P, nn.Sequential(*layers), likelihood=likelihood).to(dtype)


def encoder():
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5), nn.ReLU())


def black_white_grey(dtype):
    return torch.stack([torch.full(SHAPE, value, dtype=dtype) for value in (0.0, 1.0, 0.5)])


def parts(model, guide):
    """Parameters by what they are."""
    heads = [h for h in (getattr(guide, "head", None), *getattr(guide, "heads", [])) if h]
    steps = [step for step in getattr(guide, "steps", []) if hasattr(step, "nn")]
    return {
        "guide": list(guide.parameters()),
        "decoder": list(model.decoder.parameters()),
        "log scales": [head.bias[P:] for head in heads],
        "means": [head.bias[:P] for head in heads],
        "log sigma": [] if model.log_sigma is None else [model.log_sigma],
        "deviations": [p for n, p in guide.named_parameters() if n.endswith("log_scale")],
        "logits": [gate.bias for gate in getattr(guide, "gates", [])[:1]],
        "gates of flows": [step.nn.layers[-1].bias.view(2, P)[1] for step in steps],
    }


#: Which parameters are multiplied by a value, added to it, or set to it.
CHANGES = [
    *[("guide", "mul_", value) for value in (0.0, 1e6, 1e30)],
    *[("decoder", "mul_", value) for value in (0.0, 1e20)],
    *[("log scales", "add_", value) for value in (-1e30, 1e4, 1e30)],
    *[("means", "add_", value) for value in (-1e20, 1e30)],
    *[("log sigma", "fill_", value) for value in (-1e30, 1e30)],
    *[("deviations", "fill_", value) for value in (-50.0, 1e30)],
    *[("logits", "fill_", value) for value in (-1e30, 1e30)],
    *[("gates of flows", "fill_", value) for value in (-1e4, 1e30)],
]


@pytest.mark.filterwarnings("ignore:.* gives other numbers, or fails:UserWarning")  # rounding
@pytest.mark.parametrize("spec", EXTREME)
def test_extreme_parameters_give_finite_numbers_or_a_clear_error(spec):
    for number, change in enumerate(CHANGES):
        check_extreme(spec, [change], torch.float32, "gaussian")
        if number % 3 == 0:  # two changes at once
            pair = [change, CHANGES[(5 * number + 4) % len(CHANGES)]]
            check_extreme(spec, pair, torch.float64, "bernoulli")


def check_extreme(spec, changes, dtype, likelihood):
    model = toy(dtype, likelihood)
    torch.manual_seed(1)
    guide = make_guide(spec, model, **({} if "instance" in spec else {"encoder": encoder()}))
    guide.to(dtype)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, operation, value in changes:
            for tensor in parts(model, guide)[name]:
                getattr(tensor, operation)(value)
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
            text = str(error)
    assert "not finite" in text or "singular" in text
    assert "image" in text
    return None


@BOTH
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    loc=st.floats(-1e4, 1e4),
    spread=st.floats(0, 1e10),
    log_scale=st.floats(-1e30, 1e30),
    log_spread=st.floats(0, 1e10),
)
def test_the_marginal_posterior_is_finite(dtype, loc, spread, log_scale, log_spread):
    values = (loc, spread, log_scale, log_spread)
    q = MarginalPosterior(*(torch.full((3,), value, dtype=dtype) for value in values))
    torch.manual_seed(0)
    z = q.sample((20,))
    assert z.isfinite().all()
    assert q.log_prob(z).isfinite().all()
    assert q.variance.isfinite().all()


@BOTH
@pytest.mark.parametrize("logits", [[-1e30], [-1e30, 1e30], [1e30, 1e30, 0.0], [-50.0, 50.0, 50.0]])
def test_mixture_weights_of_extreme_logits(dtype, logits):
    logits = torch.tensor(logits, dtype=dtype)
    loc = torch.arange(len(logits), dtype=dtype)[:, None]
    q = gaussian_mixture(logits, loc, torch.ones_like(loc))
    share = q.mixture_distribution.probs
    torch.testing.assert_close(share, logits.double().softmax(-1).to(dtype))
    torch.manual_seed(0)
    assert q.log_prob(q.sample((20,))).isfinite().all()


@BOTH
@torch.no_grad()
def test_a_low_rank_factor_that_drowns_the_diagonal(dtype):
    guide = make_guide("lowrank:2", toy(dtype), encoder=encoder()).to(dtype)
    x = black_white_grey(dtype)
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
