r"""VAE: one Gaussian with diagonal covariance, in one pass of an encoder."""

from __future__ import annotations

import copy
import warnings

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_gpvae.core._errors import check_finite
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import Program
from pyro_gpvae.model.elbo import Objective
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.likelihoods import bounded
from pyro_gpvae.model.networks import build_encoder, call_network, feature_dim

__all__ = ["GaussianGuide"]


class GaussianGuide(Program):
    r"""The amortised Gaussian of the VAE.

    .. math:: q(z|x) = N(z; m(x), \mathrm{diag}\, s(x)^2),
        \qquad (m, \log s) = \mathrm{Linear}(\phi(x))

    It is trained with the analytic KL (``TraceMeanField_ELBO``). Other guides extend this class:
    they replace :meth:`posterior` and keep the encoder. All scales are
    :func:`pyro_gpvae.model.likelihoods.bounded`. An image costs one pass of the encoder.

    References:
        Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014.
        https://arxiv.org/abs/1312.6114

    Arguments:
        model: The model, which determines the image shape and the dimension p of z.
        encoder: A module from images (B, C, H, W) to features φ (B, d). The default is the
            encoder of the paper's Tables 1-3.
        warm_start: A trained guide of this family, whose encoder is copied instead.

    Raises:
        ValueError: If both an encoder and a warm start are given, or they do not fit.
        NonFiniteError: From :meth:`posterior`, if the encoder's output is not finite. The message
            names the images. ``pyro.enable_validation(False)`` switches the check off, as it does
            for the arguments of distributions.

    Example:
        >>> import torch
        >>> from pyro_gpvae import ImageModel
        >>> guide = GaussianGuide(ImageModel((1, 28, 28), latent_dim=10))
        >>> q = guide.posterior(torch.zeros(5, 1, 28, 28))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([10]))
    """

    def __init__(
        self,
        model: ImageModel,
        encoder: nn.Module | None = None,
        *,
        warm_start: GaussianGuide | None = None,
    ) -> None:
        super().__init__()
        if warm_start is not None:
            if encoder is not None:
                raise ValueError("give either an encoder or a warm start, which brings its own")
            if not isinstance(warm_start, GaussianGuide):
                raise ValueError(
                    "a warm start must be a trained guide with the VAE's encoder, "
                    f"got {type(warm_start).__name__}"
                )
            if type(warm_start) not in (GaussianGuide, type(self)):
                warnings.warn(
                    f"only the encoder of the {type(warm_start).__name__} is copied, which may "
                    "infer badly without the rest of that guide",
                    stacklevel=2,
                )
            encoder = copy.deepcopy(warm_start.encoder)
        self.latent_dim: int = model.latent_dim
        self.encoder: nn.Module = build_encoder(model.image_shape) if encoder is None else encoder
        self.feature_dim = feature_dim(self.encoder, model.image_shape)
        if warm_start is None:
            self.head = nn.Linear(self.feature_dim, 2 * self.latent_dim)
        elif warm_start.latent_dim == self.latent_dim:
            self.head = copy.deepcopy(warm_start.head)
        else:
            raise ValueError(
                f"the warm start has {warm_start.latent_dim} latent dimensions, "
                f"the model {self.latent_dim}"
            )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the features φ (B, d), the mean m (B, p) and log s (B, p) of the images x."""
        features = call_network(self.encoder, x)
        output = call_network(self.head, features)
        check_finite("the encoder's mean or log-scale", output)
        loc, log_scale = output.chunk(2, dim=-1)
        return features, loc, bounded(log_scale)

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Returns q(z|x): batch shape (B,), event shape (p,)."""
        _, loc, log_scale = self.encode(x)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.posterior(x)  # outside of the plate, as a refining guide runs the model
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            z: Tensor = pyro.sample("z", q)
        return z

    def elbo(self) -> Objective:
        """Returns Pyro's ELBO with analytic KL divergences."""
        return TraceMeanField_ELBO()
