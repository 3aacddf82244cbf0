r"""The report on one run, or on several side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from pyro_gpvae.core._files import write_text
from pyro_gpvae.runs import sections
from pyro_gpvae.runs.folder import Place
from pyro_gpvae.runs.gap_report import QUICK, gap_sections, measure_gaps
from pyro_gpvae.runs.programs import labels_of, open_runs
from pyro_gpvae.runs.report import Report, caption

__all__ = ["report_runs"]


def report_runs(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    images: int = 20,
    overwrite: bool = False,
    progress: bool = True,
    **place: Unpack[Place],
) -> Report:
    """Writes one HTML file about runs: scores, curves, gaps, pictures, latent space, options.

    Arguments:
        folders: Run folders, or ``module:function``; see :func:`pyro_gpvae.runs.programs.open_run`.
        out: The HTML file.
        images: The inference gap is measured on the first so many test images; 0 omits it.
        overwrite: Whether to replace the file.
        progress: Whether to show a progress bar.
        place: See :class:`pyro_gpvae.runs.folder.Place`.

    Raises:
        FileExistsError: If the file exists.
        ValueError: If a folder is given twice, or is not a run.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or replace it (--overwrite)")
    opened = open_runs(folders, **place)
    runs = dict(zip(labels_of(opened), opened, strict=True))
    trained = {label: run for label, run in runs.items() if "scores" in run.record}
    parts = [sections.scores(trained), sections.curves(trained)] if trained else []
    if images:
        with tempfile.TemporaryDirectory() as chunks:
            table = measure_gaps(
                opened, chunks, QUICK | {"seed": 0}, num_images=images, progress=progress
            )
        parts += gap_sections(table)
    for label, run in runs.items():
        own = [sections.missed(run, table[table["label"] == label])] if images else []
        index = list(range(min(8, len(run.data.test))))
        own.append(sections.pictures(run, index, 32, run.config.seed))
        own.append(sections.latent(run, run.config.seed))
        for section in own if len(runs) > 1 else ():
            section.title += f": {label}"
        parts += own
    if trained:
        parts.append(sections.configuration(trained))
    text = caption(opened, max(run.record["data"]["test_images"] for run in opened), "")
    title = f"pyro-gpvae: {', '.join(runs)}"
    report = Report(title, text.strip(), parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, report.html())
    return report
