r"""Runs: train a guide, evaluate it, and keep both in a folder that reproduces the score.

A run folder holds ``config.json`` (every option), ``record.json`` (options, versions, commit,
device, seconds, scores), ``history.csv`` (a row an epoch), ``scores.csv`` (a row a test image),
``weights.safetensors``, and ``manifest.json`` (sizes and SHA-256 of the others). While a run is
trained, its folder is ``RUN.partial``, with checkpoints and a lock.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_gpvae.checkpoint import (
    Checkpoints,
    OnError,
    load_weights,
    save_weights,
    weights_sha256,
)
from pyro_gpvae.companion import companion_scores, width_images
from pyro_gpvae.config import RunConfig
from pyro_gpvae.data import ImageData, load_data, split_validation, to_float
from pyro_gpvae.files import (
    CHECKPOINTS,
    MANIFEST,
    check_manifest,
    check_replaceable,
    finished_folder,
    new_folder,
    partial_folder,
    read_json,
    work_folder,
    write_json,
    write_manifest,
    write_text,
)
from pyro_gpvae.guide import available_guides, load_guide, make_guide
from pyro_gpvae.importance import Evidence, chunk_size_for, log_evidence
from pyro_gpvae.model import ImageModel, initial_sigma
from pyro_gpvae.networks import ImageShape, build_decoder
from pyro_gpvae.provenance import environment, sha256
from pyro_gpvae.randomness import seeded
from pyro_gpvae.training import History, fit

__all__ = [
    "RUN_FILES",
    "Begun",
    "Run",
    "check_options",
    "check_trust",
    "complete_run",
    "evaluate_run",
    "load_images",
    "load_run",
    "resume_run",
    "train_into",
    "train_run",
    "warm_guide",
    "warm_start",
]

RUN_FILES = (
    "config.json",
    "history.csv",
    "manifest.json",
    "record.json",
    "scores.csv",
    "weights.safetensors",
)

# with what a process that was killed at the very end may have left in a finished run
_REPLACEABLE = (*RUN_FILES, CHECKPOINTS, "lock")

# of an unfinished run: the hashes of what it was begun with
_BEGUN = "begun.json"

#: The newest format of run folders that this version writes, and reads with all older ones.
FORMAT = 1


@dataclass
class Run:
    """A finished run, read back from its folder.

    Attributes:
        folder: Where it lies.
        config: Its options.
        record: The content of ``record.json``.
        model: The trained model.
        guide: The trained guide.
    """

    folder: Path
    config: RunConfig
    record: dict[str, Any]
    model: ImageModel
    guide: Any

    @cached_property
    def data(self) -> ImageData:
        """The images that the run was trained and evaluated on, read at first use.

        Raises:
            ValueError: If they are not the same images as in the run.
        """
        data = load_images(self.config)
        for part, images in (("train", data.train), ("test", data.test)):
            if sha256(images) != self.record["data"][f"{part}_sha256"]:
                raise ValueError(
                    f"the {part} images of {self.config.data!r} are not those of the run "
                    f"{self.folder}: its scores cannot be reproduced. Point --data or --root to "
                    "the files it was trained on."
                )
        return data


def train_run(
    config: RunConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool | str = True,
    checkpoint_every: int | str = "5m",
    on_checkpoint_error: OnError = "continue",
    trust_guide: bool = False,
    data: ImageData | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a guide and a model, evaluates them on the test images, and writes a run folder.

    The same configuration gives the same numbers on the same device with the same number of
    threads; on a GPU, where free memory decides the chunk size of the evaluation, if that is given.
    The global random state is left as it was. A run that is stopped or killed at any moment is
    continued by :func:`resume_run`.

    Arguments:
        config: The options.
        out: The run folder. It appears when the run is finished; until then the work is in
            ``out.partial``, and what was in ``out`` stays.
        overwrite: Whether to replace an earlier run in that folder, finished or not.
        progress: Whether to show a progress bar; a text is its label.
        checkpoint_every: Steps, or minutes such as "5m"; see :class:`pyro_gpvae.Checkpoints`.
        on_checkpoint_error: "continue" or "stop" if a checkpoint cannot be written.
        trust_guide: Whether the guide of the warm start may be code outside the registered
            guides; see :func:`load_run`.
        data: The data set that the options name, whole, if it is loaded already.
        plan: What the record says of the plan that the run is part of.

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
    # what may be wrong is found before anything is overwritten
    check_replaceable(Path(out).expanduser().resolve(), overwrite, _REPLACEABLE)
    data = data or load_data(config.data, root=config.root, download=config.download)
    start = warm_start(config, trust_guide)
    saving: dict[str, Any] = {"every": checkpoint_every, "on_error": on_checkpoint_error}
    how: dict[str, Any] = {"progress": progress, "data": data, "plan": plan}
    return _train_beside(out, config, start, saving, how, overwrite=overwrite)


def resume_run(
    out: str | Path,
    *,
    progress: bool | str = True,
    checkpoint_every: int | str = "5m",
    on_checkpoint_error: OnError = "continue",
    trust_guide: bool = False,
    data: ImageData | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Continues a run of :func:`train_run` that was stopped or killed, with its own options.

    It ends with the numbers of a run that was never stopped, bit for bit, on the same device with
    the same number of threads (on CUDA: in torch's deterministic mode, and with a chunk size that
    is given). A finished run is left as it is.

    Arguments:
        out: The run folder, as it was given to :func:`train_run`, or ``out.partial``.
        progress, checkpoint_every, on_checkpoint_error, trust_guide, data, plan: As for
            :func:`train_run`; ``trust_guide`` is about the run's own guide as well.

    Returns:
        The content of ``record.json``.

    Raises:
        FileNotFoundError: If there is no run, finished or not.
        ValueError: If its files are damaged; or see :func:`load_run` about its guide.
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
    source = partial / "config.json"
    config = RunConfig.from_json(read_json(source), source)
    check_trust(config.guide, source, trust_guide)
    start = warm_start(config, trust_guide)
    saving: dict[str, Any] = {"every": checkpoint_every, "on_error": on_checkpoint_error}
    how: dict[str, Any] = {"progress": progress, "data": data, "plan": plan}
    return _train_beside(out, config, start, saving, how, resume=True)


def complete_run(config: RunConfig, out: str | Path, **how: Any) -> dict[str, Any]:
    """Trains a run, goes on with an unfinished one, or leaves a finished one: call it at any time.

    Whether a run that is there already has these options is not checked here, but by
    :func:`check_options`.

    Arguments:
        config: The options.
        out: The run folder.
        how: Keyword arguments of :func:`train_run` but ``overwrite``.

    Returns:
        The content of ``record.json``.

    Raises:
        ValueError, FileNotFoundError, InUseError, NonFiniteError: As :func:`train_run`.
    """
    out = Path(out).expanduser().resolve()
    begun = partial_folder(out) / "config.json"
    if begun.is_file() or (out / "record.json").is_file():
        return resume_run(out, **how)
    return train_run(config, out, **how)


def check_options(run: Run, config: RunConfig, ignore: Collection[str], advice: str) -> None:
    """Refuses a finished run that has other options than are wanted.

    Arguments:
        run: The run.
        config: The options that are wanted.
        ignore: The names of those that may differ.
        advice: What the error tells to do.

    Raises:
        ValueError: If another option differs; names it.
    """
    for option, wanted in vars(config).items():
        found = getattr(run.config, option)
        if wanted != found and option not in ignore:
            raise ValueError(
                f"{run.folder} was trained with {option} = {found!r}, not {wanted!r}: {advice}"
            )


def _train_beside(
    out: str | Path,
    config: RunConfig,
    start: Run | None,
    saving: Mapping[str, Any],
    how: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains in ``out.partial``, from the beginning or from what is there, and renames it.

    ``saving`` are arguments of :class:`Checkpoints`, ``how`` of :func:`train_into`.
    """
    with work_folder(out, overwrite=overwrite, files=_REPLACEABLE, resume=resume) as folder:
        checkpoints = Checkpoints(folder / CHECKPOINTS, **saving)
        if not resume:
            write_json(folder / "config.json", dataclasses.asdict(_resolved(config)))
        return train_into(folder, config, start, checkpoints=checkpoints, **how)


