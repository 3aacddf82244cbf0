r"""Files of a run: weights as safetensors, JSON, and folders that are complete or absent."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["load_weights", "new_folder", "read_json", "save_weights", "write_json", "write_text"]


def save_weights(path: str | Path, model: Any, guide: Any) -> None:
    """Writes the parameters and buffers of model and guide to one safetensors file.

    Names start with ``model.`` and ``guide.``. The file is complete or absent, never half-written.

    Raises:
        ValueError: If model or guide is not a module, so that its parameters cannot be found.
    """
    # safetensors refuses tensors that share memory (tied weights): every name gets a copy
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(model, guide).items()
    }
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary)


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
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read the weights in {path}: {error}. The file is damaged or not in the "
            "safetensors format: copy it again, or train again."
        ) from error
    expected = _named_tensors(model, guide)
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
            f"the weights in {path} do not fit this model and guide: "
            f"{'; '.join(problems[:3])}{more}. Build both with the options they were trained with."
        )
    for name, tensor in expected.items():
        # state_dict returns views of the parameters: copying into them loads the module
        tensor.detach().copy_(found[name])


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is complete or absent, never half-written."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, complete or absent; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected a complete run folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"cannot read {path}: {error}. Expected JSON as a run wrote it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, files: Collection[str] = ()
) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` that takes its place if the block succeeds.

    After an error or an interrupt, ``path`` is as it was before.

    Arguments:
        path: The folder to make, with its parents.
        overwrite: Whether a folder that is not empty is replaced.
        files: The names that such a folder may hold: with any other in it, it is kept.

    Raises:
        FileExistsError: If ``path`` is a file, or a folder that may not be replaced.
    """
    path = Path(path).expanduser().resolve()
    _check_replaceable(path, overwrite, files)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _check_replaceable(path, overwrite, files)  # what happened there in the meantime?
        if path.exists():
            old = _sibling(path)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(path: Path, overwrite: bool, files: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another name for the folder")
    present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in present if name not in files]
    if present and not overwrite:
        raise FileExistsError(
            f"the folder {path} exists and is not empty: choose another, or overwrite it "
            "(--overwrite)"
        )
    if foreign:
        raise FileExistsError(
            f"the folder {path} is not overwritten, because it holds {foreign[0]!r}, "
            "which this command does not write: choose another folder"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` at once if the block succeeds."""
    temporary = _sibling(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _named_tensors(model: Any, guide: Any) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if not isinstance(program, nn.Module):
            raise ValueError(
                f"the {role} is a {type(program).__name__}, expected a torch.nn.Module: "
                "only a module's parameters can be saved"
            )
        named |= {f"{role}.{name}": tensor for name, tensor in program.state_dict().items()}
    return named


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
