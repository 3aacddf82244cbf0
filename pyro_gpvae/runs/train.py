"""Runs: train a guide, evaluate it, and keep both in a folder that reproduces the score."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._files import (
    check_replaceable,
    finished_folder,
    partial_folder,
    read_json,
    work_folder,
    write_json,
    write_text,
)
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import ImageData, split_validation
from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import ImageModel, initial_sigma
from pyro_gpvae.model.networks import autocast_networks
from pyro_gpvae.runs.config import RunConfig, check_same
from pyro_gpvae.runs.evaluate import diagnostics, evaluate
from pyro_gpvae.runs.folder import (
    FORMAT,
    RUN_FILES,
    Run,
    build_model,
    check_trust,
    load_images,
    load_run,
    named_device,
    warm_guide,
)
from pyro_gpvae.runs.report import HTML
from pyro_gpvae.runs.weights import save_weights
from pyro_gpvae.training.checkpoint import Checkpoints, OnError
from pyro_gpvae.training.loop import History, fit

__all__ = ["TrainOptions", "resume_run", "train_run"]

#: The files from which an unfinished run is continued.
_UNFINISHED = ("checkpoint.pt", "checkpoint.previous.pt")
#: What a run folder may hold if it is replaced: also a report, and a manifest of older versions.
_FILES = (*RUN_FILES, HTML, "manifest.json")
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
        config: The options of the run; relative paths of the data are recorded as absolute ones.
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
    if options.get("data") is None:  # images at hand may have any name
        config = config.moved()
    if resume:
        for folder in (partial_folder(out), out):
            if (folder / "config.json").is_file():
                check_same(_read_config(folder)[0], config, out)
                return resume_run(out, device=config.device, **options)
    check_replaceable(out, overwrite, (*_FILES, *_UNFINISHED, "lock"))
    return _train(config, out, None, options, overwrite)


def resume_run(
    out: str | Path, *, device: str | None = None, **options: Unpack[TrainOptions]
) -> dict[str, Any]:
    """Continues a run of :func:`train_run` that was stopped or killed, with its own options.

    It ends with the numbers of a run that was never stopped, bit for bit, on the same device with
    the same number of threads (on CUDA: in torch's deterministic mode, and with a chunk size that
    is given). A finished run is left as it is.

    Arguments:
        out: The run folder, as it was given to :func:`train_run`, or ``out.partial``.
        device: The device to continue on; None is that of the run.
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
    return _train(config.moved(device=device), out, begun_with, options)


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
    config = config.moved(device=str(named_device(config.device)))
    data = load_images(config, options.get("data"), options.get("download", False))
    hashes = {"train images": sha256(data.train), "test images": sha256(data.test)}
    start = None
    if config.warm_start is not None:
        trust = options.get("trust_guide", False)
        start = load_run(config.warm_start, device=config.device, trust_guide=trust)
        hashes["warm start"] = start.weights_sha256
    for name, found in hashes.items():
        if begun_with and begun_with.get(name) != found:
            raise ValueError(
                f"since the run {out} was begun, its {name} changed: put back what was there, or "
                "start again (--overwrite)"
            )
    images, validation = data.train, None
    if config.validation:
        images, validation = split_validation(images, config.validation)
    model, guide = _build(config, data.image_shape, initial_sigma(images), start)
    resume, progress = begun_with is not None, options.get("progress", True)
    with work_folder(
        out, files=_FILES, unfinished=_UNFINISHED, overwrite=overwrite, resume=resume
    ) as folder:
        if not resume:
            write_json(folder / "config.json", dataclasses.asdict(config) | {_BEGUN_WITH: hashes})
        checkpoints = Checkpoints(
            folder,
            every=options.get("checkpoint_every", "5m"),
            resume=True,
            on_error=options.get("on_checkpoint_error", "continue"),
        )
        low, rate = config.precision == "bf16", config.sigma_learning_rate
        with autocast_networks(torch.bfloat16) if low else nullcontext():
            history = fit(
                model,
                guide,
                images,
                epochs=config.epochs,
                batch_size=config.batch_size,
                validation=validation,
                keep_best=config.keep_best,
                seed=config.seed,
                checkpoints=checkpoints,
                progress=config.guide if progress is True else progress,
                learning_rate=config.learning_rate,
                learning_rates=None if rate is None else {"model.log_sigma": rate},
                backend=config.backend,
                on_nonfinite=config.on_nonfinite,
            )
        record: dict[str, Any] = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "data": {
                "name": data.name,
                "image_shape": list(data.image_shape),
                "train_images": len(images),
                "validation_images": config.validation,
                "test_images": len(data.test),
                "train_sha256": hashes["train images"],
                "test_sha256": hashes["test images"],
            },
        }
        if start is not None:  # so that the record alone tells how to repeat the run
            record["warm_start"] = start.record
        if (plan := options.get("plan")) is not None:
            record["plan"] = dict(plan)
        shown = bool(progress) and sys.stderr.isatty()
        return _finish(folder, record, data.test, model, guide, history, shown)


