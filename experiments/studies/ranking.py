"""All guides, each trained with a decoder of its own: which gives the best model?

    python experiments/studies/ranking.py --seeds 3

This is the comparison on the embedded digits, which anyone can repeat overnight; ``--data`` and
``--decoder`` choose other images and networks. Every guide is trained together with a decoder from
random weights, with the same number of epochs, σ at a learning rate of 1e-2, and the weights of the
epoch with the highest ELBO on held-out images.
``vae, 2 x epochs`` has the time of guides whose steps cost twice as much, and ``gp after vae``
starts from the trained VAE, as in the paper. Each is an ordinary run folder in --out, which is
continued if the study is stopped, and compared by

* IWAE(K), with the guide's own q: what the paper reports;
* log p(x), which does not depend on how good q is: how good the decoder is that was trained with
  this guide. ``reference_evidence`` finds what IWAE misses on some of the test images;
* the ELBO, and the gap, log p(x) - ELBO.

Differences to the VAE are paired over seeds. ``ranking_DATA_DECODER.json``, ``.md`` and ``.png``
are written to --out; ``--render`` makes the last two from the first.
"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro_gpvae.plots  # before matplotlib, without settings of the working directory  # noqa: F401

# isort: split
import matplotlib.pyplot as plt
import pandas as pd
import tyro
from _study import publish
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from scipy import stats

from pyro_gpvae import load_data, load_run, reference_evidence
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation.importance import ParetoWarning
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.train import train_run

#: The rows: a name, the guide, the run it starts from, and a factor of the epochs.
ROWS: dict[str, tuple[str, str | None, int]] = {
    "vae": ("vae", None, 1),
    "vae, 2 x epochs": ("vae", None, 2),
    "gp": ("gp", None, 1),
    "gp after vae": ("gp", "vae", 1),
    "newton:1": ("newton:1,covariance=diagonal", None, 1),
    "sa:1": ("sa:1", None, 1),
    "iaf:2": ("iaf:2", None, 1),
    "hf:2": ("hf:2", None, 1),
    "me:2": ("me:2", None, 1),
    "rme:2": ("rme:2", None, 1),
    "full": ("full", None, 1),
}
#: Further rows for the fully-connected decoder, as in the paper.
FC_ROWS: dict[str, tuple[str, str | None, int]] = {
    "vlae:1": ("vlae:1", None, 1),
    "vlae:1, damped": ("vlae:1,step=damped", None, 1),
}
#: The published scores of Tables 4 and 5.
PUBLISHED = Path(__file__).parents[1] / "tables" / "published"
NETWORKS = {"conv": "convolutional", "fc": "fully-connected"}
#: Importance samples for each image and proposal of the reference estimate, without annealing.
REFERENCE_SAMPLES = 500


@dataclass(kw_only=True)
class Options:
    """Options of the study.

    Attributes:
        data: Name of a data set, or path of an .npz file.
        root: Folder where data sets are kept; None is that of the command.
        decoder: Networks of the paper: "conv" or "fc".
        epochs: Passes over the training images.
        seeds: The number of seeds, from 0.
        latent_dim: Dimension p of z.
        validation: Number of training images held out, by which the epoch is chosen.
        train_images: Use only the first so many training images; None is all.
        test_images: Number of test images for IWAE and ELBO; None is all.
        reference_images: Number of test images for log p(x).
        num_samples: Importance samples K per image.
        rows: Only these rows; none is all. The VAE is always there.
        out: Folder of the runs and the results.
        render: Only make page and picture from the record.
    """

    data: str = "mnist5k"
    root: str | None = None
    decoder: Literal["conv", "fc"] = "conv"
    epochs: int = 60
    seeds: int = 3
    latent_dim: int = 10
    validation: int = 500
    train_images: int | None = None
    test_images: int | None = None
    reference_images: int = 200
    num_samples: int = 100
    rows: tuple[str, ...] = ()
    out: Path = Path("runs/ranking")
    render: bool = False

    @property
    def name(self) -> str:
        """The name of the record."""
        return f"ranking_{Path(self.data).stem}_{self.decoder}"


def main(options: Options) -> None:
    record = publish(options.name, options, partial(measure, options), markdown)
    picture(record).savefig(options.out / f"{options.name}.png", dpi=150)
    plt.close("all")


def measure(options: Options) -> dict[str, Any]:
    """Trains and evaluates what is missing; returns a row for each seed and guide."""
    rows = ROWS | (FC_ROWS if options.decoder == "fc" else {})
    chosen = [name for name in rows if not options.rows or name in ("vae", *options.rows)]
    found = [cell(options, name, seed) for seed in range(options.seeds) for name in chosen]
    return {"cells": found}


def cell(options: Options, name: str, seed: int) -> dict[str, Any]:
    """Trains and evaluates one row for one seed, unless its folder has the result."""
    guide, start, factor = (ROWS | FC_ROWS)[name]
    folder = (
        options.out
        / options.name
        / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-seed{seed}"
    )
    config = RunConfig(
        data=options.data,
        root=options.root,
        guide=guide,
        decoder=options.decoder,
        latent_dim=options.latent_dim,
        epochs=factor * options.epochs,
        sigma_learning_rate=1e-2,
        validation=options.validation,
        keep_best=True,
        train_images=options.train_images,
        test_images=options.test_images,
        num_samples=options.num_samples,
        seed=seed,
        device="cpu",
        warm_start=None if start is None else str(folder.parent / f"{start}-seed{seed}"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)  # log p(x) is by the reference
        record = train_run(config, folder, resume=True, progress=f"{name}, seed {seed}")
        reference = folder / "reference.json"
        if not reference.exists():
            write_json(reference, reference_scores(options, folder, seed))
    return {
        "row": name,
        "seed": seed,
        "iwae": record["scores"]["log_evidence"],
        "elbo": record["scores"]["elbo"],
        "sigma": record["sigma"],
        "best_epoch": record["best_epoch"],
        "epochs": config.epochs,
        "seconds": record["seconds"]["training"],
        "commit": record["commit"],
        "train_images": record["data"]["train_images"],
        "test_images": record["data"]["test_images"],
        "validation": pd.read_csv(folder / "history.csv")["validation_elbo"].round(2).to_list(),
        **shortfalls(folder, read_json(reference)),
    }


def reference_scores(options: Options, folder: Path, seed: int) -> dict[str, Any]:
    """Returns the mean reference log p(x) of the first test images."""
    run = load_run(folder)
    x = to_batch(load_data(options.data, options.root).test[: options.reference_images])[0]
    found = reference_evidence(
        run.model, x, run.guide, num_samples=REFERENCE_SAMPLES, num_chains=0, seed=seed
    )
    return {
        "reference": float(found.log_evidence.mean()),
        "reference_images": len(x),
        "untrusted": int((~found.trusted).sum()),
    }


def shortfalls(folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Adds how far the ELBO and IWAE are below the reference, on the same images."""
    table = pd.read_csv(folder / "scores.csv")[: reference["reference_images"]]
    return reference | {
        "gap": reference["reference"] - table["elbo"].mean(),
        "iwae_shortfall": reference["reference"] - table["log_evidence"].mean(),
    }


