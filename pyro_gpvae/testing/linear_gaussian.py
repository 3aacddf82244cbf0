r"""A model about which everything is known, to hold guides and evaluators against."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import ImageShape

__all__ = ["LinearGaussian", "linear_gaussian"]


class LinearGaussian(ImageModel):
    r"""A model about which everything is known: :math:`x = A z + b + \sigma \varepsilon`.

    .. math::
        p(x) = N(b, A A^\top + \sigma^2 I), \qquad
        p(z|x) = N(\Lambda^{-1} A^\top (x - b) / \sigma^2, \Lambda^{-1}), \quad
        \Lambda = I + A^\top A / \sigma^2

    See :func:`linear_gaussian`, which builds one.
    """

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact p(z|x): batch shape (B,), event shape (p,)."""
        loadings, bias, sigma = self._linear()
        eye = torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        precision = eye + loadings.mT @ loadings / sigma.square()
        right = (x.flatten(1) - bias) @ loadings / sigma.square()
        loc = torch.linalg.solve(precision, right.mT).mT
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats: (B,)."""
        loadings, bias, sigma = self._linear()
        marginal = LowRankMultivariateNormal(bias, loadings, sigma.square().expand_as(bias))
        log_p: Tensor = marginal.log_prob(x.flatten(1))
        return log_p

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Draws from the model, clipped to [0, 1]: (count, C, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        loadings, bias, sigma = self._linear()
        z = torch.randn(count, self.latent_dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, len(bias), generator=generator, dtype=torch.float64)
        x = z.to(bias) @ loadings.mT + bias + sigma * noise.to(bias)
        return x.clamp(0, 1).detach().reshape(-1, *self.image_shape)

    def _linear(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.log_sigma is not None
        layer: Any = next(self.decoder.children())
        return layer.weight, layer.bias, self.log_sigma.exp()


def linear_gaussian(
    image_shape: ImageShape,
    latent_dim: int,
    seed: int = 0,
    *,
    signal: float = 3.0,
    sigma: float = 0.1,
) -> LinearGaussian:
    r"""Builds a linear-Gaussian model, whose posterior and evidence are known in closed form.

    Arguments:
        image_shape: The shape (C, H, W) of an image.
        latent_dim: The dimension p of z.
        seed: Of the loadings A.
        signal: The expected diagonal of :math:`A^\top A / \sigma^2`; the posterior variance of
            each dimension is about 1 / (1 + signal).
        sigma: The standard deviation of the pixels' noise.
    """
    pixels = math.prod(image_shape)
    layer = nn.utils.skip_init(nn.Linear, latent_dim, pixels)
    generator = torch.Generator().manual_seed(seed)
    scale = sigma * math.sqrt(signal / pixels)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(pixels, latent_dim, generator=generator))
        layer.bias.fill_(0.5)
    decoder = nn.Sequential(layer, nn.Unflatten(1, tuple(image_shape)))
    return LinearGaussian(image_shape, latent_dim, decoder, sigma=sigma)
