r"""The generative model, a Pyro program: a decoder, a likelihood and N(0, I) priors."""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import Program
from pyro_gpvae.data.batch import check_data
from pyro_gpvae.model.likelihoods import GaussianPixels, bounded
from pyro_gpvae.model.networks import ImageShape, build_decoder, call_network

__all__ = ["ImageModel", "initial_sigma"]


class ImageModel(Program):
    r"""A Pyro model of images with one latent vector each.

    .. math::
        z_n \sim N(0, I_p), \qquad
        x_n \sim N(g_\theta(z_n), \sigma^2 I)

    with a learned :math:`\sigma`, or :math:`x_n \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(
    g_\theta(z_n)))`. Densities are those of pixels in [0, 1]. The program of images x (B, C, H, W)
    has the sites ``"z"`` and ``"x"``, which is observed, in ``plate("data", B)``.

    Arguments:
        image_shape: The shape (C, H, W) of an image.
        latent_dim: The dimension p of z.
        decoder: A module from latents (n, p) to images (n, C, H, W), or to logits for
            Bernoulli pixels; by default :func:`pyro_gpvae.build_decoder`.
        likelihood: "gaussian" or "bernoulli".
        sigma: Initial :math:`\sigma`; :func:`initial_sigma` computes it from the data.

    Raises:
        ValueError: If p < 1, sigma is not positive, or the likelihood is unknown.

    Example:
        >>> model = ImageModel((1, 28, 28), latent_dim=10)
        >>> model.likelihood(torch.zeros(7, 5, 10)).batch_shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        image_shape: ImageShape,
        latent_dim: int,
        decoder: nn.Module | None = None,
        *,
        likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least(1, latent_dim=latent_dim)
        if likelihood not in ("gaussian", "bernoulli"):
            raise ValueError(f"likelihood must be 'gaussian' or 'bernoulli', got {likelihood!r}")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.latent_dim = latent_dim
        self.decoder = build_decoder(image_shape, latent_dim) if decoder is None else decoder
        log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))
        self.log_sigma = log_sigma if likelihood == "gaussian" else None
        # a buffer, so that the prior follows the model to its device and dtype
        self._zero: Tensor
        self.register_buffer("_zero", torch.zeros(latent_dim), persistent=False)

    def prior(self) -> TorchDistribution:
        """The prior N(0, I) of one image's z: batch shape (), event shape (p,)."""
        return dist.Normal(self._zero, torch.ones_like(self._zero)).to_event(1)

    @property
    def sigma(self) -> Tensor | None:
        """The standard deviation of a pixel, a scalar; None for Bernoulli pixels."""
        return None if self.log_sigma is None else bounded(self.log_sigma).exp()

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """The distribution of an image given z (..., p): batch shape (...), event (C, H, W)."""
        flat = call_network(self.decoder, z.reshape(-1, self.latent_dim))
        output = flat.reshape(*z.shape[:-1], *self.image_shape)
        if self.sigma is None:
            return dist.Bernoulli(logits=output).to_event(3)
        return GaussianPixels(output, self.sigma)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Returns log p(x, z) in nats, shape (..., B), of images (B, C, H, W), z (..., B, p)."""
        return self.likelihood(z).log_prob(x) + self.prior().log_prob(z)

    def check_images(self, x: Tensor, *others: Tensor) -> None:
        """Checks that x are images (B, C, H, W) of this model: uint8 values, or pixels/255.

        Raises:
            ValueError: If there are other tensors; if the shape or the dtype is wrong or there is
                no image; if floats are not finite, beyond ±100, or above 2 with none below zero; or
                if Bernoulli pixels are not 0 or 1.
        """
        if others:
            raise ValueError(
                f"the model takes images alone, got {1 + len(others)} tensors: leave out labels, "
                "in a DataLoader with a collate_fn or another data set"
            )
        self._check_shape(x)
        if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
            raise ValueError(
                f"images must be uint8 values 0 to 255 or floats, got {x.dtype}: convert values 0 "
                "to 255 with .to(torch.uint8), values in [0, 1] with .float()"
            )
        if len(x) == 0:
            raise ValueError("x must hold at least one image, got none")
        self._check_binary(x)
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(high - low):
            raise ValueError(f"images must be finite, got values between {low} and {high}")
        if x.dtype != torch.uint8 and (max(-low, high) > 100 or (high > 2 and low >= 0)):
            raise ValueError(
                "images must be uint8, or floats on the scale [0, 1], got floats between "
                f"{low:g} and {high:g}: divide values 0 to 255 by 255"
            )

    def _check_shape(self, x: Tensor) -> None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or x.shape[1:] != torch.Size(self.image_shape):
            sizes = ", ".join(map(str, self.image_shape))
            raise ValueError(f"the model expects images (B, {sizes}), got {shape}")

    def _check_binary(self, x: Tensor) -> None:
        white = 255 if x.dtype == torch.uint8 else 1
        if self.log_sigma is None and not bool(((x == 0) | (x == white)).all()):
            raise ValueError(
                "Bernoulli pixels must be 0 or 1, got grey ones: use ImageData.binarized(), or "
                "likelihood='gaussian'"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        if is_validation_enabled():
            self._check_binary(x)
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            z: Tensor = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)
        return z


def initial_sigma(images: Tensor) -> float:
    r"""Returns the root mean squared deviation of the pixels from their mean over the images.

    Adam needs 10-15 epochs at 5e-4 to bring another initial :math:`\sigma` to it. ``images`` are
    (N, C, H, W), at least one: uint8 values, which are divided by 255, or floats as they are.

    Example:
        >>> initial_sigma(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
        0.5
    """
    check_data(images, "images")
    total = square = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    scale = 255 if images.dtype == torch.uint8 else 1  # as to_batch, but in float64
    for chunk in images.split(4096):  # limits the memory of the float64 copies
        pixels = chunk.to(torch.float64) / scale
        total = total + pixels.sum(0)
        square = square + pixels.square().sum(0)
    variance = square / len(images) - (total / len(images)).square()
    # constant images have no variance: use half a grey level instead of zero
    return max(math.sqrt(max(variance.mean().item(), 0.0)), 0.5 / 255)
