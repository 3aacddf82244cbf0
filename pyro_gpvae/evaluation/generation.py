r"""Images from a trained model: samples, reconstructions, interpolations, traversals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyro_gpvae.core._memory import bytes_each
from pyro_gpvae.core._plates import DATA_PLATE, in_data_plate
from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.importance import (
    MAX_IMAGES,
    as_pixels,
    default_chunk_size,
    device_and_dtype,
)
from pyro_gpvae.model.networks import ImageShape

__all__ = [
    "Decoded",
    "PathKind",
    "decode",
    "estimated_mean",
    "float_batches",
    "interpolate",
    "known_mean",
    "latent_path",
    "latent_traversals",
    "posterior_mean",
    "program_sites",
    "reconstruct",
    "sample_images",
    "seeded_for",
    "to_uint8",
    "traverse",
]

PathKind = Literal["spherical", "linear"]

#: Draws that stand for the mean of a posterior which does not tell it, such as a flow's.
MEAN_DRAWS = 100


class Decoded(NamedTuple):
    """Latents (..., p) and the images (..., C, H, W) decoded from them.

    Means of a Gaussian likelihood may lie outside [0, 1]; those of Bernoulli pixels are
    probabilities.
    """

    z: Tensor
    images: Tensor


@with_own_parameters
@torch.no_grad()
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
        image_shape: The shape (C, H, W); by default ``model.image_shape``.
        seed: If given, the same seed gives the same images, and the global random state is left
            as it was. With and without noise the z are the same.

    Raises:
        ValueError: If num_images is less than 1, or the model is not as above.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> z, images = sample_images(ImageModel((1, 28, 28), latent_dim=2), 5, seed=0)
        >>> z.shape, images.shape
        (torch.Size([5, 2]), torch.Size([5, 1, 28, 28]))
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    shape = _image_shape(model, image_shape)
    blank = torch.zeros(1, *shape)
    with seeded_for(model, blank, seed):
        # all z before the first image: the same ones with and without noise, in any chunks
        (blank,) = float_batches(model, blank)
        z = program_sites(model, blank)[0]["fn"].expand((num_images,)).sample()
        return Decoded(z, decode(model, z, noise=noise, image_shape=shape))


@with_own_parameters
@torch.no_grad()
def decode(
    model: PyroProgram, z: Tensor, *, noise: bool = False, image_shape: ImageShape | None = None
) -> Tensor:
    """Returns the mean of p(x|z), or a draw from it, for z (..., p): images (..., C, H, W).

    The model is run with z given, so that any Pyro model will do; see :func:`sample_images`.

    Raises:
        ValueError: If the model is not as above, or what it decodes is not finite.
    """
    shape = _image_shape(model, image_shape)
    device, dtype = device_and_dtype(model, z)

    def decoded(part: Tensor, noise: bool = False) -> Tensor:
        blank = torch.zeros(len(part), *shape, device=device, dtype=dtype)
        with pyro.validation_enabled(False):  # what is not finite is reported below
            likelihood: Any = program_sites(model, blank, part)[1]["fn"]
            pixels: Tensor = likelihood.sample() if noise else likelihood.mean
        return pixels.reshape(blank.shape)  # a model may have flattened its images

    flat = z.reshape(-1, z.shape[-1]).to(device, dtype)
    need = partial(bytes_each, lambda count: partial(decoded, flat.new_zeros(count, z.shape[-1])))
    parts = flat.split(default_chunk_size(device, need))
    images = torch.cat([decoded(part, noise) for part in parts])
    broken = len(images) - int(images.isfinite().flatten(1).all(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} decoded images are not finite: training has diverged, or "
            "z is far from where the decoder was trained"
        )
    return images.reshape(*z.shape[:-1], *shape)


@with_own_parameters
@torch.no_grad()
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
        model: See :func:`sample_images`.
        guide: A Pyro guide for it. One with ``posterior(x)`` is asked for the mean; where
            neither that nor its mean is known, the mean of 100 draws is taken.
        x: Images (B, C, H, W), uint8 or floats in [0, 1].
        draw: Whether to decode a draw from q(z|x) instead of its mean.
        seed: As in :func:`sample_images`.

    Raises:
        ValueError: If x is not a batch of images, or model or guide lack their sites.
    """
    with seeded_for(model, x, seed):
        parts = [
            _draws(guide, batch, 1)[0] if draw else posterior_mean(guide, batch)[0]
            for batch in float_batches(model, x)
        ]
    z = torch.cat(parts)
    return Decoded(z, decode(model, z, image_shape=_shape_of(x)))


