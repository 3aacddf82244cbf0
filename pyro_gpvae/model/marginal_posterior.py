r"""The marginal posterior q(z|x) of a random encoder, eq. (7) of the supplement."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model.likelihoods import bounded

__all__ = ["MarginalPosterior"]

# the largest number of quadrature nodes × latents in one step, which fits in the cache
_MAX_NODES = 1 << 17


class MarginalPosterior(TorchDistribution):
    r"""The distribution of one latent z when f and log h are Gaussian: eq. (7) of the supplement.

    .. math::
        f \sim N(a, v), \qquad \log h \sim N(b, r), \qquad z \sim N(f, h^2)
        \qquad\Rightarrow\qquad
        q(z) = \int N(z; a, v + e^{2\ell})\, N(\ell; b, r)\, d\ell .

    The density is computed by the trapezoidal rule over :math:`\ell` (Trefethen and Weideman,
    2014): a mixture of normals, which is within 1e-6 nats of the integral with 32 nodes, for
    :math:`\sqrt r \le 0.5` and z within five standard deviations. Samples are scored in parts, so
    that the memory does not grow with their number. :math:`v = r = 0` gives :math:`N(a, e^{2b})`,
    and :math:`\log h` is :func:`~pyro_gpvae.model.likelihoods.bounded`.

    Arguments:
        loc: The mean a of f.
        loc_scale: The standard deviation :math:`\sqrt v` of f.
        log_scale: The mean b of log h.
        log_scale_scale: The standard deviation :math:`\sqrt r` of log h.
        num_nodes: The number of quadrature nodes.

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
        check_at_least(1, num_nodes=num_nodes)
        self.loc, self.loc_scale, self.log_scale, self.log_scale_scale = broadcast_all(
            loc, loc_scale, log_scale, log_scale_scale
        )
        self.num_nodes = num_nodes
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        r = self.log_scale_scale.square()
        return self.loc_scale.square() + (2 * bounded(self.log_scale + r)).exp()

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        # draw the noise of z first: with v = r = 0, a seed then gives the sample of N(a, e^{2b})
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        log_h = self.log_scale + self.log_scale_scale * torch.randn_like(noise)
        # z | h ~ N(a, v + h²)
        return self.loc + torch.hypot(self.loc_scale, bounded(log_h).exp()) * noise

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # these depend on the node but not on the sample: ℓ, its variance and its normaliser
        loc, shape = self.loc, (-1, 1) + (1,) * self.loc.dim()  # nodes, samples, latents
        nodes, log_weights = (t.reshape(shape) for t in _trapezoidal(self.num_nodes, loc))
        ell = bounded(torch.addcmul(self.log_scale, self.log_scale_scale, nodes))
        variance = (2 * ell).exp() + self.loc_scale.square()
        log_mass = torch.add(log_weights, variance.log(), alpha=-0.5)
        precision = variance.reciprocal()

        square = (value - loc).square()
        if not square.numel():
            return square
        samples = square.reshape(-1, *square.shape[square.dim() - loc.dim() :])
        step = max(1, _MAX_NODES // max(1, self.num_nodes * samples[0].numel()))
        parts = [_mix(log_mass, precision, part) for part in samples.split(step)]
        return torch.cat(parts).reshape(square.shape) - 0.5 * math.log(2 * math.pi)


def _mix(log_mass: Tensor, precision: Tensor, square: Tensor) -> Tensor:
    """Returns log Σ exp(log mass - precision square / 2), summed over the nodes in dimension 0."""
    exponent = torch.addcmul(log_mass, precision, square, value=-0.5)
    top = exponent.detach().amax(0)
    shift = top.clamp(min=torch.finfo(top.dtype).min)  # -∞ - -∞ would be NaN
    # in float32, exp of less than -87 is a denormal number, which is a hundred times slower;
    # below -80 a term is negligible compared with the largest one
    return exponent.sub_(shift).clamp_min_(-80).exp_().sum(0).log() + top


def _trapezoidal(num_nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns nodes t and log weights with Σ w g(t) ≈ E[g(t)], t ~ N(0, 1)."""
    # with this distance, the truncation error and the discretisation error are about equal
    distance = math.sqrt(2 * math.pi / num_nodes)
    numbers = torch.arange(num_nodes, dtype=like.dtype, device=like.device)
    nodes = distance * (numbers - (num_nodes - 1) / 2)
    return nodes, (-0.5 * nodes.square()).log_softmax(0)
