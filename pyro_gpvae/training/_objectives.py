r"""The objectives that a training step can use."""

from __future__ import annotations

import copy

from pyro.infer import (
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)

from pyro_gpvae.model.elbo import MeanFieldELBO, Objective, TraceELBO
from pyro_gpvae.model.renyi import PerImageRenyiELBO

#: What replaces the objectives of Pyro, with the same value and gradient.
_EQUALS: dict[type, type] = {
    Trace_ELBO: TraceELBO,
    TraceMeanField_ELBO: MeanFieldELBO,
    RenyiELBO: PerImageRenyiELBO,
}


def without_host_sync(objective: Objective) -> Objective:
    """Returns an equal objective of this library if there is one, and the objective otherwise."""
    name = type(objective).__name__
    if isinstance(objective, TraceEnum_ELBO | TraceTMC_ELBO):
        raise ValueError(
            f"{name} enumerates sites that the guide does not have, and eq. (2) has no terms for "
            "them: use dist.MixtureSameFamily, or SVI(PerImage(model, N), PerImage(guide, N), ...)"
        )
    if isinstance(objective, JitTrace_ELBO | JitTraceMeanField_ELBO):
        raise ValueError(
            f"{name} needs torch.jit, which is deprecated: use {name.removeprefix('Jit')} and "
            "backend='compiled'"
        )
    if type(objective) in _EQUALS:
        twin = copy.copy(objective)
        twin.__class__ = _EQUALS[type(objective)]
        return twin
    if not hasattr(objective, "differentiable_loss"):
        raise ValueError(f"elbo must have differentiable_loss, as Trace_ELBO has; {name} has not")
    return objective
