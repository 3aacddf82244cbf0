r"""The density of Gaussian pixels, and the range of every scale parameter."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Tensor

__all__ = ["LOG_SCALE_BOUND", "GaussianPixels", "bounded"]

LOG_SCALE_BOUND = 20.0


def bounded(log_scale: Tensor) -> Tensor:
    r"""Returns the logarithm of a scale, clamped to ±20; NaN stays NaN.

    In float32, :math:`e^{2 \log s}` overflows from 44.4 on and underflows to zero from -52 on.
    Within ±20, squares, inverse squares, and sums of them over a million pixels are finite.

    Example:
        >>> bounded(torch.tensor([-1e30, -2.5, 50.0, math.nan]))
        tensor([-20.0000,  -2.5000,  20.0000,      nan])
    """
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)


class GaussianPixels(Independent):
    r"""Independent normal pixels with one standard deviation: ``Normal(loc, scale).to_event(3)``.

    .. math::
        \log p(x) = -\frac{1}{2 \sigma^2} \sum_d (x_d - \mu_d)^2
        - D \log \sigma - \frac{D}{2} \log 2\pi

    The density takes three passes over the pixels, where that of ``Normal`` takes about fifteen.

    Arguments:
        loc: The mean μ of the pixels, (..., C, H, W).
        scale: The standard deviation σ of each pixel, a scalar.

    Example:
        >>> pixels = GaussianPixels(torch.zeros(7, 5, 1, 28, 28), torch.tensor(0.3))
        >>> pixels.log_prob(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([7, 5])
    """

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if scale.dim() != 0:
            raise ValueError(f"scale must be a scalar, got the shape {tuple(scale.shape)}")
        super().__init__(Normal(loc, scale, validate_args=validate_args), 3, validate_args)
        self._scale = scale

    expand = TorchDistribution.expand

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self.base_dist._validate_sample(value)
        residual = value - self.base_dist.loc
        # in place saves memory traffic, but a gradient needs the residual again
        square = residual.square() if torch.is_grad_enabled() else residual.mul_(residual)
        total = square.sum((-3, -2, -1))
        count = math.prod(self.event_shape)
        log_normalizer = count * (self._scale.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * total / self._scale.square() - log_normalizer
