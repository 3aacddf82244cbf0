"""How much is worked on at once: what half of a GPU's free memory holds, whoever asks.

``importance.free_memory`` is all that is told of a GPU here; the rest runs as it is.
"""

import dataclasses
import warnings

import pytest
import torch

from guides.laplace import _MAX_TANGENTS
from pyro_gpvae import ImageModel, log_evidence, make_guide
from pyro_gpvae.core._files import read_json
from pyro_gpvae.core._memory import PeakMemory, bytes_each
from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
from pyro_gpvae.evaluation.companion import companion_scores
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.evaluation.generation import decode
from pyro_gpvae.evaluation.importance import ParetoWarning, default_chunk_size
from pyro_gpvae.evaluation.reference import reference_evidence
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.curvature import linearize
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.train import train_run

FREE = 10_000_000


def table_1():
    torch.manual_seed(0)
    model = ImageModel((1, 28, 28), 10).requires_grad_(False)
    return model, make_guide("vae", model), torch.rand(8, 1, 28, 28)


def optimum(model, guide, x):
    return make_guide("instance:full", model, max_steps=6).optimise(x)


CHAINS = {"num_chains": 16, "num_steps": 3, "seed": 0}
ESTIMATORS = {
    "own": lambda model, guide, x: log_evidence(model, guide, x, 80, seed=0),
    "fixed": lambda model, guide, x: log_evidence(
        model, PrecomputedPosterior(guide.posterior(x)), x, 80, seed=0
    ),
    "annealed": lambda model, guide, x: annealed_evidence(model, x, guide, **CHAINS),
    "bidirectional": lambda model, guide, x: bidirectional(model, num_images=8, **CHAINS),
    "optimum": optimum,
    "companion": lambda model, guide, x: companion_scores(
        model, guide, x, x, num_samples=80, widths=(1.0,), num_chains=2, num_steps=2
    ),
    "gap": lambda model, guide, x: decompose(
        model, guide, x[:4], num_samples=80, reference_samples=160, max_optimum_steps=6
    ),
    "decoded": lambda model, guide, x: decode(model, torch.zeros(160, model.latent_dim)),
    "reference": lambda model, guide, x: reference_evidence(
        model, x[:4], guide, num_samples=160, num_chains=16, num_steps=2
    ),
}


def peak(work):
    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)
        warnings.filterwarnings("ignore", ".* optimum after 6 steps")
        work()
    return memory.peak


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_fits_half_of_what_is_free(name, monkeypatch):
    program = table_1()
    assert peak(lambda: ESTIMATORS[name](*program)) > FREE // 2
    monkeypatch.setattr("pyro_gpvae.evaluation.importance.free_memory", lambda device: FREE)
    state = torch.get_rng_state()
    assert peak(lambda: ESTIMATORS[name](*program)) < FREE // 2
    assert torch.equal(torch.get_rng_state(), state), "measuring draws no random numbers"


def test_a_gpu_takes_65536_halved_until_they_fit_half_of_what_is_free(monkeypatch):
    gpu, need = torch.device("cuda"), 1000
    for free, expected in ((10**15, 65_536), (2 * 65_536 * need - 1, 32_768), (0, 1)):
        monkeypatch.setattr(
            "pyro_gpvae.evaluation.importance.free_memory", lambda device, free=free: free
        )
        assert default_chunk_size(gpu, lambda: need) == expected


def test_a_cpu_takes_640_and_measures_nothing():
    def need():
        raise AssertionError("measured")

    assert default_chunk_size(torch.device("cpu"), need) == 640


def test_a_run_records_what_fitted_and_is_repeated_with_that(monkeypatch, tmp_path):
    options = {"latent_dim": 2, "epochs": 1, "train_images": 64, "test_images": 10}
    config = RunConfig(guide="vae", num_samples=30, device="cpu", **options)
    folder = tmp_path / "run"
    monkeypatch.setattr("pyro_gpvae.evaluation.importance.free_memory", lambda device: 600_000)
    record = train_run(config, folder, progress=False)
    assert record["config"]["chunk_size"] == record["scores"]["chunk_size"] == 5
    assert read_json(folder / "config.json") == record["config"]
    monkeypatch.undo()  # all memory is free again
    again = evaluate_run(folder)
    assert again["scores"] == record["scores"]
    assert again["config"]["chunk_size"] == 5
    other = train_run(config, tmp_path / "other", progress=False)["scores"]
    assert other["chunk_size"] == 640
    assert other["log_evidence"] != record["scores"]["log_evidence"]
    config = RunConfig(**record["config"])
    assert dataclasses.asdict(config) == record["config"]
    assert train_run(config, tmp_path / "again", progress=False)["scores"] == record["scores"]


def test_a_gpu_linearizes_two_gibibytes_at_once():
    torch.manual_seed(0)
    model = ImageModel((3, 64, 64), 50).requires_grad_(False)
    x, z = torch.rand(4, 3, 64, 64), torch.randn(4, 50)
    with torch.no_grad():
        each = bytes_each(lambda count: lambda: linearize(model, x[:count], z[:count]))
    assert _MAX_TANGENTS["cuda"] * each / 50 < 2.1 * 2**30
