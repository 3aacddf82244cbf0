"""Repeats a run from its record alone."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._files import read_json
from pyro_gpvae.data.images import load_data
from pyro_gpvae.runs.folder import check_images, check_record, check_trust, load_images
from pyro_gpvae.runs.train import train_run

__all__ = ["reproduce_run"]

#: With more, OpenMP ends the process.
_MOST_THREADS = 1024


def reproduce_run(
    source: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    **train_kwargs: Any,
) -> dict[str, Any]:
    """Trains and evaluates a run again, with the options, images and threads of its record.

    On the same device, with the same versions, the scores are the same bit for bit (on CUDA: in
    torch's deterministic mode). If the run started from another one, that run is used if it is
    where the record says. Otherwise it is trained again first, in ``out-warm-start``.

    Arguments:
        source: A ``record.json``, or the run folder that has it.
        out: The new run folder.
        data, root, device: See :class:`pyro_gpvae.runs.folder.Place`. On another device the scores
            differ by rounding, which training amplifies.
        train_kwargs: Further arguments of :func:`pyro_gpvae.train_run`.

    Returns:
        The content of the new ``record.json``.

    Raises:
        FileNotFoundError: If there is no such record, or no images.
        ValueError: If the file is not the record of a run, or the images are not those of the
            run. Names file and field.

    Warns:
        If code, versions, device or scores differ from the record.
    """
    source, out = Path(source), Path(out)
    source = source / "record.json" if source.is_dir() else source
    place = {"data": data, "root": root, "device": device}
    return _repeat(read_json(source), source, out, place, train_kwargs)


def _repeat(
    recorded: dict[str, Any],
    source: Path,
    out: Path,
    place: dict[str, str | None],
    train_kwargs: dict[str, Any],
) -> dict[str, Any]:
    config, threads = check_record(recorded, source), recorded.get("threads")
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"{source}: threads must be 1 to {_MOST_THREADS}, got {threads!r}")
    if config.warm_start is not None and not isinstance(recorded.get("warm_start"), dict):
        raise ValueError(
            f"{source}: config.warm_start names a run, whose record is not in this one: it was "
            "written by an earlier version"
        )
    check_trust(config.guide, source, train_kwargs.get("trust_guide", False))
    config = config.moved(**place)
    images = load_data(config.data, config.root, train_kwargs.get("download", False))
    check_images(load_images(config, images), recorded, source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if config.warm_start is not None and not _is_there(recorded, config.warm_start):
            start = out.with_name(f"{out.name}-warm-start")
            _repeat(recorded["warm_start"], source, start, place, train_kwargs)
            config = dataclasses.replace(config, warm_start=str(start))
        record = train_run(config, out, **train_kwargs | {"data": images})
    finally:
        torch.set_num_threads(before)
    now: dict[str, Any] = {"the score": record["scores"]["log_evidence"]}
    now |= {name: record.get(name) for name in ("commit", "versions", "device", "threads")}
    then = recorded | {"the score": recorded["scores"]["log_evidence"]}
    differ = [
        f"{name} (recorded {then.get(name)}, now {value})"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if differ:
        warnings.warn(f"{source}: not as recorded: {'; '.join(differ)}", stacklevel=3)
    return record


def _is_there(recorded: dict[str, Any], folder: str) -> bool:
    """Whether a folder holds the very run that the recorded one started from."""
    try:
        return read_json(Path(folder) / "record.json") == recorded["warm_start"]
    except (FileNotFoundError, ValueError):
        return False