def markdown(record: dict[str, Any]) -> str:
    """Returns the table of the record, with the paper's scores where it has them."""
    cells = pd.DataFrame(record["cells"])
    cells["log p(x)"] = cells["iwae"] + cells["iwae_shortfall"]
    paper = published(record)
    heads = ["guide (seeds)", "log p(x)", "difference to the VAE", "p", "gap", "IWAE misses"]
    heads += ["IWAE", *(["paper"] if paper else []), "ELBO", "σ", "epoch"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, group in cells.groupby("row", sort=False):
        paired = group.set_index("seed")["log p(x)"].sub(
            cells[cells["row"] == "vae"].set_index("seed")["log p(x)"]
        )
        difference = "–" if name == "vae" else mean(paired)
        p = math.nan if name == "vae" else paired_p(paired)
        texts = [mean(group["log p(x)"]), difference, "–" if math.isnan(p) else f"{p:.3f}"]
        texts += [mean(group[key]) for key in ("gap", "iwae_shortfall", "iwae")]
        texts += [paper.get(str(name), "–")] if paper else []
        texts += [mean(group["elbo"]), f"{group['sigma'].mean():.3f}", mean(group["best_epoch"], 0)]
        lines.append(f"| `{name}` ({len(group)}) | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", caption(record), ""])


