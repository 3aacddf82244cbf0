r"""Report of the demo: VAE and GPVAE on 5,000 digits, with a table and pictures."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_gpvae.core._files import check_replaceable, write_json, write_text
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation.uncertainty import rank_correlation
from pyro_gpvae.plots import image_grid, loss_curves, reconstructions, uncertain_images
from pyro_gpvae.runs._report import caption, describe, markdown_table
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.train import train_run

__all__ = ["DEMO_FILES", "run_demo"]

DEMO_FILES = (
    "README.md", "metrics.json", "metrics.csv", "loss_curves.png", "reconstructions.png",
    "prior_samples.png", "uncertain_images.png", "start", "vae", "gpvae",
)  # fmt: skip
# the run folders: the first half, which both methods share, and the second half of each method
_LABELS = {"start": "VAE at half time", "vae": "VAE", "gpvae": "GPVAE"}
_DIAGNOSTICS = ("v_over_h2", "r", "kl_weights_per_image")


def run_demo(
    out: str | Path = "demo",
    *,
    quick: bool = False,
    progress: bool = True,
    epochs: int | None = None,
    test_images: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains VAE and GPVAE on the embedded digits and writes a report; returns ``metrics.json``.

    The first half of the epochs trains a VAE. The second half continues the VAE, and trains GPVAE
    from the same weights on eq. (2) of the paper's supplement. For the first arguments see
    ``pyro-gpvae demo --help``; the others are options of :class:`RunConfig`.
    """
    epochs = epochs or (6 if quick else 40)
    if epochs < 2 or epochs % 2:
        raise ValueError(f"epochs must be even and at least 2, got {epochs}")
    if quick and test_images is None:
        test_images = 200
    out = Path(out).expanduser()
    runs_and_rests = (f"{name}{end}" for name in _LABELS for end in ("", ".partial"))
    check_replaceable(out, True, (*DEMO_FILES, *runs_and_rests))
    config = RunConfig(guide="vae", epochs=epochs // 2, test_images=test_images, **options)
    (out / "README.md").unlink(missing_ok=True)  # of other runs
    begin = time.monotonic()
    runs: dict[str, Run] = {}
    for name, label in _LABELS.items():
        bar = "VAE, first half"
        if runs:
            guide, bar = "gp" if name == "gpvae" else "vae", f"{label}, second half"
            config = replace(config, guide=guide, warm_start=str(out / "start"))
        train_run(config, out / name, overwrite=True, progress=progress and bar)
        runs[name] = load_run(out / name)
    metrics = _compare(runs, quick)
    _draw(runs, out, metrics["caption"])
    metrics["seconds"] = time.monotonic() - begin
    write_json(out / "metrics.json", metrics)
    write_text(out / "metrics.csv", pd.DataFrame(metrics["methods"]).to_csv(index=False))
    write_text(out / "README.md", _report(metrics, out))
    print(f"{_table(metrics)}\n\n{metrics['seconds']:.0f} seconds; report in {out}")
    return metrics


def _compare(runs: dict[str, Run], quick: bool) -> dict[str, Any]:
    """Returns the scores of each method, and the paired differences of GPVAE and VAE."""
    config, test = runs["gpvae"].config, runs["gpvae"].data.test
    gp, vae = (pd.read_csv(runs[name].folder / "scores.csv") for name in ("gpvae", "vae"))
    difference = gp[["elbo", "log_evidence"]] - vae[["elbo", "log_evidence"]]
    budget = f"Batch {config.batch_size}, Adam {config.learning_rate:g}, K = {config.num_samples}."
    uncertainty, gap = gp["uncertainty"].to_numpy(), (gp["log_evidence"] - gp["elbo"]).to_numpy()
    note = "QUICK DEMO, budget cut: " if quick else ""
    differences = {"mean": difference.mean(), "standard_error": difference.sem()}
    return {
        "caption": note + caption([describe(runs["gpvae"])], len(test), budget),
        "quick": quick,
        "num_samples": config.num_samples,
        "methods": [_scores(name, runs) for name in runs],
        "gpvae_minus_vae": pd.DataFrame(differences).to_dict("index"),
        # whether the uncertainty of the encoder predicts the quality of its inference
        "rank_correlation_uncertainty_gap": rank_correlation(uncertainty, gap)._asdict(),
    }


def _scores(name: str, runs: dict[str, Run]) -> dict[str, Any]:
    record, start = runs[name].record, runs["start"].record
    seconds = record["seconds"]["training"]
    if name != "start":  # the time of a method includes the half that it shares
        seconds += start["seconds"]["training"]
    return {
        "method": _LABELS[name],
        "epochs": runs[name].total_epochs,
        **record["scores"],
        "training_seconds": seconds,
        "evaluation_seconds": record["seconds"]["evaluation"],
        "sigma": record["sigma"],
        **{name: record["diagnostics"].get(name) for name in _DIAGNOSTICS},
    }


_COLUMNS = {
    "": "{method}",
    "epochs": "{epochs}",
    "ELBO": "{elbo:.1f}",
    "log p(x) ± MC error": "{log_evidence:.1f} ± {monte_carlo_error:.2f}",
    "ESS": "{mean_effective_sample_size:.1f}",
    "train s": "{training_seconds:.0f}",
    "eval s": "{evaluation_seconds:.0f}",
}


def _table(metrics: dict[str, Any]) -> str:
    """Returns caption, table and conclusions as Markdown, which the demo also prints."""
    rows = [[text.format(**m) for text in _COLUMNS.values()] for m in metrics["methods"]]
    for row, m in zip(rows, metrics["methods"], strict=True):
        costs = m["v_over_h2"], m["kl_weights_per_image"]
        row += ["–" if value is None else f"{value:.2g}" for value in costs]
    head = (*_COLUMNS, "v/h²", "KL/N")
    lines = [metrics["caption"], "", markdown_table(head, rows), ""]
    lines += [
        "Nats per test image. ± is the paired standard error over images, for this seed alone."
    ]
    for score, name in (("log_evidence", "log p(x)"), ("elbo", "ELBO")):
        mean, error = metrics["gpvae_minus_vae"][score].values()
        verdict = "these images do not resolve a difference"
        if abs(mean) > 2 * error:
            verdict = f"{'GPVAE' if mean > 0 else 'VAE'} is better on these images"
        lines.append(f"GPVAE - VAE, {name}: {mean:+.2f} ± {error:.2f}: {verdict}.")
    return "\n".join(lines)


def _report(metrics: dict[str, Any], folder: Path) -> str:
    rho, low, high, _ = metrics["rank_correlation_uncertainty_gap"].values()
    return f"""# VAE and GPVAE on 5,000 digits

{_table(metrics)}

- Both methods continue the VAE at half time; their seconds include the half that they share.
- log p(x): importance sampling with K samples from the guide. Where the effective sample size
  (ESS) is small, both this estimate and its Monte-Carlo (MC) error are too low.
- v/h²: the variance of the encoder's mean over the variance that it reports.
- KL/N: the cost of a random encoder in eq. (2), per training image.

![ELBO and σ while training](loss_curves.png)

![Reconstructions from the encoder's mean](reconstructions.png)

![Samples from the prior](prior_samples.png)

![Least and most uncertain images](uncertain_images.png)

The rank correlation between an image's inference uncertainty and log p(x) - ELBO is {rho:.2f}
(95 % bootstrap interval {low:.2f} to {high:.2f}). If it is negative, the random encoder is most
certain where its inference is worst, as happens after few epochs.

The folders `start`, `vae` and `gpvae` are run folders: `pyro-gpvae evaluate {folder}/vae`
reproduces a score, and `pyro-gpvae uncertainty {folder}/gpvae` measures the gap better.
"""


@torch.no_grad()
def _draw(runs: dict[str, Run], folder: Path, caption: str) -> None:
    histories = [pd.read_csv(folder / name / "history.csv") for name in runs]
    first, curves = histories[0], {"VAE, first half": histories[0]}
    for name, history in zip(("VAE", "GPVAE"), histories[1:], strict=True):
        second = history.assign(epoch=history["epoch"] + len(first))
        # the curve continues where the first half ended
        curves[name] = pd.concat([first.iloc[[-1]], second], ignore_index=True)
    test = runs["gpvae"].data.test
    prior = torch.randn(
        64, runs["gpvae"].config.latent_dim, generator=torch.Generator().manual_seed(0)
    )
    decoded, samples = {}, {}
    for name in ("vae", "gpvae"):
        model, guide = runs[name].model, runs[name].guide
        x = to_batch(test[:12], model)[0]
        decoded[_LABELS[name]] = model.decoder(guide.posterior(x).mean).cpu().numpy()
        samples[_LABELS[name]] = model.decoder(prior.to(x)).cpu().numpy()
    scores = pd.read_csv(folder / "gpvae" / "scores.csv")["uncertainty"]
    text = f"Decoded from the mean of q(z|x). {caption}"
    figures = {
        "loss_curves": loss_curves(curves, f"ELBO of GPVAE: eq. (2). {caption}"),
        "reconstructions": reconstructions(test[:12].numpy(), decoded, text),
        "prior_samples": image_grid(
            samples, caption=f"Decoded prior draws, the same z for both. {caption}"
        ),
        "uncertain_images": uncertain_images(
            test.numpy(), scores, caption=f"GPVAE, Σ v/h² + r over dimensions. {caption}"
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
