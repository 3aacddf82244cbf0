r"""The generative model, its guides' contract, and the objectives that train both.

``image_model``
    :class:`ImageModel`, a Pyro program: p(z) = N(0, I), a decoder and a likelihood.
``networks``
    Encoders and decoders of the paper's Tables 1-3, and autocast around networks.
``likelihoods``
    The density of Gaussian pixels, and the range of every scale parameter.
``elbo``
    :class:`PerImage`, which turns an ELBO into eq. (2), the estimators, and :func:`elbo_terms`.
``stratified``
    The ELBO of guides whose posterior is a mixture.
``marginal_posterior``
    q(z|x) of a random encoder, eq. (7).
``guide``
    The contract that a guide fulfils, and loading guides by name.
``curvature``
    Jacobians of the decoder, and the Gauss-Newton precision of the posterior.

This room imports ``core`` and ``data``. Training, evaluation, guides and the rooms above them
import this room.
"""

from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, Objective, PerImage, TraceELBO, elbo_terms
from pyro_gpvae.model.guide import available_guides, load_guide, make_guide, posterior_of
from pyro_gpvae.model.image_model import ImageModel, initial_sigma
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.networks import build_decoder, build_encoder
from pyro_gpvae.model.stratified import StratifiedELBO

__all__ = [
    "Block",
    "ImageModel",
    "MarginalPosterior",
    "MeanFieldELBO",
    "Objective",
    "PerImage",
    "StratifiedELBO",
    "TraceELBO",
    "available_guides",
    "build_decoder",
    "build_encoder",
    "elbo_terms",
    "initial_sigma",
    "load_guide",
    "make_guide",
    "pair",
    "posterior_of",
]