def train_into(
    folder: Path,
    config: RunConfig,
    start: Run | None = None,
    *,
    progress: bool | str = True,
    checkpoints: Checkpoints | None = None,
    data: ImageData | None = None,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Does the work of :func:`train_run` in an existing folder, from a run that is at hand, and
    from the newest of the checkpoints if there is one."""
    begun = Begun(config, start, data)
    if checkpoints is not None:
        begun.check(folder)
    history = fit(
        begun.model,
        begun.guide,
        begun.train,
        seed=config.seed,
        progress=progress if isinstance(progress, str) or not progress else config.guide,
        checkpoints=checkpoints,
        resume=checkpoints is not None,
        **begun.options,
    )
    return begun.finish(folder, history, plan=plan)


class Begun:
    """A run before and after its training: model and guide, images, and what is written of it.

    Arguments:
        config: The options.
        start: The run it starts from.
        data: The data set that the options name, whole, if it is loaded already.

    Attributes:
        config: The options, with the device filled in, and the chunk size once it is evaluated.
        model: The model.
        guide: The guide.
        train: The training images.
        options: Keyword arguments of :func:`pyro_gpvae.fit`.

    Raises:
        ValueError: If an option is wrong, or the warm start does not fit.
    """

    def __init__(
        self, config: RunConfig, start: Run | None = None, data: ImageData | None = None
    ) -> None:
        config.check()
        self.config = config = _resolved(config)
        self.start = start
        self.device = _device(config.device)
        self.data = load_images(config, data)
        self.hashes = {"train": sha256(self.data.train), "test": sha256(self.data.test)}
        self.train, validation = self.data.train, None
        if config.validation:
            self.train, validation = split_validation(self.data.train, config.validation)
        _check_start(config, self.data.image_shape, start)
        with seeded(config.seed, self.device):
            self.model = _build_model(config, self.data.image_shape, initial_sigma(self.train))
            if start is None:
                self.guide = make_guide(config.guide, self.model)
            else:
                self.model.load_state_dict(start.model.state_dict())
                self.guide = warm_guide(config.guide, self.model, start.guide)
        self.model.requires_grad_(not config.freeze_decoder)
        if not isinstance(self.guide, torch.nn.Module):
            raise ValueError(
                f"the guide {config.guide!r} is a {type(self.guide).__name__}, expected a "
                "torch.nn.Module or PyroModule: only a module's weights can be saved"
            )
        self.options: dict[str, Any] = {
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "validation": validation,
            "device": self.device,
            "on_nonfinite": config.on_nonfinite,
            "backend": config.backend,
            "precision": None if config.precision == "default" else config.precision,
        }

    def check(self, folder: Path) -> None:
        """Refuses to go on in this folder with other images or another warm start."""
        _check_begun(folder, self.hashes, self.start)

    def finish(
        self,
        folder: Path,
        trained: History,
        *,
        plan: Mapping[str, Any] | None = None,
        stacked: int | None = None,
    ) -> dict[str, Any]:
        """Evaluates the trained guide, and writes the files of the run.

        Arguments:
            folder: Where to.
            trained: The history.
            plan: What the record says of the plan that the run is part of.
            stacked: The number of runs that were trained in one program with it, itself included.
        """
        data, device = self.data, self.device
        history = trained.frame()
        begin = time.monotonic()
        config = self.config = _with_chunk_size(self.config, self.model, self.guide, data.test)
        scores, table = _evaluate(self.model, self.guide, data.test, config)
        record: dict[str, Any] = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "data": {
                "name": data.name,
                "note": data.note,
                "image_shape": list(data.image_shape),
                "train_images": len(self.train),
                "validation_images": config.validation,
                "test_images": len(data.test),
                "train_sha256": self.hashes["train"],
                "test_sha256": self.hashes["test"],
            },
            **environment(device),
            "backend": trained.backend,
            "steps": int(history["step"].iloc[-1]),
            "seconds": {
                "training": float(history["seconds"].iloc[-1]),
                "evaluation": time.monotonic() - begin,
            },
            "scores": scores,
            "sigma": None if self.model.sigma is None else float(self.model.sigma.detach()),
            "diagnostics": _diagnostics(self.guide, data.test, device, len(self.train)),
        }
        if self.start is not None:  # so that the record alone tells how to repeat the run
            record["warm_start"] = self.start.record
        if plan is not None:
            record["plan"] = dict(plan)
        if stacked is not None:  # the seconds of training are those of all
            record["stacked"] = stacked
        save_weights(folder / "weights.safetensors", self.model, self.guide)
        write_text(folder / "history.csv", history.to_csv(index=False))
        write_text(folder / "scores.csv", table.to_csv(index=False))
        write_json(folder / "config.json", dataclasses.asdict(config))
        write_json(folder / "record.json", record)
        (folder / _BEGUN).unlink(missing_ok=True)
        write_manifest(folder, [name for name in RUN_FILES if name != MANIFEST])
        return record


def load_run(
    folder: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
) -> Run:
    """Reads a run folder back: configuration, record, trained model and guide.

    No file of a run can run code: weights are safetensors, the rest is JSON and CSV. A guide
    that is named ``module:Class``, though, is imported, from the current directory if it is there.

    Arguments:
        folder: The run folder.
        data: Where the data lie now, if not where the configuration says.
        root: Likewise, the folder of data sets.
        device: Where to put model and guide; by default the device of the run.
        trust_guide: Whether a guide outside the registered ones may be imported.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing, or the run not finished.
        ValueError: If a file is damaged or of a newer format, the files do not fit each other, or
            the guide is not registered and not trusted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        begun = partial_folder(folder).is_dir()
        hint = f"it is not finished: continue it (--resume {folder})" if begun else ""
        raise FileNotFoundError(
            f"there is no run folder {folder}: {hint or 'expected one that train wrote'}"
        )
    if not (folder / "record.json").exists() and (
        inside := sorted(path.parent.name for path in folder.glob("*/record.json"))
    ):
        raise ValueError(f"{folder} holds the runs {', '.join(inside)}: name one of them")
    if (folder / MANIFEST).exists():  # runs of version 0.1 have none
        check_manifest(folder)
    source = folder / "config.json"
    config = RunConfig.from_json(read_json(source), source)
    check_trust(config.guide, source, trust_guide)
    config = dataclasses.replace(
        config,
        data=data or config.data,
        root=root or config.root,
        device=device or config.device,
    )
    record = read_json(folder / "record.json")
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise ValueError(
            f"{folder} has format {record['format']}, this version reads up to {FORMAT}: "
            "upgrade pyro-gpvae"
        )
    try:
        channels, height, width = (int(size) for size in record["data"]["image_shape"])
        [record["data"][name] for name in ("train_sha256", "test_sha256", "train_images")]
        record["scores"]["log_evidence"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'record.json'} is not the record of a run: {error!r}"
        ) from error
    target = _device(config.device)
    with seeded(config.seed, torch.device("cpu")), torch.no_grad():
        model = _build_model(config, (channels, height, width), sigma=1.0)
        guide = make_guide(config.guide, model).eval()
        guide(torch.zeros(1, *model.image_shape))  # Pyro makes some parameters at first use
    load_weights(folder / "weights.safetensors", model, guide)
    model.to(target).pair(guide).eval()
    guide.to(target)
    return Run(folder, config, record, model, guide)


