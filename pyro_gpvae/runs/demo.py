r"""The demo: VAE and GPVAE on 5,000 digits, from training to a report with pictures."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_gpvae.core._files import new_folder, write_json, write_text
from pyro_gpvae.data.images import to_float
from pyro_gpvae.evaluation.uncertainty import rank_correlation
from pyro_gpvae.plots import image_grid, loss_curves, reconstructions, uncertain_images
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.train import train_into

__all__ = ["DEMO_FILES", "run_demo"]

DEMO_FILES = (
    "README.md",
    "metrics.json",
    "metrics.csv",
    "loss_curves.png",
    "reconstructions.png",
    "prior_samples.png",
    "uncertain_images.png",
    "start",
    "vae",
    "gpvae",
)
_EPOCHS, _QUICK_EPOCHS = 40, 6
_QUICK_TEST_IMAGES = 200
# the half that both methods share, then the other half of each
_START, _VAE, _GPVAE = "start", "vae", "gpvae"
_LABELS = {_START: "VAE at half time", _VAE: "VAE", _GPVAE: "GPVAE"}


def run_demo(
    out: str | Path = "demo",
    *,
    quick: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    epochs: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    num_samples: int = 100,
    latent_dim: int = 10,
) -> dict[str, Any]:
    """Trains and compares VAE and GPVAE on the embedded digits, prints a table, writes a report.

    Both get the same number of epochs: after the first half the VAE is trained on, while GPVAE
    starts from the same weights and trains eq. (2) of the paper's supplement for the other half.

    Arguments:
        out: Folder of the report; an earlier report in it is replaced.
        quick: Whether to cut the budget: fewer epochs, fewer test images. The captions say so.
        seed: Seed of everything.
        device: "cpu", "cuda" or "cuda:INDEX"; by default CUDA if there is one.
        progress: Whether to show progress bars.
        epochs: Of each method; even.
        train_images, test_images: How many to use; by default 4,000, and 1,000 or 200.
        num_samples: Importance samples K per image.
        latent_dim: Dimension p of z.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: If an option cannot be used.
        FileExistsError: If the folder holds anything that is not part of a report.
    """
    epochs = epochs or (_QUICK_EPOCHS if quick else _EPOCHS)
    if epochs < 2 or epochs % 2:
        raise ValueError(f"epochs must be even, to be halved, and at least 2, got {epochs}")
    if quick and test_images is None:
        test_images = _QUICK_TEST_IMAGES
    out = Path(out)
    config = RunConfig(
        guide="vae",
        latent_dim=latent_dim,
        epochs=epochs // 2,
        train_images=train_images,
        test_images=test_images,
        num_samples=num_samples,
        seed=seed,
        device=device,
    )
    begin = time.monotonic()
    with new_folder(out, overwrite=True, files=DEMO_FILES) as folder:
        runs: dict[str, Run] = {}
        for name, guide in ((_START, "vae"), (_VAE, "vae"), (_GPVAE, "gp")):
            start = runs.get(_START)
            warm_start = None if start is None else str(out / _START)
            this = replace(config, guide=guide, warm_start=warm_start)
            (folder / name).mkdir()
            half = "second" if start else "first"
            label = f"{_LABELS[_GPVAE if name == _GPVAE else _VAE]}, {half} half"
            train_into(folder / name, this, start, progress=progress and label)
            runs[name] = load_run(folder / name)
        metrics = _compare(runs, folder, epochs, quick)
        for name, figure in _pictures(runs, folder, metrics["caption"]).items():
            figure.savefig(folder / name)
        metrics["seconds"] = time.monotonic() - begin
        write_json(folder / "metrics.json", metrics)
        write_text(folder / "metrics.csv", pd.DataFrame(metrics["methods"]).to_csv(index=False))
        write_text(folder / "README.md", _report(metrics, out))
    print(_table(metrics))
    print(f"\n{metrics['seconds']:.0f} seconds; report in {out}")
    return metrics


def _compare(runs: dict[str, Run], folder: Path, epochs: int, quick: bool) -> dict[str, Any]:
    """The scores of each method, and the paired difference of GPVAE and VAE."""
    methods = []
    for name, run in runs.items():
        record, scores = run.record, run.record["scores"]
        # what a method took from scratch includes the half that it shares
        shared = 0.0 if name == _START else runs[_START].record["seconds"]["training"]
        methods.append(
            {
                "method": _LABELS[name],
                "epochs": epochs // 2 if name == _START else epochs,
                "elbo": scores["elbo"],
                "log_evidence": scores["log_evidence"],
                "monte_carlo_error": scores["monte_carlo_error"],
                "sampling_error": scores["sampling_error"],
                "median_log_evidence": scores["median_log_evidence"],
                "mean_effective_sample_size": scores["mean_effective_sample_size"],
                "training_seconds": shared + record["seconds"]["training"],
                "evaluation_seconds": record["seconds"]["evaluation"],
                "sigma": record["sigma"],
                "v_over_h2": record["diagnostics"].get("v_over_h2"),
                "r": record["diagnostics"].get("r"),
                "kl_weights_per_image": record["diagnostics"].get("kl_weights_per_image"),
            }
        )
    tables = {name: pd.read_csv(folder / name / "scores.csv") for name in (_VAE, _GPVAE)}
    differences = {}
    for score in ("elbo", "log_evidence"):
        difference = tables[_GPVAE][score] - tables[_VAE][score]
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        differences[score] = {"mean": float(difference.mean()), "standard_error": error}
    gp = tables[_GPVAE]
    gap = gp["log_evidence"] - gp["elbo"]
    record = runs[_GPVAE].record
    config, data = record["config"], record["data"]
    budget = (
        f"{data['train_images']:,} training and {data['test_images']:,} test digits (MNIST), "
        f"p = {config['latent_dim']}, {epochs} epochs each, batch {config['batch_size']}, "
        f"Adam {config['learning_rate']:g}, K = {config['num_samples']}, seed {config['seed']}"
    )
    return {
        "caption": ("QUICK DEMO, budget cut: " if quick else "") + budget,
        "quick": quick,
        "methods": methods,
        "gpvae_minus_vae": differences,
        # does the encoder know where its inference is poor?
        "rank_correlation_uncertainty_gap": rank_correlation(
            gp["uncertainty"].to_numpy(), gap.to_numpy()
        )._asdict(),
    }


def _table(metrics: dict[str, Any]) -> str:
    """The table that the demo prints: Markdown, readable as plain text."""
    head = ("", "epochs", "ELBO", "log p(x) ± MC error", "ESS", "train s", "eval s", "v/h²", "KL/N")
    rows = [head]
    for m in metrics["methods"]:
        rows.append(
            (
                m["method"],
                str(m["epochs"]),
                f"{m['elbo']:.1f}",
                f"{m['log_evidence']:.1f} ± {m['monte_carlo_error']:.2f}",
                f"{m['mean_effective_sample_size']:.1f}",
                f"{m['training_seconds']:.0f}",
                f"{m['evaluation_seconds']:.0f}",
                "-" if m["v_over_h2"] is None else f"{m['v_over_h2']:.2g}",
                "-" if m["kl_weights_per_image"] is None else f"{m['kl_weights_per_image']:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([metrics["caption"] + ".", "", *lines, "", *_conclusions(metrics)])


def _conclusions(metrics: dict[str, Any]) -> list[str]:
    lines = [
        "Nats per test image, higher is better. Equal training: VAE and GPVAE both continue the",
        "VAE at half time with a fresh Adam, the VAE on its own objective, GPVAE on eq. (2).",
        "",
    ]
    for score, name in (("log_evidence", "log p(x)"), ("elbo", "ELBO")):
        mean = metrics["gpvae_minus_vae"][score]["mean"]
        error = metrics["gpvae_minus_vae"][score]["standard_error"]
        if abs(mean) > 2 * error:
            verdict = f"{'GPVAE' if mean > 0 else 'VAE'} is better on these images"
        else:
            verdict = "no difference that these images can resolve"
        lines.append(f"GPVAE - VAE, {name}: {mean:+.2f} ± {error:.2f}: {verdict}.")
    lines.append("(± is the paired standard error over images; it says nothing about other seeds.)")
    return lines


def _report(metrics: dict[str, Any], folder: Path) -> str:
    correlation = metrics["rank_correlation_uncertainty_gap"]
    rho, low, high = (f"{correlation[name]:.2f}" for name in ("rho", "low", "high"))
    return f"""# VAE and GPVAE on 5,000 digits

