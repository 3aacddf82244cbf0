r"""IAF: inverse autoregressive flow, after the VAE's Gaussian."""

from __future__ import annotations

import warnings

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from guides._flows import FlowPosterior
from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded

__all__ = ["IAFGuide"]


class IAFGuide(GaussianGuide):
    r"""A Gaussian that T gated autoregressive steps transform.

    .. math::
        z_0 &\sim N(m(x), \mathrm{diag}\, s(x)^2) \\
        z_t &= g_t \odot z_{t-1} + (1 - g_t) \odot \mu_t, \qquad
            (\mu_t, \mathrm{logit}\, g_t) = \mathrm{MADE}_t(z_{t-1}, \phi(x)) \\
        \log q(z_T|x) &= \log N(z_0; m, \mathrm{diag}\, s^2) - \textstyle\sum_{t,j} \log g_{tj}

    In the masked network, component j of :math:`\mu_t` and :math:`g_t` depends only on the
    components of :math:`z_{t-1}` before j and on the context, which is the features
    :math:`\phi(x)`. It has one hidden layer (ReLU) and a linear skip connection. The first
    components have few hidden units (3 of 256 if p = 50); if these are dead, the context still
    reaches the output by the skip connection. The order of the components is reversed from step
    to step. Gates start near sigmoid(2) = 0.88. T = 0 is the VAE.

    A sample and its density cost T passes of the networks, and the density of any other z p T
    passes. The steps always run in the precision of their parameters, because the inverse has to
    undo them. A warm start copies the VAE's encoder, but the steps start at random and change its
    mean, so train some epochs before comparing.

    References:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
        https://arxiv.org/abs/1606.04934

    Arguments:
        model, encoder, warm_start: See :class:`guides.gaussian.GaussianGuide`.
        num_steps: The number T of steps.
        hidden_dim: Hidden units of each step's network, at least p.

    Raises:
        ValueError: If T is negative, or the network is narrower than p.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = IAFGuide(ImageModel((1, 28, 28), latent_dim=10), num_steps=2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int = 1,
        encoder: nn.Module | None = None,
        *,
        hidden_dim: int = 256,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(0, num_steps=num_steps)
        if hidden_dim < model.latent_dim:
            raise ValueError(
                f"hidden_dim must be at least the model's latent_dim, {model.latent_dim}, so that "
                f"every component can be masked on its own, got {hidden_dim}"
            )
        # the encoder is initialised first, so that under a seed it equals the VAE's
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_steps = num_steps
        order = torch.arange(self.latent_dim)  # Pyro's default is a random order
        with warnings.catch_warnings():
            # with p = 1 the network depends on the context alone, which is intended
            warnings.filterwarnings("ignore", "ConditionalAutoRegressiveNN input_dim = 1")
            self.steps = nn.ModuleList(
                ConditionalAffineAutoregressive(
                    _MaskedNetwork(
                        self.latent_dim,
                        self.feature_dim,
                        [hidden_dim],
                        permutation=order.flip(0) if step % 2 else order,  # type: ignore[arg-type]
                        skip_connections=True,
                    ),
                    stable=True,
                    sigmoid_bias=2.0,
                )
                for step in range(num_steps)
            )

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        if self.num_steps == 0:
            return super().posterior(x)
        features, loc, log_scale = self.encode(x)
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        return FlowPosterior(base, self.steps, features)


class _MaskedNetwork(ConditionalAutoRegressiveNN):
    """Pyro's network with bounded gates: a closed gate would lose z and its density."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        mu, logit = super().forward(x, context)
        return mu, bounded(logit)
