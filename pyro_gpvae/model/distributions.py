r"""The density of an image, the marginal posterior of eq. (7), and the range of scales."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Independent, Normal, TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

__all__ = ["LOG_SCALE_BOUND", "GaussianPixels", "MarginalPosterior", "bounded"]

#: Standard deviations lie between exp(-20) = 2e-9 and exp(20) = 5e8: see :func:`bounded`.
LOG_SCALE_BOUND = 20.0


def bounded(log_scale: Tensor) -> Tensor:
    r"""Returns the logarithm of a scale, clamped to ±20, before anything exponentiates it.

    :math:`\log \sigma`, :math:`\log s`, :math:`\log h`, the log standard deviations of W and U,
    and the logits of gates come out of linear maps and optimisers, which know no limit; in
    float32 :math:`e^{2 \log s}` overflows from 44.4 on, and is zero, with infinite gradients of
    :math:`z / s`, from -52. Within ±20 squares, inverse squares, and their sums over a million
    pixels or latents are finite. A clamp is the identity where it does nothing, so ordinary
    results do not change; where it holds its gradient is zero. Pixels and latents are of order
    one, so that a posterior which needs a scale beyond the bound does not exist.

    Not a number stays what it is, for whoever checks.

    Example:
        >>> bounded(torch.tensor([-1e30, -2.5, 50.0, math.nan]))
        tensor([-20.0000,  -2.5000,  20.0000,      nan])
    """
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)


class GaussianPixels(Independent):
    r"""Independent normal pixels of one standard deviation: ``Normal(loc, scale).to_event(3)``.

    .. math::
        \log p(x) = -\frac{1}{2 \sigma^2} \sum_d (x_d - \mu_d)^2
        - D \log \sigma - \frac{D}{2} \log 2\pi

    The same distribution, whose density takes three passes over the pixels and one temporary of
    their size, in place of about fifteen and ten: ``Normal`` takes the logarithm and the square of
    σ again for every pixel of every sample.

    Arguments:
        loc: The mean μ of the pixels, (..., C, H, W).
        scale: The standard deviation σ of each of them, a scalar.

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
        # one pass finds out that nothing is NaN; infinities of both signs need a closer look
        if validate and not (bool(scale > 0) and math.isfinite(float(loc.detach().sum()))):
            Normal(loc, scale, validate_args=True)  # says what is wrong, if anything is
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
        # in place, it stays in the cache; where there is a gradient it is needed again
        square = residual.square() if torch.is_grad_enabled() else residual.mul_(residual)
        total = square.sum((-3, -2, -1))
        count = math.prod(self.event_shape)
        log_normalizer = count * (self._scale.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * total / self._scale.square() - log_normalizer


# quadrature nodes times latents at once, unless a single sample has more: a cache full
_MAX_NODES = 1 << 17


class MarginalPosterior(TorchDistribution):
    r"""Distribution of z when f and log h are Gaussian: eq. (7), one latent dimension.

    .. math::
        f \sim N(a, v), \qquad \log h \sim N(b, r), \qquad z \sim N(f, h^2)
        \qquad\Rightarrow\qquad
        q(z) = \int N(z; a, v + e^{2\ell})\, N(\ell; b, r)\, d\ell .

    Samples are exact. The density is the trapezoidal rule over :math:`\ell`, a finite mixture of
    normals, hence normalised for any number of nodes. With the default 32 nodes it is within 1e-6
    nats of the integral for :math:`\sqrt r \le 0.5` and z within five standard deviations, where
    Gauss-Hermite quadrature needs 42 (farther out, 48 of those are better); 24 are enough for
    :math:`\sqrt r \le 0.2`. The Gaussian with the same mean and variance is wrong by nats in 50
    dimensions for :math:`\sqrt r = 0.5`.
    Samples are scored a few at a time: the memory is that of nodes × latents, however many
    samples there are.

    Parameters are given as standard deviations, because :math:`v = r = 0` is allowed, and gives
    :math:`N(a, e^{2b})`. In samples, nodes and variance :math:`\log h` is :func:`bounded`.

    References:
        Trefethen and Weideman, *The Exponentially Convergent Trapezoidal Rule*, 2014.

    Arguments:
        loc: The mean a of f.
        loc_scale: The standard deviation :math:`\sqrt v` of f.
        log_scale: The mean b of log h.
        log_scale_scale: The standard deviation :math:`\sqrt r` of log h.
        num_nodes: The number of quadrature nodes; how many are needed, see above.

    Raises:
        ValueError: If a standard deviation is negative, or num_nodes is less than 1.

    Example:
        >>> q = MarginalPosterior(torch.zeros(5, 2), 0.1, -1.0, 0.3).to_event(1)
        >>> q.batch_shape, q.event_shape, q.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([5]), torch.Size([2]), torch.Size([5]))
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real,
        "loc_scale": constraints.nonnegative,
        "log_scale": constraints.real,
        "log_scale_scale": constraints.nonnegative,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        loc_scale: Tensor | float,
        log_scale: Tensor | float,
        log_scale_scale: Tensor | float,
        num_nodes: int = 32,
        validate_args: bool | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
        self.loc, self.loc_scale, self.log_scale, self.log_scale_scale = broadcast_all(
            loc, loc_scale, log_scale, log_scale_scale
        )
        self.num_nodes = num_nodes
        self._unexpanded = tuple(getattr(self, name) for name in self.arg_constraints)
        validate = self._validate_args if validate_args is None else validate_args
        if validate and self._is_valid():
            super().__init__(self.loc.shape, validate_args=False)
            if validate_args is None:
                del self._validate_args  # of the class again
            else:
                self._validate_args = validate_args
        else:  # torch says what is wrong, if anything is
            super().__init__(self.loc.shape, validate_args=validate_args)

    def _is_valid(self) -> bool:
        """Whether no parameter is NaN and no standard deviation negative, by one look at all of
        them; rather no than yes."""
        total = self.loc + self.loc_scale + self.log_scale + self.log_scale_scale
        least = torch.minimum(self.loc_scale, self.log_scale_scale)
        return bool(torch._is_all_true((total - total == 0) & (least >= 0)))

    def expand(
        self,
        batch_shape: Size | list[int] | tuple[int, ...],
        _instance: MarginalPosterior | None = None,
    ) -> MarginalPosterior:
        new = self._get_checked_instance(MarginalPosterior, _instance)  # type: ignore[no-untyped-call]
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        new.num_nodes, new._unexpanded = self.num_nodes, self._unexpanded
        super(MarginalPosterior, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """E[z] = a."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Var[z] = v + exp(2b + 2r)."""
        r = self.log_scale_scale.square()
        return self.loc_scale.square() + (2 * bounded(self.log_scale + r)).exp()

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # the noise of z first: with v = r = 0 a seed then gives what N(a, e^{2b}) gives
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        log_h = self.log_scale + self.log_scale_scale * torch.randn_like(noise)
        # z | h ~ N(a, v + h²)
        return self.loc + torch.hypot(self.loc_scale, bounded(log_h).exp()) * noise

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # what depends on the node but not on the sample: ℓ, its variance and its normaliser
        loc, loc_scale, log_scale, log_scale_scale = self._unexpanded
        shape = (-1, 1) + (1,) * loc.dim()  # nodes, samples, latents
        nodes, log_weights = (t.reshape(shape) for t in _trapezoidal(self.num_nodes, loc))
        ell = bounded(torch.addcmul(log_scale, log_scale_scale, nodes))
        variance = (2 * ell).exp() + loc_scale.square()
        log_mass = torch.add(log_weights, variance.log(), alpha=-0.5)
        precision = variance.reciprocal()

        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        square = (value - loc).square()
        if not square.numel():
            return square
        samples = square.reshape(-1, *square.shape[square.dim() - loc.dim() :])
        step = max(1, _MAX_NODES // max(1, self.num_nodes * samples[0].numel()))
        parts = [_mix(log_mass, precision, part) for part in samples.split(step)]
        return torch.cat(parts).reshape(square.shape) - 0.5 * math.log(2 * math.pi)


def _mix(log_mass: Tensor, precision: Tensor, square: Tensor) -> Tensor:
    """log Σ exp(log mass - precision square / 2) over nodes, the first dimension."""
    exponent = torch.addcmul(log_mass, precision, square, value=-0.5)
    top = exponent.detach().amax(0)
    shift = top.clamp(min=torch.finfo(top.dtype).min)  # -∞ - -∞ would be NaN
    # exp of less than -87 is a denormal in float32, which costs a hundred times as much, and less
    # than -80 is nothing beside the largest term
    return exponent.sub_(shift).clamp_min_(-80).exp_().sum(0).log() + top


def _trapezoidal(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and log weights with Σ w g(t) ≈ E[g(t)], t ~ N(0, 1), computed on the device.

    At this distance of the nodes, what is cut off and what is left out between them are about
    equally small.
    """
    distance = math.sqrt(2 * math.pi / num_nodes)
    numbers = torch.arange(num_nodes, dtype=like.dtype, device=like.device)
    nodes = distance * (numbers - (num_nodes - 1) / 2)
    return nodes, (-0.5 * nodes.square()).log_softmax(0)
