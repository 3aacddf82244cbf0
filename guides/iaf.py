r"""IAF: inverse autoregressive flow, after the VAE's Gaussian."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Size, Tensor, nn
from torch.distributions import constraints

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.model.likelihoods import bounded

__all__ = ["FlowPosterior", "IAFGuide"]


class IAFGuide(GaussianGuide):
    r"""A Gaussian bent by T gated autoregressive steps.

    .. math::
        z_0 &\sim N(m(x), \mathrm{diag}\, s(x)^2) \\
        z_t &= g_t \odot z_{t-1} + (1 - g_t) \odot \mu_t, \qquad
            (\mu_t, \mathrm{logit}\, g_t) = \mathrm{MADE}_t(z_{t-1}, c(x)) \\
        \log q(z_T|x) &= \log N(z_0; m, \mathrm{diag}\, s^2) - \textstyle\sum_{t,j} \log g_{tj}

    A masked network lets component j of :math:`\mu_t` and :math:`g_t` see only the components
    of :math:`z_{t-1}` before j, and all of the context c(x): the features :math:`\phi(x)`, or
    a linear compression of them. It has one hidden layer (ReLU) and a linear skip connection:
    few hidden units may serve the first components (3 of 256 if p = 50), and if they are dead
    the context still arrives. The order of the components is reversed from step to step. Gates
    start near sigmoid(2) = 0.88. T = 0 is the VAE.

    A warm start copies the VAE's encoder, but the steps, which start at random, then move its
    mean: train some epochs before comparing.

    References:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
        https://arxiv.org/abs/1606.04934

    Arguments:
        model: The model, which tells the image shape and the dimension p of z.
        num_steps: The number T of steps.
        encoder: A module from images (B, C, H, W) to features (B, d).
        hidden_dim: Hidden units of each step's network, at least p.
        context_dim: The length of c(x); by default the features are the context.
        warm_start: A trained VAE guide whose encoder is copied.

    Raises:
        ValueError: If T is negative, the network is narrower than p, or the context is empty.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = IAFGuide(ImageModel((1, 28, 28), latent_dim=10), num_steps=2)
        >>> q = guide.posterior(torch.zeros(5, 1, 28, 28))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([10]))
    """

    def __init__(
        self,
        model: Any,
        num_steps: int = 1,
        encoder: nn.Module | None = None,
        *,
        hidden_dim: int = 256,
        context_dim: int | None = None,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        if not isinstance(num_steps, int) or num_steps < 0:
            raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
        if hidden_dim < model.latent_dim:
            raise ValueError(
                f"hidden_dim must be at least the model's latent_dim, {model.latent_dim}, so that "
                f"every component can be masked on its own, got {hidden_dim}"
            )
        if context_dim is not None and context_dim < 1:
            raise ValueError(f"context_dim must be at least 1, got {context_dim}")
        # the Gaussian first: under a seed it then starts where the VAE starts
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_steps = num_steps
        self.compress = (
            None
            if context_dim is None or num_steps == 0
            else nn.Linear(self.feature_dim, context_dim)
        )
        context_dim = context_dim or self.feature_dim
        order = torch.arange(self.latent_dim)  # Pyro's default is a random order
        with warnings.catch_warnings():
            # one dimension, where the network sees the context alone, is fine
            warnings.filterwarnings("ignore", "ConditionalAutoRegressiveNN input_dim = 1")
            self.steps = nn.ModuleList(
                ConditionalAffineAutoregressive(
                    _MaskedNetwork(
                        self.latent_dim,
                        context_dim,
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
        context = features if self.compress is None else self.compress(features)
        return FlowPosterior(base, self.steps, context)


class _MaskedNetwork(ConditionalAutoRegressiveNN):
    """Pyro's network, whose gates can never close for good: z would be lost, and its density."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        mu, logit = super().forward(x, context)
        return mu, bounded(logit)


class FlowPosterior(TorchDistribution):
    r"""Distribution of :math:`z = f_T \circ \dots \circ f_1(z_0)`, :math:`z_0 \sim` base.

    .. math:: \log q(z) = \log q_0(z_0) - \sum_t \log |\det \partial f_t / \partial z_{t-1}|

    A ``ConditionalTransformedDistribution`` of Pyro's conditional transforms, but for what it
    remembers. There each transform caches its last input and output, and is part of a reference
    cycle, so that samples and their graphs live until Python's collector runs. Here the
    density is computed along with a sample and kept while that very tensor is: scoring it is
    free, and any other tensor, however equal, is scored by inverting the transforms (p passes
    of the network for each IAF step). Everything is freed with the distribution.

    A remembered density depends on the parameters through the sample's own computation. To
    differentiate it by z itself, score ``z.detach().requires_grad_()``.

    Raises:
        NonFiniteError: If z overflows in a step, forward or backward; names the images.

    Arguments:
        base: A reparametrised distribution with batch shape (B,) and event shape (p,).
        steps: Pyro's conditional transforms, in the order of sampling.
        context: What they are conditioned on, (B, h).
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        base: TorchDistribution,
        steps: Iterable[Any],
        context: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.steps = tuple(steps)
        self.context = context
        self._last: _Draw | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> FlowPosterior:
        new = self._get_checked_instance(FlowPosterior, _instance)  # type: ignore[no-untyped-call]
        new.base = self.base.expand(batch_shape)
        new.steps = self.steps
        new.context = self.context
        new._last = None
        super(FlowPosterior, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        z: Tensor = self.base.rsample(torch.Size(sample_shape))
        log_q = self.base.log_prob(z)
        for t, step in enumerate(self.steps, start=1):
            z, log_det = self._apply(step, z)
            check_finite(f"z after step {t} of the flow", z)
            log_q = log_q - log_det
        self._last = _Draw(z, log_q)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._last is not None and self._last.is_of(value):
            return self._last.log_q
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        z = value.expand(shape)
        log_det = z.new_zeros(())
        for step in reversed(self.steps):
            z, log_det_of_step = self._apply(step, z, inverse=True)
            log_det = log_det + log_det_of_step
        check_finite("z before the flow", z)
        log_q: Tensor = self.base.log_prob(z) - log_det
        return log_q

    def _apply(
        self, step: ConditionalTransform, value: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The step's output, or input, for a value; log |det| of its Jacobian at the input."""
        transform = step.condition(self.context)
        other: Tensor = transform.inv(value) if inverse else transform(value)
        ends = (other, value) if inverse else (value, other)
        log_det: Tensor = transform.log_abs_det_jacobian(*ends)
        # it refers to itself and to its cache: emptied, it frees them now
        vars(transform).clear()
        return other, log_det


class _Draw:
    """The log density of a sample, for as long as that tensor is what was drawn."""

    def __init__(self, z: Tensor, log_q: Tensor) -> None:
        self.log_q = log_q
        self._z = weakref.ref(z)
        self._version = _version(z)
        self._has_graph = torch.is_grad_enabled()

    def is_of(self, value: Tensor) -> bool:
        """Whether this very tensor was drawn, unchanged, and with a graph if one is due."""
        return (
            self._z() is value
            and self._version == _version(value)
            and (self._has_graph or not torch.is_grad_enabled())
        )


def _version(z: Tensor) -> int | None:
    """Counts the changes in place; tensors of ``torch.inference_mode`` have no such count."""
    return None if z.is_inference() else z._version
