"""Runs: train a guide, evaluate it, and keep both in a folder that reproduces the score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pyro_gpvae.core._files import (
    check_replaceable,
    finished_folder,
    partial_folder,
    read_json,
    work_folder,
    write_json,
)
from pyro_gpvae.data.images import ImageData, load_data
from pyro_gpvae.runs._prepared import prepare
from pyro_gpvae.runs.config import PLACE, RunConfig, check_same
from pyro_gpvae.runs.folder import RUN_FILES, Run, check_trust, load_run
from pyro_gpvae.training.checkpoint import Checkpoints, OnError

__all__ = ["TrainOptions", "resume_run", "train_into", "train_run"]

#: The files from which an unfinished run is continued.
_UNFINISHED = ("checkpoint.pt", "checkpoint.previous.pt")
#: What a run folder may hold if it is replaced: older versions wrote a manifest.
_FILES = (*RUN_FILES, "manifest.json")
#: The key of an unfinished config.json under which the hashes of images and warm start are noted.
_BEGUN_WITH = "begun_with"


class TrainOptions(TypedDict, total=False):
    """Keyword arguments of :func:`train_run` and :func:`resume_run`.

    Attributes:
        progress: Whether to show a progress bar; a text is its label. True by default.
        checkpoint_every: Steps between checkpoints, or minutes such as "5m", the default.
        on_checkpoint_error: "continue" (the default) or "stop" if a checkpoint cannot be written.
        trust_guide: Whether a guide that a file names may be code outside the registered guides;
            see :func:`pyro_gpvae.load_run`. False by default.
        data: The whole data set that the options name, if it is loaded already.
        download: Whether to download the data set if it is missing. False by default.
        plan: What the record says about the plan that the run is part of.
    """

    progress: bool | str
    checkpoint_every: int | str
    on_checkpoint_error: OnError
    trust_guide: bool
    data: ImageData | None
    download: bool
    plan: Mapping[str, Any] | None


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[TrainOptions],
) -> dict[str, Any]:
    """Trains a guide and a model, evaluates them on the test images, and writes a run folder.

    The same configuration gives the same numbers on the same device with the same number of
    threads. The global random state is left as it was. A run that is stopped or killed at any
    moment is continued by :func:`resume_run`, or by this function with ``resume=True``.

    Arguments:
        config: The options of the run.
        out: The run folder. It appears when the run is finished; until then the work is in
            ``out.partial``, and what was in ``out`` stays.
        overwrite: Whether to replace an earlier run in that folder, finished or not.
        resume: Whether to continue an unfinished run in that folder, and to leave a finished one
            as it is. The options must be the same, except for those of the place
            (:data:`pyro_gpvae.runs.config.PLACE`).
        options: See :class:`TrainOptions`.

    Returns:
        The content of ``record.json``.

    Raises:
        ValueError: If an option is wrong, or the warm start does not fit.
        FileExistsError: If the folder is not empty, or an unfinished run is there.
        InUseError: If another process is training in that folder.
        FileNotFoundError: If data or the warm start are missing.
        NonFiniteError: If training diverges.
    """
    config.check()
    out = Path(out).expanduser().resolve()
    if resume:
        for folder in (partial_folder(out), out):
            if (folder / "config.json").is_file():
                check_same(_read_config(folder)[0], config, PLACE, out)
                return resume_run(out, **options)
    check_replaceable(out, overwrite, (*_FILES, *_UNFINISHED, "lock"))
    return _train(config, out, None, options, overwrite)


def resume_run(out: str | Path, **options: Unpack[TrainOptions]) -> dict[str, Any]:
    """Continues a run of :func:`train_run` that was stopped or killed, with its own options.

    It ends with the numbers of a run that was never stopped, bit for bit, on the same device with
    the same number of threads (on CUDA: in torch's deterministic mode, and with a chunk size that
    is given). A finished run is left as it is.

    Arguments:
        out: The run folder, as it was given to :func:`train_run`, or ``out.partial``.
        options: See :class:`TrainOptions`; ``trust_guide`` applies to the run's own guide as well.

    Returns:
        The content of ``record.json``.

    Raises:
        FileNotFoundError: If there is no run, finished or not.
        ValueError: If its files are damaged, its images or its warm start have changed, or its
            guide is not trusted.
        InUseError: If another process is training in that folder.
    """
    out = finished_folder(out).resolve()
    partial = partial_folder(out)
    if not (partial / "config.json").is_file():
        if (out / "record.json").is_file():
            return read_json(out / "record.json")
        raise FileNotFoundError(
            f"there is no run to continue: neither {partial} nor {out} holds one. Start it with "
            "train --out"
        )
    config, begun_with = _read_config(partial)
    check_trust(config.guide, partial / "config.json", options.get("trust_guide", False))
    return _train(config, out, begun_with, options)


def _read_config(folder: Path) -> tuple[RunConfig, dict[str, str]]:
    """Reads the configuration of a run, and what an unfinished one was begun with."""
    values = read_json(folder / "config.json")
    begun_with = values.pop(_BEGUN_WITH, {})
    if not isinstance(begun_with, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged: {_BEGUN_WITH} is {begun_with!r}")
    return RunConfig.from_json(values, folder / "config.json"), begun_with


def _train(
    config: RunConfig,
    out: Path,
    begun_with: dict[str, str] | None,
    options: TrainOptions,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains in ``out.partial`` and renames it; ``begun_with`` is None for a new run."""
    start = None
    if config.warm_start is not None:
        start = load_run(config.warm_start, trust_guide=options.get("trust_guide", False))
    download = options.get("download", False)
    data = options.get("data") or load_data(config.data, config.root, download)
    run = prepare(config, start, data)
    for name, found in run.begun_with().items():
        if begun_with and begun_with.get(name) != found:
            raise ValueError(
                f"since the run {out} was begun, its {name} changed: put back what was there, or "
                "start again (--overwrite)"
            )
    resume = begun_with is not None
    with work_folder(
        out, files=_FILES, unfinished=_UNFINISHED, overwrite=overwrite, resume=resume
    ) as folder:
        if not resume:
            content = dataclasses.asdict(run.config) | {_BEGUN_WITH: run.begun_with()}
            write_json(folder / "config.json", content)
        checkpoints = Checkpoints(
            folder,
            every=options.get("checkpoint_every", "5m"),
            resume=True,
            on_error=options.get("on_checkpoint_error", "continue"),
        )
        history = run.train(options.get("progress", True), checkpoints)
        return run.finish(folder, history, options.get("plan"))


def train_into(
    folder: Path, config: RunConfig, start: Run | None = None, progress: bool | str = True
) -> dict[str, Any]:
    """Trains and evaluates a run in an existing folder, without checkpoints.

    Arguments:
        folder: The folder, to which the files of the run are written.
        config: The options.
        start: The run that it starts from.
        progress: As of :class:`TrainOptions`.
    """
    run = prepare(config, start, load_data(config.data, root=config.root))
    return run.finish(folder, run.train(progress))
