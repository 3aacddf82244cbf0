"""What a GPU needs of the code, on a device that refuses what a GPU refuses; see ``emulated``."""

import pytest
import torch
from emulated import DEVICE, stand_in_for_cuda, unread
from families import FAMILIES, READERS, make
from test_steps import B, uint8

from pyro_gpvae import fit, log_weights
from pyro_gpvae.randomness import seeded
from pyro_gpvae.steps import TrainingStep


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """With that device. "compiled" runs the graph that would be compiled, operator by operator."""
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


def pair(spec, device):
    return tuple(program.to(device) for program in make(spec))


def assert_same(found, expected, tolerance=1e-10):
    """Tensors of the device, and those of the CPU."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == DEVICE
        assert theirs.device.type == "cpu"
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


def steps(spec, backend, device):
    """Losses of some steps, full and partial, and the parameters after them."""
    batches = [torch.arange(B), torch.arange(3), torch.arange(5, 5 + B), torch.arange(2, 2 + B)]
    batches = [batch.to(device) for batch in batches]
    step = TrainingStep(
        *pair(spec, device),
        uint8().to(device),
        batch_size=B,
        learning_rate=5e-3,
        backend=backend,
    )
    with seeded(3, torch.device("cpu")):
        for batch in batches[:2]:  # makes the moments, and captures
            step(batch)
        with unread():
            losses = [step(batch) for batch in batches]
    return losses + [parameter.detach() for parameter in step.parameters.values()]


@pytest.mark.parametrize("backend", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("spec", FAMILIES)
def test_steps_stay_on_the_device_and_wait_for_nothing(spec, backend):
    assert_same(steps(spec, backend, DEVICE), steps(spec, "eager", "cpu"))


def trained(spec, backend, device, **options):
    model, guide = pair(spec, "cpu")
    options = {"epochs": 3, "batch_size": B, "progress": False, "seed": 3} | options
    history = fit(model, guide, uint8(), backend=backend, device=device, **options)
    assert history.backend == backend
    frame = history.frame().drop(columns="seconds")
    return [*model.parameters(), *guide.parameters()], frame


@pytest.mark.parametrize("spec", [*FAMILIES, *READERS])
def test_training(spec):
    backend = "captured" if spec in FAMILIES else "eager"
    found, frame = trained(spec, backend, DEVICE)
    expected, expected_frame = trained(spec, "eager", "cpu")
    assert_same([t.detach() for t in found], [t.detach() for t in expected])
    assert float((frame - expected_frame).abs().max().max()) < 1e-8


@pytest.mark.parametrize("spec", [*FAMILIES, *READERS])
def test_importance_weights(spec):
    x = uint8().double() / 255

    def weights(device):
        model, guide = pair(spec, device)
        with seeded(0, torch.device("cpu")):
            return [log_weights(model.eval(), guide.eval(), x.to(device), 7)]

    assert_same(weights(DEVICE), weights("cpu"))
