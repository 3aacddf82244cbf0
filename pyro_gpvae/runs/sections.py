r"""The sections of a report on runs: scores, learning curves, pictures, and how to repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from pyro_gpvae.core._files import check_size
from pyro_gpvae.evaluation import generation
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.folder import Run
from pyro_gpvae.runs.report import Section, number

__all__ = ["configuration", "curves", "decoded_means", "latent", "missed", "pictures", "scores"]

#: The latent map shows so many test images, and counts active units on them.
LATENT_IMAGES = 500
#: A latent dimension is active if its posterior mean varies more over images.
ACTIVE = 0.01

_SCORES = (
    "Nats per test image, higher is better. log p(x) is estimated by importance sampling with K "
    "samples from the guide, and is too low where these miss the posterior; ± is its Monte-Carlo "
    "error. The ELBO also counts what inference loses. σ is the noise of a Gaussian likelihood, in "
    "units of pixels in [0, 1]."
)


def scores(runs: Mapping[str, Run]) -> Section:
    """Returns the scores of each run."""
    rows = []
    for label, run in runs.items():
        found, sigma = run.record["scores"], run.record.get("sigma")
        rows.append(
            {
                "run": f"`{label}`",
                "epochs": f"{run.total_epochs:,}",
                "log p(x)": f"{found['log_evidence']:.1f} ± {number(found['monte_carlo_error'])}",
                "ELBO": f"{found['elbo']:.1f}",
                "K": f"{found['num_samples']}",
                "σ": "–" if sigma is None else f"{sigma:.3f}",
                "training (s)": f"{run.record['seconds']['training']:.0f}",
            }
        )
    return Section("Scores", [_SCORES], pd.DataFrame(rows))


def curves(runs: Mapping[str, Run], caption: str = "") -> Section:
    """Returns the learning curves of the runs; each continues that of its warm start."""
    from pyro_gpvae.plots import loss_curves  # imports matplotlib

    histories = {}
    for label, run in runs.items():
        source = run.folder / "history.csv"
        check_size(source, 64 << 20)
        history = pd.read_csv(source)
        if len(history.select_dtypes("number").columns) < len(history.columns):
            raise ValueError(f"{source} is damaged: expected numbers alone")
        epochs = run.total_epochs - len(history)
        histories[label] = history.assign(epoch=history["epoch"] + epochs)
    figure = loss_curves(histories, caption)
    return Section("Learning curves", figures={"loss_curves.png": figure})


def pictures(run: Run, index: list[int], count: int, seed: int, caption: str = "") -> Section:
    """Returns reconstructions of some test images, and samples from the prior."""
    from pyro_gpvae import plots  # imports matplotlib

    images = run.data.test[index]
    reconstruct = partial(generation.reconstruct, run.model, run.guide, images, seed=seed)
    sample = partial(generation.sample_images, run.model, count, seed=seed)
    gaussian = run.config.likelihood == "gaussian"
    mean = "means of p(x|z)" if gaussian else "probabilities of p(x|z)"
    decoded = {"its mean": reconstruct(), "a draw": reconstruct(draw=True)}
    samples = {mean: sample(), "draws from p(x|z), same z": sample(noise=True)}
    figures = {
        "reconstructions.png": plots.reconstructions(
            images.numpy(),
            {name: found.images.cpu().numpy() for name, found in decoded.items()},
            f"Test images, and the {mean} with z the mean of q(z|x), or one draw from it. "
            f"{caption}",
        ),
        "samples.png": plots.image_grid(
            {name: found.images.cpu().numpy() for name, found in samples.items()},
            caption=f"z from the prior N(0, I). {caption}",
        ),
    }
    return Section("Reconstructions and samples", figures=figures)


def latent(run: Run, seed: int, caption: str = "") -> Section:
    """Returns a map of the posterior means of test images, and the number of active units.

    Reference: Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders*, 2016, who count
    the dimensions whose posterior mean has a variance above 0.01 over the images.
    """
    from pyro_gpvae.plots import latent_map  # imports matplotlib

    images, labels = run.data.test[:LATENT_IMAGES], run.data.test_labels
    means = generation.reconstruct(run.model, run.guide, images, seed=seed).z.cpu().numpy()
    active = int((np.var(means, axis=0, ddof=1) > ACTIVE).sum()) if len(means) > 1 else 0
    text = (
        f"{active} of {means.shape[1]} latent dimensions are active: the variance of their "
        f"posterior mean over {len(means)} test images is above {ACTIVE} (that of the prior is 1)."
    )
    figures = {}
    if min(means.shape) > 1:
        shown = None if labels is None else labels[:LATENT_IMAGES].numpy()
        note = "" if shown is None else " Colours and numbers are the labels."
        figures["latent.png"] = latent_map(
            means, shown, f"The mean of q(z|x) of {len(means)} test images.{note} {caption}"
        )
    return Section("Latent space", [text], figures=figures)


def missed(run: Run, table: pd.DataFrame, caption: str = "") -> Section:
    """Returns the images on which inference loses most, and what they could decode to.

    Arguments:
        run: A run.
        table: The gaps of its first test images; see
            :func:`pyro_gpvae.runs.gap_report.measure_gaps`.
        caption: Data and budget.
    """
    from pyro_gpvae.plots import missed_images  # imports matplotlib

    worst = table.nlargest(10, "gap")
    images = run.data.test[worst["image"].to_list()]
    lost = worst["gap"], worst["beyond_gaussian"]
    rows = decoded_means(run.model, run.guide, images, *lost, seed=run.config.seed)
    text = (
        f"The {len(worst)} largest inference gaps of the first {len(table)} test images; numbers "
        "are ELBO - log p(x) in nats."
    )
    figure = missed_images(images.numpy(), rows, f"{text} {caption}")
    return Section("Images that inference gets wrong", figures={"missed.png": figure})


def decoded_means(
    model: ImageModel, guide: Any, images: Tensor, lost: Any, lost_at_best: Any, seed: int = 0
) -> dict[str, tuple[Any, Any]]:
    """Decodes the guide's mean and that of the best Gaussian: the rows of ``missed_images``.

    ``lost`` and ``lost_at_best`` are the nats (B,) that these two q lose.
    """
    encoder = generation.reconstruct(model, guide, images, seed=seed).images
    best = optimise_gaussian(model, images, start=guide).posterior.mean
    decoded = generation.decode(model, best)
    return {
        "decoded from\nthe guide's mean": (encoder.cpu().numpy(), lost),
        "decoded from the mean\nof the best Gaussian": (decoded.cpu().numpy(), lost_at_best),
    }


def configuration(runs: Mapping[str, Run]) -> Section:
    """Returns options, versions, machine and weights of the runs, and how to repeat them."""
    columns = {}
    for label, run in runs.items():
        record, config = run.record, run.config
        values = {k: v for k, v in vars(config).items() if v is not None and k != "root"}
        commit = record.get("commit") or "–"
        values |= {
            "commit": commit[:10] + "+" * commit.endswith("+"),
            "computed on": f"{record.get('device')}, threads: {record.get('threads')}",
            **{f"{name} (version)": v for name, v in record.get("versions", {}).items()},
            "SHA-256 of the weights": run.weights_sha256[:16],
        }
        columns[f"`{label}`"] = pd.Series({name: str(value) for name, value in values.items()})
    table = pd.DataFrame(columns).fillna("–").rename_axis("option").reset_index()
    folders = "; ".join(f"`pyro-gpvae evaluate {run.folder}`" for run in runs.values())
    text = (
        f"The same score again: {folders}. The same run again: `pyro-gpvae train --from-record "
        "RUN/record.json`."
    )
    return Section("Configuration", [text], table)
