"""Gaussian pixels are independent normals, and scales are bounded."""

import math

import pytest
import torch
from pyro import distributions as dist

from pyro_gpvae.model.likelihoods import GaussianPixels, bounded


def pixels_of(*batch, seed=0):
    torch.manual_seed(seed)
    loc = torch.randn(*batch, 2, 3, 4).double().requires_grad_()
    return loc, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def test_pixels_are_independent_normals():
    loc, scale = pixels_of(7, 5)
    pixels, normal = GaussianPixels(loc, scale), dist.Normal(loc, scale).to_event(3)
    x = torch.rand(5, 2, 3, 4).double()
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(pixels.log_prob(x), normal.log_prob(x), **exact)
    with torch.no_grad():  # where it is computed in place
        before = x.clone(), loc.clone()
        torch.testing.assert_close(pixels.log_prob(x), normal.log_prob(x), **exact)
        assert torch.equal(x, before[0])
        assert torch.equal(loc, before[1])
    assert (pixels.batch_shape, pixels.event_shape) == (normal.batch_shape, normal.event_shape)
    assert torch.equal(pixels.mean, normal.mean)
    torch.testing.assert_close(pixels.entropy(), normal.entropy())
    assert isinstance(pixels.base_dist, dist.Normal)
    for p, q in ((pixels, normal), (pixels.expand((6, 7, 5)), normal.expand((6, 7, 5)))):
        torch.testing.assert_close(p.log_prob(x), q.log_prob(x), **exact)
        torch.manual_seed(1)
        sample = p.sample((2,))
        torch.manual_seed(1)
        assert torch.equal(sample, q.sample((2,)))
    gradients = [torch.autograd.grad(p.log_prob(x).sum(), (loc, scale)) for p in (pixels, normal)]
    torch.testing.assert_close(*gradients, **exact)
    assert torch.autograd.gradgradcheck(
        lambda loc, scale: GaussianPixels(loc, scale).log_prob(x[:1]), (loc[:1, :1], scale)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loc, scale, x: (loc * math.nan, scale, x), "Expected parameter loc"),
        (lambda loc, scale, x: (loc, -scale, x), "Expected parameter scale"),
        (lambda loc, scale, x: (loc, scale.expand(3), x), r"scale must be a scalar, got .*\(3,\)"),
        (lambda loc, scale, x: (loc, scale, x * math.nan), "within the support"),
    ],
)
def test_bad_pixels(change, message):
    loc, scale = pixels_of(5)
    loc, scale, x = change(loc, scale, torch.rand(5, 2, 3, 4).double())
    with pytest.raises(ValueError, match=message):
        GaussianPixels(loc, scale, validate_args=True).log_prob(x)


def test_overflown_pixels_are_impossible_not_an_error():
    loc, scale = pixels_of(2)
    loc = loc.detach().index_fill(0, torch.tensor(1), math.inf)
    loc[1, 0] = -math.inf  # whose sum is not a number
    found = GaussianPixels(loc, scale, validate_args=True).log_prob(torch.zeros(2, 2, 3, 4))
    assert found[0].isfinite()
    assert found[1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_of_bounded_scales_and_their_inverses_are_finite(dtype):
    ends = bounded(torch.tensor([-1e30, 1e30], dtype=dtype))
    for power in (-2, 2):
        assert (1e6 * (power * ends).exp()).isfinite().all()
