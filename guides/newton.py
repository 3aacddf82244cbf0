r"""Newton: learned curvature preconditions gradient steps from the encoder's mean to the mode."""

from __future__ import annotations

from typing import Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from guides.covariance import FullCovarianceGuide
from guides.gaussian import GaussianGuide
from guides.refinement import RefinementELBO, sample_refined
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.core._programs import BorrowedModules
from pyro_gpvae.model.elbo import Objective
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.networks import call_network

__all__ = ["NewtonGuide"]

Covariance = Literal["full", "diagonal"]

# the longest whitened gradient that a step uses, in posterior standard deviations
_MAX_NORM = 10.0
# the logit of ρ after a warm start: a step is then at most half a posterior standard deviation
_WARM_LOGIT = -3.0
# the outputs of the networks change this much faster than their weights
_GAIN = 4.0
# the largest a and b
_BOUND = 3.0


class NewtonGuide(FullCovarianceGuide):
    r"""T Newton steps from the encoder's mean, with an amortised inverse Hessian.

    .. math::
        z_0 &= m(x), \qquad
        w_t = \mathrm{clip}\bigl(L(z_t)^\top \nabla_z \log p(x, z)|_{z = z_t}\bigr), \qquad
        L(z) = \mathrm{diag}(e^{\ell + a(z)})\, (I + \mathrm{lower}(b(z))) \\
        z_{t+1} &= z_t + L(z_t)\, \bigl(\rho(w_t, z_t) \odot w_t\bigr), \qquad
        q(z|x) = N(z; z_T, L(z_T) L(z_T)^\top)

    Near the mode the covariance of the posterior is the inverse Hessian of −log p(x, z), so that
    :math:`\Sigma = L L^\top` preconditions the gradient as Newton's method does, and in the
    coordinates of L all directions have curvature 1. The Gauss-Newton curvature of log p(x|z)
    depends on the decoder and z, but not on x. A network therefore predicts a and b, which are
    p and p(p − 1)/2 numbers between −3 and 3, from z alone. (Without these bounds training can make
    L so close to singular that log q is rounding noise.) The network is evaluated again after every
    step, at the cost of a few matrix products. The s(x) of the encoder is only the initial value of
    ℓ. A second network returns the rate ρ of each whitened direction, between 0 and 1; it learns to
    shorten steps that are too long. The norm of the whitened gradient is bounded by 10 posterior
    standard deviations.
    Before training L is diagonal, and ρ is ½ for a random encoder and 0.05 after a warm start: the
    s(x) of a VAE that was hardly trained is too wide, and long steps by it would lose what the VAE
    has learned.

    Nothing is sampled inside the steps. Training differentiates through them, and moves the starts
    of the steps towards their end by :class:`guides.refinement.RefinementELBO`. T = 0 is
    :class:`guides.FullCovarianceGuide` (the VAE with covariance="diagonal"). T can be changed after
    training (``guide.num_steps = 2``), as all steps have the same networks. The result of an image
    does not depend on the others in its batch.

    Cost: each step decodes one latent vector per image, with a vector-Jacobian product with
    respect to z only. That is about 2 passes of the decoder for a step, and one more with the
    safeguard.

    References:
        Marino, Yue and Mandt, *Iterative Amortized Inference*, 2018, for learned steps.
        https://arxiv.org/abs/1807.09356
        Park, Kim and Kim, *Variational Laplace Autoencoders*, 2019, for exact Gauss-Newton steps.
        https://proceedings.mlr.press/v97/park19a.html

    Arguments:
        model: The model, whose ``log_joint(x, z)`` is differentiated. Its parameters are not among
            those of the guide.
        num_steps: The number T of steps, at least 0. A guide that was built with T = 0 has no
            networks for steps.
        encoder: A module from images (B, C, H, W) to features (B, d).
        covariance: That of q. With "diagonal" the steps still use the full matrix, but
            :math:`q = N(z_T, \mathrm{diag}\, s(x)^2)` with the s(x) of the
            encoder.
        safeguard: Whether an image takes a step only if it raises log p(x, z).
        hidden: The width of the two hidden layers of both networks.
        warm_start: A trained guide of this family, whose encoder is copied.

    Raises:
        ValueError: If num_steps is negative, hidden is less than 1, the covariance is unknown, or
            the model has no ``log_joint``.
        NonFiniteError: From :meth:`posterior`, if a curvature, gradient or mean is not finite;
            names the images.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = NewtonGuide(ImageModel((1, 28, 28), latent_dim=10), 1)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).covariance_matrix.shape
        torch.Size([5, 10, 10])
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int = 1,
        encoder: nn.Module | None = None,
        *,
        covariance: Covariance = "full",
        safeguard: bool = False,
        hidden: int = 256,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(0, num_steps=num_steps)
        check_at_least(1, hidden=hidden)
        if covariance not in get_args(Covariance):
            raise ValueError(
                f"covariance must be one of {get_args(Covariance)}, got {covariance!r}"
            )
        if not callable(getattr(model, "log_joint", None)):
            raise ValueError(
                f"{type(self).__name__} differentiates model.log_joint(x, z), which the model "
                f"{type(model).__name__} does not have"
            )
        super().__init__(model, encoder, warm_start=warm_start)
        p = self.latent_dim
        self.num_steps = num_steps
        self.covariance = covariance
        self.safeguard = safeguard
        self._model = BorrowedModules((model,))
        self.curvature: nn.Module | None = None
        self.rate: nn.Module | None = None
        if num_steps or covariance == "diagonal":
            self.lower = None  # with T = 0, the VAE
        if num_steps:
            self.curvature = _network(p, hidden, p + p * (p - 1) // 2)
            start = 0.0 if warm_start is None else _WARM_LOGIT / _GAIN
            self.rate = _network(3 * p, hidden, p, start)
            with torch.no_grad():  # ℓ starts as log s of an empty image; it varies little with x
                empty = self.head.weight.new_zeros(1, *model.image_shape)
                log_scale = self.encode(empty)[2].squeeze(0)
            self.log_scale = nn.Parameter(log_scale)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        return self._refine(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return sample_refined(*self._refine(x))

    def elbo(self) -> Objective:
        """Returns :class:`guides.refinement.RefinementELBO`, or with T = 0 that of Gaussians."""
        return RefinementELBO() if self.num_steps else super().elbo()

    def _refine(self, x: Tensor) -> tuple[TorchDistribution, list[Tensor]]:
        """Returns q(z|x), and the points z_0, ..., z_{T-1} where the steps start."""
        if not self.num_steps:
            return super().posterior(x), []
        _, z, log_scale = self.encode(x)
        factor = self.factor(z)
        starts = []
        for t in range(1, self.num_steps + 1):
            starts.append(z)
            z = self.step(x, z, factor)
            check_finite(f"the mean after step {t}", z)
            if t < self.num_steps or self.covariance == "full":
                factor = self.factor(z)
        if self.covariance == "diagonal":
            return dist.Normal(z, log_scale.exp()).to_event(1), starts
        return dist.MultivariateNormal(z, scale_tril=factor), starts

    def factor(self, z: Tensor) -> Tensor:
        """Returns L(z), the Cholesky factor (B, p, p) of the covariance predicted at z (B, p)."""
        if self.curvature is None:
            raise ValueError("a guide that was built with num_steps=0 has no step to take")
        p = self.latent_dim
        output = _BOUND * torch.tanh(_GAIN / _BOUND * call_network(self.curvature, z))
        rows, columns = torch.tril_indices(p, p, -1, device=z.device)
        unit = torch.diag_embed(torch.ones_like(z))
        unit[..., rows, columns] = output[..., p:]
        factor = bounded(self.log_scale + output[..., :p]).exp().unsqueeze(-1) * unit
        check_finite("the predicted curvature", factor.flatten(1))
        return factor

    def step(self, x: Tensor, z: Tensor, factor: Tensor) -> Tensor:
        """Returns the latents (B, p) after one step from z (B, p).

        Arguments:
            x: Images (B, C, H, W).
            z: Latents (B, p).
            factor: L (B, p, p).
        """
        assert self.rate is not None
        log_joint, gradient = self._gradient(x, z)
        check_finite("the gradient of log p(x, z)", gradient)
        white = (factor.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        norm = torch.linalg.vector_norm(white, dim=-1, keepdim=True)
        short = white * (_MAX_NORM / norm.clamp(min=_MAX_NORM))
        inputs = torch.cat([short, white.asinh(), z], dim=-1)
        rate = torch.sigmoid(_GAIN * call_network(self.rate, inputs))
        moved = z + (factor @ (rate * short).unsqueeze(-1)).squeeze(-1)
        if not self.safeguard:
            return moved
        (model,) = self._model
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            rises = model.log_joint(x, moved) > log_joint  # False also for NaN
        return torch.where(rises.unsqueeze(-1), moved, z)

    def _gradient(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p(x, z) (B,) and its gradient in z (B, p), differentiable in training."""
        (model,) = self._model
        training = torch.is_grad_enabled()
        # the sites of a step are not sites of the guide
        with torch.enable_grad(), poutine.block(), pyro.validation_enabled(False):
            z = z if training and z.requires_grad else z.detach().requires_grad_()
            log_joint = model.log_joint(x, z)
            # images do not interact, so the gradient of the sum holds the gradient of each
            (gradient,) = torch.autograd.grad(log_joint.sum(), z, create_graph=training)
        return log_joint.detach(), gradient


def _network(inputs: int, hidden: int, outputs: int, start: float = 0.0) -> nn.Sequential:
    """Returns a network with two hidden layers whose outputs all equal ``start`` at first."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last
    )
