"""Helpers of the studies: shared options, and a record from which the page is made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_json, write_text


@dataclass(kw_only=True)
class RunOptions:
    """Options of a study that trains runs.

    Attributes:
        data: Name of a data set or path of an .npz file.
        root: Folder of data sets.
        epochs: Passes over the training images, of every run.
        seeds: Number of seeds, starting from 0.
        latent_dim: Dimension p of z.
        train_images: Use only the first so many training images; None is all.
        guides: Only these guides; by default all. The comparison always has the VAE.
        device: "cpu" or "cuda"; None is CUDA if there is one.
        render: Only make text and picture again from the record.
    """

    data: str = "mnist5k"
    root: str | None = None
    epochs: int = 20
    seeds: int = 1
    latent_dim: int = 10
    train_images: int | None = None
    guides: tuple[str, ...] = ()
    device: str | None = None
    render: bool = False


def publish(
    name: str,
    options: Any,
    measure: Callable[[], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Writes the record NAME.json, unless it is only rendered, and its page NAME.md.

    Arguments:
        name: Name of the study.
        options: Its options, a dataclass with ``out`` and ``render``.
        measure: Returns the measured part of the record.
        page: Makes the Markdown page from a record.

    Returns:
        The record.
    """
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        chosen = {k: v for k, v in vars(options).items() if k not in ("out", "render")}
        chosen = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()}
        write_json(out / f"{name}.json", chosen | environment(torch.device("cpu")) | measure())
    record = read_json(out / f"{name}.json")
    text = page(record)
    write_text(out / f"{name}.md", text)
    print(text)
    return record