@with_own_parameters
def interpolate(
    model: PyroProgram,
    guide: PyroProgram,
    x_start: Tensor,
    x_end: Tensor,
    steps: int = 9,
    *,
    kind: PathKind = "spherical",
    seed: int | None = None,
) -> Decoded:
    """Decodes paths between the posterior means of two batches of images.

    Arguments:
        model, guide, seed: See :func:`reconstruct`.
        x_start, x_end: Images (B, C, H, W).
        steps: The number S of points of a path, both ends included.
        kind: See :func:`latent_path`.

    Returns:
        Latents (B, S, p) and images (B, S, C, H, W).

    Raises:
        ValueError: As :func:`reconstruct` and :func:`latent_path`.
    """
    if x_start.shape != x_end.shape:
        raise ValueError(
            f"x_start has shape {tuple(x_start.shape)}, x_end {tuple(x_end.shape)}: expected equal"
        )
    start, end = (reconstruct(model, guide, x, seed=seed).z for x in (x_start, x_end))
    z = latent_path(start, end, steps, kind)
    return Decoded(z, decode(model, z, image_shape=_shape_of(x_start)))


def latent_path(start: Tensor, end: Tensor, steps: int, kind: PathKind = "spherical") -> Tensor:
    r"""Returns points on the way from start to end, (B, p) each: (B, S, p).

    .. math::
        z_t = \frac{\sin((1 - t)\,\Omega)\, z_0 + \sin(t\,\Omega)\, z_1}{\sin \Omega},
        \qquad t = 0, \tfrac{1}{S-1}, \dots, 1,

    with the angle :math:`\Omega` between both ends. Draws from N(0, I) have norms near
    :math:`\sqrt p`, and two of them are nearly orthogonal, so that the middle of the straight line
    between them has a norm near :math:`\sqrt{p/2}`, where the prior has hardly any mass and the
    decoder has seen little. The spherical path keeps the norm between those of its ends. Where
    the ends are collinear the angle gives no path, and it is a straight line.

    References:
        White, *Sampling Generative Networks*, 2016. https://arxiv.org/abs/1609.04468

    Raises:
        ValueError: If there are fewer than 2 steps, or the kind is unknown.

    Example:
        >>> latent_path(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 3)[0, 1]
        tensor([1.4142, 1.4142])
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, for both ends, got {steps}")
    if kind not in get_args(PathKind):
        raise ValueError(f"kind must be one of {get_args(PathKind)}, got {kind!r}")
    t = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None]
    a, b = start.unsqueeze(-2), end.unsqueeze(-2)
    line = (1 - t) * a + t * b
    if kind == "linear":
        return line
    cosine = torch.cosine_similarity(a, b, dim=-1).unsqueeze(-1).clamp(-1, 1)
    angle = cosine.acos()
    # 1e-3 rad from collinear the formula divides one rounding error by another
    curved = angle.sin() > 1e-3
    sine = torch.where(curved, angle.sin(), 1.0)
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return torch.where(curved, arc, line)


@with_own_parameters
def traverse(
    model: PyroProgram,
    guide: PyroProgram,
    x: Tensor,
    dims: Sequence[int] | None = None,
    *,
    span: float = 3.0,
    steps: int = 9,
    seed: int | None = None,
) -> Decoded:
    """Decodes what each latent dimension does: it runs from -span to span, in standard deviations
    of the prior N(0, I), while the others stay at an image's posterior mean.

    The values are the same for every image and dimension (and not offsets from the mean), so
    that all of them are where the prior has mass.

    References:
        Higgins et al., *beta-VAE: Learning Basic Visual Concepts with a Constrained Variational
        Framework*, 2017. https://openreview.net/forum?id=Sy2fzU9gl

    Arguments:
        model, guide, seed: See :func:`reconstruct`.
        x: Images (B, C, H, W).
        dims: The D dimensions to move; by default all.
        span: The end of the range.
        steps: The number S of values.

    Returns:
        Latents (B, D, S, p) and images (B, D, S, C, H, W).

    Raises:
        ValueError: If span is not positive, there are fewer than 2 steps, or a dimension does not
            exist.
    """
    mean = reconstruct(model, guide, x, seed=seed).z
    z = latent_traversals(mean, dims, span=span, steps=steps)
    return Decoded(z, decode(model, z, image_shape=_shape_of(x)))


def latent_traversals(
    z: Tensor, dims: Sequence[int] | None = None, *, span: float = 3.0, steps: int = 9
) -> Tensor:
    """Returns copies of z (B, p) in which one of D dimensions has one of S values from -span to
    span: (B, D, S, p).

    Raises:
        ValueError: As :func:`traverse`.
    """
    if not (span > 0 and math.isfinite(span)):
        raise ValueError(f"span must be positive and finite, got {span}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, for both ends, got {steps}")
    dims = range(z.shape[-1]) if dims is None else dims
    for dim in dims:
        if not 0 <= dim < z.shape[-1]:
            raise ValueError(f"dims must be between 0 and {z.shape[-1] - 1}, got {dim}")
    copies = z[:, None, None, :].repeat(1, len(dims), steps, 1)
    values = torch.linspace(-span, span, steps, dtype=z.dtype, device=z.device)
    for row, dim in enumerate(dims):
        copies[:, row, :, dim] = values
    return copies


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as integers 0 to 255; what lies outside is clipped.

    Example:
        >>> to_uint8(torch.tensor([-0.5, 0.5, 2.0]))
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    return (255 * images.clamp(0, 1)).round().to(torch.uint8)


@with_own_parameters
def posterior_mean(guide: PyroProgram, x: Tensor) -> tuple[Tensor, Tensor]:
    """E_q[z|x] and an error of its estimate, (B, p) each.

    Where :func:`known_mean` has none, or the guide has no ``posterior(x)``, it is the mean of 100
    draws, made with the global random state, and the error is half the difference between the
    means of the first and of the last 50: uncorrelated with the estimate's own error, and of the
    same distribution. That of a mean that is known is zero.
    """
    if hasattr(guide, "posterior"):
        return estimated_mean(guide.posterior(x))
    return _of_draws(_draws(guide, x, MEAN_DRAWS))


def estimated_mean(q: Distribution) -> tuple[Tensor, Tensor]:
    """The mean of a distribution and an error of its estimate, see :func:`posterior_mean`."""
    mean = known_mean(q)
    if mean is None:
        return _of_draws(q.sample(torch.Size((MEAN_DRAWS,))))
    return mean, torch.zeros_like(mean)


def _of_draws(z: Tensor) -> tuple[Tensor, Tensor]:
    first, last = (half.mean(0) for half in z.chunk(2))
    return (first + last) / 2, (first - last) / 2


def known_mean(q: Distribution) -> Tensor | None:
    """The mean that a distribution tells of itself; None if it does not, as a flow does not."""
    try:
        return q.mean
    except (AttributeError, NotImplementedError):
        return None


def _draws(guide: PyroProgram, x: Tensor, count: int) -> Tensor:
    """Draws from q(z|x): (count, B, p)."""
    if hasattr(guide, "posterior"):
        z: Tensor = guide.posterior(x).sample((count,))
        return z
    draws = []
    for _ in range(count):
        trace = poutine.trace(guide).get_trace(x)
        if "z" not in trace:
            raise ValueError(
                f"the guide must have a site 'z' in plate({DATA_PLATE!r}), and has none"
            )
        value: Any = trace.nodes["z"]["value"]
        draws.append(value)
    return torch.stack(draws)


def program_sites(model: PyroProgram, x: Tensor, z: Tensor | None = None) -> tuple[Any, Any]:
    """The site "z" and the observed site of a run of the model, with z given or drawn."""
    program = model if z is None else poutine.condition(model, data={"z": z})
    nodes = poutine.trace(program).get_trace(x).nodes
    observed = [
        site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and name != "z"
        and in_data_plate(site)
        and not isinstance(site["fn"], dist.Unit)  # pyro.factor
    ]
    if "z" not in nodes or len(observed) != 1:
        raise ValueError(
            f"the model must have a site 'z' and one observed site in plate({DATA_PLATE!r}), and "
            f"has {len(observed)} observed {'and' if 'z' in nodes else 'and no'} 'z'"
        )
    return nodes["z"], observed[0]


def float_batches(model: PyroProgram, images: Tensor, size: int = MAX_IMAGES) -> Sequence[Tensor]:
    """Images as floats where the model is, so many at once."""
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected at least one image, (B, C, H, W), got {shape}")
    if hasattr(model, "check_images"):  # before the guide's encoder stumbles over it
        model.check_images(images)
    return [as_pixels(model, part) for part in images.split(size)]


def _image_shape(model: Any, given: ImageShape | None) -> ImageShape:
    shape = given or getattr(model, "image_shape", None)
    if shape is None:
        raise ValueError("the model has no image_shape: pass image_shape=(C, H, W)")
    channels, height, width = shape
    return channels, height, width


def _shape_of(x: Tensor) -> ImageShape:
    channels, height, width = x.shape[1:]
    return channels, height, width


def seeded_for(model: PyroProgram, x: Tensor, seed: int | None) -> AbstractContextManager[None]:
    """Seeds the device that the model is on, if there is a seed: see :func:`seeded`."""
    return nullcontext() if seed is None else seeded(seed, device_and_dtype(model, x)[0])
