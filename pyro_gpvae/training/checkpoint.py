r"""Checkpoints: one file from which a training continues bit for bit."""

from __future__ import annotations

import errno
import re
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyro_gpvae.core._files import InUseError, locked, replacing

__all__ = ["Checkpoint", "Checkpoints", "OnError", "check_extra_state", "copy_tensors"]

OnError = Literal["continue", "stop"]

#: The format of checkpoints that this version writes and reads.
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a number of steps: tensors and plain values."""

    step: int
    state: dict[str, Any]


@dataclass
class Checkpoints:
    """The folder of a training's checkpoint, and how often it is written.

    The newest checkpoint is ``checkpoint.pt``, the one before ``checkpoint.previous.pt``. A file is
    synchronised with the disk before it gets its name, and no code in it can run.

    Arguments:
        folder: The folder.
        every: The interval: a number of steps, or of minutes such as "5m".
        resume: Whether to continue from the checkpoint in the folder, if there is one. Otherwise a
            folder with a checkpoint is refused.
        on_error: What to do if a checkpoint cannot be written, as on a full disk: warn and
            "continue", or "stop" the training with the OSError.

    Example:
        >>> Checkpoints("run/checkpoints", every="10m").seconds
        600.0
    """

    folder: str | Path
    every: int | str = "5m"
    resume: bool = False
    on_error: OnError = "continue"
    steps: int | None = field(init=False, default=None)
    seconds: float | None = field(init=False, default=None)
    #: The step of the newest checkpoint that was written or read.
    last_step: int | None = field(init=False, default=None)
    _written: tuple[int, float] = field(init=False, repr=False, default=(0, 0.0))
    _newest_is_damaged: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).expanduser().absolute()
        self.path = self.folder / "checkpoint.pt"
        self.previous = self.folder / "checkpoint.previous.pt"
        every = re.fullmatch(r"([0-9]+)|([0-9]+\.?[0-9]*)m", str(self.every).strip())
        if every is not None and every[1]:
            self.steps = int(every[1])
        elif every is not None:
            self.seconds = 60 * float(every[2])
        if not (self.steps or self.seconds):
            raise ValueError(
                f"every must be a number of steps such as 1000, or of minutes such as 5m, "
                f"got {self.every!r}"
            )
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {get_args(OnError)}, got {self.on_error!r}")
        self._written = 0, time.monotonic()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Locks the folder; InUseError or FileExistsError if it is another training's."""
        folder = Path(self.folder)
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "lock", f"writes checkpoints to {folder}"))
                for left in folder.glob(".checkpoint.pt.*.partial"):  # by a killed process
                    left.unlink()
            except OSError as error:
                if isinstance(error, InUseError):
                    raise  # the first checkpoint reports that a folder is read-only
            if not self.resume and self._files():
                message = "holds a checkpoint of a training: continue it (resume=True), or choose"
                raise FileExistsError(f"{folder} {message} another folder")
            yield

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        last_step, last_time = self._written
        if self.steps:
            return step - last_step >= self.steps
        return time.monotonic() - last_time >= (self.seconds or 0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and keeps the one before."""
        self._written = checkpoint.step, time.monotonic()
        try:
            self._write(checkpoint)
        except OSError as error:
            if self.on_error == "stop":
                raise
            warnings.warn(
                f"no checkpoint at step {checkpoint.step}: {error}. Training continues; the last "
                f"checkpoint is of step {self.last_step}",
                stacklevel=3,
            )

    def latest(self) -> Checkpoint | None:
        """Reads the newest checkpoint that is not damaged; ValueError if all are."""
        problems = []
        for path in self._files():
            try:
                content = _read(path)
            except FileNotFoundError:
                continue  # a running training has moved it meanwhile
            except ValueError as error:
                problems.append(str(error))
                self._newest_is_damaged = path == self.path
                continue
            checkpoint = _checked(content, path)
            for problem in problems:
                warnings.warn(f"{problem}: the checkpoint before is used", stacklevel=2)
            self._written = checkpoint.step, time.monotonic()
            self.last_step = checkpoint.step
            return checkpoint
        if problems:
            raise ValueError(f"{'; '.join(problems)}. Delete {self.folder} to start again")
        return None

    def _files(self) -> list[Path]:
        """The checkpoints that are there, newest first."""
        return [path for path in (self.path, self.previous) if path.is_file()]

    def _write(self, checkpoint: Checkpoint) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            try:
                torch.save({"format": FORMAT, **vars(checkpoint)}, file)
            except RuntimeError as error:  # torch's for a full disk
                raise OSError(errno.EIO, str(error)) from error
            if self.path.exists() and not self._newest_is_damaged:
                self.path.replace(self.previous)
        self._newest_is_damaged, self.last_step = False, checkpoint.step


def _read(path: Path) -> Any:
    """The content of a file of ``torch.save``; ValueError if it is damaged or runs code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size, as torch.save never does")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"the checkpoint {path} is damaged: {reason}") from error


def _checked(content: Any, path: Path) -> Checkpoint:
    """The checkpoint in the content of a file; ValueError if it is something else."""
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"the checkpoint {path} has format {version}, this version reads format {FORMAT}: "
            "upgrade pyro-gpvae to continue it"
        )
    match content:
        case {"format": int(found), "step": int(step), "state": dict(state)} if found == FORMAT:
            return Checkpoint(step, state)
    raise ValueError(f"{path} is not a checkpoint of pyro-gpvae: move it away")


def check_extra_state(role: str, module: nn.Module) -> None:
    """Raises ValueError if a module keeps state that is neither a parameter nor a buffer."""
    for name, each in module.named_modules(prefix=role):
        if type(each).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{name} has get_extra_state, whose result cannot be saved: keep it in buffers"
            )


def copy_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors in place, by name; changes nothing unless names and shapes agree."""
    different = sorted(expected.keys() ^ found.keys())
    problems = [f"{n} is {'missing' if n in expected else 'unknown'}" for n in different]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is {found[name].dtype}, expected {tensor.dtype}"
        for name, tensor in expected.items()
        if name in found and found[name].dtype != tensor.dtype
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {source} do not fit this model and guide: "
            f"{'; '.join(problems[:3])}{more}. Build both with the options they were trained with."
        )
    for name, tensor in expected.items():
        tensor.detach().copy_(found[name])