def evaluate_run(
    folder: str | Path,
    guide: str | None = None,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
    test_images: int | None = None,
    chunk_size: int | None = None,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    companion: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_guide: bool = False,
) -> dict[str, Any]:
    """Evaluates a finished run again; as it stands, with exactly the recorded score.

    "Exactly" holds on the same device with the same number of threads, and versions of the
    libraries. Every argument but the first changes something: see :class:`RunConfig`.

    Arguments:
        folder: The run folder.
        guide: Another guide over the run's decoder, such as "vlae:2"; it starts from the run's
            encoder if it takes a ``warm_start``, and from random weights otherwise. It is not
            trained.
        companion: For the first so many of the images, also the scores that tell a better model
            from a better proposal; see :func:`pyro_gpvae.companion.companion_scores`.
        out: A folder to write ``record.json`` and ``scores.csv`` to.
        overwrite: Whether to replace an earlier evaluation there.
        trust_guide: Whether the run's guide may be code outside the registered guides.

    Returns:
        ``run``, ``guide``, ``trained_guide`` (the run's own), ``config``, ``data``, ``scores``,
        ``recorded`` (the scores of the run), ``diagnostics``, ``seconds``, versions, commit,
        device and threads, and ``companion`` if asked for.

    Raises:
        FileNotFoundError, ValueError: As :func:`load_run`; or if an option is wrong.
        FileExistsError: If ``out`` is not empty.
    """
    run = load_run(folder, data=data, root=root, device=device, trust_guide=trust_guide)
    config = dataclasses.replace(
        run.config,
        guide=guide or run.config.guide,
        num_samples=run.config.num_samples if num_samples is None else num_samples,
        seed=run.config.seed if seed is None else seed,
        chunk_size=run.config.chunk_size if chunk_size is None else chunk_size,
    )
    config.check()
    target = _device(config.device)
    program = run.guide
    if guide is not None:
        with seeded(config.seed, target):
            program = warm_guide(guide, run.model, run.guide)
        if isinstance(program, torch.nn.Module):
            program.to(target).eval()
    images = run.data.take(test=test_images).test
    if companion is not None and not 1 <= companion <= len(images):
        raise ValueError(f"companion must be 1 to {len(images)} test images, got {companion}")

    files = ("record.json", "scores.csv")
    with (
        nullcontext()
        if out is None
        else new_folder(out, overwrite=overwrite, files=files) as target_folder
    ):
        begin = time.monotonic()
        config = _with_chunk_size(config, run.model, program, images)
        scores, table = _evaluate(run.model, program, images, config)
        result = {
            "run": str(folder),
            "guide": config.guide,
            "trained_guide": run.config.guide,
            "config": dataclasses.asdict(config),
            "data": run.record["data"],
            **environment(target),
            "seconds": {"evaluation": time.monotonic() - begin},
            "scores": scores,
            "recorded": run.record["scores"],
            "diagnostics": _diagnostics(
                program, images, target, run.record["data"]["train_images"]
            ),
        }
        if companion is not None:
            chosen_on, source = width_images(run.data.train, run.config.validation)
            result["companion"], columns = companion_scores(
                run.model,
                program,
                images[:companion],
                chosen_on,
                num_samples=config.num_samples,
                chunk_size=config.chunk_size,
                seed=config.seed,
            )
            result["companion"]["validation"] = source
            table = table.join(columns)  # empty for the images that follow
        if target_folder is not None:
            write_text(target_folder / "scores.csv", table.to_csv(index=False))
            write_json(target_folder / "record.json", result)
    return result


