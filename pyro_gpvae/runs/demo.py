r"""The demo: VAE and GPVAE on 5,000 digits, compared by score and by inference gap."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_gpvae.core._files import check_replaceable, write_json, write_text
from pyro_gpvae.runs._report import caption, describe, markdown_table, number
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.gap_report import read_table, report_gaps, summarise
from pyro_gpvae.runs.generation_report import report_generation
from pyro_gpvae.runs.train import train_run

__all__ = ["DEMO_FILES", "run_demo"]

#: The run folders: the first half, which both methods share, and the second half of each method.
_LABELS = {"start": "VAE at half time", "vae": "VAE", "gpvae": "GPVAE"}
DEMO_FILES = (
    "README.md", "metrics.json", "loss_curves.png", "gap", "vae-images", "gpvae-images", *_LABELS,
)  # fmt: skip


def run_demo(
    out: str | Path = "demo",
    *,
    quick: bool = False,
    progress: bool = True,
    epochs: int | None = None,
    gap_images: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains VAE and GPVAE on the embedded digits and writes a report; returns ``metrics.json``.

    The first half of the epochs trains a VAE. The second half continues the VAE, and trains GPVAE
    from the same weights on eq. (2) of the paper's supplement. The gaps are those of the first
    ``gap_images`` test images. For the other arguments see ``pyro-gpvae demo --help`` and
    :class:`RunConfig`.
    """
    epochs, gap_images = epochs or (4 if quick else 40), gap_images or (2 if quick else 20)
    if epochs < 2 or epochs % 2:
        raise ValueError(f"epochs must be even and at least 2, got {epochs}")
    if quick:
        options = {"test_images": 200} | options
    out = Path(out).expanduser()
    unfinished = (f"{name}.partial" for name in _LABELS)
    check_replaceable(out, True, (*DEMO_FILES, *unfinished))
    (out / "README.md").unlink(missing_ok=True)  # of other runs
    config = RunConfig(guide="vae", epochs=epochs // 2, sigma_learning_rate=1e-2, **options)
    begin = time.monotonic()
    runs: dict[str, Run] = {}
    for name, label in _LABELS.items():
        bar = "VAE, first half"
        if runs:
            guide, bar = "gp" if name == "gpvae" else "vae", f"{label}, second half"
            config = replace(config, guide=guide, warm_start=str(out / "start"))
        train_run(config, out / name, overwrite=True, progress=progress and bar)
        runs[name] = load_run(out / name)
    folders = [out / "vae", out / "gpvae"]
    budget = {"num_samples": 200, "reference_samples": 500, "num_chains": 0, "num_steps": 1}
    report_gaps(
        folders, out / "gap", budget | {"seed": config.seed}, overwrite=True,
        labels=["VAE", "GPVAE"], num_images=gap_images, progress=progress,
    )  # fmt: skip
    for folder in folders:
        images = folder.with_name(f"{folder.name}-images")
        report_generation(folder, images, overwrite=True, progress=False)
    metrics = _compare(runs, quick, read_table(out / "gap" / "gap.csv"))
    _draw(runs, out, metrics["caption"])
    metrics["seconds"] = time.monotonic() - begin
    write_json(out / "metrics.json", metrics)
    text = _table(metrics)
    write_text(out / "README.md", _REPORT.format(table=text))
    print(f"{text}\n\n{metrics['seconds']:.0f} seconds; report in {out}")
    return metrics


def _compare(runs: dict[str, Run], quick: bool, gaps: pd.DataFrame) -> dict[str, Any]:
    """Returns the scores of each method, and the paired differences of GPVAE and VAE."""
    config, scores = runs["gpvae"].config, ["elbo", "log_evidence"]
    gp, vae = (pd.read_csv(runs[name].folder / "scores.csv")[scores] for name in ("gpvae", "vae"))
    budget = (
        f"Batch {config.batch_size}, Adam {config.learning_rate:g} "
        f"(σ: {config.sigma_learning_rate:g}), K = {config.num_samples}."
    )
    means = summarise(gaps).set_index(["label", "quantity"])["mean"]
    methods = []
    for name, label in _LABELS.items():
        record, row = runs[name].record, {"method": label, "epochs": runs[name].total_epochs}
        row |= record["scores"] | {"seconds": record["seconds"]["training"]}
        if name != "start":  # the time of a method includes the half that it shares
            row["seconds"] += runs["start"].record["seconds"]["training"]
            row |= {gap: means[label, gap] for gap in ("approximation", "amortisation")}
        methods.append(row)
    differences = {"mean": (gp - vae).mean(), "standard_error": (gp - vae).sem()}
    return {
        "caption": ("QUICK DEMO, budget cut: " if quick else "")
        + caption([describe(runs["gpvae"])], len(gp), budget),
        "quick": quick,
        "gap_images": gaps["image"].nunique(),
        "methods": methods,
        "gpvae_minus_vae": pd.DataFrame(differences).to_dict("index"),
    }


def _table(metrics: dict[str, Any]) -> str:
    """Returns caption, table and conclusions as Markdown."""
    head = (
        "",
        "epochs",
        "ELBO",
        "log p(x) ± MC error",
        "approximation gap",
        "amortisation gap",
        "s",
    )
    rows = [
        [
            m["method"],
            str(m["epochs"]),
            f"{m['elbo']:.1f}",
            f"{m['log_evidence']:.1f} ± {m['monte_carlo_error']:.2f}",
            *(number(m.get(gap)) for gap in ("approximation", "amortisation")),
            f"{m['seconds']:.0f}",
        ]
        for m in metrics["methods"]
    ]
    lines = [
        metrics["caption"],
        "",
        markdown_table(head, rows),
        "",
        f"Nats per test image; the gaps are those of the first {metrics['gap_images']}. The "
        "approximation gap is what the best Gaussian of each image loses, and the amortisation gap "
        "what the encoder loses compared with it.",
    ]
    for score, name in (("log_evidence", "log p(x)"), ("elbo", "ELBO")):
        mean, error = metrics["gpvae_minus_vae"][score].values()
        verdict = "these images do not resolve a difference"
        if abs(mean) > 2 * error:
            verdict = f"{'GPVAE' if mean > 0 else 'VAE'} is better on these images"
        lines.append(
            f"GPVAE - VAE, {name}: {mean:+.2f} ± {error:.2f} (paired standard error over images, "
            f"one seed): {verdict}."
        )
    return "\n".join(lines)


_REPORT = """# VAE and GPVAE on 5,000 digits

{table}

- Both methods continue the VAE at half time; their seconds include the half that they share.
- log p(x): importance sampling with K samples from the guide. Where these are few or far from the
  posterior, both this estimate and its Monte-Carlo (MC) error are too low.
- [The gaps in full](gap/gap.md).

![ELBO and σ while training](loss_curves.png)

![Where the gap comes from](gap/gap.png)

![Reconstructions of the VAE](vae-images/reconstructions.png)

![Reconstructions of GPVAE](gpvae-images/reconstructions.png)

![Samples of the VAE](vae-images/samples.png)

![Samples of GPVAE](gpvae-images/samples.png)

The folders `start`, `vae` and `gpvae` are run folders: `pyro-gpvae evaluate vae` reproduces a
score, and `pyro-gpvae uncertainty gpvae` asks whether GPVAE knows where its inference is poor.
"""


def _draw(runs: dict[str, Run], folder: Path, caption: str) -> None:
    from pyro_gpvae.plots import loss_curves  # imports matplotlib

    first, *seconds = (pd.read_csv(run.folder / "history.csv") for run in runs.values())
    curves = {"VAE, first half": first}
    for name, history in zip(("VAE", "GPVAE"), seconds, strict=True):
        second = history.assign(epoch=history["epoch"] + len(first))
        # the curve continues where the first half ended
        curves[name] = pd.concat([first.iloc[[-1]], second], ignore_index=True)
    figure = loss_curves(curves, f"ELBO of GPVAE: eq. (2). {caption}")
    figure.savefig(folder / "loss_curves.png")