{_table(metrics)}

- log p(x) ± MC error: importance sampling with K samples from the guide, and its Monte-Carlo
  error. Where the effective sample size is small, it is far below log p(x), and its error, which
  only sees the samples that were drawn, is too small as well.
- ESS: effective sample size, between 1 and K, averaged over the images.
- Seconds of training include the half that both share.
- v/h²: variance of the encoder's mean over the variance it reports, averaged over dimensions.
- KL/N: KL(q(W, U) ‖ N(0, I)) per training image, the price of a random encoder in eq. (2).

![ELBO and σ while training](loss_curves.png)

![Reconstructions from the encoder's mean](reconstructions.png)

![Samples from the prior](prior_samples.png)

![Least and most uncertain images](uncertain_images.png)

Rank correlation between the inference uncertainty of an image and its gap log p(x) - ELBO: {rho},
with a 95 % bootstrap interval over the images from {low} to {high}. A negative one says that the
random encoder is most sure where it infers worst, as it is after few epochs. log p(x) is IWAE(100)
here, which is itself too low: `pyro-gpvae uncertainty {folder}/gpvae` measures the gap better.

Numbers: [metrics.json](metrics.json), [metrics.csv](metrics.csv). The folders `start`, `vae` and
`gpvae` are runs: `pyro-gpvae evaluate {folder}/vae` reproduces the score of one.
"""


@torch.no_grad()
def _pictures(runs: dict[str, Run], folder: Path, caption: str) -> dict[str, Figure]:
    first = pd.read_csv(folder / _START / "history.csv")
    histories = {"VAE, first half": first}
    for name in (_VAE, _GPVAE):
        second = pd.read_csv(folder / name / "history.csv")
        second["epoch"] += len(first)
        # the curve goes on from where the first half ended
        histories[_LABELS[name]] = pd.concat([first.iloc[[-1]], second], ignore_index=True)
    methods = {_LABELS[name]: runs[name] for name in (_VAE, _GPVAE)}
    test = runs[_GPVAE].data.test
    images = test[: min(12, len(test))]
    latents = torch.randn(
        64, runs[_GPVAE].config.latent_dim, generator=torch.Generator().manual_seed(0)
    )
    scores = pd.read_csv(folder / _GPVAE / "scores.csv")
    return {
        "loss_curves.png": loss_curves(histories, f"ELBO of GPVAE: eq. (2). {caption}"),
        "reconstructions.png": reconstructions(
            images.numpy(),
            {
                name: _decode(run, run.guide.posterior(_input(run, images)).mean)
                for name, run in methods.items()
            },
            f"Decoded from the mean of q(z|x). {caption}",
        ),
        "prior_samples.png": image_grid(
            {name: _decode(run, latents) for name, run in methods.items()},
            caption=f"Decoded means g(z), the same z for both. {caption}",
            title="samples from the prior",
        ),
        "uncertain_images.png": uncertain_images(
            test.numpy(),
            scores["uncertainty"],
            caption=f"GPVAE, Σ v/h² + r over dimensions. {caption}",
        ),
    }


def _decode(run: Run, z: Tensor) -> Any:
    decoder = run.model.decoder
    return decoder(z.to(next(decoder.parameters()).device)).clamp(0, 1).cpu().numpy()


def _input(run: Run, images: Tensor) -> Tensor:
    return to_float(images.to(next(run.model.parameters()).device))
