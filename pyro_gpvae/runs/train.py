r"""Runs: train a guide, evaluate it, and keep both in a folder that reproduces the score.

While a run is trained, its folder is ``RUN.partial``, with checkpoints and a lock; what a finished
one holds is in :mod:`pyro_gpvae.runs.folder`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._files import (
    CHECKPOINTS,
    MANIFEST,
    check_replaceable,
    finished_folder,
    partial_folder,
    read_json,
    work_folder,
    write_json,
    write_manifest,
    write_text,
)
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import ImageData, load_data, split_validation
from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import initial_sigma
from pyro_gpvae.model.networks import ImageShape, autocast_networks
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import diagnostics, evaluate
from pyro_gpvae.runs.folder import (
    FORMAT,
    RUN_FILES,
    Run,
    build_model,
    check_trust,
    load_images,
    named_device,
    warm_guide,
    warm_start,
)
from pyro_gpvae.runs.weights import save_weights, weights_sha256
from pyro_gpvae.training.checkpoint import Checkpoints, OnError
from pyro_gpvae.training.loop import History, fit

__all__ = ["Begun", "complete_run", "resume_run", "train_into", "train_run"]

# with what a process that was killed at the very end may have left in a finished run
_REPLACEABLE = (*RUN_FILES, CHECKPOINTS, "lock")

# of an unfinished run: the hashes of what it was begun with
_BEGUN = "begun.json"


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
            guides; see :func:`pyro_gpvae.load_run`.
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
        ValueError: If its files are damaged; or see :func:`pyro_gpvae.load_run` about its guide.
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
    :func:`pyro_gpvae.runs.folder.check_options`.

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
        checkpoints = Checkpoints(folder / CHECKPOINTS, resume=True, **saving)
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
    lowered = config.precision == "bf16"
    with autocast_networks(torch.bfloat16) if lowered else nullcontext():
        history = fit(
            begun.model,
            begun.guide,
            begun.train,
            seed=config.seed,
            progress=progress if isinstance(progress, str) or not progress else config.guide,
            checkpoints=checkpoints,
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
        self.device = named_device(config.device)
        self.data = load_images(config, data)
        self.hashes = {"train": sha256(self.data.train), "test": sha256(self.data.test)}
        self.train, validation = self.data.train, None
        if config.validation:
            self.train, validation = split_validation(self.data.train, config.validation)
        _check_start(config, self.data.image_shape, start)
        with seeded(config.seed, self.device):
            self.model = build_model(config, self.data.image_shape, initial_sigma(self.train))
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
        self.model.to(self.device)
        self.guide.to(self.device)
        self.options: dict[str, Any] = {
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "validation": validation,
            "on_nonfinite": config.on_nonfinite,
            "backend": config.backend,
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
    ) -> dict[str, Any]:
        """Evaluates the trained guide, and writes the files of the run.

        Arguments:
            folder: Where to.
            trained: The history.
            plan: What the record says of the plan that the run is part of.
        """
        data, device = self.data, self.device
        history = trained.frame()
        begin = time.monotonic()
        scores, table = evaluate(self.model, self.guide, data.test, self.config)
        config = self.config = dataclasses.replace(self.config, chunk_size=scores["chunk_size"])
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
            "diagnostics": diagnostics(self.guide, data.test, device, len(self.train)),
        }
        if self.start is not None:  # so that the record alone tells how to repeat the run
            record["warm_start"] = self.start.record
        if plan is not None:
            record["plan"] = dict(plan)
        save_weights(folder / "weights.safetensors", self.model, self.guide)
        write_text(folder / "history.csv", history.to_csv(index=False))
        write_text(folder / "scores.csv", table.to_csv(index=False))
        write_json(folder / "config.json", dataclasses.asdict(config))
        write_json(folder / "record.json", record)
        (folder / _BEGUN).unlink(missing_ok=True)
        write_manifest(folder, [name for name in RUN_FILES if name != MANIFEST])
        return record


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
    return dataclasses.replace(config, device=str(named_device(config.device)))


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
