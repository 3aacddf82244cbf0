r"""The same run with several seeds, trained in one program: a run folder for each."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_gpvae.core._files import (
    CHECKPOINTS,
    finished_folder,
    partial_folder,
    read_json,
    work_folder,
    write_json,
)
from pyro_gpvae.data.images import ImageData, load_data
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Run, check_trust, warm_start
from pyro_gpvae.runs.train import Begun
from pyro_gpvae.training.checkpoint import Checkpoints, OnError
from pyro_gpvae.training.loop import fit

__all__ = ["is_stacked", "resume_seeds", "train_seeds"]

_SEEDS = "seeds.json"


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool | str = True,
    checkpoint_every: int | str = "5m",
    on_checkpoint_error: OnError = "continue",
    trust_guide: bool = False,
    data: ImageData | None = None,
) -> list[dict[str, Any]]:
    """Trains a run with each of several seeds, all at once, and writes ``out/seed-N`` for each.

    Run i is what :func:`pyro_gpvae.train_run` gives with seed i, up to rounding; see
    :class:`pyro_gpvae.training._stacked.StackedStep`. The seconds of training in each record are those of
    all, and ``stacked`` says how many they are.

    Arguments:
        config: The options; its seed is not used.
        seeds: The seeds.
        out: The folder of the run folders. It appears when all are finished; until then the work
            is in ``out.partial``, and :func:`resume_seeds` goes on with it.
        overwrite, progress, checkpoint_every, on_checkpoint_error, trust_guide, data: As for
            :func:`pyro_gpvae.train_run`.

    Returns:
        The contents of the ``record.json`` of each run.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, InUseError, NonFiniteError: As
            :func:`pyro_gpvae.train_run`.
        UnsupportedError: If this guide cannot be stacked; train its seeds one by one.
    """
    config.check()
    numbers = [operator.index(seed) for seed in seeds]
    if len(numbers) < 2 or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ValueError(f"seeds must be at least two different whole numbers, got {numbers}")
    start = warm_start(config, trust_guide)
    saving: dict[str, Any] = {"every": checkpoint_every, "on_error": on_checkpoint_error}
    how: dict[str, Any] = {"progress": progress, "data": data, "overwrite": overwrite}
    return _train(config, numbers, out, start, saving, **how)


def resume_seeds(
    out: str | Path,
    *,
    progress: bool | str = True,
    checkpoint_every: int | str = "5m",
    on_checkpoint_error: OnError = "continue",
    trust_guide: bool = False,
    data: ImageData | None = None,
) -> list[dict[str, Any]]:
    """Continues what :func:`train_seeds` began, with its own options; finished runs stay.

    Arguments:
        out: The folder, as it was given to :func:`train_seeds`, or ``out.partial``.
        progress, checkpoint_every, on_checkpoint_error, trust_guide, data: As for
            :func:`pyro_gpvae.resume_run`.

    Raises:
        FileNotFoundError: If there is nothing to continue.
        ValueError: If its files are damaged.
    """
    out = finished_folder(out).resolve()
    source = partial_folder(out) / _SEEDS
    if not source.is_file():
        if (out / _SEEDS).is_file():
            seeds = read_json(out / _SEEDS)["seeds"]
            return [read_json(out / f"seed-{seed}" / "record.json") for seed in seeds]
        raise FileNotFoundError(f"there are no runs to continue: neither {source.parent} nor {out}")
    begun = read_json(source)
    seeds = begun.get("seeds")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{source} does not name the seeds of runs: it is damaged")
    config = RunConfig.from_json(begun.get("config", {}), source)
    check_trust(config.guide, source, trust_guide)
    start = warm_start(config, trust_guide)
    saving: dict[str, Any] = {"every": checkpoint_every, "on_error": on_checkpoint_error}
    return _train(config, seeds, out, start, saving, progress=progress, data=data, resume=True)


def is_stacked(out: str | Path) -> bool:
    """Whether a folder holds runs of :func:`train_seeds`, finished or not."""
    out = finished_folder(out).resolve()
    return any((folder / _SEEDS).is_file() for folder in (partial_folder(out), out))


def _train(
    config: RunConfig,
    seeds: list[int],
    out: str | Path,
    start: Run | None,
    saving: Mapping[str, Any],
    *,
    progress: bool | str,
    data: ImageData | None,
    overwrite: bool = False,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Does the work of both in ``out.partial``; ``saving`` are arguments of Checkpoints."""
    out = Path(out).expanduser().resolve()
    ours = [p.name for p in out.glob("seed-*") if (p / "record.json").is_file()]
    data = data or load_data(config.data, root=config.root, download=config.download)
    runs = [Begun(dataclasses.replace(config, seed=seed), start, data) for seed in seeds]
    files = (_SEEDS, "begun.json", *ours, CHECKPOINTS, "lock")
    with work_folder(out, overwrite=overwrite, files=files, resume=resume) as folder:
        if not resume:
            config = dataclasses.replace(runs[0].config, seed=config.seed)
            write_json(folder / _SEEDS, {"seeds": seeds, "config": dataclasses.asdict(config)})
        runs[0].check(folder)
        options = runs[0].options
        histories = fit(
            [run.model for run in runs],
            [run.guide for run in runs],
            runs[0].train,
            seeds=seeds,
            progress=progress if isinstance(progress, str) or not progress else config.guide,
            checkpoints=Checkpoints(folder / CHECKPOINTS, **saving),
            resume=True,
            **options,
        )
        records = []
        for seed, run, history in zip(seeds, runs, histories, strict=True):
            target = folder / f"seed-{seed}"
            target.mkdir(exist_ok=True)
            records.append(run.finish(target, history, stacked=len(runs)))
    (out / "begun.json").unlink(missing_ok=True)
    return records
