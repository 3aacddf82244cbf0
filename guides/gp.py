r"""GPVAE: Gaussian-process corrections of the encoder's mean and log-scale, eq. (2) and (7)."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.networks import call_network

__all__ = ["GPGuide", "GaussianRows"]

Covariance = Literal["diagonal", "full"]
Estimator = Literal["functions", "weights", "marginal"]
Features = Literal["shared", "own"]


class GPGuide(GaussianGuide):
    r"""A random encoder: the VAE's encoder plus Gaussian processes with a linear deep kernel.

    .. math::
        f(x)            &= m(x) + W \phi(x) \\
        \log h(x)       &= \log s(x) + U \phi(x) \\
        q(z|x, W, U)    &= N(z; f(x), \mathrm{diag}\, h(x)^2) \\
        q(W, U)         &= \textstyle\prod_j N(w_j; \mu_j, V_j) \prod_j N(u_j; \eta_j, R_j)

    The features :math:`\phi(x)` are the encoder's last hidden layer and a constant 1 (the bias).
    Given x, the dimensions j are independent, and

    .. math::
        f_j \sim N(a_j, v_j), \quad a_j = m_j + \mu_j^\top\phi, \quad v_j = \phi^\top V_j \phi,
        \qquad
        \log h_j \sim N(b_j, r_j), \quad b_j = \log s_j + \eta_j^\top\phi, \quad
        r_j = \phi^\top R_j \phi .

    The training objective is eq. (2), with N the number of training images:

    .. math::
        E_{q(z|x)}[\log p(x|z)] - E_{q(W,U)}[KL(q(z|x,W,U) \| p(z))]
        - \tfrac1N KL(q(W,U) \| N(0, I))

    ``W`` and ``U`` are global sites. Each estimator is a Pyro program with these sites:

    * ``"weights"`` computes f and log h from one draw of W and U for the minibatch (plain Pyro).
    * ``"functions"`` draws f and log h for each image from the normals above. It estimates the
      same objective: by eq. (6) of the supplement, the expectations over W and U are expectations
      over f and log h of each image. The variance of the gradient with respect to the standard
      deviations of W and U is 100 to 700 times smaller
      (``experiments/studies/gradient_variance.py``).
    * ``"marginal"`` draws z from the marginal q(z|x) of eq. (7) and scores it by that density.
      It estimates a tighter bound than eq. (2) for the same q, because the mutual information
      :math:`I(z; (W, U) | x)` is not subtracted.

    With W = U = 0 the guide is the VAE. If m is linear in the same features and trained jointly,
    it can absorb μ. The correction then adds only a spread, unless the guide has a warm start or
    features of its own.

    References:
        Kim, *Gaussian Process Modeling of Approximate Inference Errors for Variational
        Autoencoders*, 2022, and its supplement, eq. (2) and (7).

    Arguments:
        model, encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.
        covariance: Whether V and R of each row are "diagonal" or "full".
        estimator: One of the three estimators above.
        features: "shared" uses the features of the encoder; "own" uses those of a copy of it,
            which is trained separately.
        initial_scale: The initial standard deviation of W and U. It must be so small that √v
            starts well below h.
        num_nodes: The number of quadrature nodes of the marginal posterior, see
            :class:`pyro_gpvae.model.marginal_posterior.MarginalPosterior`.

    Raises:
        ValueError: If an option is unknown, the initial scale is not positive, or ``num_nodes``
            is not a positive integer.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = GPGuide(ImageModel((1, 28, 28), latent_dim=10))
        >>> guide.W().event_shape  # 256 features and the bias
        torch.Size([10, 257])
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        encoder: nn.Module | None = None,
        *,
        covariance: Covariance = "diagonal",
        estimator: Estimator = "functions",
        features: Features = "shared",
        initial_scale: float = 1e-3,
        warm_start: GaussianGuide | None = None,
        num_nodes: int = 32,
    ) -> None:
        for name, value, choices in (
            ("covariance", covariance, Covariance),
            ("estimator", estimator, Estimator),
            ("features", features, Features),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
        if not initial_scale > 0:
            raise ValueError(f"initial_scale must be positive, got {initial_scale}")
        check_at_least(1, num_nodes=num_nodes)
        super().__init__(model, encoder, warm_start=warm_start)
        self.own_encoder = copy.deepcopy(self.encoder) if features == "own" else None
        if self.own_encoder is not None:
            self.own_encoder.requires_grad_(True)
        self.covariance = covariance
        self.estimator = estimator
        self.num_nodes = num_nodes
        shape = self.latent_dim, self.feature_dim + 1
        self.W = GaussianRows(*shape, covariance, initial_scale)
        self.U = GaussianRows(*shape, covariance, initial_scale)

    def global_prior(self) -> dict[str, TorchDistribution]:
        """Returns the priors W, U ~ N(0, I)."""
        return {"W": self.W.prior(), "U": self.U.prior()}

    def forward(self, x: Tensor) -> Tensor:
        W, U = pyro.sample("W", self.W()), pyro.sample("U", self.U())
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            if self.estimator == "marginal":
                q = self.posterior(x)
            else:
                f, log_h = self._sample_functions(x, W, U)
                q = dist.Normal(f, bounded(log_h).exp()).to_event(1)
            z: Tensor = pyro.sample("z", q)
        return z

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns the marginal q(z|x) of eq. (7): batch shape (B,), event shape (p,)."""
        a, v, b, r = self.moments(x)
        q: TorchDistribution = MarginalPosterior(a, v.sqrt(), b, r.sqrt(), self.num_nodes)
        return q.to_event(1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns a, v, b, r, each (B, p): the mean and variance of f(x), then of log h(x)."""
        m, log_s, phi = self._encode(x)
        a, b = m + self.W.mean(phi), log_s + self.U.mean(phi)
        check_finite("the mean of the random encoder", torch.cat([a, b], dim=-1))
        return a, self.W.variance(phi), bounded(b), self.U.variance(phi)

    def expected_kl(self, x: Tensor) -> Tensor:
        r"""Returns the second term of eq. (2) in closed form, in nats, (B,).

        .. math::
            E_{q(W,U)}[KL(q(z|x,W,U) \| N(0, I))]
            = \tfrac12 \sum_j [a_j^2 + v_j + e^{2 b_j + 2 r_j} - 1 - 2 b_j]
        """
        a, v, b, r = self.moments(x)
        return 0.5 * (a.square() + v + (2 * bounded(b + r)).exp() - 1 - 2 * b).sum(-1)

    def kl_weights(self) -> Tensor:
        """Returns KL(q(W, U) ‖ N(0, I)) in nats, shape (). Eq. (2) divides it by N."""
        kl_w, kl_u = (kl_divergence(rows(), rows.prior()) for rows in (self.W, self.U))
        return kl_w + kl_u

    def uncertainty(self, x: Tensor) -> Tensor:
        """Returns the inference uncertainty Σⱼ vⱼ/hⱼ² + rⱼ of each image, (B,).

        The paper proposes it as a measure of how difficult posterior approximation is.
        """
        _, v, b, r = self.moments(x)
        return (v / (2 * b).exp() + r).sum(-1)

    def diagnostics(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the means over images and dimensions of v/h² and r, and KL(q(W,U) ‖ N(0, I))."""
        _, v, b, r = self.moments(x)
        ratio = (v / (2 * b).exp()).mean()
        return {"v_over_h2": ratio, "r": r.mean(), "kl_weights": self.kl_weights()}

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns m (B, p), log s (B, p) and the features φ of the kernel (B, d + 1)."""
        features, m, log_s = self.encode(x)
        if self.own_encoder is not None:
            features = call_network(self.own_encoder, x)
        return m, log_s, nn.functional.pad(features, (0, 1), value=1.0)

    def _sample_functions(self, x: Tensor, W: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(x) and log h(x) of each image: by W and U, or drawn from their own normals.

        These sites have no counterpart in the model, and W and U already determine them, so their
        densities are masked out of the objective.
        """
        if self.estimator == "weights":
            m, log_s, phi = self._encode(x)
            return m + _times(W, phi), log_s + _times(U, phi)
        a, v, b, r = self.moments(x)
        auxiliary: Any = {"is_auxiliary": True}
        with poutine.mask(mask=False):
            f = pyro.sample("f", dist.Normal(a, v.sqrt()).to_event(1), infer=auxiliary)
            log_h = pyro.sample("log_h", dist.Normal(b, r.sqrt()).to_event(1), infer=auxiliary)
        return f, log_h


class GaussianRows(nn.Module):
    r"""Distribution of a random matrix (p, d) with independent Gaussian rows.

    .. math:: q(W) = \textstyle\prod_j N(w_j; \mu_j, V_j)

    Arguments:
        num_rows: The number p of rows.
        num_columns: The number d of columns.
        covariance: Whether each :math:`V_j` is "diagonal" or "full".
        initial_scale: The initial standard deviation of the entries. Their mean starts at zero.
    """

    def __init__(
        self, num_rows: int, num_columns: int, covariance: Covariance, initial_scale: float
    ) -> None:
        super().__init__()
        shape = num_rows, num_columns
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.full(shape, math.log(initial_scale)))
        lower = nn.Parameter(torch.zeros(*shape, num_columns)) if covariance == "full" else None
        self.lower = lower

    def forward(self) -> TorchDistribution:
        """Returns the distribution of the matrix, event shape (p, d)."""
        if self.lower is None:
            return dist.Normal(self.loc, self.scale).to_event(2)
        scale_tril = self._scale_tril(self.lower)
        return dist.MultivariateNormal(self.loc, scale_tril=scale_tril).to_event(1)

    def prior(self) -> TorchDistribution:
        """Returns N(0, I) in the same family, so that the KL divergence is analytic."""
        zero = torch.zeros_like(self.loc)
        if self.lower is None:
            return dist.Normal(zero, torch.ones_like(zero)).to_event(2)
        eye = torch.eye(zero.shape[1], dtype=zero.dtype, device=zero.device)
        return dist.MultivariateNormal(zero, scale_tril=eye).to_event(1)

    def mean(self, phi: Tensor) -> Tensor:
        r"""Returns the mean :math:`\mu_j^\top \phi` of :math:`W\phi`, (B, p), for φ (B, d)."""
        return phi @ self.loc.mT

    def variance(self, phi: Tensor) -> Tensor:
        r"""Returns the variance :math:`\phi^\top V_j \phi` of :math:`W\phi`, (B, p).

        It is positive: the last feature is 1, and only the diagonal of the Cholesky factor
        multiplies it.
        """
        if self.lower is None:
            return phi.square() @ self.scale.square().mT
        return torch.einsum("bd,pde->bpe", phi, self._scale_tril(self.lower)).square().sum(-1)

    @property
    def scale(self) -> Tensor:
        """Standard deviations (p, d), or the diagonal of the Cholesky factors of V."""
        return bounded(self.log_scale).exp()

    def _scale_tril(self, lower: Tensor) -> Tensor:
        """Returns the Cholesky factor of each V, (p, d, d).

        The elements below the diagonal are in units of the small scales. Otherwise one step of an
        optimiser makes the factor so ill-conditioned that the density of W overflows.
        """
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return self.scale.unsqueeze(-1) * (lower.tril(-1) + eye)


def _times(weights: Tensor, phi: Tensor) -> Tensor:
    """Returns W φ for weights (p, d), or (K, 1, p, d) if particles are vectorised, and φ (B, d)."""
    product = phi @ weights.mT
    return product if weights.dim() == 2 else product.squeeze(-3)
