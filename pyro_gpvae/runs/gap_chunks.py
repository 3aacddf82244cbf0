r"""Measures the inference gaps of runs in chunks of images, and resumes after an interrupt."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

import pyro_gpvae
from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._files import write_text
from pyro_gpvae.evaluation.gap import BATCH, decompose
from pyro_gpvae.runs.folder import Run, load_run

__all__ = ["describe", "measure_gaps", "read_table"]


def measure_gaps(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    num_images: int = 100,
    labels: Sequence[str] | None = None,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
    progress: bool = True,
    **budget: Any,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Decomposes the gaps of the first test images of each run; returns a table and descriptions.

    Each chunk of 25 finished images is written to ``out/chunks``, under a name that is a hash of
    the weights, the images and the budget, and is not measured again: after an interrupt, with
    further runs, or with more images. A damaged chunk is measured again, with a warning.

    Arguments:
        labels: A name for each run; by default its guide, or its folder where guides are not
            unique.
        data, root, device, trust_guide: See :func:`pyro_gpvae.load_run`.
        budget: Further arguments of :func:`pyro_gpvae.decompose`.
    """
    if not folders or len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"expected one or more different run folders, got {len(folders)}")
    if num_images < 1:
        raise ValueError(f"images must be at least 1, got {num_images}")
    where: dict[str, Any] = {"data": data, "root": root, "device": device}
    runs = [load_run(folder, trust_guide=trust_guide, **where) for folder in folders]
    counts = [min(num_images, len(run.data.test)) for run in runs]
    labels = _labels(runs) if labels is None else labels
    tables = []
    with tqdm(total=sum(counts), desc="inference gap", unit="image", disable=not progress) as bar:
        for run, count, label in zip(runs, counts, labels, strict=True):
            own: dict[str, Any] = {"run": str(run.folder), "label": label}
            own |= {"guide": run.config.guide, "seed": run.config.seed}
            for start in range(0, count, BATCH):
                chunk = _measure(run, slice(start, min(start + BATCH, count)), Path(out), budget)
                tables.append(chunk.assign(**own)[[*own, *chunk.columns]])
                bar.update(len(chunk))
    return pd.concat(tables, ignore_index=True), [describe(run) for run in runs]


def _measure(run: Run, chosen: slice, out: Path, budget: dict[str, Any]) -> pd.DataFrame:
    """Reads the chunk of some images, or measures and writes it."""
    images, num_train = run.data.test[chosen], run.record["data"]["train_images"]
    key = {  # everything that the numbers depend on
        "format": 2,  # 1 had no checksum, and trusted any annealing
        "version": pyro_gpvae.__version__,
        "weights": run.weights_sha256,
        "guide": run.config.guide,
        "likelihood": run.config.likelihood,
        "train_images": num_train,
        "images": sha256(images),
        "first_image": chosen.start,
        "budget": budget,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = out / "chunks" / f"{name}.csv"
    text = _read_chunk(path)
    if text is None:
        gap = decompose(
            run.model, run.guide, images, num_train=num_train, first_image=chosen.start, **budget
        )
        text = gap.table().to_csv(index=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"# sha256 {hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    table = pd.read_csv(io.StringIO(text))
    return table.assign(image=table["image"] + chosen.start)


def _read_chunk(path: Path) -> str | None:
    """Reads a table without its checksum; returns None if it is absent, or, warned, damaged."""
    if not path.is_file():
        return None
    head, _, text = path.read_bytes().partition(b"\n")
    if head == f"# sha256 {hashlib.sha256(text).hexdigest()}".encode():
        return text.decode()
    warnings.warn(
        f"{path} is damaged (its checksum is wrong): its images are measured again", stacklevel=4
    )
    return None


def describe(run: Run) -> dict[str, Any]:
    """Returns what a record tells about a run: its folder, options, data, σ and weights."""
    config = {k: v for k, v in vars(run.config).items() if k != "root"}
    return {
        "run": str(run.folder),
        "config": config,
        "train_images": run.record["data"]["train_images"],
        "sigma": run.record.get("sigma"),
        "weights_sha256": run.weights_sha256,
    }


def read_table(path: str | Path) -> pd.DataFrame:
    """Reads a table of images, such as ``gap.csv``."""
    # the former name of the column
    return pd.read_csv(path).rename(columns={"spread": "weight_information"})


def _labels(runs: Sequence[Run]) -> list[str]:
    """Returns the guides, with seeds or as folders where guides are not unique."""
    for names in (
        [run.config.guide for run in runs],
        [f"{run.config.guide}, seed {run.config.seed}" for run in runs],
    ):
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]
