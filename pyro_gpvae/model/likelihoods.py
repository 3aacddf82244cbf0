r"""The density of Gaussian pixels, and the range of every scale parameter."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Independent, Normal
from torch import Size, Tensor

__all__ = ["LOG_SCALE_BOUND", "GaussianPixels", "bounded"]

#: Standard deviations lie between exp(-20) = 2e-9 and exp(20) = 5e8: see :func:`bounded`.
LOG_SCALE_BOUND = 20.0


def bounded(log_scale: Tensor) -> Tensor:
    r"""Returns the logarithm of a scale, clamped to ±20, so that its exponential is finite.

    :math:`\log \sigma`, :math:`\log s`, :math:`\log h`, the log standard deviations of W and U
    and the logits of gates are outputs of linear maps and optimisers, which have no bound. In
    float32, :math:`e^{2 \log s}` overflows from 44.4 on and underflows to zero from -52 on, where
    the gradient of :math:`z / s` is infinite. Within ±20, squares, inverse squares, and sums of
    them over a million pixels or latents are finite. The clamp is the identity inside the range,
    and its gradient is zero outside. Pixels and latents are of order one, so no posterior needs a
    scale outside the range.

    NaN stays NaN, so that later checks find it.

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

    The density takes three passes over the pixels and one temporary tensor of their size. The
    density of ``Normal`` takes about fifteen passes and ten temporary tensors, because it computes
    the logarithm and the square of σ for every pixel of every sample.

    Arguments:
        loc: The mean μ of the pixels, (..., C, H, W).
        scale: The standard deviation σ of each pixel, a scalar.

    Raises:
        ValueError: If scale is not a scalar, or a parameter is outside its range.

    Example:
        >>> pixels = GaussianPixels(torch.zeros(7, 5, 1, 28, 28), torch.tensor(0.3))
        >>> pixels.log_prob(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([7, 5])
    """

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if scale.dim() != 0:
            raise ValueError(f"scale must be a scalar, got the shape {tuple(scale.shape)}")
        validate = Normal._validate_args if validate_args is None else validate_args
        # one pass detects every NaN; a sum of infinities of both signs needs the full check
        if validate and not (bool(scale > 0) and math.isfinite(float(loc.detach().sum()))):
            Normal(loc, scale, validate_args=True)  # raises with torch's message, if at all
        base = Normal(loc, scale, validate_args=False)
        base._validate_args = validate
        super().__init__(base, 3)
        self._scale = scale

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: GaussianPixels | None = None,
    ) -> GaussianPixels:
        new = self._get_checked_instance(GaussianPixels, _instance)  # type: ignore[no-untyped-call]
        new._scale = self._scale
        super().expand(batch_shape, _instance=new)  # type: ignore[no-untyped-call]
        return new

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
