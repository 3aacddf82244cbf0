r"""RME: a mixture of encoders that grows; each component is trained against those before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from guides.mixture import MixtureGuide, build_gate
from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.model.elbo import Block
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.networks import call_network
from pyro_gpvae.model.stratified import gaussian_mixture

__all__ = ["RecursiveMixtureGuide"]

# number of draws for KL(q_m ‖ Q_{m-1}), which need no decoder
_NUM_DRAWS = 16


class RecursiveMixtureGuide(MixtureGuide):
    r"""A mixture of M amortised Gaussians, grown by one component at a time.

    .. math::
        Q_m(z|x) = (1 - \varepsilon_m(x)) \, Q_{m-1}(z|x) + \varepsilon_m(x) \, q_m(z|x),
        \qquad \varepsilon_m(x) = \mathrm{sigmoid}(\mathrm{Linear}'_m(\phi_m(x)))

    On every minibatch these are trained at the same time, each with an optimiser of its own:

    1. for m = 1 ... M, the encoder of component m, on

       .. math:: ELBO(q_m; x) + \eta \min\{KL(q_m \| Q_{m-1}), C\}

       (the first component without the second term), with all else fixed. The component moves to
       where the posterior has mass that the mixture so far has missed;
    2. the weights :math:`\varepsilon`, on the stratified ELBO of the mixture :math:`Q_M`;
    3. the model, on the same objective.

    With η = 1 and a divergence below C, the entropies cancel and the objective is
    :math:`E_{q_m}[\log p(x, z) - \log Q_{m-1}(z|x)]`, the functional gradient of
    :math:`KL(Q \| p(z|x))`. Its only optimum is a point mass, so C determines how narrow or how
    far away a component becomes. C counts the nats of all p dimensions together: 20 is small for
    p = 50, and for p = 1 it exceeds the divergence between the modes of most posteriors.

    All gradients of a minibatch are taken before the first update. If the model is updated after
    the components on the same minibatch, it learns far more slowly, as it does in a plain VAE.

    :func:`pyro_gpvae.fit` trains the :meth:`blocks`; a minibatch costs 3 M passes of the
    decoder and their gradients. Under :class:`pyro.infer.SVI` with :meth:`elbo`, the same mixture
    is trained jointly, as :class:`guides.mixture.MixtureGuide` is.

    References:
        Kim and Pavlovic, *Recursive Inference for Variational Autoencoders*, 2020.
        https://papers.nips.cc/paper/2020/hash/e3844e186e6eb8736e9f53c0c5889527-Abstract.html

    Arguments:
        model: The model, which determines the image shape and the dimension p of z.
        num_components: The number M of components.
        encoder: See :class:`guides.mixture.MixtureGuide`.
        repulsion: The strength η with which a component is driven away from those before it.
        max_divergence: The divergence C, in nats, beyond which it is not driven further.
        warm_start: See :class:`guides.mixture.MixtureGuide`.

    Raises:
        ValueError: If there are no components, η is negative, C is not positive, or encoder and
            warm start do not fit.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> model = ImageModel((1, 28, 28), latent_dim=10)
        >>> guide = RecursiveMixtureGuide(model, num_components=3)
        >>> len(guide.blocks(model))
        5
    """

    def __init__(
        self,
        model: ImageModel,
        num_components: int = 2,
        encoder: nn.Module | None = None,
        *,
        repulsion: float = 1.0,
        max_divergence: float = 20.0,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        if not (repulsion >= 0 and math.isfinite(repulsion)):
            raise ValueError(f"repulsion must be finite and not negative, got {repulsion}")
        if not max_divergence > 0:
            raise ValueError(f"max_divergence must be positive, got {max_divergence}")
        super().__init__(model, num_components, encoder, warm_start=warm_start)
        self.repulsion = repulsion
        self.max_divergence = max_divergence

    def blocks(self, model: PyroProgram) -> list[Block]:
        """Returns the objectives: each component, the weights, the model.

        Parameters that require no gradient are left out, so that a guide can be trained for a
        fixed model.

        Raises:
            ValueError: If the model is not a module, so that its parameters are not known.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(
                "the model is trained in a block of its own, so it must be a torch.nn.Module, "
                f"got {type(model).__name__}"
            )
        theta = list(model.parameters())
        if self.num_components == 1:
            blocks = [Block(self.elbo(), _trainable([*theta, *self.parameters()]))]
        else:
            encoders = zip([self.encoder, *self.encoders], [self.head, *self.heads], strict=True)
            blocks = [
                Block(
                    TraceMeanField_ELBO(),
                    _trainable(itertools.chain(*(part.parameters() for part in parts))),
                    guide=self.component(m),
                )
                for m, parts in enumerate(encoders, start=1)
            ]
            blocks.append(Block(self.elbo(), _trainable(self.gates.parameters())))
            blocks.append(Block(self.elbo(), _trainable(theta)))
        return [block for block in blocks if block.parameters]

    def component(self, m: int) -> Callable[[Tensor], None]:
        """Returns the Pyro guide q_m(z|x), whose ELBO is the objective of component m."""

        def guide(x: Tensor) -> None:
            phi = call_network([self.encoder, *self.encoders][m - 1], x)
            output = call_network([self.head, *self.heads][m - 1], phi)
            check_finite(f"the mean or log-scale of component {m}", output)
            loc, log_scale = output.chunk(2, dim=-1)
            q = dist.Normal(loc, bounded(log_scale).exp()).to_event(1)
            with pyro.plate(DATA_PLATE, len(x), dim=-1):
                pyro.sample("z", q)
                if m > 1:
                    reward = self.repulsion * self._divergence(q, x, m).clamp(
                        max=self.max_divergence
                    )
                    # an ELBO subtracts the log densities of the guide
                    pyro.factor("repulsion", -reward, has_rsample=True)

        return guide

    def _divergence(self, q: TorchDistribution, x: Tensor, m: int) -> Tensor:
        """Returns a Monte-Carlo estimate (B,) of KL(q_m ‖ Q_{m-1}), differentiable in q_m alone."""
        with torch.no_grad():
            log_mass, loc, log_scale = self.components(x, count=m - 1)
            previous = gaussian_mixture(log_mass, loc, log_scale.exp())
        z = q.rsample((_NUM_DRAWS,))
        divergence: Tensor = -q.entropy() - previous.log_prob(z).mean(0)
        return divergence

    def _build_gates(self) -> nn.ModuleList:
        # ε_m = 1/m, so that all components start with equal mass
        logits = (-math.log(m - 1) for m in range(2, self.num_components + 1))
        return nn.ModuleList(build_gate(self.feature_dim, logit) for logit in logits)

    def _log_mass(self, features: list[Tensor]) -> Tensor:
        log_mass = features[0].new_zeros(len(features[0]), 1)
        for layer, phi in zip(self.gates, features[1:], strict=False):
            logit = call_network(layer, phi)
            log_mass = torch.cat([log_mass + F.logsigmoid(-logit), F.logsigmoid(logit)], dim=-1)
        return log_mass


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
