"""What holds for every evaluator: one conversion of images, and no side effects."""

import warnings

import pandas as pd
import pyro
import pytest
import torch
from torch import nn

from guides import GPGuide
from pyro_gpvae import ImageModel, log_evidence, log_weights
from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.evaluation.generation import decode, reconstruct, sample_images
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.evaluation.posterior_grid import posterior_grid, posterior_record
from pyro_gpvae.evaluation.reference import reference_evidence
from pyro_gpvae.evaluation.uncertainty import (
    bhattacharyya_uncertainty,
    uncertainty_scores,
    weight_information,
)

FEW = {"num_chains": 2, "num_steps": 3, "seed": 0}
GAP = {"num_train": 9, "num_samples": 20, "reference_samples": 30}

#: Every evaluator of images, as a function of a model, a guide and the images.
EVALUATORS = {
    "log_weights": lambda m, g, x: log_weights(m, g, x, 5),
    "log_evidence": lambda m, g, x: log_evidence(m, g, x, 5, seed=0).log_evidence,
    "annealed": lambda m, g, x: annealed_evidence(m, x, g, **FEW).log_evidence,
    "reference": lambda m, g, x: (
        reference_evidence(m, x, g, num_samples=30, widths=(1.0, 2.0), **FEW).log_evidence
    ),
    "decompose": lambda m, g, x: decompose(m, g, x, **GAP).table(),
    "optimise_gaussian": lambda m, g, x: optimise_gaussian(m, x, start=g).posterior.mean,
    "reconstruct": lambda m, g, x: reconstruct(m, g, x).images,
    "bhattacharyya": lambda m, g, x: bhattacharyya_uncertainty(g, x),
    "weight_information": lambda m, g, x: weight_information(g, x),
    "uncertainty_scores": lambda m, g, x: uncertainty_scores(m, g, x),
    "posterior_grid": lambda m, g, x: posterior_grid(m, x, num_points=20).density,
    "posterior_record": lambda m, g, x: posterior_record(m, g, x, num_points=20)["q"],
}
OF_THE_MODEL = {
    "bidirectional": lambda m, g, x: bidirectional(m, g, num_images=2, **FEW).lower,
    "sample_images": lambda m, g, x: sample_images(m, 3, noise=True, seed=0).images,
    "decode": lambda m, g, x: decode(m, torch.zeros(2, 2)),
}


class Counting(nn.Tanh):
    """Has a buffer that changes with every call, as batch normalisation in training mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls.add_(1)
        return super().forward(x)


def programs(decoder_counts=False):
    """A model and a random encoder whose buffers change, in training mode and float64."""
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(2, 9), Counting() if decoder_counts else nn.Tanh(), nn.Linear(9, 9)
    )
    decoder.append(nn.Unflatten(1, (1, 3, 3)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), Counting())
    model = ImageModel((1, 3, 3), 2, decoder, sigma=0.3)
    guide = GPGuide(model, encoder, initial_scale=0.1).double()
    return model.double().train(), guide.train()


def bytes_of_images():
    return torch.randint(256, (3, 1, 3, 3), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(autouse=True)
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", EVALUATORS)
def test_uint8_images_are_floats_over_255(name):
    model, guide = programs()
    model.eval(), guide.eval()
    x, found = bytes_of_images(), []
    for images in (x, x.double() / 255, x.float() / 255):
        torch.manual_seed(1)
        found.append(EVALUATORS[name](model, guide, images))
    if isinstance(found[0], pd.DataFrame):
        pd.testing.assert_frame_equal(found[0], found[1], rtol=1e-10)
    else:
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
        assert torch.as_tensor(found[2]).dtype == torch.as_tensor(found[0]).dtype


@pytest.mark.parametrize("name", {**EVALUATORS, **OF_THE_MODEL})
def test_nothing_is_left_behind(name):
    # torch.func, which differentiates decoders, refuses buffers that change
    model, guide = programs(name not in ("reference", "decompose", "optimise_gaussian"))
    pyro.param("someone", torch.ones(1))
    state = {k: v.clone() for p in (model, guide) for k, v in p.state_dict().items()}
    rng = torch.random.get_rng_state()
    (EVALUATORS | OF_THE_MODEL)[name](model, guide, bytes_of_images())
    if name not in ("log_weights", "reconstruct"):  # which use the global random state
        assert torch.equal(torch.random.get_rng_state(), rng)
    for key, value in state.items():
        assert torch.equal({**model.state_dict(), **guide.state_dict()}[key], value), key
    assert model.training
    assert guide.training
    assert all(m.training for m in (*model.modules(), *guide.modules()))
    assert list(pyro.get_param_store().keys()) == ["someone"]
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
