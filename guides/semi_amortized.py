r"""SA: gradient steps on the ELBO of each image refine the encoder's Gaussian."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.core._programs import BorrowedModules
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded

__all__ = ["RefiningGuide", "SemiAmortizedGuide"]

# the rate of log s relative to that of the mean, ρ
_LOG_SCALE_RATE = 0.1
# a step of less than 1/256 of the largest is not worth another pass of the decoder
_MAX_HALVINGS = 8


class RefiningGuide(GaussianGuide):
    r"""A Gaussian that starts from the encoder and is refined in k steps for each image.

    .. math:: \lambda_0 = (m(x), \log s(x)), \qquad
        \lambda_{t+1} = \mathrm{step}(x, \lambda_t, \nabla_\lambda L(\lambda_t; x)), \qquad
        q(z|x) = N(z; \lambda_k)

    with the ELBO of one image, estimated with fresh noise in each step:

    .. math:: L(m, \log s; x) = \tfrac1S \textstyle\sum_i \log p(x | m + s \epsilon_i)
        - KL(N(m, \mathrm{diag}\, s^2) \| p(z)), \qquad \epsilon_i \sim N(0, I).

    Subclasses define :meth:`step`. The refinement runs once for each image, whatever the number of
    samples that are then drawn from q. It works inside ``torch.no_grad()``; outside it, gradients
    flow through the steps to the encoder and the decoder. A step costs S passes of the decoder and
    their gradient; training differentiates through them.

    Arguments:
        model: The model. Its decoder is used, but it is neither among the parameters of the guide
            nor in its ``state_dict``, and is moved to another device or dtype with the model.
        num_steps: The number k of steps. k = 0 is the VAE.
        encoder: A module from images (B, C, H, W) to features (B, d).
        num_samples: The number S of samples in each ELBO. The second half is the negative of
            the first: the error of the mean's gradient is then of order s² instead of s.
        warm_start: A trained guide of this family, whose encoder is copied.

    Raises:
        ValueError: If num_steps is negative or num_samples less than 1.
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int,
        encoder: nn.Module | None = None,
        *,
        num_samples: int = 2,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(0, num_steps=num_steps)
        check_at_least(1, num_samples=num_samples)
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_steps = num_steps
        self.num_samples = num_samples
        self._model = BorrowedModules((model,))

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns the refined q(z|x): batch shape (B,), event shape (p,)."""
        path, _ = self.path(x)
        loc, log_scale = path[-1]
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def path(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Returns λ₀ ... λₖ, each the mean and log s (B, p), and the ELBO (B,) before each step.

        The ELBO is the noisy but unbiased estimate whose gradient the step uses.
        """
        _, loc, log_scale = self.encode(x)
        path, elbos = [(loc, log_scale)], []
        for t in range(1, self.num_steps + 1):
            loc, log_scale, elbo = self.step(x, loc, log_scale)
            check_finite(f"the mean or log-scale after step {t}", torch.cat([loc, log_scale], -1))
            log_scale = bounded(log_scale)
            path.append((loc, log_scale))
            elbos.append(elbo)
        return path, elbos

    def step(self, x: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next mean and log s (B, p), and the ELBO (B,) at the current ones."""
        raise NotImplementedError

    def image_elbo(self, x: Tensor, loc: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """Returns the ELBO of each image, (B,), in nats: a sum over pixels, not a mean over images.

        Arguments:
            x: Images (B, C, H, W).
            loc, log_scale: The mean and log s (B, p).
            noise: The ε of each sample (S, B, p).
        """
        (model,) = self._model
        scale = bounded(log_scale).exp()
        # The sites of the steps are not sites of the guide. A line search may try values that
        # validation would refuse; their ELBO is -inf or NaN instead.
        with poutine.block(), pyro.validation_enabled(False):
            log_likelihood = model.likelihood(loc + scale * noise).log_prob(x).mean(0)
            kl = kl_divergence(dist.Normal(loc, scale).to_event(1), model.prior())
        elbo: Tensor = log_likelihood - kl
        return elbo

    def gradient(
        self, x: Tensor, loc: Tensor, log_scale: Tensor, noise: Tensor, second_order: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the ELBO (B,) and its gradients with respect to the mean and log s, (B, p).

        If gradients are enabled, the ELBO is differentiable, and with ``second_order`` so are its
        gradients. If they are not, no graph is kept.
        """
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            loc, log_scale = (
                value if training and value.requires_grad else value.detach().requires_grad_()
                for value in (loc, log_scale)
            )
            elbo = self.image_elbo(x, loc, log_scale, noise)
            # images do not interact, so the gradient of the sum holds the gradient of each
            grad_loc, grad_log_scale = torch.autograd.grad(
                elbo.sum(),
                (loc, log_scale),
                create_graph=training and second_order,
                retain_graph=training,
            )
        return (elbo if training else elbo.detach()), grad_loc, grad_log_scale

    def draw_noise(self, loc: Tensor) -> Tensor:
        """Returns ε (S, B, p), in antithetic pairs."""
        half = torch.randn(
            (self.num_samples + 1) // 2, *loc.shape, dtype=loc.dtype, device=loc.device
        )
        return torch.cat([half, -half])[: self.num_samples]


class SemiAmortizedGuide(RefiningGuide):
    r"""SA(k): k steps of gradient ascent on the ELBO of each image.

    With ``natural`` steps the gradient is preconditioned by the inverse Fisher information of
    q, which is :math:`s^2` for the mean and ½ for log s:

    .. math::
        m_{t+1} = m_t + \eta\, \gamma\, s_t^2 \odot \nabla_m L, \qquad
        \log s_{t+1} = \log s_t + \eta\, \gamma\, \rho\, \tfrac12 \nabla_{\log s} L, \qquad
        \gamma = \min\Bigl(1, \frac{c}{\max(1, \eta) \|\nabla L\|}\Bigr)

    where the norm is one over all of an image's parameters, and that of the Fisher metric: c
    bounds a step in units of posterior standard deviations. Without ``natural`` both
    preconditioners are 1 and the norm is Euclidean, as published. The rate of log s relative to
    the mean is :math:`\rho = 0.1`: the gradient of log s is much noisier, and at ρ = 1 its noise
    costs much of what later steps gain.

    No fixed :math:`\eta` is safe. In the units of q the curvature of the ELBO is 1 if the
    posterior is uncorrelated and up to p otherwise, so that the iteration may diverge if
    :math:`\eta > 2/p`. With ``line_search``, each image therefore takes the first of
    η, η/2, η/4, ... that raises its own ELBO on the noise of the gradient. If none does, the image
    keeps its q. The outer gradient treats the factor as a constant.

    The result of an image does not depend on the other images of its batch.

    References:
        Kim et al., *Semi-Amortized Variational Autoencoders*, 2018.
        https://arxiv.org/abs/1802.02550

    Arguments:
        model, num_steps, encoder, num_samples, warm_start: See :class:`RefiningGuide`.
        step_size: :math:`\eta`. With the line search it is the largest that is tried.
        natural: Whether to take natural-gradient steps.
        line_search: Whether to shorten the step of an image until its ELBO rises. Without it
            choose a small step size; some images may still diverge.
        max_norm: c. The published value for plain gradients is 5.
        legacy_sign: Adds the gradient of the *negative* ELBO, averaged over the batch, with
            ρ = 1, plain steps and no line search. This is a suspected explanation of published
            results in which SA gains nothing, and the option only serves to test it: the steps
            lower the ELBO on a fixed decoder, and the result of an image depends on the size of
            its batch.

    Raises:
        ValueError: If num_steps is negative, num_samples less than 1, or step_size or max_norm
            is not positive.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = SemiAmortizedGuide(ImageModel((1, 28, 28), latent_dim=10), 2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int = 4,
        encoder: nn.Module | None = None,
        *,
        step_size: float = 1.0,
        natural: bool = True,
        line_search: bool = True,
        num_samples: int = 2,
        max_norm: float = 10.0,
        legacy_sign: bool = False,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        for name, value in (("step_size", step_size), ("max_norm", max_norm)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(model, num_steps, encoder, num_samples=num_samples, warm_start=warm_start)
        self.step_size = step_size
        self.natural = natural
        self.line_search = line_search
        self.max_norm = max_norm
        self.legacy_sign = legacy_sign

    def step(self, x: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next mean and log s (B, p), and the ELBO (B,) at the current ones."""
        noise = self.draw_noise(loc)
        elbo, *gradient = self.gradient(x, loc, log_scale, noise)
        d_loc, d_log_scale = self._direction(log_scale, *gradient)
        if not self.legacy_sign:
            d_log_scale = _LOG_SCALE_RATE * d_log_scale
        if self.legacy_sign or not self.line_search:
            return loc + self.step_size * d_loc, log_scale + self.step_size * d_log_scale, elbo
        rate = self._line_search(x, loc, log_scale, d_loc, d_log_scale, noise, elbo)
        # a product with a rate of 0 is not enough: the gradient may be infinite
        return (
            torch.where(rate > 0, loc + rate * d_loc, loc),
            torch.where(rate > 0, log_scale + rate * d_log_scale, log_scale),
            elbo,
        )

    def _direction(
        self, log_scale: Tensor, grad_loc: Tensor, grad_log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the preconditioned and clipped gradient with respect to the mean and log s."""
        metric: tuple[Tensor | float, float] = (1.0, 1.0)
        if self.legacy_sign:
            grad_loc, grad_log_scale = -grad_loc / len(grad_loc), -grad_log_scale / len(grad_loc)
        elif self.natural:
            metric = (log_scale.exp(), math.sqrt(0.5))  # inverse roots of the Fisher information
        white = metric[0] * grad_loc, metric[1] * grad_log_scale
        norm = torch.linalg.vector_norm(torch.cat(white, dim=-1), dim=-1, keepdim=True)
        # c bounds the gradient, and the step if η > 1
        clip = self.max_norm / (max(self.step_size, 1.0) * norm).clamp(min=self.max_norm)
        return metric[0] * clip * white[0], metric[1] * clip * white[1]

    @torch.no_grad()
    def _line_search(
        self,
        x: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        d_loc: Tensor,
        d_log_scale: Tensor,
        noise: Tensor,
        elbo: Tensor,
    ) -> Tensor:
        """Returns rates (B, 1) that raise the ELBO of each image, 0 where none is found.

        The whole batch is evaluated until every image has a rate. An image that has one keeps it,
        so that the result does not depend on the other images of the batch.
        """
        rate = torch.full_like(loc[:, :1], self.step_size)
        rises = torch.zeros_like(rate, dtype=torch.bool)
        for halvings in range(_MAX_HALVINGS + 1):
            if halvings:
                rate = torch.where(rises, rate, rate / 2)
            tried = self.image_elbo(x, loc + rate * d_loc, log_scale + rate * d_log_scale, noise)
            rises |= (tried > elbo).unsqueeze(-1)
            if rises.all():
                break
        return torch.where(rises, rate, 0.0)
