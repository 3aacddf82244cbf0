r"""Weights as safetensors, and checkpoints from which training continues bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_gpvae.core._files import (
    MANIFEST,
    InUseError,
    check_manifest,
    locked,
    read_json,
    take_place,
    write_bytes,
    write_manifest,
    write_text,
)

__all__ = [
    "Checkpoints",
    "NewerFormatError",
    "TrainingState",
    "load_weights",
    "named_tensors",
    "save_weights",
    "state_of",
    "weights_sha256",
]

OnError = Literal["continue", "stop"]


class NewerFormatError(RuntimeError):
    """A checkpoint was written by a newer version of this library."""


#: The newest format of checkpoints that this version writes, and reads with all older ones.
FORMAT = 1

_TENSORS, _STATE = "tensors.safetensors", "state.json"


def save_weights(path: str | Path, model: Any, guide: Any) -> None:
    """Writes the parameters and buffers of model and guide to one safetensors file.

    Names start with ``model.`` and ``guide.``. The file is complete or absent, never half-written.

    Raises:
        ValueError: If model or guide is not a module, so that its parameters cannot be found.
    """
    write_bytes(path, _to_bytes(named_tensors(model, guide)))


def load_weights(path: str | Path, model: Any, guide: Any) -> None:
    """Reads what :func:`save_weights` wrote, into the modules, which keep their device and dtype.

    Nothing is changed unless the whole file fits. No code in the file can run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds other tensors than model and guide have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weights file {path}: expected one that training wrote, "
            "such as RUN/weights.safetensors"
        )
    copy_tensors(_read_tensors(path), named_tensors(model, guide), str(path))


def named_tensors(model: Any, guide: Any) -> dict[str, Tensor]:
    """The parameters and buffers of model and guide by name; ValueError if one is no module."""
    named: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if not isinstance(program, nn.Module):
            raise ValueError(
                f"the {role} is a {type(program).__name__}, expected a torch.nn.Module: "
                "only a module's parameters can be saved"
            )
        named |= state_of(role, program)
    return named


