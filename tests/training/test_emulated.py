"""What a GPU needs of the code, on a device that refuses what a GPU refuses; see ``emulated``."""

import pytest
import torch
from emulated import DEVICE, stand_in_for_cuda, unread
from families import FAMILIES, READERS, make
from pyro import distributions as dist
from test_steps import B, Breaking, Dying, Kill, normalised, of, place_of, uint8, with_white

from guides import GaussianGuide
from pyro_gpvae import (
    ImageModel,
    NonFiniteError,
    annealed_evidence,
    decompose,
    fit,
    log_evidence,
    log_weights,
    make_guide,
    reference_evidence,
)
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.evaluation.generation import reconstruct
from pyro_gpvae.evaluation.uncertainty import weight_information
from pyro_gpvae.training.step import TrainingStep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """With that device."""
    stand_in_for_cuda(monkeypatch)


def pair(spec, device):
    return tuple(program.to(device) for program in make(spec))


def assert_same(found, expected, tolerance=1e-10):
    """Tensors of the device, and those of the CPU."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == DEVICE
        assert theirs.device == CPU
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


# --- training


def steps(spec, backend, device):
    """Losses of some steps, full and partial, and the parameters after them."""
    batches = [torch.arange(B), torch.arange(3), torch.arange(5, 5 + B), torch.arange(2, 2 + B)]
    batches = [batch.to(device) for batch in batches]
    images = uint8().to(device)
    step = TrainingStep(*pair(spec, device), images, batch_size=B, backend=backend)
    with seeded(3, CPU):
        for batch in batches[:2]:  # makes the moments, and captures
            step(batch)
        step(images[batches[0]])  # pixels have a graph of their own
        with unread():
            losses = [step(batch) for batch in batches]
            losses += [step(images[batches[2]])]
    return losses + [parameter.detach() for parameter in step.parameters.values()]


@pytest.mark.parametrize("backend", ["eager", "captured"])
@pytest.mark.parametrize("spec", FAMILIES)
def test_steps_stay_on_the_device_and_wait_for_nothing(spec, backend):
    assert_same(steps(spec, backend, DEVICE), steps(spec, "eager", CPU))


def trained(make_pair, backend, device, data=None, **options):
    """Parameters and buffers after a training, and its history."""
    model, guide = make_pair()
    options = {"epochs": 2, "batch_size": B, "learning_rate": 5e-3, "seed": 3} | options
    data = uint8() if data is None else data
    history = fit(model, guide, data, backend=backend, device=device, progress=False, **options)
    assert backend in (history.backend, "auto")
    return [*model.state_dict().values(), *guide.state_dict().values()], history


@pytest.mark.parametrize("spec", ["gp", "rme:3", "iaf", *READERS])
def test_training(spec):
    backend = "captured" if spec in FAMILIES else "eager"
    epochs = 17 if spec == "gp" else 2  # 51 steps
    found, history = trained(lambda: make(spec), backend, DEVICE, epochs=epochs)
    expected, other = trained(lambda: make(spec), "eager", CPU, epochs=epochs)
    assert_same(found, expected)
    rows, other_rows = (h.frame().drop(columns="seconds") for h in (history, other))
    assert float((rows - other_rows).abs().max().max()) < 1e-8


def convolutional(spec):
    torch.manual_seed(0)
    model = ImageModel((1, 28, 28), latent_dim=3)
    return model, make_guide(spec, model)


@pytest.mark.parametrize("spec", ["gp", "iterative:1"])
def test_convolutions(spec):
    data = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    found, _ = trained(lambda: convolutional(spec), "captured", DEVICE, data)
    expected, _ = trained(lambda: convolutional(spec), "eager", CPU, data)
    assert_same(found, expected, tolerance=1e-3)


def test_captured_resumes(tmp_path):
    def run(**options):
        return trained(lambda: make("gp"), "captured", DEVICE, **options)[0]

    expected = run()
    with pytest.raises(Kill):
        run(checkpoints=Dying(tmp_path, every=1))
    found = run(checkpoints=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batch_statistics_are_captured():
    found, _ = trained(normalised, "captured", DEVICE, uint8(16))
    expected, _ = trained(normalised, "eager", CPU, uint8(16))
    assert_same(found, expected)


@pytest.mark.parametrize("number", [0, 17])
def test_captured_stops_at_the_step_and_the_image(number):
    with pytest.raises(NonFiniteError) as caught:
        trained(lambda: of(Breaking), "captured", DEVICE, with_white(number))
    assert caught.value.step == place_of(number)
    assert caught.value.images == (number,)


def test_captured_skips():
    def run(backend, device):
        data = with_white(3)
        with pytest.warns(UserWarning, match="this update is skipped"):
            return trained(lambda: of(Breaking), backend, device, data, on_nonfinite="skip")

    (found, history), (expected, other) = run("captured", DEVICE), run("eager", CPU)
    assert_same(found, expected)
    assert list(history.frame().skipped) == list(other.frame().skipped) == [1, 2]


def test_stacked_runs_stop_at_the_first_that_breaks():
    def stop(backend, device):
        pairs = [of(Breaking) for _ in range(3)]
        options = {"epochs": 2, "batch_size": B, "progress": False}
        options |= {"seeds": (3, 4, 5), "backend": backend, "device": device}
        with pytest.raises(NonFiniteError) as caught:
            fit(*zip(*pairs, strict=True), with_white(17), **options)
        return caught.value.step, caught.value.images

    assert stop("captured", DEVICE) == stop("eager", CPU) == (2, (17,))


class Factorising(GaussianGuide):
    """Looks whether a matrix has a Cholesky factor, in C++."""

    def posterior(self, x):
        q = super().posterior(x)
        tril = torch.linalg.cholesky(torch.diag_embed(q.variance))
        return dist.MultivariateNormal(q.mean, scale_tril=tril)


def test_what_cannot_be_captured_is_trained_eagerly(caplog):
    with pytest.raises(AssertionError, match=r"_linalg_check_errors.* reads the device"):
        trained(lambda: of(Factorising), "captured", DEVICE)
    found, history = trained(lambda: of(Factorising), "auto", DEVICE)
    expected, _ = trained(lambda: of(Factorising), "eager", CPU)
    assert history.backend == "eager"
    assert_same(found, expected)
    (line,) = [record.message for record in caplog.records]
    assert "'eager', not 'captured'" in line
    assert "reads the device" in line


def test_images_that_stay_on_the_host(monkeypatch):
    monkeypatch.setattr("pyro_gpvae.training.loop.stays_on_host", lambda images, device: True)
    found, _ = trained(lambda: make("gp"), "captured", DEVICE)
    expected, _ = trained(lambda: make("gp"), "eager", CPU)
    assert_same(found, expected)


def stacked(backend, device):
    """Three runs of GPVAE in one program: parameters and histories."""
    pairs = [make("gp") for _ in range(3)]
    with torch.no_grad():
        for number, (model, _) in enumerate(pairs):
            model.log_sigma += 0.1 * number
    options = {"epochs": 2, "batch_size": B, "learning_rate": 5e-3, "progress": False}
    programs = zip(*pairs, strict=True)
    options |= {"seeds": (3, 4, 5), "backend": backend, "device": device}
    histories = fit(*programs, uint8(), **options)
    assert {history.backend for history in histories} == {backend}
    rows = [torch.tensor(h.frame().drop(columns="seconds").to_numpy(float)) for h in histories]
    return [p.detach() for pair in pairs for m in pair for p in m.parameters()], rows


def test_stacked_training():
    found, rows = stacked("captured", DEVICE)
    expected, expected_rows = stacked("eager", CPU)
    assert_same(found, expected)
    torch.testing.assert_close(rows, expected_rows)


def test_stacked_runs_that_cannot_be_captured(caplog):
    pairs = [of(Factorising) for _ in range(2)]
    options = {"epochs": 2, "batch_size": B, "progress": False, "device": DEVICE}
    histories = fit(*zip(*pairs, strict=True), uint8(), seeds=(0, 1), backend="auto", **options)
    assert [history.backend for history in histories] == ["eager", "eager"]
    assert "'eager', not 'captured'" in caplog.text


# --- evaluation


@pytest.mark.parametrize("spec", [*FAMILIES, *READERS])
def test_importance_weights(spec):
    x = uint8().double() / 255

    def weights(device):
        model, guide = pair(spec, device)
        with seeded(0, CPU):
            return [log_weights(model.eval(), guide.eval(), x.to(device), 7)]

    assert_same(weights(DEVICE), weights(CPU))


ESTIMATES = {
    "evidence": lambda model, guide, x: log_evidence(model, guide, x, 20, seed=0).log_evidence,
    "annealing": lambda model, guide, x: (
        annealed_evidence(model, x, guide, num_chains=2, num_steps=3, seed=0).log_evidence
    ),
    "reference": lambda model, _, x: reference_evidence(model, x, seed=0).log_evidence,
    "optimum": lambda model, guide, x: decompose(model, guide, x, num_train=21, seed=0).elbo_full,
    "price of spread": lambda _, guide, x: weight_information(guide, x),
    "images": lambda model, guide, x: reconstruct(model, guide, x).images,
}


@pytest.mark.parametrize("free", [None, 60_000])
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates(name, free, monkeypatch):
    monkeypatch.setattr("pyro_gpvae.evaluation.importance.free_memory", lambda device: free)
    x = uint8(4).double() / 255

    def estimate(device):
        model, guide = pair("gp", device)
        with seeded(0, CPU):
            return [ESTIMATES[name](model.eval(), guide.eval(), x.to(device))]

    assert_same(estimate(DEVICE), estimate(CPU))
