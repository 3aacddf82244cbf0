r"""GPVAE: mean and log-scale of the encoder get Gaussian-process corrections."""

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
from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.marginal_posterior import MarginalPosterior

__all__ = ["GPGuide", "GaussianRows"]

Covariance = Literal["diagonal", "full", "point"]
Estimator = Literal["functions", "weights", "marginal"]
Features = Literal["shared", "own"]


class GPGuide(GaussianGuide):
    r"""A random encoder: Gaussian processes with a linear deep kernel around the VAE's encoder.

    .. math::
        f(x)            &= m(x) + W \phi(x) \\
        \log h(x)       &= \log s(x) + U \phi(x) \\
        q(z|x, W, U)    &= N(z; f(x), \mathrm{diag}\, h(x)^2) \\
        q(W, U)         &= \textstyle\prod_j N(w_j; \mu_j, V_j) \prod_j N(u_j; \eta_j, R_j)

    so that, independently for each dimension j given x,

    .. math::
        f_j \sim N(a_j, v_j), \quad a_j = m_j + \mu_j^\top\phi, \quad v_j = \phi^\top V_j \phi,
        \qquad
        \log h_j \sim N(b_j, r_j), \quad b_j = \log s_j + \eta_j^\top\phi, \quad
        r_j = \phi^\top R_j \phi .

    ``W`` and ``U`` are global sites. All three estimators are Pyro programs with these sites:

    * ``"weights"``: f and log h from the one draw of W, U in the minibatch; plain Pyro.
    * ``"functions"``: f and log h drawn for each image from the normals above. The same
      objective, eq. (2); for the standard deviations of W and U, the variance of the gradient is
      100 to 700 times smaller (``experiments/studies/gradient_variance.py``).
    * ``"marginal"``: z from the marginal q(z|x) of eq. (7), scored by its own density. Not
      eq. (2) but a tighter bound for the same q, without the price
      :math:`I(z; (W, U) | x)` of a spread in W and U.

    Where m is linear in the same features and trained jointly, it can absorb μ: the correction
    is only more than spread after a warm start, with a frozen mean, or with its own features.

    References:
        Kim, *Gaussian Process Modeling of Approximate Inference Errors for Variational
        Autoencoders*, 2022, and its supplement, eq. (2) and (7).

    Arguments:
        model: The model, which tells the image shape and the dimension p of z.
        encoder: A module from images (B, C, H, W) to features (B, d).
        covariance: V and R are "diagonal" or "full" for each row, or zero ("point": W and U
            are parameters μ, η without a prior; zero at the start, which is the VAE).
        estimator: See above.
        features: "shared" with the encoder, or its "own": a copy that is trained separately.
        bias: Whether to append a constant 1 to the features.
        scale_features: Whether to divide the features by √d.
        initial_scale: Initial standard deviation of W and U for unscaled features; small, so
            that √v starts well below h.
        warm_start: A trained VAE guide whose encoder is copied. Train it with the model first.
        freeze_mean: Whether m and s stay as they are.
        num_nodes: Quadrature nodes of the marginal posterior, see :class:`MarginalPosterior`.

    Raises:
        ValueError: If an option is unknown, the initial scale is not positive, or ``num_nodes``
            is not a positive integer.
    """

    def __init__(
        self,
        model: Any,
        encoder: nn.Module | None = None,
        *,
        covariance: Covariance = "diagonal",
        estimator: Estimator = "functions",
        features: Features = "shared",
        bias: bool = True,
        scale_features: bool = False,
        initial_scale: float = 1e-3,
        warm_start: GaussianGuide | None = None,
        freeze_mean: bool = False,
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
        if not isinstance(num_nodes, int) or num_nodes < 1:
            raise ValueError(f"num_nodes must be an integer of at least 1, got {num_nodes!r}")
        super().__init__(model, encoder, warm_start=warm_start)
        if freeze_mean:
            self.encoder.requires_grad_(False)
            self.head.requires_grad_(False)
        self.own_encoder = copy.deepcopy(self.encoder) if features == "own" else None
        if self.own_encoder is not None:
            self.own_encoder.requires_grad_(True)
        self.covariance = covariance
        self.estimator = estimator
        self.bias = bias
        self.feature_scale = 1 / math.sqrt(self.feature_dim) if scale_features else 1.0
        self.num_nodes = num_nodes
        shape = (self.latent_dim, self.feature_dim + bias)
        self.W = GaussianRows(*shape, covariance, initial_scale / self.feature_scale)
        self.U = GaussianRows(*shape, covariance, initial_scale / self.feature_scale)

    def global_prior(self) -> dict[str, TorchDistribution]:
        """The priors W, U ~ N(0, I); none if they are points."""
        if self.covariance == "point":
            return {}
        return {"W": self.W.prior(), "U": self.U.prior()}

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        if self.covariance != "point":
            weights = {"W": pyro.sample("W", self.W()), "U": pyro.sample("U", self.U())}
        m, log_s, phi = self._encode(x)
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            if self.estimator == "marginal" or not weights:
                q = self._posterior(m, log_s, phi)
            else:
                if self.estimator == "weights":
                    f = m + _times(weights["W"], phi)
                    log_h = log_s + _times(weights["U"], phi)
                else:
                    f, log_h = self._sample_functions(m, log_s, phi)
                q = dist.Normal(f, bounded(log_h).exp()).to_event(1)
            z: Tensor = pyro.sample("z", q)
        return z

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns the marginal q(z|x) of eq. (7): batch shape (B,), event shape (p,)."""
        return self._posterior(*self._encode(x))

    def diagnostics(self, x: Tensor) -> dict[str, Tensor]:
        """Means over images and dimensions of v/h² and r; KL(q(W,U) ‖ N(0, I)) in nats."""
        _, v, b, r = self.moments(x)
        return {
            "v_over_h2": (v / (2 * b).exp()).mean(),
            "r": r.mean(),
            "kl_weights": self.kl_weights(),
        }

    def uncertainty(self, x: Tensor) -> Tensor:
        """Inference uncertainty Σⱼ vⱼ/hⱼ² + rⱼ of each image, (B,): the paper's claim is that it
        tells how difficult posterior approximation is for an image."""
        _, v, b, r = self.moments(x)
        return (v / (2 * b).exp() + r).sum(-1)

    def expected_kl(self, x: Tensor) -> Tensor:
        r"""The second term of eq. (2) in closed form, in nats, (B,).

        .. math::
            E_{q(W,U)}[KL(q(z|x,W,U) \| N(0, I))]
            = \tfrac12 \sum_j [a_j^2 + v_j + e^{2 b_j + 2 r_j} - 1 - 2 b_j]
        """
        a, v, b, r = self.moments(x)
        return 0.5 * (a.square() + v + (2 * bounded(b + r)).exp() - 1 - 2 * b).sum(-1)

    def kl_weights(self) -> Tensor:
        """KL(q(W, U) ‖ N(0, I)) in nats; eq. (2) divides it by N. Zero for points."""
        if self.covariance == "point":
            return self.head.weight.new_zeros(())
        return sum(
            (kl_divergence(rows(), rows.prior()) for rows in (self.W, self.U)),
            self.head.weight.new_zeros(()),
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns a, v, b, r, each (B, p): mean and variance of f(x) and of log h(x)."""
        m, log_s, phi = self._encode(x)
        a, b = self._means(m, log_s, phi)
        return a, self.W.variance(phi), b, self.U.variance(phi)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m (B, p), log s (B, p) and the features of the kernel (B, d or d + 1)."""
        features, m, log_s = self.encode(x)
        phi = features if self.own_encoder is None else self.own_encoder(x)
        phi = phi * self.feature_scale
        if self.bias:
            phi = nn.functional.pad(phi, (0, 1), value=1.0)
        return m, log_s, phi

    def _means(self, m: Tensor, log_s: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, the means of f(x) and of log h(x)."""
        a, b = m + self.W.mean(phi), log_s + self.U.mean(phi)
        check_finite("the mean of the random encoder", torch.cat([a, b], dim=-1))
        return a, bounded(b)

    def _posterior(self, m: Tensor, log_s: Tensor, phi: Tensor) -> TorchDistribution:
        a, b = self._means(m, log_s, phi)
        if self.covariance == "point":
            return dist.Normal(a, b.exp()).to_event(1)
        q: TorchDistribution = MarginalPosterior(
            a, self.W.deviation(phi), b, self.U.deviation(phi), self.num_nodes
        )
        return q.to_event(1)

    def _sample_functions(self, m: Tensor, log_s: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and log h(x) of each image. W and U imply them: they cost nothing of their own."""
        a, b = self._means(m, log_s, phi)
        q_f = dist.Normal(a, self.W.deviation(phi)).to_event(1)
        q_log_h = dist.Normal(b, self.U.deviation(phi)).to_event(1)
        with poutine.mask(mask=False):
            f = pyro.sample("f", q_f, infer={"is_auxiliary": True})
            log_h = pyro.sample("log_h", q_log_h, infer={"is_auxiliary": True})
        return f, log_h


class GaussianRows(nn.Module):
    r"""Distribution of a random matrix (p, d) with independent Gaussian rows :math:`N(\mu_j, V_j)`.

    Arguments:
        num_rows: p.
        num_columns: d.
        covariance: Each V is "diagonal", "full", or zero ("point").
        initial_scale: Initial standard deviation of the entries; they start with mean zero.
    """

    def __init__(
        self, num_rows: int, num_columns: int, covariance: Covariance, initial_scale: float
    ) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(num_rows, num_columns))
        log_scale = torch.full((num_rows, num_columns), math.log(initial_scale))
        self.log_scale = None if covariance == "point" else nn.Parameter(log_scale)
        self.lower = (
            nn.Parameter(torch.zeros(num_rows, num_columns, num_columns))
            if covariance == "full"
            else None
        )

    def forward(self) -> TorchDistribution:
        """The distribution of the matrix, event shape (p, d)."""
        if self.lower is None:
            return dist.Normal(self.loc, self.scale).to_event(2)
        return dist.MultivariateNormal(self.loc, scale_tril=self._scale_tril()).to_event(1)

    def prior(self) -> TorchDistribution:
        """N(0, I), in the same family, so that the KL divergence is analytic."""
        zero = torch.zeros_like(self.loc)
        if self.lower is None:
            return dist.Normal(zero, torch.ones_like(zero)).to_event(2)
        eye = torch.eye(zero.shape[1], dtype=zero.dtype, device=zero.device)
        return dist.MultivariateNormal(zero, scale_tril=eye).to_event(1)

    def mean(self, phi: Tensor) -> Tensor:
        r"""Mean :math:`\mu_j^\top \phi` of the product with features (B, d): shape (B, p)."""
        return phi @ self.loc.mT

    def variance(self, phi: Tensor) -> Tensor:
        r"""Variance :math:`\phi^\top V_j \phi` of the product: shape (B, p)."""
        if self.lower is None:
            return phi.square() @ self.scale.square().mT
        return torch.einsum("bd,pde->bpe", phi, self._scale_tril()).square().sum(-1)

    def deviation(self, phi: Tensor) -> Tensor:
        """Standard deviation of the product: shape (B, p); positive also where φ is zero."""
        variance = self.variance(phi)
        return (variance + torch.finfo(variance.dtype).tiny).sqrt()

    @property
    def scale(self) -> Tensor:
        """Standard deviations (p, d), or the diagonal of the Cholesky factors of V."""
        if self.log_scale is None:
            return torch.zeros_like(self.loc)
        return bounded(self.log_scale).exp()

    def _scale_tril(self) -> Tensor:
        assert self.lower is not None
        # in units of the small scales: otherwise one step of an optimiser is enough to make the
        # factor so ill-conditioned that the density of W overflows
        eye = torch.eye(self.lower.shape[-1], dtype=self.lower.dtype, device=self.lower.device)
        return self.scale.unsqueeze(-1) * (self.lower.tril(-1) + eye)


def _times(weights: Tensor, phi: Tensor) -> Tensor:
    """W φ for weights (p, d), or (K, 1, p, d) where particles are vectorised, and φ (B, d)."""
    product = phi @ weights.mT
    return product if weights.dim() == 2 else product.squeeze(-3)
