r"""The instance-wise optimum: the Gaussian of highest ELBO of each image."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.batch import Data, to_batch
from pyro_gpvae.evaluation._common import evaluator
from pyro_gpvae.evaluation._modes import laplace_start, log_volume
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.guide import check_program_data

__all__ = ["Covariance", "InstanceOptimum", "check_optimum_options", "climb", "optimise_gaussian"]

Covariance = Literal["diagonal", "full"]

_MIN_STEPS, _FAR_AGE = 6, 1
# a quadratic log joint has curvature 1; around other posteriors the ELBO is flatter
_CURVATURE = 0.25
#: The number of nodes in each dimension of a product rule, by the number of dimensions.
_NODES = {1: 32, 2: 9, 3: 5}


@dataclass(frozen=True)
class InstanceOptimum:
    """The result of the optimisation of B images; tensors have shape (B,), in nats.

    Attributes:
        posterior: The optimised Gaussian of u, batch shape (B,), event shape (n,).
        elbo: Its ELBO, as estimated during the last steps.
        gap: The estimated distance of the ELBO from the nearest local optimum.
        converged: Whether the gap is below the tolerance.
        steps: The number of steps of each image.
        jitter: See :func:`pyro_gpvae.model.curvature.inverse_cholesky`, for the precision at the
        mode.
        tolerance: The tolerance of the ELBO.
        density: The joint density of model and data.
    """

    posterior: TorchDistribution
    elbo: Tensor
    gap: Tensor
    converged: Tensor
    steps: Tensor
    jitter: Tensor
    tolerance: float
    density: JointDensity

    def warn_unless_converged(self, stacklevel: int = 2) -> None:
        """Warns of images that have not converged."""
        left = int((~self.converged).sum())
        if left:
            warnings.warn(
                f"{left} of {len(self.gap)} images are not within {self.tolerance} nats of their "
                f"optimum after {int(self.steps.max())} steps (estimated gap up to "
                f"{float(self.gap.max()):.2g}): raise max_steps",
                stacklevel=stacklevel + 1,
            )


@evaluator
def optimise_gaussian(
    model: PyroProgram,
    data: Data,
    covariance: Covariance = "full",
    *,
    start: Any = None,
    tolerance: float = 0.05,
    max_steps: int = 200,
    num_starts: int = 2,
    chunk_size: int | None = None,
    vectorized: bool | None = None,
) -> InstanceOptimum:
    r"""Finds the Gaussian of highest ELBO of each image, without amortisation.

    .. math:: q^*(u|x) = \arg\max_q E_q[\log p(x, u) - \log q(u)],
        \qquad q = N(\mu, \mathrm{diag}\, s^2) \text{ or } N(\mu, \Sigma)

    for unconstrained latents u, see :class:`pyro_gpvae.model.density.JointDensity`. Newton steps
    with a line search find a mode; an ImageModel uses the Gauss-Newton curvature of its decoder.
    From the Laplace approximation there, mean and covariance :math:`\Sigma = S S^\top` follow the
    natural gradient,

    .. math::
        \mu \leftarrow \mu + \rho_t S a, \quad a = S^\top E_q[\nabla \log p(x, u)], \qquad
        S \leftarrow S e^{\rho_t A / 2}, \quad
        A = I + S^\top E_q[\nabla \log p(x, u)\, \varepsilon^\top], \quad u = \mu + S\varepsilon

    (the symmetric part of A, or its diagonal). Expectations are randomly rotated cubatures of 2p +
    1 points (Monahan and Genz 1997), or products of Gauss-Hermite rules for p < 4. The rotations
    are the same for all images, so a result does not depend on the batch, and the random state is
    not used. The rate :math:`\rho_t = 2/(t + 4)` averages the remaining noise; t is reset while
    successive gradients agree. The cubature of 2p + 1 points is exact for polynomials of degree 5,
    so that the optimum of a decoder that bends within the posterior is lower by some 0.1 nats (p =
    10, a digit).

    Around a Gaussian posterior the gap to the optimum is
    :math:`\frac12 \|a\|^2 + \frac14 \|A\|^2`. Other posteriors are flatter: an image has converged
    when four times this, for the average of the latest gradients, is below the tolerance.

    Arguments:
        model, data: See :func:`pyro_gpvae.log_weights`. All latents must be continuous.
        covariance: "diagonal" or "full".
        start: A guide, whose posterior mean is the start where its q(z|x) is known; else u = 0.
        tolerance: The tolerance of the ELBO of an image, in nats.
        max_steps: The largest number of steps.
        num_starts: The number of starting points of the search for a mode: the start, and others
            at a distance of about 0.5 in each dimension. If there are others, the likeliest draw of
            each of two groups of 256 from the prior (32, if the model runs in a loop) is a start
            too. The mode of highest Laplace evidence is taken.
        chunk_size, vectorized: See :func:`pyro_gpvae.log_weights`. They do not change the result.

    Raises:
        ValueError: If an option is unknown, or a number is not positive.
        torch.linalg.LinAlgError: If the curvature of an image is not finite; names the image.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> optimise_gaussian(model, torch.rand(3, 1, 28, 28)).converged
        tensor([True, True, True])
    """
    check_optimum_options(covariance, tolerance, max_steps, num_starts)
    check_program_data(model, data)
    density = JointDensity(model, to_batch(data, model), vectorized=vectorized)
    loc, factor, jitter = laplace_start(density, covariance, start, num_starts)

    def work(size: int) -> InstanceOptimum:
        begin = loc.clone(), factor.clone(), jitter
        return climb(density, begin, covariance, tolerance, max_steps, size)

    return halving_chunks(work, chunk_size, loc.device)


def check_optimum_options(
    covariance: str, tolerance: float, max_steps: int, num_starts: int
) -> None:
    """Raises ValueError if an option of :func:`optimise_gaussian` is wrong."""
    if covariance not in get_args(Covariance):
        raise ValueError(f"covariance must be one of {get_args(Covariance)}, got {covariance!r}")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    check_at_least(1, max_steps=max_steps, num_starts=num_starts)


def climb(
    density: JointDensity,
    begin: tuple[Tensor, Tensor, Tensor],
    covariance: str,
    tolerance: float,
    max_steps: int,
    chunk_size: int,
) -> InstanceOptimum:
    """Follows the natural gradient from (μ, S, jitter) as in laplace_start; changes μ and S."""
    loc, factor, jitter = begin
    p, diagonal = loc.shape[-1], covariance == "diagonal"
    entropy = log_volume(factor) + p / 2 * math.log(2 * math.pi * math.e)
    elbo, gap = torch.zeros_like(entropy), torch.full_like(entropy, torch.inf)
    mean_a, mean_A = torch.zeros_like(loc), torch.zeros_like(factor)
    steps = torch.zeros(len(loc), dtype=torch.long, device=loc.device)
    age = torch.zeros_like(entropy)  # the t of the rates, which is reset while gradients agree
    eye = torch.eye(p, dtype=loc.dtype, device=loc.device)
    generator = torch.Generator("cpu").manual_seed(0)
    active = torch.arange(len(loc), device=loc.device)
    for t in range(max_steps):
        points, weights = (tensor.to(loc) for tensor in _cubature(p, generator))
        S = factor[active]
        u = loc[active] + torch.einsum("bij,sj->sbi", S, points)
        log_joint, gradient = _gradient(density[active], u, chunk_size)
        check_finite("the gradient of log p(x, z)", gradient, active)
        a = torch.einsum("bji,sbj,s->bi", S, gradient, weights)
        A = eye + torch.einsum("bji,sbj,sk,s->bik", S, gradient, points, weights)
        A = A * eye if diagonal else (A + A.mT) / 2

        share = (2 / (age[active] + 2)).unsqueeze(-1)
        value = weights @ log_joint + entropy[active]
        elbo[active] = torch.lerp(elbo[active], value, share[:, 0])
        mean_a[active] = torch.lerp(mean_a[active], a, share)
        mean_A[active] = torch.lerp(mean_A[active], A, share.unsqueeze(-1))
        gap[active] = _estimate_gap(mean_a[active], mean_A[active])
        steps[active] += 1

        rate = (2 / (age[active] + 4)).unsqueeze(-1)
        # where the average keeps most of a gradient, the optimum is still far away
        far = gap[active] > 0.5 * _estimate_gap(a, A)
        age[active] = torch.where(far, age[active].clamp(max=_FAR_AGE), age[active]) + 1
        a, A = rate * _shorten(a, p), rate.unsqueeze(-1) * _shorten(A, p)
        loc[active] += (S @ a.unsqueeze(-1)).squeeze(-1)
        factor[active] = S @ torch.linalg.matrix_exp(A / 2)
        entropy[active] += A.diagonal(dim1=-2, dim2=-1).sum(-1) / 2
        if t + 1 >= _MIN_STEPS:
            active = active[gap[active] >= tolerance]
        if len(active) == 0:
            break
    posterior = density.posterior(_gaussian(loc, factor, diagonal))
    return InstanceOptimum(posterior, elbo, gap, gap < tolerance, steps, jitter, tolerance, density)


def _gaussian(loc: Tensor, factor: Tensor, diagonal: bool) -> TorchDistribution:
    if diagonal:
        return dist.Normal(loc, factor.diagonal(dim1=-2, dim2=-1)).to_event(1)
    # S is a square root of the covariance, but no longer triangular
    root = torch.linalg.qr(factor.mT).R.mT
    root = root * root.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return dist.MultivariateNormal(loc, scale_tril=root)


def _gradient(density: JointDensity, u: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """log p(x, u) (S, B) and its gradient (S, B, n) for latents u (S, B, n)."""
    size = max(1, chunk_size // len(u))
    parts = [slice(begin, begin + size) for begin in range(0, len(density), size)]
    found = [density[part].gradient(u[:, part]) for part in parts]
    values, gradients = zip(*found, strict=True)
    return torch.cat(values, dim=1), torch.cat(gradients, dim=1)


def _cubature(dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (S, p) and weights for N(0, I), randomly rotated.

    They are a cross of 2p points and the centre, whose radius √(p + 2) gives E‖ε‖² and E‖ε‖⁴
    exactly. In few dimensions rotations do not vary the distances enough, and the points are those
    of a product of Gauss-Hermite rules.
    """
    normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    axes, triangle = torch.linalg.qr(normal)
    axes = axes * triangle.diagonal().sign()  # uniform over rotations
    if dim in _NODES:
        nodes, weights = map(torch.from_numpy, hermegauss(_NODES[dim]))
        grid = torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim)
        weights = torch.cartesian_prod(*[weights / weights.sum()] * dim).reshape(-1, dim).prod(-1)
        return grid @ axes, weights
    axes = axes * math.sqrt(dim + 2)
    points = torch.cat([axes.mT, -axes.mT, torch.zeros_like(axes[:1])])
    weights = points.new_full((2 * dim + 1,), 0.5 / (dim + 2))
    weights[-1] = 2 / (dim + 2)
    return points, weights


def _estimate_gap(a: Tensor, A: Tensor) -> Tensor:
    """The distance of an ELBO of curvature _CURVATURE and this gradient from its maximum, (B,)."""
    return (a.square().sum(-1) / 2 + A.square().sum((-2, -1)) / 4) / _CURVATURE


def _shorten(tensor: Tensor, dim: int) -> Tensor:
    """Limits the norm of each vector or matrix to √p, a step of one standard deviation."""
    norm = tensor.flatten(1).norm(dim=1).clamp(min=math.sqrt(dim))
    return tensor * (math.sqrt(dim) / norm).view(-1, *[1] * (tensor.dim() - 1))
