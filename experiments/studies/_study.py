"""Writes the record of a study, and the page that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_json, write_text


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
        places = ("out", "root", "render", "only_finished")  # where and how, not what is measured
        chosen = {k: v for k, v in vars(options).items() if k not in places}
        chosen = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()}
        write_json(out / f"{name}.json", chosen | environment(torch.device("cpu")) | measure())
    record = read_json(out / f"{name}.json")
    text = page(record)
    write_text(out / f"{name}.md", text)
    print(text)
    return record
