r"""ME: a mixture of encoders, trained jointly."""

from __future__ import annotations

import copy

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from guides.gaussian import GaussianGuide
from pyro_gpvae.core._errors import check_at_least, check_finite
from pyro_gpvae.model.elbo import Objective
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.networks import call_network
from pyro_gpvae.model.stratified import StratifiedELBO, gaussian_mixture

__all__ = ["MixtureGuide"]


class MixtureGuide(GaussianGuide):
    r"""A mixture of M amortised Gaussians with amortised weights.

    .. math::
        Q(z|x) = \sum_k \alpha_k(x) \, N(z; m_k(x), \mathrm{diag}\, s_k(x)^2), \qquad
        (m_k, \log s_k) = \mathrm{Linear}_k(\phi_k(x)), \quad
        \alpha(x) = \mathrm{softmax}_k(\mathrm{Linear}'_k(\phi_k(x)))

    Each component has an encoder of its own. All are trained together on the stratified ELBO

    .. math::
        \sum_k \alpha_k(x) \, E_{N(z_k; m_k, s_k^2)}
            [\log p(x|z_k) + \log p(z_k) - \log Q(z_k|x)]

    (:class:`pyro_gpvae.model.stratified.StratifiedELBO`), which costs M passes of the decoder for
    each image. The weights start equal. Evaluation draws i.i.d. from Q. With one component the
    guide is the VAE, and so is its objective.

    References:
        Kim, *Gaussian Process Modeling of Approximate Inference Errors for Variational
        Autoencoders*, 2022: the baseline "ME".

    Arguments:
        model: The model, which determines the image shape and the dimension p of z.
        num_components: The number M of components.
        encoder: A module from images (B, C, H, W) to features (B, d), used by the first
            component. The others have copies of it that are initialised again.
        warm_start: A trained guide whose encoder is copied by all components instead. The first
            component starts as the trained guide; the heads of the others are perturbed.

    Raises:
        ValueError: If there are no components, or encoder and warm start do not fit.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = MixtureGuide(ImageModel((1, 28, 28), latent_dim=10), num_components=3)
        >>> guide.posterior(torch.zeros(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: ImageModel,
        num_components: int = 2,
        encoder: nn.Module | None = None,
        *,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        check_at_least(1, num_components=num_components)
        super().__init__(model, encoder, warm_start=warm_start)
        self.num_components = num_components
        # component 1 is the VAE's encoder and head; these lists hold components 2 to M
        self.encoders, self.heads = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_components - 1):
            encoder, head = copy.deepcopy(self.encoder), _initialised(copy.deepcopy(self.head))
            if warm_start is None:
                _initialised(encoder)
            else:
                _mix_in(head, self.head, 0.1)
            self.encoders.append(encoder)
            self.heads.append(head)
        self.gates = self._build_gates()

    def components(self, x: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log α (B, M), the means (B, M, p) and the log scales (B, M, p) of the images x.

        With a count, it returns those of the mixture of the first components alone.
        """
        encoders = [self.encoder, *self.encoders][:count]
        heads = [self.head, *self.heads][:count]
        features = [call_network(encoder, x) for encoder in encoders]
        outputs = [call_network(head, phi) for head, phi in zip(heads, features, strict=True)]
        log_mass = self._log_mass(features)
        check_finite("a component's mean, log-scale or weight", torch.cat([*outputs, log_mass], -1))
        loc, log_scale = torch.stack(outputs, dim=-2).chunk(2, dim=-1)
        return log_mass, loc, bounded(log_scale)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns Q(z|x): batch shape (B,), event shape (p,)."""
        if self.num_components == 1:
            return super().posterior(x)
        log_mass, loc, log_scale = self.components(x)
        return gaussian_mixture(log_mass, loc, log_scale.exp())

    def elbo(self) -> Objective:
        """Returns the stratified ELBO, or for one component that of the VAE (analytic KL)."""
        return super().elbo() if self.num_components == 1 else StratifiedELBO(max_plate_nesting=1)

    def diagnostics(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the mean weight of each component. A component without weight learns nothing."""
        mass = self.components(x)[0].exp().mean(0)
        return {f"mass_{k}": value for k, value in enumerate(mass, start=1)}

    def _build_gates(self) -> nn.ModuleList:
        count = self.num_components if self.num_components > 1 else 0
        return nn.ModuleList(build_gate(self.feature_dim, 0.0) for _ in range(count))

    def _log_mass(self, features: list[Tensor]) -> Tensor:
        """Returns log α (B, M) from the features (B, d) of each component."""
        if len(features) == 1:
            return features[0].new_zeros(len(features[0]), 1)
        logits = [call_network(gate, phi) for gate, phi in zip(self.gates, features, strict=False)]
        return torch.cat(logits, dim=-1).log_softmax(-1)


def build_gate(feature_dim: int, logit: float) -> nn.Linear:
    """Returns a map from features to one logit, which starts as a constant."""
    layer = nn.Linear(feature_dim, 1)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, logit)
    return layer


def _initialised(module: nn.Module) -> nn.Module:
    """Initialises all layers of a module again, and returns it."""
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
    return module.requires_grad_(True)


@torch.no_grad()
def _mix_in(head: nn.Module, trained: nn.Module, share: float) -> None:
    """Sets a head to the trained one plus a share of its own parameters."""
    for mine, theirs in zip(head.parameters(), trained.parameters(), strict=True):
        mine.mul_(share).add_(theirs)
