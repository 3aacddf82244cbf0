r"""HF: a full covariance from Householder reflections of the VAE's Gaussian."""

from __future__ import annotations

import warnings

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import ConditionalHouseholder
from torch import Tensor, nn

from guides._flows import FlowPosterior
from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import call_network

__all__ = ["HouseholderGuide"]


class HouseholderGuide(GaussianGuide):
    r"""A Gaussian rotated by T reflections that depend on the image.

    .. math::
        z_0 \sim N(m(x), \mathrm{diag}\, s(x)^2), \qquad
        z_t = z_{t-1} - 2 v_t \frac{v_t^\top z_{t-1}}{\|v_t\|^2}, \qquad
        v_1 = \mathrm{Linear}(\phi(x)), \quad v_{t+1} = \mathrm{Linear}(v_t)

    so that :math:`q(z|x) = N(z; Hm, H\, \mathrm{diag}(s^2)\, H^\top)` with the orthogonal
    matrix :math:`H = H_T \cdots H_1`; the log-determinant is 0. T = 0 is the VAE.

    Reflections cost O(T p²) for each image and O(T p) for each sample. A warm start copies the
    VAE's encoder, but the reflections start at random and also move its mean, so train some
    epochs before comparing.

    References:
        Tomczak and Welling, *Improving Variational Auto-Encoders using Householder Flow*, 2016.
        https://arxiv.org/abs/1611.09630

    Arguments:
        model, encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.
        num_reflections: The number T of reflections. Any orthogonal matrix is a product of p
            reflections, so that a larger number raises a warning.

    Raises:
        ValueError: If T is negative.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = HouseholderGuide(ImageModel((1, 28, 28), latent_dim=10), num_reflections=2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        num_reflections: int = 1,
        encoder: nn.Module | None = None,
        *,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(0, num_reflections=num_reflections)
        if num_reflections > model.latent_dim:
            warnings.warn(
                f"num_reflections = {num_reflections} is more than latent_dim = "
                f"{model.latent_dim}, which already gives every orthogonal matrix",
                stacklevel=2,
            )
        # the encoder is initialised first, so that under a seed it equals the VAE's
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_reflections = num_reflections
        self.flow: ConditionalHouseholder | None = None
        if num_reflections > 0:
            vectors = _Vectors(self.feature_dim, self.latent_dim, num_reflections)
            with warnings.catch_warnings():
                # Pyro warns as well if there are more reflections than dimensions
                warnings.filterwarnings("ignore", "Number of Householder transforms")
                self.flow = ConditionalHouseholder(self.latent_dim, vectors, num_reflections)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        if self.flow is None:
            return super().posterior(x)
        features, loc, log_scale = self.encode(x)
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        return FlowPosterior(base, [self.flow], features)


class _Vectors(nn.Module):
    """The vectors v₁ ... v_T of features (..., d): T tensors (..., p), or one tensor if T = 1."""

    def __init__(self, feature_dim: int, latent_dim: int, count: int) -> None:
        super().__init__()
        widths = [feature_dim] + [latent_dim] * count
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, ...]:
        vectors, v = [], features
        for layer in self.layers:
            v = call_network(layer, v)
            vectors.append(_nonzero(v))
        return tuple(vectors) if len(vectors) > 1 else vectors[0]


def _nonzero(v: Tensor) -> Tensor:
    """Returns v, or the first unit vector if v is zero, because Pyro divides by its norm.

    If the norm overflows, v is divided by its largest element.
    """
    first = torch.zeros_like(v)
    first[..., 0] = 1
    norm = v.norm(dim=-1, keepdim=True)
    v = torch.where(norm.isinf(), v / v.abs().amax(-1, keepdim=True).clamp(min=1), v)
    return torch.where(norm > torch.finfo(v.dtype).eps, v, first)
