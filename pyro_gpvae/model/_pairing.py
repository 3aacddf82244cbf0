r"""Adds the priors of a guide's global random weights to a model."""

from __future__ import annotations

from typing import Any

import pyro

from pyro_gpvae.core._programs import Program, PyroProgram
from pyro_gpvae.model.guide import HasGlobalPrior

__all__ = ["Paired", "pair"]


class Paired(Program):
    """A model that first samples the global sites of a guide from their priors.

    Arguments:
        model: A Pyro model.
        guide: A guide with ``global_prior()``. Its parameters are not part of this module.
    """

    def __init__(self, model: PyroProgram, guide: HasGlobalPrior) -> None:
        super().__init__()
        self.model = model
        self._global_prior = guide.global_prior

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name, prior in self._global_prior().items():
            pyro.sample(name, prior)
        return self.model(*args, **kwargs)


def pair(model: PyroProgram, guide: PyroProgram) -> PyroProgram:
    r"""Returns the model with the priors of the guide's global random weights.

    Only the guide of a GPVAE has the weights W and U. An ELBO compares their distribution with
    their prior N(0, I), so the model must sample them as well. This function wraps the model and
    does not change it; it returns the model itself if the guide has no global weights.
    :func:`pyro_gpvae.fit` and :func:`pyro_gpvae.elbo_terms` call it by themselves.

    Arguments:
        model: A Pyro model, such as :class:`pyro_gpvae.ImageModel`.
        guide: A Pyro guide for it.

    Example:
        >>> import torch
        >>> from pyro import poutine
        >>> from pyro_gpvae import ImageModel, make_guide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> program = pair(model, make_guide("gp", model))
        >>> poutine.trace(program).get_trace(torch.zeros(1, 1, 28, 28)).stochastic_nodes
        ['W', 'U', 'data', 'z']
    """
    if isinstance(model, Paired):  # with this guide or another one
        model = model.model
    if isinstance(guide, HasGlobalPrior) and guide.global_prior():
        return Paired(model, guide)
    return model
