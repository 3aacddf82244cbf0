r"""VLAE: a Laplace approximation around a refined mean, by Jacobians of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.core._programs import BorrowedModules
from pyro_gpvae.model.curvature import (
    STEP_SIZES,
    _OutsidePyro,
    _push_forward,
    _residual,
    inverse_cholesky,
    line_search,
    linearize,
)

__all__ = [
    "LaplaceGuide",
    "LaplacePosterior",
    "gauss_newton_step",
]

Solver = Literal["direct", "cg"]
Step = Literal["line_search", "damped"]


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
        self._model = BorrowedModules((model,))

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