def warm_start(config: RunConfig, trust_guide: bool) -> Run | None:
    """The run that a run starts from, if there is one; see :func:`load_run` about trust."""
    if config.warm_start is None:
        return None
    return load_run(config.warm_start, trust_guide=trust_guide)


def _check_begun(folder: Path, hashes: Mapping[str, str], start: Run | None) -> None:
    """Notes what a run begins with, images by their hashes; refuses to go on with anything else."""
    begun = {f"{part} images": digest for part, digest in hashes.items()}
    if start is not None:
        begun["warm start"] = weights_sha256(start.model, start.guide)
    if (folder / _BEGUN).exists():
        noted = read_json(folder / _BEGUN)
        for name, found in begun.items():
            if noted.get(name) != found:
                raise ValueError(
                    f"since the run {folder} was begun, its {name} changed: put back what was "
                    "there, or start again (--overwrite)"
                )
    else:
        write_json(folder / _BEGUN, begun)


def _resolved(config: RunConfig) -> RunConfig:
    """The configuration with its device filled in."""
    return dataclasses.replace(config, device=str(_device(config.device)))


def _with_chunk_size(config: RunConfig, model: ImageModel, guide: Any, images: Tensor) -> RunConfig:
    """The configuration with its chunk size filled in: on a GPU, what fits now."""
    chunk_size = config.chunk_size or chunk_size_for(model, guide, images)
    return dataclasses.replace(config, chunk_size=chunk_size)


