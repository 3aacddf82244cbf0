r"""Files that are complete or absent: text, JSON, folders, manifests of checksums, locks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "InUseError",
    "check_manifest",
    "check_replaceable",
    "finished_folder",
    "locked",
    "new_folder",
    "partial_folder",
    "read_json",
    "take_place",
    "work_folder",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
]

#: The file of a folder that lists its other files with their sizes and SHA-256.
MANIFEST = "manifest.json"


#: The folder of checkpoints in a folder of unfinished work.
CHECKPOINTS = "checkpoints"


class InUseError(OSError):
    """Another living process writes to the same folder."""


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file that is complete or absent, never half-written, also after a power cut."""
    path = Path(path)
    temporary = _sibling(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file that is complete or absent, never half-written."""
    write_bytes(path, text.encode())


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
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot read {path}: {error}. Expected JSON as a run wrote it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_manifest(folder: str | Path, files: Sequence[str]) -> None:
    """Writes ``manifest.json``: the size and SHA-256 of each of these files of a folder."""
    folder = Path(folder)
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in sorted(files)
    }
    write_json(folder / MANIFEST, {"files": listed})


def check_manifest(folder: str | Path) -> None:
    """Compares a folder with its ``manifest.json``.

    Raises:
        FileNotFoundError: If there is no manifest.
        ValueError: If a file is missing or is not what was written; names it.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    try:
        files = dict(manifest["files"])
        expected = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in files.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).name != name:
            raise ValueError(f"{folder / MANIFEST} names {name!r}, expected names of files")
        if not path.is_file():
            raise ValueError(f"{path} is missing: it is listed in {MANIFEST}")
        if path.stat().st_size != size:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, {size:,} were written: it is damaged"
            )
        if _sha256(path) != digest:
            raise ValueError(f"{path} is not what was written: its SHA-256 differs")


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds an operating system's lock on a file; it ends with the process, however that ends.

    Raises:
        InUseError: If another process holds it; ``what`` says what that one does.
    """
    # one lock for a path in this process: who holds it may take it again
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"another process {what}: wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


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
    check_replaceable(path, overwrite, files)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(path, overwrite, files)  # what happened there in the meantime?
        take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """The folder ``path.partial``, in which :func:`work_folder` lets ``path`` grow."""
    return path.with_name(f"{path.name}.partial")


def finished_folder(path: str | Path) -> Path:
    """The ``path``, also if the :func:`partial_folder` of it was named."""
    path = Path(path).expanduser()
    if path.name.endswith(".partial") and not partial_folder(path).exists():
        return path.with_name(path.name.removesuffix(".partial"))
    return path


@contextmanager
def work_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    files: Collection[str] = (),
    resume: bool = False,
) -> Iterator[Path]:
    """Gives the folder ``path.partial``, which takes the place of ``path`` if the block succeeds.

    Unlike that of :func:`new_folder` it is kept if the block fails and has left checkpoints
    there, and is given again with ``resume``; without, it is empty but for its lock. Only one
    process at a time gets it.

    Arguments:
        path, overwrite, files: As for :func:`new_folder`; unfinished work is overwritten as well.
        resume: Whether to go on with the work that is there.

    Raises:
        FileExistsError: If ``path`` may not be replaced, there is unfinished work, or
            ``path.partial`` holds something else.
        InUseError: If another process works there.
    """
    path = Path(path).expanduser().resolve()
    check_replaceable(path, overwrite or resume, files)
    folder = partial_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in folder.iterdir()}
    if present and not present & {"lock", CHECKPOINTS, *files}:  # it would be emptied
        raise FileExistsError(f"{folder} is no unfinished run: move it, or choose another folder")
    with locked(folder / "lock", f"is working in {folder}"):
        if not (resume or overwrite) and (folder / CHECKPOINTS).exists():
            raise FileExistsError(
                f"{folder} holds an unfinished run: continue it (--resume {path}), or "
                "overwrite it (--overwrite)"
            )
        # what was to be overwritten, or was half-written when a process was killed, must not stay
        for left in list(folder.rglob(".*.partial") if resume else folder.iterdir()):
            if left.name != "lock":
                _delete(left)
        try:
            yield folder
        except BaseException:
            if not any((folder / CHECKPOINTS).glob("checkpoint*.pt")):  # nothing to continue
                shutil.rmtree(folder, ignore_errors=True)
            raise
        check_replaceable(path, overwrite or resume, files)
        take_place(folder, path)  # the lock goes with it: nobody else gets in meanwhile
    (path / "lock").unlink(missing_ok=True)
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


def take_place(folder: Path, path: Path) -> None:
    """Renames a folder to ``path``, whose former content is deleted."""
    if path.exists():
        old = _sibling(path)
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old)
    else:
        folder.rename(path)


def check_replaceable(path: Path, overwrite: bool, files: Collection[str]) -> None:
    """Raises FileExistsError if ``path`` is no folder that may be made, or replaced."""
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


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
