r"""Adds the priors of a guide's global random weights to a model."""

from __future__ import annotations

from typing import Any

import pyro
from torch import nn

from pyro_gpvae.core._programs import Program, PyroProgram, modules_of
from pyro_gpvae.model.guide import HasGlobalPrior


class Paired(Program):
    """A model that first samples the global sites of a guide, which it does not own."""

    def __init__(self, model: PyroProgram, guide: HasGlobalPrior) -> None:
        super().__init__()
        self.model = model
        if not isinstance(model, nn.Module):  # a bound method trains its module
            self.owner = modules_of(model).get("")
        self._global_prior = guide.global_prior

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name, prior in self._global_prior().items():
            pyro.sample(name, prior)
        return self.model(*args, **kwargs)


def pair(model: PyroProgram, guide: PyroProgram) -> PyroProgram:
    r"""Returns a program that samples the guide's global weights from their priors, then the model.

    An ELBO compares the distribution of these weights with their prior, so the model must sample
    them, too. The model does not change; it is returned itself if the guide has no global weights.
    :func:`pyro_gpvae.fit` and :func:`pyro_gpvae.elbo_terms` call this function.

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
