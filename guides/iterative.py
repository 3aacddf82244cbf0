r"""Iterative amortised inference: learned steps refine the encoder's Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from guides.semi_amortized import RefiningGuide
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import call_network

__all__ = ["IterativeGuide"]


class IterativeGuide(RefiningGuide):
    r"""T updates of the encoder's Gaussian by one network that reads the gradient of the ELBO.

    .. math::
        m_{t+1} &= m_t + (1 - g) \odot s_t \odot \delta, \qquad
        \log s_{t+1} = \log s_t + (1 - g') \odot \delta', \\
        (g, g', \delta, \delta') &= f_\omega\bigl(m_t, \log s_t,
            \mathrm{asinh}(s_t \odot \nabla_m L), \mathrm{asinh}(\nabla_{\log s} L)\bigr)

    which is the gated update :math:`\lambda \gets g \odot \lambda + (1 - g) \odot
    \hat\lambda` with a proposal :math:`\hat\lambda` in units of the current q. The optimum has to
    be met to a fraction of s, which is harder to learn for a network whose output is the mean
    itself. The gradients span orders of magnitude. They enter in the same units, on a scale that is
    linear around zero and logarithmic far from it; the paper uses log and sign, or layer
    normalisation. As in the paper, training does not differentiate through these inputs. The last
    layer starts at zero, so that the guide starts as the VAE; T = 0 is the VAE.

    The training objective is the ELBO of the last λ, where the paper sums it over all λ.

    References:
        Marino et al., *Iterative Amortized Inference*, 2018. https://arxiv.org/abs/1807.09356

    Arguments:
        model, encoder, num_samples, warm_start: See :class:`RefiningGuide`.
        num_steps: The number T of updates, all by the same network. It can be changed after
            training (``guide.num_steps = 8``), but the network was trained for the first T: a
            few more may raise the ELBO a little, many lower it.
        hidden: The width of the network's two hidden layers.

    Raises:
        ValueError: If num_steps is negative, or num_samples or hidden is less than 1.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = IterativeGuide(ImageModel((1, 28, 28), latent_dim=10), 2)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        num_steps: int = 4,
        encoder: nn.Module | None = None,
        *,
        hidden: int = 256,
        num_samples: int = 2,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(1, hidden=hidden)
        super().__init__(model, num_steps, encoder, num_samples=num_samples, warm_start=warm_start)
        # with T = 0 the guide has exactly the parameters of the VAE
        self.update = _update_network(self.latent_dim, hidden) if num_steps else None

    def step(self, x: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the next mean and log s (B, p), and the ELBO (B,) at the current ones."""
        if self.update is None:
            raise ValueError("a guide that was built with num_steps=0 has no update to apply")
        noise = self.draw_noise(loc)
        elbo, grad_loc, grad_log_scale = self.gradient(x, loc, log_scale, noise, second_order=False)
        scale = log_scale.exp()
        inputs = [loc, log_scale, (scale * grad_loc).asinh(), grad_log_scale.asinh()]
        gate, delta = call_network(self.update, torch.cat(inputs, dim=-1)).chunk(2, dim=-1)
        d_loc, d_log_scale = (torch.sigmoid(-gate) * delta).chunk(2, dim=-1)  # 1 - g = σ(-gate)
        return loc + scale * d_loc, log_scale + d_log_scale, elbo


def _update_network(latent_dim: int, hidden: int) -> nn.Sequential:
    """Returns a network from λ and its gradient (4p) to the logits of g and the proposals (4p)."""
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
