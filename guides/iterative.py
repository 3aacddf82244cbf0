r"""Iterative amortised inference: the steps that refine the encoder's Gaussian are learned."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from guides.semi_amortized import RefiningGuide
from pyro_gpvae.core._plates import DATA_PLATE

__all__ = ["IterativeGuide"]

Objective = Literal["final", "sum"]


class IterativeGuide(RefiningGuide):
    r"""T updates of the encoder's Gaussian by one network that sees the gradient of the ELBO.

    .. math::
        m_{t+1} &= m_t + (1 - g) \odot s_t \odot \delta, \qquad
        \log s_{t+1} = \log s_t + (1 - g') \odot \delta', \\
        (g, g', \delta, \delta') &= f_\omega\bigl(m_t, \log s_t,
            \mathrm{asinh}(s_t \odot \nabla_m L), \mathrm{asinh}(\nabla_{\log s} L)\bigr)

    which is the gated update :math:`\lambda \gets g \odot \lambda + (1 - g) \odot
    \hat\lambda` with a proposal :math:`\hat\lambda` in units of the present q: the optimum has to
    be met to a fraction of s, which a network that puts out the mean itself has to learn first.
    The gradients, which span orders of magnitude, enter in the same units and on a
    scale that is linear around zero and logarithmic far away (instead of log and sign, or layer
    normalisation, in the paper). The last layer starts at zero, so that the guide starts as the
    VAE's encoder; with no steps it stays that exactly.

    References:
        Marino et al., *Iterative Amortized Inference*, 2018. https://arxiv.org/abs/1807.09356

    Arguments:
        model, encoder, num_samples, warm_start: See :class:`RefiningGuide`.
        num_steps: The number T of updates, all by the same network. It can be changed after
            training, ``guide.num_steps = 8``, but the network has only learned the first T: a
            few more may gain a little, many lose.
        hidden: Width of the network's two hidden layers.
        objective: Train on the ELBO of the last λ ("final"), or on the "sum" over all of them,
            as in the paper. Evaluation and logged terms are those of the last in both cases.
        second_order: Whether training differentiates through the gradients that enter the
            network. Without it they are plain inputs, as in the paper, and a training step is
            cheaper.

    Raises:
        ValueError: If num_steps is negative, num_samples or hidden is less than 1, or the
            objective is unknown.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = IterativeGuide(ImageModel((1, 28, 28), latent_dim=10), 2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Any,
        num_steps: int = 4,
        encoder: nn.Module | None = None,
        *,
        hidden: int = 256,
        objective: Objective = "final",
        second_order: bool = False,
        num_samples: int = 2,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {get_args(Objective)}, got {objective!r}")
        super().__init__(model, num_steps, encoder, num_samples=num_samples, warm_start=warm_start)
        self.objective = objective
        self.second_order = second_order
        # none for T = 0, which has the parameters of the VAE and no others
        self.update = _update_network(self.latent_dim, hidden) if num_steps else None

    def forward(self, x: Tensor) -> Tensor:
        path, elbos = self.path(x)
        loc, log_scale = path[-1]
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            if self.objective == "sum" and elbos and torch.is_grad_enabled():
                # a term of the training objective only: no part of q
                earlier = torch.stack(elbos).sum(0)
                pyro.factor("earlier_steps", -earlier, has_rsample=True)
            z: Tensor = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
        return z

    def step(self, x: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next mean and log s (B, p), and the ELBO (B,) at the present ones."""
        if self.update is None:
            raise ValueError("a guide that was built with num_steps=0 has no update to apply")
        noise = self.draw_noise(loc)
        elbo, grad_loc, grad_log_scale = self.gradient(
            x, loc, log_scale, noise, second_order=self.second_order
        )
        scale = log_scale.exp()
        inputs = [loc, log_scale, (scale * grad_loc).asinh(), grad_log_scale.asinh()]
        gate, delta = self.update(torch.cat(inputs, dim=-1)).chunk(2, dim=-1)
        d_loc, d_log_scale = (torch.sigmoid(-gate) * delta).chunk(2, dim=-1)  # 1 - g = σ(-gate)
        return loc + scale * d_loc, log_scale + d_log_scale, elbo


def _update_network(latent_dim: int, hidden: int) -> nn.Sequential:
    """From λ and its gradient, 4p numbers, to the logits of g and the proposals, 4p numbers."""
    last = nn.Linear(hidden, 4 * latent_dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(4 * latent_dim, hidden),
        nn.LeakyReLU(0.01),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.01),
        last,
    )
