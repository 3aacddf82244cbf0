r"""VLAE: a Laplace approximation around a refined mean, by Jacobians of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from guides.gaussian import GaussianGuide, check_finite
from pyro_gpvae.convolutions import ConvTranspose2d
from pyro_gpvae.distributions import bounded
from pyro_gpvae.nonfinite import name_images
from pyro_gpvae.program import References

__all__ = [
    "LaplaceGuide",
    "LaplacePosterior",
    "decoder_jacobian",
    "gauss_newton_step",
    "inverse_cholesky",
    "line_search",
    "linearize",
]

Solver = Literal["direct", "cg"]
Step = Literal["line_search", "damped"]

#: Shares of the Gauss-Newton step that the line search tries; the last one is to stay.
STEP_SIZES = (1.0, 0.5, 0.25, 0.1, 0.0)
# tangents of the decoder at once where nothing is kept for a backward pass; bounds the memory:
# on a GPU 0.4 GiB for images of 28×28, 2 GiB for 64×64 in colour
_MAX_TANGENTS = {"cpu": 2048, "cuda": 8192}


class LaplaceGuide(GaussianGuide):
    r"""VLAE(T): T steps from the encoder's mean towards the mode, and the curvature there.

    .. math::
        \mu_0 &= m(x), \qquad J = \partial g / \partial z \text{ at } \mu_t, \qquad
        \Lambda = J^\top J / \sigma^2 + I \\
        \mu' &= \Lambda^{-1} J^\top (x - g(\mu_t) + J \mu_t) / \sigma^2, \qquad
        \mu_{t+1} = (1 - \alpha_t) \mu_t + \alpha_t \mu' \\
        q(z|x) &= N(z; \mu_T, \Lambda^{-1}), \qquad \Lambda \text{ at } \mu_T

    with full covariance. :math:`\mu' - \mu_t = \Lambda^{-1} \nabla_z \log p(x, \mu_t)` is the
    Gauss-Newton step, and for Bernoulli pixels of probability π the generalised one,
    :math:`\Lambda = J^\top \mathrm{diag}(\pi (1 - \pi)) J + I`. Gradients flow through the steps
    and Λ to encoder and decoder. T = 0 is not the VAE: its covariance is Λ⁻¹ at m(x).

    The encoder's s(x) is not used.

    Jacobians are exact, for any decoder without batch statistics, by forward-mode
    differentiation: p products that share one forward pass. Cost per image, in forward passes of
    the decoder (Table 1, p = 10, CPU):

    * a Jacobian about p + 3 (T + 1 of them), a line search 5 more a step;
    * "cg": about 4 for each iteration, in place of the T Jacobians of the steps. The covariance
      needs the full Jacobian at the end in any case.

    References:
        Park, Kim and Kim, *Variational Laplace Autoencoders*, 2019.
        https://proceedings.mlr.press/v97/park19a.html

    Arguments:
        model: The model, whose decoder and likelihood are used; its parameters stay its own.
        num_steps: T, at least 0.
        encoder: A module from images (B, C, H, W) to features (B, d).
        step: "damped" is the published :math:`\alpha_t = 0.5 / (t + 1)`. "line_search" takes for
            each image the α of 1, ½, ¼, 0.1 and 0 that gives the highest log p(x, z), so that no
            step makes it worse.
        solver: "direct" (Cholesky of Λ) or "cg" (conjugate gradients on products with Λ, without
            J; for a p in the hundreds).
        warm_start: A trained guide of this family, whose encoder is copied.

    Raises:
        ValueError: If num_steps is negative, an option is unknown, or the model has no decoder.
        torch.linalg.LinAlgError: From :meth:`posterior`, if the precision of an image is
            singular or not finite; names the image.
        NonFiniteError: From :meth:`posterior`, if a mean is not finite; names the image.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = LaplaceGuide(ImageModel((1, 28, 28), latent_dim=3), 1)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    def __init__(
        self,
        model: Any,
        num_steps: int = 2,
        encoder: nn.Module | None = None,
        *,
        step: Step = "line_search",
        solver: Solver = "direct",
        warm_start: GaussianGuide | None = None,
    ) -> None:
        if num_steps < 0:
            raise ValueError(f"num_steps must be at least 0, got {num_steps}")
        for name, value, choices in (("step", step, Step), ("solver", solver, Solver)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
        if not isinstance(getattr(model, "decoder", None), nn.Module):
            raise ValueError(
                f"{type(self).__name__} differentiates model.decoder, which the model "
                f"{type(model).__name__} does not have"
            )
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_steps = num_steps
        self.step: Step = step
        self.solver: Solver = solver
        # in a tuple, so that the decoder's parameters are not this module's
        self._model = References((model,))

    def posterior(self, x: Tensor) -> LaplacePosterior:
        """Returns N(μ_T, Λ⁻¹), which tells its jitter: batch shape (B,), event shape (p,)."""
        model = self._model[0]
        _, loc, _ = self.encode(x)
        for t in range(self.num_steps):
            sizes = STEP_SIZES if self.step == "line_search" else (0.5 / (t + 1),)
            loc = gauss_newton_step(model, x, loc, sizes, self.solver)
            check_finite(f"the mean after step {t + 1}", loc)
        _, precision = linearize(model, x, loc)
        factor, jitter = inverse_cholesky(precision)
        q = LaplacePosterior(loc, scale_tril=factor.to(loc.dtype))
        q.jitter = jitter
        return q


class LaplacePosterior(dist.MultivariateNormal):
    """N(μ_T, Λ⁻¹) of each image.

    Attributes:
        jitter: What was added to the diagonal of Λ to factorise it, as a share of its mean, (B,):
            zero unless Λ is singular to rounding. See :func:`inverse_cholesky`.
    """

    jitter: Tensor


def gauss_newton_step(
    model: Any,
    x: Tensor,
    z: Tensor,
    sizes: tuple[float, ...] = STEP_SIZES,
    solver: Solver = "direct",
) -> Tensor:
    r"""Returns :math:`z + \alpha \Lambda^{-1} \nabla_z \log p(x, z)`, (B, p).

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        x: Images (B, C, H, W).
        z: Latents (B, p).
        sizes: The candidates for α; see :func:`line_search`.
        solver: "direct" or "cg".
    """
    if solver == "direct":
        gradient, precision = linearize(model, x, z)
        factor, _ = inverse_cholesky(precision)
        direction = (factor @ (factor.mT @ gradient.unsqueeze(-1))).squeeze(-1)
    else:
        gradient, product = _implicit(model, x, z)
        direction = _conjugate_gradients(product, gradient)
    return line_search(model, x, z, direction.to(z.dtype), sizes)


def line_search(
    model: Any, x: Tensor, z: Tensor, direction: Tensor, sizes: tuple[float, ...] = STEP_SIZES
) -> Tensor:
    """Returns z + α direction, (B, p); if there are several α, each image takes the one of
    highest log p(x, z)."""
    alpha = z.new_tensor(sizes)
    if len(sizes) > 1:
        # the choice is discrete; validation would refuse a step that is too long
        with torch.no_grad(), pyro.validation_enabled(False):
            log_joint = model.log_joint(x, z + alpha[:, None, None] * direction)
            best = log_joint.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argmax(0)
        alpha = alpha[best].unsqueeze(-1)
    return z + alpha * direction


def linearize(model: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the gradient of log p(x, z) in z, (B, p), and its precision Λ, (B, p, p).

    Both in float64: JᵀJ squares the condition number of J, and in float32 its rounding error
    is as large as the I of the prior from :math:`\sigma \approx 0.03` on.
    """
    if torch.is_grad_enabled():
        return _linearize(model, x, z)
    size = max(1, _MAX_TANGENTS.get(z.device.type, 2048) // z.shape[-1])
    parts = [_linearize(model, *part) for part in zip(x.split(size), z.split(size), strict=True)]
    gradients, precisions = zip(*parts, strict=True)
    return torch.cat(gradients), torch.cat(precisions)


def decoder_jacobian(decoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns g(z), flat (B, D), and its Jacobian (B, D, p), by p forward-mode products.

    The products share one forward pass. In an ``nn.Sequential`` they go through it layer by layer,
    all in one batch, for the cost of decoding p latent vectors; any other decoder is one layer.
    """
    directions = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    output, tangents = z, directions.unsqueeze(1).expand(-1, *z.shape)
    layers: tuple[nn.Module, ...] = (decoder,)
    if type(decoder) is nn.Sequential and not _has_hooks(decoder):
        layers = tuple(decoder)  # children() would pass over a layer's second place
    for layer in layers:
        output, tangents = _through(layer, output, tangents)
    return output.flatten(1), tangents.flatten(2).movedim(0, -1)


#: Layers that are linear in their input but for a bias. Subclasses may be anything.
_AFFINE = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, ConvTranspose2d)


def _through(layer: nn.Module, value: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's value, and the products of its Jacobian there with tangents (p, B, ...)."""
    if type(layer) in _AFFINE and not _has_hooks(layer):
        none = {} if layer.bias is None else {"bias": torch.zeros_like(cast(Tensor, layer.bias))}
        images = torch.func.functional_call(layer, none, tangents.flatten(0, 1))
        return layer(value), images.unflatten(0, tangents.shape[:2])
    if type(layer) is nn.ReLU and not _has_hooks(layer):
        output = layer(value)
        return output, tangents * (output > 0)

    def product(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return _push_forward(layer, value, tangent)

    out_dims: Any = (None, 0)
    output, images = torch.func.vmap(product, 0, out_dims, randomness="same")(tangents)
    return output, images


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _push_forward(decoder: nn.Module, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """g(z) and the product of its Jacobian with a direction."""
    with _OutsidePyro():
        result = torch.func.jvp(decoder, (z,), (direction,))
    return result[0], result[1]


class _OutsidePyro(Messenger):
    """Lets a decoder that is a PyroModule run in torch.func, where its statements about
    parameters fail: they set requires_grad. The model, outside, makes the same statements."""

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) > 1:
            msg["value"], msg["done"] = msg["args"][1], True
        msg["stop"] = True


def inverse_cholesky(precision: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Returns the lower triangular S with :math:`S S^\top = \Lambda^{-1}`, and the jitter.

    A matrix that is not positive definite to rounding gets a jitter on its diagonal, the first of
    1e-12, 1e-10, ... 1e-4 of the mean of its diagonal that is enough; the others are left alone.
    In float64 condition numbers up to 1e15 need none, in float32 up to about 1e6.

    Arguments:
        precision: Λ of each image, (B, p, p).
        images: The numbers of the images, for the error message; by default 0 to B - 1.

    Returns:
        S (B, p, p), and the jitter (B,) as a share of the mean of the diagonal: mostly zero.

    Raises:
        torch.linalg.LinAlgError: If a matrix is not finite, or no jitter helps; names the image.
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


def _residual(model: Any, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of log p(x|z) in the decoder's output, and its curvature, both (B, D)."""
    if model.log_sigma is None:
        mean = output.sigmoid()
        return x.flatten(1) - mean, mean * (1 - mean)
    weight = (-2 * bounded(model.log_sigma)).exp()
    return weight * (x.flatten(1) - output), weight.expand_as(output)


def _linearize(model: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    output, jacobian = decoder_jacobian(model.decoder, z)
    residual, weight = _residual(model, x, output)
    gradient = torch.einsum("bdp,bd->bp", jacobian, residual) - z
    jacobian, weight = jacobian.double(), weight.double()
    eye = torch.eye(z.shape[-1], dtype=torch.float64, device=z.device)
    return gradient.double(), jacobian.mT @ (weight.unsqueeze(-1) * jacobian) + eye


def _implicit(model: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradient of log p(x, z), (B, p), and the product of Λ with vectors (B, p).

    In float64 outside the decoder: all in float32, the rounding errors that the iterations
    gather moved the evidence of a digit by up to 0.02 nats.
    """
    decoder = model.decoder
    with _OutsidePyro():
        result = torch.func.vjp(decoder, z)
    output, pullback = result[0], result[1]
    residual, weight = _residual(model, x, output.flatten(1))

    def product(vector: Tensor) -> Tensor:
        _, image = _push_forward(decoder, z, vector.to(z.dtype))
        return vector + pullback(weight.view_as(image) * image)[0].double()

    return (pullback(residual.view_as(output))[0] - z).double(), product


def _conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Solves Λ v = target, (B, p), for each image to √eps of the dtype, or p + 10 iterations."""
    solution, residual, direction = torch.zeros_like(target), target, target
    square = residual.square().sum(-1, keepdim=True)
    goal = torch.finfo(target.dtype).eps * square.detach()
    for _ in range(target.shape[-1] + 10):
        active = square.detach() > goal  # a converged image stays, whatever its batch does
        if not active.any():
            break
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        length = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        previous, square = square, residual.square().sum(-1, keepdim=True)
        ratio = torch.where(active, square / torch.where(active, previous, 1.0), 0.0)
        direction = residual + ratio * direction
    return solution
