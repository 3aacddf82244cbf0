r"""The demo: how much inference loses on 5,000 digits, for VAE, GPVAE and refined inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_gpvae.core._files import check_replaceable, write_text
from pyro_gpvae.runs import sections
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.gap_report import QUICK, gap_sections, measure_gaps
from pyro_gpvae.runs.report import HTML, Report, Section, caption, number
from pyro_gpvae.runs.train import train_run

__all__ = ["DEMO_FILES", "run_demo"]

#: The run folders: the first half, which all methods share, and the second half of each method.
RUNS = {
    "start": "vae",
    "vae": "vae",
    "gp": "gp",
    "newton": "newton:1,covariance=diagonal,safeguard=True",
}
LABELS = {"vae": "VAE", "gp": "GPVAE", "newton": "newton:1"}
DEMO_FILES = (
    "README.md", HTML, "chunks", "gap.csv", "gap.png", "latent.png",
    "loss_curves.png", "missed.png", "reconstructions.png", "samples.png", *RUNS,
)  # fmt: skip

_TEXT = (
    "Nats per image, of the first {images} test images; log p(x) is the most reliable of several "
    "estimates. What inference loses is log p(x) - ELBO. The best Gaussian of each image would "
    "lose only its column, so that the rest is the encoder's fault: the amortisation gap. All "
    "three methods continue the same VAE for as many epochs; the seconds include its training."
)


def run_demo(
    out: str | Path = "demo",
    *,
    quick: bool = False,
    progress: bool = True,
    epochs: int | None = None,
    gap_images: int | None = None,
    **options: Any,
) -> Report:
    """Trains a VAE, GPVAE and ``newton:1`` on the embedded digits, and reports what each loses.

    The first half of the epochs trains a VAE. The second half continues the VAE, and trains the
    others from its weights. The gaps are those of the first ``gap_images`` test images. For the
    other arguments see ``pyro-gpvae demo --help`` and :class:`RunConfig`.
    """
    epochs, gap_images = epochs or (4 if quick else 40), gap_images or (4 if quick else 20)
    if epochs < 2 or epochs % 2:
        raise ValueError(f"epochs must be even and at least 2, got {epochs}")
    if quick:
        options = {"test_images": 200} | options
    out = Path(out).expanduser()
    check_replaceable(out, True, (*DEMO_FILES, *(f"{name}.partial" for name in RUNS)))
    (out / "README.md").unlink(missing_ok=True)  # of other runs
    config = RunConfig(guide="vae", epochs=epochs // 2, sigma_learning_rate=1e-2, **options)
    for name, guide in RUNS.items():
        bar = f"{LABELS[name]}, second half" if name != "start" else "VAE, first half"
        start = str(out / "start") if name != "start" else None
        config = replace(config, guide=guide, warm_start=start)
        train_run(config, out / name, overwrite=True, progress=progress and bar)
    runs = {label: load_run(out / name) for name, label in LABELS.items()}
    table = measure_gaps(
        [*runs.values()], out, QUICK | {"seed": config.seed},
        num_images=gap_images, labels=[*runs], progress=progress,
    )  # fmt: skip
    write_text(out / "gap.csv", table.to_csv(index=False))
    report = _report(runs, table, quick)
    report.save(out, "README.md")
    return report


def _report(runs: dict[str, Run], table: pd.DataFrame, quick: bool) -> Report:
    vae = next(iter(runs.values()))
    config = vae.config
    budget = (
        f"Batch {config.batch_size}, Adam {config.learning_rate:g} "
        f"(σ: {config.sigma_learning_rate:g}), K = {config.num_samples}."
    )
    text = caption([vae], vae.record["data"]["test_images"], budget)
    text = ("QUICK DEMO, budget cut: " if quick else "") + text
    chosen = table[table["label"] == "VAE"]
    missed = sections.missed(vae, chosen, caption=text)
    missed.title = "Digits that the encoder of the VAE gets wrong"
    parts = [_headline(runs, table), missed, gap_sections(table, text)[0]]
    parts += [sections.curves(runs, text), sections.scores(runs)]
    parts += [
        sections.pictures(runs["GPVAE"], list(range(min(8, len(vae.data.test)))), 32, 0, text),
        sections.latent(runs["GPVAE"], config.seed, text),
    ]
    for section in parts[-2:]:
        section.title += " of GPVAE"
    parts.append(sections.configuration(runs))
    return Report("How much does inference lose?", text, parts, printed=1)


def _headline(runs: dict[str, Run], table: pd.DataFrame) -> Section:
    """Returns what each method loses, and the paired differences to the VAE."""
    rows = []
    for label, run in runs.items():
        images = table[table["label"] == label]
        means = images[["log_evidence", "gap", "beyond_gaussian"]].mean()
        start = run.record["warm_start"]["seconds"]["training"]
        rows.append(
            {
                "": label,
                "epochs": f"{run.total_epochs}",
                "log p(x)": f"{means['log_evidence']:.1f}",
                "ELBO": f"{means['log_evidence'] - means['gap']:.1f}",
                "inference loses": number(means["gap"]),
                "at worst": number(images["gap"].max()),
                "best Gaussian": number(means["beyond_gaussian"]),
                "s": f"{start + run.record['seconds']['training']:.0f}",
            }
        )
    values = table.pivot(index="image", columns="label", values="log_evidence")
    text = [_TEXT.format(images=len(values))]
    for label in list(runs)[1:]:
        difference = values[label] - values["VAE"]
        mean, error = difference.mean(), difference.sem()
        verdict = "these images do not resolve a difference"
        if abs(mean) > 2 * error:
            verdict = f"the decoder of {label if mean > 0 else 'VAE'} is better on these images"
        text.append(
            f"{label} - VAE, log p(x): {mean:+.2f} ± {error:.2f} (paired standard error over "
            f"images, one seed): {verdict}."
        )
    return Section("What inference loses", text, pd.DataFrame(rows))
