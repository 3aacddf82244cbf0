"""A linear-Gaussian model, small enough that everything about it is known exactly."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_gpvae import Checkpoints, ImageModel

SHAPE = (1, 2, 3)


def linear_model(latent_dim: int = 2, seed: int = 0, sigma: float = 0.3) -> ImageModel:
    """x = A z + c + noise, in float64."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(latent_dim, math.prod(SHAPE)), nn.Unflatten(1, SHAPE))
    return ImageModel(SHAPE, latent_dim, decoder, sigma=sigma).double()


def linear_encoder(num_features: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), num_features), nn.Tanh())


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)


def uint8(count: int) -> Tensor:
    return (images(count) * 255).to(torch.uint8)


class Kill(BaseException):
    """The process ends."""


class Dying(Checkpoints):
    """Checkpoints whose process ends right after the one of a step."""

    def __init__(self, folder, dies_after=4, every=1):
        super().__init__(folder, every)
        self.dies_after = dies_after

    def save(self, checkpoint):
        super().save(checkpoint)
        if checkpoint.step == self.dies_after:
            raise Kill


def exact_posterior(model: ImageModel, x: Tensor) -> dist.MultivariateNormal:
    """p(z | x): batch shape (B,)."""
    layer, sigma = model.decoder[0], model.log_sigma.exp()
    precision = layer.weight.mT @ layer.weight / sigma**2 + torch.eye(model.latent_dim).double()
    loc = torch.linalg.solve(precision, layer.weight.mT @ (x.flatten(1) - layer.bias).mT / sigma**2)
    return dist.MultivariateNormal(loc.mT.detach(), precision_matrix=precision.detach())


def exact_evidence(model: ImageModel, x: Tensor) -> Tensor:
    """log p(x): (B,)."""
    layer, sigma = model.decoder[0], model.log_sigma.exp()
    covariance = layer.weight @ layer.weight.mT + sigma**2 * torch.eye(len(layer.bias)).double()
    return dist.MultivariateNormal(layer.bias, covariance).log_prob(x.flatten(1)).detach()


def expected_log_likelihood(model: ImageModel, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E[log p(x|z)] for independent z_j of this mean and variance, both (B, p): (B,)."""
    layer, sigma = model.decoder[0], model.log_sigma.exp()
    residual = x.flatten(1) - layer.bias - mean @ layer.weight.mT
    square = residual.square().sum(-1) + (variance @ layer.weight.square().mT).sum(-1)
    return -0.5 * square / sigma**2 - len(layer.bias) * (sigma.log() + 0.5 * math.log(2 * math.pi))