def check_trust(guide: str, source: Path, trust_guide: bool) -> None:
    """Refuses to import code because a file says so: ValueError unless the guide is trusted."""
    if not trust_guide and guide.partition(":")[0] not in available_guides():
        raise ValueError(
            f"{source} names the guide {guide!r}, which is not registered: to load it, Python "
            "imports it, from the current directory if it is there. If you know that code, pass "
            "--trust-guide (in Python, trust_guide=True)."
        )


def load_images(config: RunConfig, data: ImageData | None = None) -> ImageData:
    """The images of a configuration: cut down and binarised as it says.

    Arguments:
        config: The options.
        data: The whole data set, if it is loaded already.

    Raises:
        FileNotFoundError, ValueError: As :func:`pyro_gpvae.load_data`.
    """
    if data is None:
        data = load_data(config.data, root=config.root, download=config.download)
    data = data.take(config.train_images, config.test_images)
    return data.binarized() if config.likelihood == "bernoulli" else data


def _check_start(config: RunConfig, image_shape: ImageShape, start: Run | None) -> None:
    if start is None:
        return
    for name in ("latent_dim", "decoder", "likelihood"):
        ours, theirs = getattr(config, name), getattr(start.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours!r}, but the warm start {start.folder} has {theirs!r}: "
                "the model starts from its weights, so they must agree"
            )
    if tuple(image_shape) != start.model.image_shape:
        raise ValueError(
            f"the images of {config.data!r} have shape {tuple(image_shape)}, but the warm start "
            f"{start.folder} was trained on {start.model.image_shape}"
        )