def _build(
    config: RunConfig, shape: tuple[int, int, int], sigma: float, start: Run | None
) -> tuple[ImageModel, torch.nn.Module]:
    """Builds model and guide of a run, with random weights or those of its warm start."""
    if start is not None:
        for name in ("latent_dim", "decoder", "likelihood"):
            ours, theirs = getattr(config, name), getattr(start.config, name)
            if ours != theirs:
                raise ValueError(
                    f"{name} is {ours!r}, but the warm start {start.folder} has {theirs!r}: "
                    "the model starts from its weights, so they must agree"
                )
        if shape != start.model.image_shape:
            raise ValueError(
                f"the images of {config.data!r} have shape {shape}, but the warm start "
                f"{start.folder} was trained on {start.model.image_shape}"
            )
    with seeded(config.seed, torch.device(config.device or "cpu")):
        model = build_model(config, shape, sigma)
        if start is None:
            guide = make_guide(config.guide, model)
        else:
            model.load_state_dict(start.model.state_dict())
            guide = warm_guide(config.guide, model, start.guide)
    model.requires_grad_(not config.freeze_decoder)
    if not isinstance(guide, torch.nn.Module):
        raise ValueError(
            f"the guide {config.guide!r} is a {type(guide).__name__}, expected a "
            "torch.nn.Module or PyroModule: only a module's weights can be saved"
        )
    return model.to(config.device), guide.to(config.device)


def _finish(
    folder: Path,
    record: dict[str, Any],
    images: Tensor,
    model: ImageModel,
    guide: torch.nn.Module,
    trained: History,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates the trained guide, completes the record, and writes the files of the run."""
    history, config = trained.frame(), RunConfig(**record["config"])
    write_text(folder / "history.csv", history.to_csv(index=False))
    _check_finite(config, folder, loss=history["loss"].iloc[-1])
    begin = time.monotonic()
    scores, table = evaluate(model, guide, images, config, progress)
    _check_finite(config, folder, elbo=scores["elbo"], log_evidence=scores["log_evidence"])
    record["config"]["chunk_size"] = scores["chunk_size"]
    seconds = {"training": float(history["seconds"].iloc[-1])}
    record |= {
        **environment(named_device(config.device)),
        "backend": trained.backend,
        "steps": int(history["step"].iloc[-1]),
        "best_epoch": trained.best_epoch,
        "seconds": seconds | {"evaluation": time.monotonic() - begin},
        "scores": scores,
        "sigma": None if model.sigma is None else float(model.sigma.detach()),
        "diagnostics": diagnostics(guide, images, record["data"]["train_images"]),
        "weights_sha256": save_weights(folder / "weights.safetensors", model, guide),
    }
    write_text(folder / "scores.csv", table.to_csv(index=False))
    write_json(folder / "record.json", record)
    # last: until then it says what the run was begun with, which is checked if it is resumed
    write_json(folder / "config.json", record["config"])
    return record


def _check_finite(config: RunConfig, folder: Path, **values: float) -> None:
    """Refuses to record numbers that are not finite: with "skip", a training may diverge."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the training of {config.guide!r} diverged: its {name} is {value}, see "
                f"{folder / 'history.csv'}. Train again (--overwrite), with a smaller learning rate"
            )
