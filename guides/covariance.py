r"""Gaussians with correlated dimensions, in one pass of an encoder: full, and low-rank."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    register_kl,
)

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import call_network

__all__ = ["FullCovarianceGuide", "LowRankGuide"]


class FullCovarianceGuide(GaussianGuide):
    r"""An amortised Gaussian with full covariance, by its Cholesky factor.

    .. math:: q(z|x) = N(z; m(x), L(x) L(x)^\top), \qquad
        L = \mathrm{diag}(s) + \mathrm{lower}(\mathrm{Linear}(\phi(x)))

    The p(p − 1)/2 elements below the diagonal start at zero, so that the guide starts as the VAE.
    For p = 1 it is the VAE. It is trained with the analytic KL.

    Arguments:
        model, encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = FullCovarianceGuide(ImageModel((1, 28, 28), latent_dim=10))
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 10, 10])
    """

    def __init__(
        self,
        model: ImageModel,
        encoder: nn.Module | None = None,
        *,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        super().__init__(model, encoder, warm_start=warm_start)
        size = self.latent_dim * (self.latent_dim - 1) // 2
        self.lower = nn.Linear(self.feature_dim, size) if size else None
        if self.lower is not None:
            nn.init.zeros_(self.lower.weight)
            nn.init.zeros_(self.lower.bias)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        if self.lower is None:
            return super().posterior(x)
        features, loc, log_scale = self.encode(x)
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, -1, device=loc.device)
        scale_tril = torch.diag_embed(log_scale.exp())
        scale_tril[..., rows, columns] = call_network(self.lower, features)
        q = dist.MultivariateNormal(loc, scale_tril=scale_tril)
        check_finite("the variance", q.variance)
        return q


class LowRankGuide(GaussianGuide):
    r"""An amortised Gaussian whose covariance is diagonal plus rank r.

    .. math:: q(z|x) = N(z; m(x), D(x) + F(x) F(x)^\top), \qquad
        D = \mathrm{diag}(s^2), \quad F = \mathrm{diag}(s)\, \mathrm{Linear}(\phi(x))

    with F of shape (p, r). Rank 0 is the VAE. F starts small but not at zero, which is a saddle
    point. The guide is trained with the analytic KL. If F is so large that
    :math:`I + F^\top D^{-1} F` is singular to rounding, D is increased until it is not.

    References:
        Ong, Nott and Smith, *Gaussian Variational Approximation with a Factor Covariance
        Structure*, 2018. https://arxiv.org/abs/1701.03208

    Arguments:
        model, encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.
        rank: The number r of columns of F, 0 to p.

    Raises:
        ValueError: If the rank is not from 0 to p.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = LowRankGuide(ImageModel((1, 28, 28), latent_dim=10), rank=2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).cov_factor.shape
        torch.Size([5, 10, 2])
    """

    def __init__(
        self,
        model: ImageModel,
        rank: int = 2,
        encoder: nn.Module | None = None,
        *,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        if not isinstance(rank, int) or not 0 <= rank <= model.latent_dim:
            raise ValueError(
                f"rank must be an integer from 0 to p = {model.latent_dim}, got {rank!r}"
            )
        super().__init__(model, encoder, warm_start=warm_start)
        self.rank = rank
        self.factor = nn.Linear(self.feature_dim, self.latent_dim * rank) if rank else None

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        if self.factor is None:
            return super().posterior(x)
        features, loc, log_scale = self.encode(x)
        scale = log_scale.exp()
        factor = call_network(self.factor, features).unflatten(-1, (self.latent_dim, self.rank))
        # I + GᵀG with G = D^(-1/2) F is factorised. Rounding makes it singular if tr GᵀG is near
        # 1/eps, so D grows with what exceeds a hundredth of that. An ordinary q never does.
        limit = 0.01 / torch.finfo(factor.dtype).eps
        jitter = (factor.square().sum((-2, -1)) / limit - 1).clamp(min=0).unsqueeze(-1)
        variance = scale.square() * (1 + jitter)
        q = LowRankNormal(loc, scale.unsqueeze(-1) * factor, variance)
        check_finite("the variance", q.variance)
        return q


class LowRankNormal(dist.LowRankMultivariateNormal):
    r"""A normal distribution with covariance diag(D) + F Fᵀ, without host synchronisation.

    The constructor of torch's class checks that :math:`I + F^\top D^{-1} F` has a Cholesky
    factor, for which the host has to wait for a GPU. :class:`LowRankGuide` makes sure that it has.

    Arguments:
        loc: The mean (..., p).
        cov_factor: F (..., p, r).
        cov_diag: D (..., p), positive.
    """

    def __init__(
        self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: bool | None = None
    ) -> None:
        shape = torch.broadcast_shapes(loc.shape, cov_diag.shape, cov_factor.shape[:-1])
        self.loc, self.cov_diag = loc.expand(shape), cov_diag.expand(shape)
        self.cov_factor = cov_factor.expand(*shape, -1)
        self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag = cov_factor, cov_diag
        product = (cov_factor.mT / cov_diag.unsqueeze(-2)) @ cov_factor
        eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
        self._capacitance_tril = torch.linalg.cholesky_ex(eye + product).L
        TorchDistribution.__init__(self, shape[:-1], shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: LowRankNormal | None = None) -> LowRankNormal:
        new: LowRankNormal = self._get_checked_instance(LowRankNormal, _instance)  # type: ignore[no-untyped-call]
        super().expand(batch_shape, _instance=new)  # type: ignore[no-untyped-call]
        return new


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
@register_kl(LowRankMultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_gaussian_independent_normal(
    q: MultivariateNormal | LowRankMultivariateNormal, p: Independent[Any]
) -> Tensor:
    """KL(q ‖ p) for independent normals p, which neither torch nor Pyro has in closed form.

    Only the mean, the variances and the entropy of q enter. With it ``TraceMeanField_ELBO`` is
    analytic for the guides of this file.
    """
    normal = p.base_dist
    if not isinstance(normal, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    square = (q.variance + (q.mean - normal.mean).square()) / normal.variance
    cross_entropy = 0.5 * (square + (2 * math.pi * normal.variance).log()).sum(-1)
    entropy: Tensor = q.entropy()  # type: ignore[no-untyped-call]
    return cross_entropy - entropy
