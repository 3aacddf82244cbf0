r"""Report of the demo: VAE and GPVAE on 5,000 digits, with a table and pictures."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from pyro_gpvae.core._files import new_folder, write_json, write_text
from pyro_gpvae.data.images import to_batch
from pyro_gpvae.evaluation.uncertainty import rank_correlation
from pyro_gpvae.plots import image_grid, loss_curves, reconstructions, uncertain_images
from pyro_gpvae.runs._markdown import markdown_table
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
# the first half, which both methods share, and the second half of each method
_START, _VAE, _GPVAE = "start", "vae", "gpvae"
_SCORES = (
    "elbo", "log_evidence", "monte_carlo_error", "sampling_error", "median_log_evidence",
    "mean_effective_sample_size",
)  # fmt: skip
_DIAGNOSTICS = ("v_over_h2", "r", "kl_weights_per_image")
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
    """Trains VAE and GPVAE on the embedded digits, prints a table of scores and writes a report.

    Both get the same number of epochs. The first half trains a VAE. The second half continues the
    VAE, and trains GPVAE from the same weights on eq. (2) of the paper's supplement.

    Arguments:
        out: Folder of the report; an earlier report in it is replaced.
        quick: Whether to use fewer epochs and test images; the captions say so.
        seed: Seed of everything.
        device: "cpu", "cuda" or "cuda:INDEX"; by default CUDA if it is available.
        progress: Whether to show progress bars.
        epochs: The number of epochs of each method, even.
        train_images, test_images: The numbers of images; by default 4,000, and 1,000 or 200.
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
        raise ValueError(f"epochs must be even and at least 2, got {epochs}")
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
            (folder / name).mkdir()
            label = f"{_LABELS[name]}, second half" if start else "VAE, first half"
            this = replace(config, guide=guide, warm_start=warm_start)
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
    """Returns the scores of each method, and the paired differences of GPVAE and VAE."""
    methods = []
    for method, run in runs.items():
        record = run.record
        # the time of a method includes the half that it shares
        shared = 0.0 if method == _START else runs[_START].record["seconds"]["training"]
        methods.append(
            {
                "method": _LABELS[method],
                "epochs": epochs // 2 if method == _START else epochs,
                **{score: record["scores"][score] for score in _SCORES},
                "training_seconds": shared + record["seconds"]["training"],
                "evaluation_seconds": record["seconds"]["evaluation"],
                "sigma": record["sigma"],
                **{name: record["diagnostics"].get(name) for name in _DIAGNOSTICS},
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
        "num_samples": config["num_samples"],
        "methods": methods,
        "gpvae_minus_vae": differences,
        # whether the uncertainty of the encoder predicts the quality of its inference
        "rank_correlation_uncertainty_gap": rank_correlation(
            gp["uncertainty"].to_numpy(), gap.to_numpy()
        )._asdict(),
    }


def _table(metrics: dict[str, Any]) -> str:
    """Returns caption, table and conclusions as Markdown, which the demo also prints."""
    head = ("", "epochs", "ELBO", "log p(x) ± MC error", "ESS", "train s", "eval s", "v/h²", "KL/N")
    rows = [
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
        for m in metrics["methods"]
    ]
    table = markdown_table(head, rows)
    return "\n".join([metrics["caption"] + ".", "", table, "", *_conclusions(metrics)])


def _conclusions(metrics: dict[str, Any]) -> list[str]:
    lines = [
        "Nats per test image; higher is better. VAE and GPVAE both continue the VAE at half time",
        "with a new Adam optimiser: the VAE on its own objective, GPVAE on eq. (2).",
        "",
    ]
    for score, name in (("log_evidence", "log p(x)"), ("elbo", "ELBO")):
        mean = metrics["gpvae_minus_vae"][score]["mean"]
        error = metrics["gpvae_minus_vae"][score]["standard_error"]
        if abs(mean) > 2 * error:
            verdict = f"{'GPVAE' if mean > 0 else 'VAE'} is better on these images"
        else:
            verdict = "these images do not resolve a difference"
        lines.append(f"GPVAE - VAE, {name}: {mean:+.2f} ± {error:.2f}: {verdict}.")
    lines.append("± is the paired standard error over images, for this seed alone.")
    return lines


def _report(metrics: dict[str, Any], folder: Path) -> str:
    samples = metrics["num_samples"]
    correlation = metrics["rank_correlation_uncertainty_gap"]
    rho, low, high = (f"{correlation[name]:.2f}" for name in ("rho", "low", "high"))
    return f"""# VAE and GPVAE on 5,000 digits

{_table(metrics)}

- log p(x) ± MC error: importance sampling with K samples from the guide, and its Monte-Carlo
  error. Where the effective sample size is small, the estimate is far below log p(x), and the
  error is underestimated as well, because it depends only on the samples that were drawn.
- ESS: effective sample size, between 1 and K, averaged over the images.
- The seconds of training include the half that both methods share.
- v/h²: the variance of the encoder's mean over the variance that it reports, averaged over
  dimensions.
- KL/N: KL(q(W, U) ‖ N(0, I)) per training image, the cost of a random encoder in eq. (2).

![ELBO and σ while training](loss_curves.png)

![Reconstructions from the encoder's mean](reconstructions.png)

![Samples from the prior](prior_samples.png)

![Least and most uncertain images](uncertain_images.png)

The rank correlation between the inference uncertainty of an image and its gap log p(x) - ELBO is
{rho}, with a 95 % bootstrap interval over the images from {low} to {high}. A negative correlation
means that the random encoder is most certain where its inference is worst, as happens after few
epochs. Here log p(x) is IWAE({samples}), which underestimates it: `pyro-gpvae uncertainty
{folder}/gpvae` measures the gap better.

Numbers: [metrics.json](metrics.json), [metrics.csv](metrics.csv). The folders `start`, `vae` and
`gpvae` are run folders: `pyro-gpvae evaluate {folder}/vae` reproduces a score.
"""


@torch.no_grad()
def _pictures(runs: dict[str, Run], folder: Path, caption: str) -> dict[str, Figure]:
    first = pd.read_csv(folder / _START / "history.csv")
    histories = {"VAE, first half": first}
    for name in (_VAE, _GPVAE):
        second = pd.read_csv(folder / name / "history.csv")
        second["epoch"] += len(first)
        # the curve continues where the first half ended
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
                name: _decode(run, run.guide.posterior(to_batch(images, run.model)).mean)
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


def _decode(run: Run, z: torch.Tensor) -> Any:
    """Returns the decoded means of z (N, p) as an array (N, C, H, W), clipped to [0, 1]."""
    device = next(run.model.parameters()).device
    return run.model.decoder(z.to(device)).clamp(0, 1).cpu().numpy()
