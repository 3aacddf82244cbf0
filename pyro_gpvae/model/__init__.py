r"""The generative model, its guides' contract, and the objectives that train both.

``image_model``, ``likelihoods`` and ``networks`` are the Pyro program of images, the density of its
pixels, and the networks of the paper. ``unconstrained`` lets the guides infer any other program.
``guide`` is the contract that a guide fulfils, and loads guides by name. ``elbo`` and
``stratified`` estimate eq. (2); ``marginal_posterior`` is q(z|x) of a random encoder, and
``curvature`` the Gauss-Newton precision of a posterior.

It imports ``core`` and ``data``; training, evaluation, guides and the packages above import it.
"""

from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, Objective, PerImage, TraceELBO, elbo_terms
from pyro_gpvae.model.guide import available_guides, load_guide, make_guide, posterior_of
from pyro_gpvae.model.image_model import ImageModel, initial_sigma
from pyro_gpvae.model.marginal_posterior import MarginalPosterior
from pyro_gpvae.model.networks import build_decoder, build_encoder
from pyro_gpvae.model.stratified import StratifiedELBO
from pyro_gpvae.model.unconstrained import UnconstrainedModel

__all__ = [
    "Block",
    "ImageModel",
    "MarginalPosterior",
    "MeanFieldELBO",
    "Objective",
    "PerImage",
    "StratifiedELBO",
    "TraceELBO",
    "UnconstrainedModel",
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
