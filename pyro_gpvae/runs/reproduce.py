r"""A run again, from its record alone."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._files import read_json
from pyro_gpvae.data.images import load_data
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import check_trust, load_images
from pyro_gpvae.runs.train import train_run

__all__ = ["reproduce_run"]


def reproduce_run(
    source: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Trains and evaluates a run again, with the options, images and threads of its record.

    On the same device, with the same versions, the scores are the same bit for bit (on CUDA: in
    torch's deterministic mode). Where the
    run started from another one, that is trained again first, in ``out-warm-start``, unless it
    is where the record says, or beside the record's own run.

    Arguments:
        source: A ``record.json``, or the run folder that has it.
        out: The new run folder.
        data, root: Where the images lie now, if not where the record says.
        device: Another device; the scores then differ by rounding, which training amplifies.
        trust_guide: Whether the record's guide may be code outside the registered guides.
        how: Further arguments of :func:`pyro_gpvae.train_run`.

    Returns:
        The content of the new ``record.json``.

    Raises:
        FileNotFoundError: If there is no such record, or no images.
        ValueError: If the file is not the record of a run, or the images are not those of the
            run. Names file and field.

    Warns:
        Where code, versions or device differ; and if the scores do.
    """
    source = Path(source)
    source = source / "record.json" if source.is_dir() else source
    recorded = read_json(source)
    return _again(recorded, source, Path(out), (data, root, device), trust_guide, how)


def _again(
    recorded: dict[str, Any],
    source: Path,
    out: Path,
    places: tuple[str | None, str | None, str | None],
    trust_guide: bool,
    how: dict[str, Any],
) -> dict[str, Any]:
    _check_record(recorded, source)
    config = RunConfig.from_json(recorded["config"], f"{source}: config")
    check_trust(config.guide, source, trust_guide)
    data, root, device = places
    config = dataclasses.replace(
        config,
        data=data or config.data,
        root=root or config.root,
        device=device or config.device,
    )
    images = load_data(config.data, root=config.root, download=config.download)
    used = load_images(config, images)
    for part, found in (("train", used.train), ("test", used.test)):
        if sha256(found) != recorded["data"][f"{part}_sha256"]:
            raise ValueError(
                f"{source}: data.{part}_sha256 is not that of the {part} images of "
                f"{config.data!r} here: point --data or --root to the files it was trained on"
            )
    how = how | {"trust_guide": trust_guide}
    threads = torch.get_num_threads()
    torch.set_num_threads(recorded["threads"])
    try:
        if config.warm_start is not None:
            start = _find_start(recorded, source, config.warm_start)
            if start is None:
                start = out.with_name(f"{out.name}-warm-start")
                _again(recorded["warm_start"], source, start, places, trust_guide, how)
            config = dataclasses.replace(config, warm_start=str(start))
        record = train_run(config, out, data=images, **how)
    finally:
        torch.set_num_threads(threads)
    _compare(recorded, record, source)
    return record


def _check_record(record: Any, source: Path) -> None:
    try:
        threads, config = record["threads"], record["config"]
        [record["data"][name] for name in ("train_sha256", "test_sha256")]
        record["scores"]["log_evidence"]
        if type(threads) is not int or threads < 1 or not isinstance(config, dict):
            raise ValueError("threads must be a positive number, config an object")
        if config.get("warm_start") is not None and "warm_start" not in record:
            raise ValueError(
                "config.warm_start names a run, whose record is not in this one: it was written "
                "by an earlier version"
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not the record of a run: {error!r}") from error


def _find_start(recorded: dict[str, Any], source: Path, folder: str) -> Path | None:
    """The folder of the very run that the recorded one started from, if it is still there."""
    for place in (Path(folder), source.absolute().parent.parent / folder):
        try:
            if read_json(place / "record.json") == recorded["warm_start"]:
                return place
        except (FileNotFoundError, ValueError):
            continue
    return None


def _compare(recorded: dict[str, Any], record: dict[str, Any], source: Path) -> None:
    now = environment(torch.device(record["config"]["device"])) | {"threads": record["threads"]}
    differ = [
        f"{name} (recorded {recorded.get(name)}, now {now[name]})"
        for name in ("commit", "versions", "device", "threads")
        if recorded.get(name) != now[name]
    ]
    scores = [record["scores"]["log_evidence"], recorded["scores"]["log_evidence"]]
    if scores[0] != scores[1]:
        differ.insert(0, f"the score (recorded {scores[1]}, now {scores[0]})")
    if differ:
        warnings.warn(f"{source}: not as recorded: {'; '.join(differ)}", stacklevel=4)
