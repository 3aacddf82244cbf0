"""Files and folders that are complete or absent, and locks."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

#: Larger JSON files are not read: none of ours is, and a file with a hole fills the memory.
_JSON_LIMIT = 64 << 20


class InUseError(OSError):
    """Another living process writes to the same folder."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file that gets the name ``path`` when it is complete, also after a power cut."""
    temporary = _sibling(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        temporary.replace(path)
        if os.name == "posix":  # makes the name permanent
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:  # such as a full disk, whose error names no file
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file that is complete or absent."""
    with replacing(Path(path)) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is complete or absent."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file that is complete or absent; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def check_size(path: Path, limit: int) -> None:
    """Raises ValueError if a file that is read as a whole has more bytes; a hole fills memory."""
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {limit:,}")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object; other contents are a ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected a complete run folder")
    check_size(path, _JSON_LIMIT)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot read {path}: {error}. Expected JSON as a run wrote it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock of the operating system, which ends with the process, however that ends.

    It is an InUseError if another process holds it; ``what`` says what that process does.
    """
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"another process {what}: wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


def partial_folder(path: Path) -> Path:
    """Returns the folder ``path.partial``, in which :func:`work_folder` works."""
    return path.with_name(f"{path.name}.partial")


def finished_folder(path: str | Path) -> Path:
    """Returns ``path``, also if its :func:`partial_folder` is given."""
    path = Path(path).expanduser()
    if path.name.endswith(".partial") and not partial_folder(path).exists():
        return path.with_name(path.name.removesuffix(".partial"))
    return path


@contextmanager
def work_folder(
    path: str | Path,
    *,
    files: Collection[str],
    unfinished: Collection[str],
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Path]:
    """Gives the folder ``path.partial``, which is renamed to ``path`` if the block succeeds.

    Only one process at a time gets it. If the block fails, the folder is kept if it holds one of
    the files ``unfinished``, from which work can be resumed, and is removed otherwise. These files
    are deleted at the end. For ``files`` and ``overwrite`` see :func:`check_replaceable`.
    """
    path = Path(path).expanduser().resolve()
    folder, files = partial_folder(path), {*files, *unfinished, "lock"}
    check_replaceable(path, overwrite or resume, files)
    check_replaceable(folder, True, files)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"is working in {folder}"):
        if not (resume or overwrite) and _holds(folder, unfinished):
            raise FileExistsError(
                f"{folder} holds an unfinished run: continue it (--resume {path}), or "
                "overwrite it (--overwrite)"
            )
        for entry in folder.iterdir():
            if entry.name != "lock" and (not resume or _is_half_written(entry.name)):
                entry.unlink()
        try:
            yield folder
        except BaseException:
            if not _holds(folder, unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        check_replaceable(path, overwrite or resume, files)
        old = _sibling(path)
        if path.exists():
            path.rename(old)
        folder.rename(path)  # with the lock, so that no other process works there meanwhile
        shutil.rmtree(old, ignore_errors=True)
    for name in ("lock", *unfinished):
        (path / name).unlink(missing_ok=True)


def check_replaceable(path: Path, overwrite: bool, files: Collection[str]) -> None:
    """Raises FileExistsError if the folder ``path`` may neither be made nor replaced.

    Only with ``overwrite`` a folder that is not empty is replaced, and only if it holds no other
    names than ``files``.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another name for the folder")
    present = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if present and not overwrite:
        raise FileExistsError(
            f"the folder {path} exists and is not empty: choose another, or overwrite it "
            "(--overwrite)"
        )
    foreign = [name for name in present if name not in files and not _is_half_written(name)]
    if foreign:
        raise FileExistsError(
            f"the folder {path} is not overwritten, because it holds {foreign[0]!r}, "
            "which this command does not write: choose another folder"
        )


def _holds(folder: Path, names: Collection[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _is_half_written(name: str) -> bool:
    """Whether a killed process may have left a file of this name."""
    return name.startswith(".") and name.endswith(".partial")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
