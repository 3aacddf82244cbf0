"""Two processes train as one does."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import GUIDES, trained
from pyro.infer import Trace_ELBO

import pyro_gpvae
from pyro_gpvae.training._distributed import World
from pyro_gpvae.training.loop import READ_EVERY

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    worker = Path(__file__).parents[1] / "distributed_worker.py"
    paths = [str(Path(pyro_gpvae.__file__).parents[1]), str(worker.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes, logs = [], [folder / f"{rank}.log" for rank in range(2)]
        for rank, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            command = [sys.executable, str(worker), str(rank), "2", str(folder)]
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            process.wait(timeout=600)
    texts = [log.read_text() for log in logs]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(runs, alone, tolerance):
    """Parameters and losses of both processes are those of one."""
    for weights, rows in runs:
        assert weights.keys() == alone[0].keys()
        for name, tensor in weights.items():
            assert torch.allclose(tensor, alone[0][name], rtol=0, atol=tolerance), name
        for row, expected in zip(rows, alone[1], strict=True):
            for key in row.keys() - {"seconds"}:
                assert row[key] == pytest.approx(expected[key], rel=100 * tolerance, abs=1e-12), key
    assert all(torch.equal(t, runs[1][0][name]) for name, t in runs[0][0].items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in GUIDES] + [("vae", torch.float32), ("gp", torch.float32)],
)
def test_parameters_and_history_are_those_of_one_process(found, name, dtype):
    assert_same([f[name, dtype] for f in found], trained(name, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["compiled", "other seeds"])
def test_compiled_and_with_networks_of_the_first_process(found, name):
    assert_same([f[name] for f in found], trained("gp"), 1e-10)


def test_draws_of_several_particles_are_shared_out_image_by_image(found):
    objective = Trace_ELBO(num_particles=2, vectorize_particles=True)
    assert_same([f["particles"] for f in found], trained("vae", elbo=objective), 1e-10)


def test_a_training_that_was_stopped_goes_on_as_one_process_would(found):
    assert_same([f["resumed"] for f in found], trained("gp", epochs=3), 1e-10)
    # the signal came to one process during step 4, and both act on it together
    steps = {f["stopped"][1] for f in found}
    assert steps <= {"stopped after step 4", "stopped after step 5"}
    assert len(steps) == 1


def test_what_fails_in_the_first_process_fails_in_the_other(found):
    assert found[0]["not resumed"][0] == "FileExistsError"
    kind, text = found[1]["not resumed"]
    assert kind == "RuntimeError"
    assert "another process" in text
    assert "FileExistsError" in text


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("batch", "ValueError", "batch_size=7: 2 processes cannot share 7 of the 22 images evenly: "
         "use batch_size=6 or 8"),
        ("few", "ValueError", "1 images are too few for 2 processes"),
        ("normalised", "UnsupportedError", "batch normalisation"),
        ("centred", "UnsupportedError", "not the mean of those on two halves"),
        ("python", "UnsupportedError", "reads a tensor in Python"),
        ("params", "UnsupportedError", "Train them in one process"),
        ("other images", "ValueError", "give all of them the same"),
        ("captured", "ValueError", "use 'compiled'"),
        ("seeds", "ValueError", "seeds= is for one process"),
        ("not finite", "NonFiniteError", "step 1: before it, guide.head.bias is not finite"),
    ],
)  # fmt: skip
def test_errors_name_the_way_out(found, name, kind, words):
    for result in found:
        assert result[name] is not None
        assert result[name][0] == kind
        assert words in result[name][1]


def test_one_process_is_a_world_of_its_own():
    assert World.present() == World()
    assert READ_EVERY > 1
    batch = torch.arange(6)
    assert World().part(batch).equal(batch)
    assert World(1, 2).part(batch).tolist() == [3, 4, 5]
