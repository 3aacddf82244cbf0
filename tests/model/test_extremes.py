"""Parameters far beyond the range of ordinary runs give finite numbers or a clear error."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.linalg import LinAlgError

from guides.householder import _nonzero
from pyro_gpvae import (
    ImageModel,
    fit,
    log_weights,
    make_guide,
)
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.stratified import gaussian_mixture

pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

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
