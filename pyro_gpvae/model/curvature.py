r"""Jacobians of the decoder, and the Gauss-Newton precision of the posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._errors import name_images
from pyro_gpvae.model._convolutions import ConvTranspose2d
from pyro_gpvae.model.likelihoods import bounded

__all__ = ["decoder_jacobian", "inverse_cholesky", "line_search", "linearize"]

#: Fractions of the Gauss-Newton step that the line search tries; zero keeps the current point.
STEP_SIZES = (1.0, 0.5, 0.25, 0.1, 0.0)

# tangents that the decoder processes at once without gradients. On a GPU they need 0.4 GiB of
# memory for images of 28×28 and 2 GiB for 64×64 in colour
_MAX_TANGENTS = {"cpu": 2048, "cuda": 8192}


def line_search(
    log_joint: Callable[[Tensor], Tensor],
    z: Tensor,
    direction: Tensor,
    sizes: tuple[float, ...] = STEP_SIZES,
) -> Tensor:
    """Returns z + α direction, (B, p), with the α of highest log p(x, z) for each image.

    ``log_joint`` maps z (S, B, p) to log p(x, z), (S, B).
    """
    alpha = z.new_tensor(sizes)
    if len(sizes) > 1:
        # the choice has no gradient; validation would raise an error for a step that is too long
        with torch.no_grad(), pyro.validation_enabled(False):
            values = log_joint(z + alpha[:, None, None] * direction)
            best = values.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argmax(0)
        alpha = alpha[best].unsqueeze(-1)
    return z + alpha * direction


def linearize(model: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the gradient of log p(x, z) in z, (B, p), and the precision Λ, (B, p, p).

    .. math::
        \Lambda = J^\top H J + I,

    where J is the Jacobian of the decoder and H the curvature of -log p(x|z) in its output. Both
    are float64: in float32, rounding errors exceed I for :math:`\sigma \lesssim 0.03`.
    """
    if not torch.is_grad_enabled():
        size = max(1, _MAX_TANGENTS.get(z.device.type, 2048) // z.shape[-1])
        if len(z) > size:
            parts = zip(x.split(size), z.split(size), strict=True)
            gradients, precisions = zip(*(linearize(model, *part) for part in parts), strict=True)
            return torch.cat(gradients), torch.cat(precisions)
    output, jacobian = decoder_jacobian(model.decoder, z)
    if model.log_sigma is None:
        mean = output.sigmoid()
        residual, weight = x.flatten(1) - mean, mean * (1 - mean)
    else:
        weight = (-2 * bounded(model.log_sigma)).exp().expand_as(output)
        residual = weight * (x.flatten(1) - output)
    gradient = torch.einsum("bdp,bd->bp", jacobian, residual) - z
    jacobian, weight = jacobian.double(), weight.double()
    eye = torch.eye(z.shape[-1], dtype=torch.float64, device=z.device)
    return gradient.double(), jacobian.mT @ (weight.unsqueeze(-1) * jacobian) + eye


def decoder_jacobian(decoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns g(z), flattened to (B, D), and its Jacobian (B, D, p), by forward-mode products.

    It costs as much as decoding p latent vectors for an ``nn.Sequential`` of linear layers,
    convolutions and ReLUs. :func:`autocast_networks` does not affect it.
    """
    directions = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    output, tangents = z, directions.unsqueeze(1).expand(-1, *z.shape)
    layers: tuple[nn.Module, ...] = (decoder,)
    if type(decoder) is nn.Sequential and not _has_hooks(decoder):
        layers = tuple(decoder)  # children() would omit a layer that occurs twice
    for layer in layers:
        output, tangents = _through(layer, output, tangents)
    return output.flatten(1), tangents.flatten(2).movedim(0, -1)


# subclasses are not included, because they may compute anything
_AFFINE = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, ConvTranspose2d)


def _through(layer: nn.Module, value: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a layer's output and the products of its Jacobian with tangents (p, B, ...)."""
    if type(layer) in _AFFINE and not _has_hooks(layer):
        none = {} if layer.bias is None else {"bias": torch.zeros_like(cast(Tensor, layer.bias))}
        images = torch.func.functional_call(layer, none, tangents.flatten(0, 1))
        return layer(value), images.unflatten(0, tangents.shape[:2])
    if type(layer) is nn.ReLU and not _has_hooks(layer):
        output = layer(value)
        return output, tangents * (output > 0)

    for part in layer.modules():
        if isinstance(part, nn.RReLU) or (
            isinstance(part, nn.modules.batchnorm._BatchNorm)
            and part.training and part.track_running_stats
        ):  # fmt: skip
            raise ValueError(
                f"the decoder's layer {part} has no Jacobian of each image: use GroupNorm or "
                "LayerNorm instead of batch normalisation, LeakyReLU instead of RReLU, or a guide "
                "that needs no Jacobians, such as sa"
            )

    def product(tangent: Tensor) -> Any:
        with _OutsidePyro():
            return torch.func.jvp(layer, (value,), (tangent,))

    out_dims: Any = (None, 0)
    return cast(Any, torch.func.vmap(product, 0, out_dims, randomness="same")(tangents))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _OutsidePyro(Messenger):
    """Stops the param messages of a PyroModule, which set requires_grad inside torch.func."""

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) > 1:
            msg["value"], msg["done"] = msg["args"][1], True
        msg["stop"] = True


def inverse_cholesky(precision: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Returns the lower triangular S with :math:`S S^\top = \Lambda^{-1}`, and the jitter.

    If rounding makes a matrix indefinite, a jitter is added to its diagonal: the smallest of 1e-12,
    1e-10, ... 1e-4 times the mean of the diagonal that is sufficient. Other matrices do not change.
    Condition numbers up to 1e15 in float64, and up to about 1e6 in float32, need no jitter.

    Raises:
        LinAlgError: If Λ (B, p, p) is not finite, or singular with the largest jitter. The message
            has the indices ``images``, by default 0 to B - 1.
    """
    finite = precision.isfinite().all(-1).all(-1)
    if not finite.all():
        raise _error(~finite, images, "not finite: a decoder output or sigma has overflowed")
    # Λ = U Uᵀ with U upper triangular, so that S = U⁻ᵀ is lower triangular
    flipped = precision.flip((-2, -1))
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    scale = precision.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    jitter, failed = torch.zeros_like(scale), torch.zeros_like(finite)
    for share in (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        jitter = torch.where(failed, share, jitter)
        lower, info = torch.linalg.cholesky_ex(flipped + (jitter * scale)[..., None, None] * eye)
        failed = info > 0
        if not failed.any():
            break
    else:
        raise _error(failed, images, "singular, also with jitter on its diagonal")
    return torch.linalg.solve_triangular(lower.flip((-2, -1)).mT, eye, upper=False), jitter


def _error(failed: Tensor, images: Tensor | None, reason: str) -> LinAlgError:
    indices = (failed.nonzero().flatten() if images is None else images[failed]).tolist()
    return LinAlgError(f"the posterior precision of image {name_images(indices)} is {reason}")
