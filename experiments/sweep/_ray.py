"""Trains the cells of a plan with Ray Tune, on this machine or on a cluster."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.data.images import ImageData

#: Trains one cell: takes its name, and its images.
TrainCell = Any


@contextmanager
def cluster(address: str | None, images: Mapping[str, ImageData]) -> Iterator[dict[str, Any]]:
    """Connects to Ray, or starts it on this machine; returns references to the images.

    Raises:
        ImportError: If Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'Ray is not installed: pip install "pyro-gpvae[sweep]", or train in turn with --in-turn'
        ) from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        # its memory is that of the images, which all runs read in place
        size = sum(data.train.nbytes + data.test.nbytes for data in images.values())
        memory = int(1.2 * size) + 100 * 2**20
        ray.init(include_dashboard=False, object_store_memory=memory, **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        yield {name: ray.put(_arrays(data)) for name, data in images.items()}
    finally:
        ray.shutdown()


def tune_cells(
    train_cell: TrainCell,
    names: Sequence[str],
    data_of: Mapping[str, str],
    images: Mapping[str, Any],
    out: Path,
    *,
    cpus: int,
    gpus: float,
    retries: int,
) -> dict[str, str]:
    """Gives cells that do not wait for each other to Ray Tune; returns those that failed, and why.

    ``train_cell`` takes a cell's name and images, which are references of :func:`cluster`. Tune's
    own state is not kept: what is finished stands in the run folders.
    """
    from ray import tune

    trainable = tune.with_resources(
        tune.with_parameters(
            _trial, train_cell=train_cell, data_of=data_of, images=images, out=str(out), cpus=cpus
        ),
        {"cpu": cpus, "gpu": gpus},
    )
    state = out / ".ray"
    shutil.rmtree(state, ignore_errors=True)  # of a driver that was killed
    grid = tune.Tuner(
        trainable,
        param_space={"cell": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(state),
            failure_config=tune.FailureConfig(max_failures=retries),
        ),
    ).fit()
    results = [grid[number] for number in range(len(grid))]
    failed = {
        str(result.config["cell"]): str(result.error).strip().split("\n")[-1]
        for result in results
        if result.error is not None and result.config is not None
    }
    missing = [n for n in names if n not in failed and not (out / n / "record.json").exists()]
    shutil.rmtree(state, ignore_errors=True)
    return failed | dict.fromkeys(missing, "not finished: start again")


def _trial(
    config: dict[str, str],
    *,
    train_cell: TrainCell,
    data_of: Mapping[str, str],
    images: Mapping[str, Any],
    out: str,
    cpus: int,
) -> None:
    """Trains a cell in a process of a worker."""
    import ray
    from ray import tune

    os.chdir(out)  # records name warm starts without a path
    torch.set_num_threads(cpus)
    arrays = ray.get(images[data_of[config["cell"]]])
    with warnings.catch_warnings():  # they lie in shared memory, which is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        parts = {part: torch.from_numpy(arrays[part]) for part in ("train", "test")}
    score = train_cell(config["cell"], ImageData(arrays["name"], **parts))
    tune.report({"log_evidence": score})


def _arrays(data: ImageData) -> dict[str, Any]:
    arrays = {"train": data.train.numpy(), "test": data.test.numpy()}
    return {"name": data.name, **arrays}
