"""Images from a trained model: samples and reconstructions."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import (
    batches,
    device_of,
    draws,
    evaluator,
    posterior_mean,
    seeded_if,
)
from pyro_gpvae.model._local import Structure
from pyro_gpvae.model.guide import check_program_data
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import ImageShape

__all__ = ["Decoded", "decode", "prior_and_likelihood", "reconstruct", "sample_images"]


class Decoded(NamedTuple):
    """Latents (..., p) and the images (..., C, H, W) decoded from them.

    Means of a Gaussian likelihood may lie outside [0, 1]; those of Bernoulli pixels are
    probabilities.
    """

    z: Tensor
    images: Tensor


@evaluator
def sample_images(
    model: PyroProgram,
    num_images: int,
    *,
    noise: bool = False,
    image_shape: ImageShape | None = None,
    seed: int | None = None,
) -> Decoded:
    """Draws z from the prior and decodes it: z (n, p), images (n, C, H, W).

    Arguments:
        model: A Pyro model with the site ``"z"`` and one observed site in ``plate("data", B)``.
        num_images: The number n of images.
        noise: Whether the images are draws from p(x|z) rather than its means.
        image_shape: The shape (C, H, W); by default that of the :class:`pyro_gpvae.ImageModel`.
        seed: See :func:`pyro_gpvae.log_evidence`. With and without noise the z are the same.

    Raises:
        ValueError: If num_images is less than 1, or the model is not as above.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> z, images = sample_images(ImageModel((1, 28, 28), latent_dim=2), 5, seed=0)
        >>> z.shape, images.shape
        (torch.Size([5, 2]), torch.Size([5, 1, 28, 28]))
    """
    check_at_least(1, num_images=num_images)
    shape = _image_shape(model, image_shape)
    blank = to_batch(torch.zeros(1, *shape), model)[0]
    with seeded_if(seed, blank.device):
        # all z before the first image, so that they are the same with noise and in any chunks
        z = prior_and_likelihood(model, blank)[0].expand((num_images,)).sample()
        return Decoded(z, decode(model, z, noise=noise, image_shape=shape))


@evaluator
def decode(
    model: PyroProgram,
    z: Tensor,
    *,
    noise: bool = False,
    image_shape: ImageShape | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Returns the mean of p(x|z), or a draw from it, for z (..., p): images (..., C, H, W).

    Arguments:
        model, noise, image_shape: See :func:`sample_images`.
        z: Latent vectors (..., p).
        chunk_size: See :func:`pyro_gpvae.log_weights`.

    Raises:
        ValueError: If the model is not as above, or what it decodes is not finite.
    """
    shape = _image_shape(model, image_shape)
    flat = to_batch(z.reshape(-1, z.shape[-1]), model)[0]

    def decoded(part: Tensor) -> Tensor:
        blank = flat.new_zeros(len(part), *shape)
        with pyro.validation_enabled(False):  # what is not finite is reported below
            likelihood = prior_and_likelihood(model, blank, part)[1]
            pixels: Tensor = likelihood.sample() if noise else likelihood.mean
        return pixels.reshape(blank.shape)  # a model may have flattened its images

    def work(size: int) -> Tensor:
        return torch.cat([decoded(part) for part in flat.split(size)])

    images = halving_chunks(work, chunk_size, flat.device)
    broken = len(images) - int(images.isfinite().flatten(1).all(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} decoded images are not finite: training has diverged, or "
            "z is far from where the decoder was trained"
        )
    return images.reshape(*z.shape[:-1], *shape)


@evaluator
def reconstruct(
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    *,
    draw: bool = False,
    seed: int | None = None,
) -> Decoded:
    """Infers z of images and decodes it: z (B, p), images (B, C, H, W).

    Arguments:
        model, seed: See :func:`sample_images`.
        guide: A Pyro guide for it. Its posterior mean is decoded; where that is not known, the
            mean of 100 draws.
        x: Images (B, C, H, W), uint8 or floats.
        draw: Whether to decode a draw from q(z|x) instead of its mean.

    Raises:
        ValueError: If x is not a batch of images, or model or guide lack their sites.
    """
    check_program_data(model, x)
    with seeded_if(seed, device_of(x, model, guide)):
        parts = [
            draws(guide, batch, 1)[0] if draw else posterior_mean(guide, batch)
            for batch in batches(x, model, guide)
        ]
    z = torch.cat(parts)
    channels, height, width = x.shape[1:]
    return Decoded(z, decode(model, z, image_shape=(channels, height, width)))


def prior_and_likelihood(model: PyroProgram, x: Tensor, z: Tensor | None = None) -> tuple[Any, Any]:
    """Returns the distributions of z and of x given z, where z is drawn if it is not given."""
    structure, _ = Structure.of(model, (x,))
    program = poutine.block(model, hide_fn=structure.is_global)
    if z is not None:
        program = poutine.condition(program, data={"z": z})
    nodes: dict[str, Any] = poutine.trace(program).get_trace(x).nodes
    sites = {name: s for name, s in nodes.items() if structure.is_local(s)}
    seen = [s for name, s in sites.items() if s["is_observed"] and name != "z"]
    observed = [s for s in seen if not isinstance(s["fn"], Unit)]
    if "z" not in sites or len(observed) != 1:
        raise ValueError(
            "the model must have a site 'z' and one observed site in its data plate, found "
            f"{len(observed)} observed sites {'and' if 'z' in sites else 'and no'} 'z'"
        )
    return sites["z"]["fn"], observed[0]["fn"]


def _image_shape(model: PyroProgram, given: ImageShape | None) -> ImageShape:
    if given is not None:
        return given
    if not isinstance(model, ImageModel):
        raise ValueError("the model has no image_shape: pass image_shape=(C, H, W)")
    return model.image_shape