def _build_model(config: RunConfig, image_shape: ImageShape, sigma: float) -> ImageModel:
    decoder = build_decoder(image_shape, config.latent_dim, config.decoder)
    return ImageModel(
        image_shape, config.latent_dim, decoder, likelihood=config.likelihood, sigma=sigma
    )


def warm_guide(spec: str, model: ImageModel, trained: Any) -> Any:
    """Builds a guide as :func:`pyro_gpvae.make_guide` does, from a trained one where it can:
    if its constructor takes a ``warm_start``."""
    name, _, options = spec.partition(":")
    if name not in available_guides() and options:
        name = ":".join(spec.split(":")[:2])
    if "warm_start" not in inspect.signature(load_guide(name)).parameters:
        return make_guide(spec, model)
    try:
        return make_guide(spec, model, warm_start=trained)
    except ValueError as error:
        guide = make_guide(spec, model)  # if it was not the warm start, this fails as well
        warnings.warn(f"{spec} cannot start from the trained guide: {error}", stacklevel=2)
        return guide


def _evaluate(
    model: ImageModel, guide: Any, images: Tensor, config: RunConfig
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The scores of a record, and a table with a row for each image."""
    evidence = log_evidence(
        model, guide, images, config.num_samples, chunk_size=config.chunk_size, seed=config.seed
    )
    table = _table(evidence)
    if hasattr(guide, "uncertainty"):
        table["uncertainty"] = _uncertainty(guide, images, _device(config.device)).numpy()
    scores = {
        "elbo": float(evidence.elbo.mean()),
        "log_evidence": evidence.mean,
        "monte_carlo_error": evidence.monte_carlo_error,
        "sampling_error": evidence.sampling_error if len(images) > 1 else None,
        "median_log_evidence": float(evidence.log_evidence.median()),
        "mean_effective_sample_size": float(evidence.effective_sample_size.mean()),
        "num_images": len(images),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "chunk_size": config.chunk_size,
    }
    return scores, table


def _table(evidence: Evidence) -> pd.DataFrame:
    names = ("log_evidence", "standard_error", "effective_sample_size", "elbo")
    table = pd.DataFrame({name: getattr(evidence, name).cpu().numpy() for name in names})
    table.insert(0, "image", range(len(table)))
    return table


@torch.no_grad()
def _uncertainty(guide: Any, images: Tensor, device: torch.device) -> Tensor:
    """The inference uncertainty of uint8 images (N, C, H, W): shape (N,), on the CPU."""
    chunks = [guide.uncertainty(to_float(x.to(device))).cpu() for x in images.split(512)]
    return torch.cat(chunks)


@torch.no_grad()
def _diagnostics(
    guide: Any, images: Tensor, device: torch.device, num_train: int
) -> dict[str, float]:
    """What the guide reports on up to 512 test images, and KL(q(W, U) ‖ p)/N in nats."""
    if not hasattr(guide, "diagnostics"):
        return {}
    found = guide.diagnostics(to_float(images[:512].to(device)))
    values = {name: float(value) for name, value in found.items()}
    if "kl_weights" in values:
        values["kl_weights_per_image"] = values["kl_weights"] / num_train
    return values


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"the device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are "
            "visible; use --device cpu"
        )
    return device
