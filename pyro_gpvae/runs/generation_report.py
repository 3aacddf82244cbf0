r"""Pictures of what a run generates, and of its latent space."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import check_replaceable, write_json
from pyro_gpvae.runs import sections
from pyro_gpvae.runs.folder import Place
from pyro_gpvae.runs.programs import open_run
from pyro_gpvae.runs.report import HTML, Report, caption, describe

__all__ = ["GENERATION_FILES", "report_generation"]

GENERATION_FILES = (
    "generated.json", "generated.md", "latent.png", "reconstructions.png", HTML, "samples.png",
)  # fmt: skip


def report_generation(
    run_folder: str | Path,
    out: str | Path,
    *,
    samples: int = 64,
    images: Sequence[int] | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    **place: Unpack[Place],
) -> Report:
    """Draws from a run, and writes pictures, a record and ``report.html``.

    For the arguments see ``pyro-gpvae generate --help``, and for ``place``
    :func:`pyro_gpvae.load_run`.
    """
    begin = time.monotonic()
    folder = Path(out).expanduser()
    check_replaceable(folder, overwrite, GENERATION_FILES)
    run = open_run(run_folder, **place)
    seed = run.config.seed if seed is None else seed
    test = run.data.test
    index = list(range(min(8, len(test))) if images is None else images)
    for i in index:
        if not 0 <= i < len(test):
            raise ValueError(f"images: {i} is not between 0 and {len(test) - 1}")
    if not index:
        raise ValueError("images: expected at least one")
    text = caption([run], len(test), f"Draws: seed {seed}.")
    text = f"Guide {run.config.guide}, {text}"
    parts = [
        sections.pictures(run, index, samples, seed, text),
        sections.latent(run, seed, text),
    ]
    report = Report(f"Images of {run.config.guide}", text, parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latent.png").unlink(missing_ok=True)  # of another run
    report.save(folder, "generated.md")
    record = {
        "format": 4,  # the formats before described paths, traversals and active units
        "run": describe(run),
        "caption": text,
        "seed": seed,
        "image_index": index,
        **environment(next(run.model.parameters()).device),
        "seconds": time.monotonic() - begin,
    }
    write_json(folder / "generated.json", record)
    return report