def state_of(role: str, module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module by names that begin with its role.

    Raises:
        ValueError: If it holds more than tensors.
    """
    state = {f"{role}.{name}": value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, expected a tensor: nothing else can be "
                "saved. Keep what get_extra_state returns in buffers"
            )
    return state


def weights_sha256(model: nn.Module, guide: nn.Module) -> str:
    """The SHA-256 of the parameters and buffers of model and guide: names, shapes, dtypes, values.

    As hexadecimal digits; on any device the same.
    """
    digest = hashlib.sha256()
    for program in (model, guide):
        for name, tensor in sorted(program.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copy_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Copies tensors in place, by name; changes nothing unless names and shapes agree."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {source} do not fit this model and guide: "
            f"{'; '.join(problems[:3])}{more}. Build both with the options they were trained with."
        )
    for name, tensor in expected.items():
        # state_dict returns views of the parameters: copying into them loads the module
        tensor.detach().copy_(found[name])


@dataclass
class TrainingState:
    """What training needs to go on as if it had never stopped.

    Attributes:
        step: Optimiser steps done.
        tensors: Weights, moments, random states and the epoch's permutation, by name.
        values: The rest, in JSON: the options, the place in the epoch, the history.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class Checkpoints:
    """A folder of checkpoints: the newest ones of a training, each verified after writing.

    A checkpoint is a folder ``step-N`` with ``tensors.safetensors``, ``state.json`` and
    ``manifest.json`` (sizes and SHA-256). It is written under another name, synced, renamed,
    and read back before an older one is deleted. No code in it can run.

    Arguments:
        folder: Where they lie.
        every: How often: a number of steps, or of minutes such as "5m".
        keep: How many to keep; with two, a file that is damaged later costs one interval.
        on_error: What to do if one cannot be written, because the disk is full or the folder
            read-only: warn and "continue", or "stop" the training with the OSError.

    Raises:
        ValueError: If ``every`` is not a positive number of steps or minutes, ``keep`` is less
            than 1, or ``on_error`` is unknown.

    Example:
        >>> Checkpoints("run/checkpoints", every="10m").seconds
        600.0
    """

    folder: str | Path
    every: int | str = "5m"
    keep: int = 2
    on_error: OnError = "continue"
    steps: int | None = field(init=False, default=None)
    seconds: float | None = field(init=False, default=None)
    _written: tuple[int, float] = field(init=False, repr=False, default=(0, 0.0))

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).expanduser().absolute()
        every = str(self.every).strip()
        number = every.removesuffix("m")
        if re.fullmatch(r"[0-9]+", every) and int(every) > 0:
            self.steps = int(every)
        elif number != every and re.fullmatch(r"[0-9]+\.?[0-9]*", number) and float(number) > 0:
            self.seconds = 60 * float(number)
        else:
            raise ValueError(
                f"every must be a number of steps such as 1000, or of minutes such as 5m, "
                f"got {self.every!r}"
            )
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {get_args(OnError)}, got {self.on_error!r}")
        self._written = 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        last_step, last_time = self._written
        if self.steps is not None:
            return step - last_step >= self.steps
        assert self.seconds is not None
        return time.monotonic() - last_time >= self.seconds

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint, verifies it, and deletes those that are no longer needed."""
        self._written = state.step, time.monotonic()
        try:
            self._write(state)
        except OSError as error:
            if self.on_error == "stop":
                raise
            warnings.warn(
                f"no checkpoint at step {state.step}: {error}. Training goes on; "
                f"{self._describe_last()}",
                stacklevel=3,
            )

    def latest(self) -> TrainingState | None:
        """Reads the newest checkpoint that is whole; None if there is none at all.

        Warns of every newer one that is damaged.

        Raises:
            ValueError: If all are damaged.
            NewerFormatError: If the newest was written by a newer version.
        """
        found = self._folders()
        for path in reversed(found):
            try:
                state = _read(path)
            except (ValueError, OSError) as error:
                warnings.warn(f"the checkpoint {path.name} is damaged: {error}", stacklevel=2)
                continue
            self._written = state.step, time.monotonic()
            return state
        if found:
            raise ValueError(
                f"all {len(found)} checkpoints in {self.folder} are damaged: "
                "delete the folder to start again"
            )
        return None

    @contextmanager
    def in_use(self, resume: bool) -> Iterator[None]:
        """Holds the folder for one training.

        Raises:
            InUseError: If another process trains there.
            FileExistsError: If there are checkpoints that are not to be continued.
        """
        folder = Path(self.folder)
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / ".lock", f"writes checkpoints to {folder}"))
            except InUseError:
                raise
            except OSError:
                pass  # it cannot be written, as the first checkpoint will say
            if not resume and self._folders():
                raise FileExistsError(
                    f"{folder} holds checkpoints of a training: continue it (resume=True), or "
                    "choose another folder"
                )
            yield

    def last_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        found = self._folders()
        return _step(found[-1]) if found else None

    def _folders(self) -> list[Path]:
        """The folders of checkpoints, oldest first."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return []
        return sorted((path for path in folder.iterdir() if _is_checkpoint(path)), key=_key)

    def _write(self, state: TrainingState) -> None:
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):  # of a process that was killed while writing
            shutil.rmtree(left, ignore_errors=True)
        path = folder / f"step-{state.step}"
        temporary = folder / f".{path.name}.{secrets.token_hex(4)}.partial"
        temporary.mkdir()
        try:
            write_bytes(temporary / _TENSORS, _to_bytes(state.tensors))
            values = {"format": FORMAT, "step": state.step, **state.values}
            # not write_json: a history may hold a NaN, and comes back as it was
            write_text(temporary / _STATE, json.dumps(values))
            write_manifest(temporary, (_TENSORS, _STATE))
            _sync(temporary)
            take_place(temporary, path)
            _sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        try:
            check_manifest(path)
        except ValueError as error:
            raise OSError(f"what was written cannot be read back: {error}") from error
        others = [other for other in self._folders() if other != path]
        # a higher step is of a checkpoint that was damaged, or training would not be here
        ahead = [other for other in others if _key(other) > state.step]
        behind = [other for other in others if _key(other) < state.step]
        for old in ahead + behind[: len(behind) - (self.keep - 1)]:
            shutil.rmtree(old)

    def _describe_last(self) -> str:
        step = self.last_step()
        return "there is no earlier one" if step is None else f"the last one is of step {step}"


def _read(path: Path) -> TrainingState:
    check_manifest(path)
    values = read_json(path / _STATE)
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormatError(
            f"the checkpoint {path} has format {version}, this version reads up to {FORMAT}: "
            "upgrade pyro-gpvae to continue it"
        )
    if not isinstance(version, int) or not isinstance(values.get("step"), int):
        raise ValueError(f"{path / 'state.json'} is not the state of a training")
    return TrainingState(values["step"], _read_tensors(path / _TENSORS), values)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read the weights in {path}: {error}. The file is damaged or not in the "
            "safetensors format: copy it again, or train again."
        ) from error


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    # safetensors refuses tensors that share memory (tied weights): every name gets a copy
    return safetensors.torch.save(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    )


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-([0-9]+)", path.name)
    return int(match[1]) if match else None


def _is_checkpoint(path: Path) -> bool:
    """Whether this is a folder of ours, damaged perhaps: nothing else is ever deleted."""
    if _step(path) is None or not path.is_dir() or path.is_symlink():
        return False
    return {entry.name for entry in path.iterdir()} <= {_TENSORS, _STATE, MANIFEST}


def _key(path: Path) -> int:
    return _step(path) or 0


def _sync(folder: Path) -> None:
    """Makes the names in a folder permanent."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
