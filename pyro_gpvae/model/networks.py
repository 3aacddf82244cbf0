r"""Encoders and decoders of the paper's Tables 1-3, for any image shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model._convolutions import ConvTranspose2d

__all__ = [
    "DecoderKind",
    "ImageShape",
    "autocast_networks",
    "build_decoder",
    "build_encoder",
    "call_network",
    "feature_dim",
]

ImageShape = tuple[int, int, int]
DecoderKind = Literal["conv", "fc"]

_autocast_dtype: ContextVar[torch.dtype | None] = ContextVar("autocast_dtype", default=None)


@contextmanager
def autocast_networks(dtype: torch.dtype) -> Iterator[None]:
    """Runs the networks of models and guides under ``torch.autocast`` inside the block.

    Densities and parameters keep their own precision: only :func:`call_network` is affected.
    """
    token = _autocast_dtype.set(dtype)
    try:
        yield
    finally:
        _autocast_dtype.reset(token)


def call_network(network: nn.Module, x: Tensor) -> Tensor:
    """Returns ``network(x)`` in the dtype of x, computed as :func:`autocast_networks` asks."""
    dtype = _autocast_dtype.get()
    if dtype is None:
        return cast(Tensor, network(x))
    # cached casts of the weights would not see the optimiser's updates
    with torch.autocast(x.device.type, dtype, cache_enabled=False):
        return cast(Tensor, network(x).to(x.dtype))


def build_encoder(image_shape: ImageShape) -> nn.Sequential:
    r"""Returns the convolutional encoder up to its last hidden layer, :math:`\phi(x)`.

    Tables 1-3 are special cases of one rule: three convolutions (four from 64 pixels on) of kernel
    4 and stride 2, then a hidden layer of 256 units (512 from 32 pixels on).

    Arguments:
        image_shape: The shape (C, H, W) of an image; H and W at least 8.

    Example:
        >>> build_encoder((1, 28, 28))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 256])
    """
    sides, width = _pyramid(image_shape)
    channels = [image_shape[0], 32, 32, 64, 64][: len(sides)]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(channels):
        layers += [nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1), nn.LeakyReLU(0.01)]
    layers += [nn.Flatten(), nn.Linear(64 * math.prod(sides[-1]), width), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


def build_decoder(
    image_shape: ImageShape, latent_dim: int, kind: DecoderKind = "conv"
) -> nn.Sequential:
    r"""Returns a decoder :math:`g_\theta(z)` with linear output.

    Arguments:
        image_shape: The shape (C, H, W) of an image; H and W at least 8.
        latent_dim: The dimension p of z.
        kind: "conv" is the transposed-convolutional decoder of Tables 1-3. "fc" has two hidden
            layers of equal width, and nearly as many parameters (supplement, section 5).

    Raises:
        ValueError: If the image is too small, p < 1, or the kind is unknown.

    Example:
        >>> build_decoder((3, 32, 32), latent_dim=10)(torch.zeros(5, 10)).shape
        torch.Size([5, 3, 32, 32])
    """
    check_at_least(1, latent_dim=latent_dim)
    if kind not in ("conv", "fc"):
        raise ValueError(f"unknown decoder {kind!r}: expected 'conv' or 'fc'")
    decoder = _conv_decoder(image_shape, latent_dim)
    if kind == "fc":
        count = sum(p.numel() for p in decoder.parameters())
        decoder = _fc_decoder(image_shape, latent_dim, count)
    return decoder


def feature_dim(encoder: nn.Module, image_shape: ImageShape) -> int:
    """Returns the number d of features that an encoder computes, found by running it once."""
    parameter = next(encoder.parameters(), torch.zeros(()))
    training = encoder.training
    encoder.eval()  # keeps the image of zeros out of the statistics of batch normalisation
    with torch.no_grad():
        features: Tensor = encoder(parameter.new_zeros(1, *image_shape))
    encoder.train(training)
    if features.dim() != 2:
        raise ValueError(f"an encoder must return features (B, d), got {tuple(features.shape)}")
    return features.shape[1]


def _pyramid(image_shape: ImageShape) -> tuple[list[tuple[int, int]], int]:
    """Returns the sizes (H, W) of the image and after each convolution, and the hidden width."""
    channels, height, width = image_shape
    if channels < 1 or min(height, width) < 8:
        raise ValueError(
            f"image_shape must be (C, H, W) with C >= 1 and H, W >= 8, got {tuple(image_shape)}"
        )
    depth = 4 if min(height, width) >= 64 else 3
    sides = [(height >> level, width >> level) for level in range(depth + 1)]
    return sides, 256 if max(height, width) < 32 else 512


def _conv_decoder(image_shape: ImageShape, latent_dim: int) -> nn.Sequential:
    sides, width = _pyramid(image_shape)
    sides = sides[::-1]
    hidden = 64 * math.prod(sides[0])
    layers: list[nn.Module] = [nn.Linear(latent_dim, width), nn.ReLU()]
    layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Unflatten(1, (64, *sides[0]))]
    channels = [*(64, 64, 32, 32)[-len(sides) + 1 :], image_shape[0]]
    for sizes, (fan_in, fan_out) in zip(pairwise(sides), pairwise(channels), strict=True):
        # where halving rounded down (7 -> 3), the output needs one more row or column
        small, large = sizes
        extra = (large[0] - 2 * small[0], large[1] - 2 * small[1])
        layer = ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1, output_padding=extra)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _fc_decoder(image_shape: ImageShape, latent_dim: int, parameters: int) -> nn.Sequential:
    """Returns the decoder whose number of parameters is closest to the given one."""
    pixels = math.prod(image_shape)

    def excess(width: int) -> int:
        sizes = (latent_dim + 1) * width + (width + 1) * width + (width + 1) * pixels
        return abs(sizes - parameters)

    width = min(range(1, math.isqrt(parameters) + 2), key=excess)
    layers: list[nn.Module] = [nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, width)]
    layers += [nn.ReLU(), nn.Linear(width, pixels), nn.Unflatten(1, image_shape)]
    return nn.Sequential(*layers)