def published(record: dict[str, Any]) -> dict[str, str]:
    """Returns the scores of the paper by row. Its GPVAE starts from a VAE."""
    tables = [pd.read_csv(PUBLISHED / f"table{n}.csv", comment="#") for n in (4, 5)]
    key = (record["data"], record["decoder"], record["latent_dim"])
    scores = pd.concat(tables).set_index(["data", "decoder", "latent_dim"])
    if key not in scores.index:
        return {}
    found = scores.loc[[key]].replace({"guide": {"gp": "gp after vae"}}).set_index("guide")
    return found["score"].map("{:.1f}".format).to_dict()


def mean(values: Any, digits: int = 1) -> str:
    """Returns the mean with the standard deviation over seeds."""
    values = [float(value) for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def paired_p(differences: Any) -> float:
    """Returns p of a two-sided paired t-test, or NaN for fewer than three seeds."""
    return float(stats.ttest_1samp(differences, 0.0).pvalue) if len(differences) > 2 else math.nan


def caption(record: dict[str, Any]) -> str:
    """Returns the data, the budget, the tests and the machine, in sentences."""
    first = record["cells"][0]
    return (
        f"{record['data']}: {first['train_images']:,} images for training, {record['validation']} "
        f"held out and {first['test_images']:,} for the scores; p = {record['latent_dim']}, the "
        f"{NETWORKS[record['decoder']]} networks of the paper, {record['epochs']} epochs (the "
        "paper: 2,000), Adam at 5e-4 and 1e-2 for log σ, weights of the epoch with the highest "
        "held-out ELBO, which is the last column. Nats per image, means ± standard deviations over "
        f"seeds. IWAE with the guide's own q, K = {record['num_samples']}. What it misses, and the "
        f"gap, are log p(x) - IWAE and log p(x) - ELBO on the first {record['reference_images']} "
        f"test images, with log p(x) by `reference_evidence`, {REFERENCE_SAMPLES} samples of each "
        "proposal and no annealing (not reliable for at most "
        f"{max(c['untrusted'] for c in record['cells'])} images of a run). log p(x) is IWAE of all "
        "test images plus what it misses, which depends less on the choice of the images. p is "
        "that of a two-sided paired t-test of the difference of log p(x), for at least three "
        "seeds, not corrected for the number of rows. `newton:1` has a diagonal covariance."
    )


def picture(record: dict[str, Any]) -> Figure:
    """Draws the ELBO of held-out digits against the epoch, the mean over seeds."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    cells = pd.DataFrame(record["cells"])
    ends = []
    for name, group in cells.groupby("row", sort=False):
        curve = pd.DataFrame(group["validation"].to_list()).mean()
        before = (
            record["epochs"] if (ROWS | FC_ROWS)[str(name)][1] else 0
        )  # the epochs of its warm start
        (line,) = axes.plot(before + 1 + curve.index, curve, linewidth=1.2)
        ends.append((float(curve.iloc[-1]), before + len(curve), name, line.get_color()))
    top = max(end[0] for end in ends)
    axes.set_ylim(top - 270, top + 25)
    last = max(end[1] for end in ends)
    for epoch in {end[1] for end in ends}:
        place = math.inf
        for value, _, name, colour in sorted((e for e in ends if e[1] == epoch), reverse=True):
            place = min(value, place - 11.0)  # nats between two labels
            label = axes.text(epoch + 0.02 * last, place, str(name), color=colour, fontsize=9)
            label.set(va="center", in_layout=False)
            label.set_path_effects([Stroke(linewidth=3, foreground="white"), Normal()])
    axes.set(
        xlabel="epoch, of the VAE before included",
        ylabel="ELBO of held-out images (nats per image)",
        title=f"{record['data']}, {record['decoder']}, means over seeds, "
        f"{record['validation']} held-out images",
    )
    axes.set_xlim(0, 1.22 * last)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
