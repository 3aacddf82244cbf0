"""Which objectives training replaces, leaves alone, or refuses."""

import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import fit
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, TraceELBO, without_host_sync
from pyro_gpvae.model.stratified import StratifiedELBO


@pytest.mark.parametrize(
    ("theirs", "ours"), [(Trace_ELBO, TraceELBO), (TraceMeanField_ELBO, MeanFieldELBO)]
)
def test_without_syncs_keeps_every_option(theirs, ours):
    options = {
        "num_particles": 7,
        "max_plate_nesting": 3,
        "vectorize_particles": True,
        "strict_enumeration_warning": False,
        "retain_graph": True,
        "tail_adaptive_beta": -0.5,
    }
    objective = theirs(**options)
    twin = without_host_sync(objective)
    assert type(twin) is ours
    assert vars(twin) == vars(objective)
    assert twin.num_particles == 7
    assert without_host_sync(twin) is twin
    twin.num_particles = 1  # its own
    assert objective.num_particles == 7


class _OwnTrace(Trace_ELBO):
    pass


@pytest.mark.parametrize(
    "objective",
    [_OwnTrace(), StratifiedELBO()],
    ids=lambda objective: type(objective).__name__,
)
def test_without_syncs_leaves_other_objectives_alone(objective):
    assert without_host_sync(objective) is objective


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TraceGraph_ELBO(), "elbo must have differentiable_loss, .*; TraceGraph_ELBO has not"),
        (RenyiELBO(num_particles=2), "elbo must have differentiable_loss, .*; RenyiELBO has not"),
        (TraceEnum_ELBO(max_plate_nesting=1), "TraceEnum_ELBO enumerates sites .*MixtureSameFam"),
        (TraceTMC_ELBO(max_plate_nesting=1), "TraceTMC_ELBO enumerates sites .*SVI"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "guide", "block"])
def test_objectives_that_fit_cannot_use_are_refused_by_name(where, objective, message):
    model = linear_model()
    guide = GaussianGuide(model, linear_encoder()).double()
    if where == "guide":
        guide.elbo = lambda: objective
    if where == "block":
        guide.blocks = lambda model: [Block(objective, list(guide.parameters()))]
    data = (images(4) * 255).to(torch.uint8)
    options = {"elbo": objective} if where == "argument" else {}
    with pytest.raises(ValueError, match=message):
        fit(model, guide, data, epochs=1, progress=False, **options)
