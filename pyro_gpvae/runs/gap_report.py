r"""The inference gaps of runs: measured in chunks, averaged over images and seeds, reported."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch

import pyro_gpvae
from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.core._progress import progress_bar
from pyro_gpvae.evaluation.gap import BATCH, LADDER, decompose
from pyro_gpvae.evaluation.importance import PARETO_LIMIT
from pyro_gpvae.runs.folder import Place, Run
from pyro_gpvae.runs.programs import labels_of, open_runs
from pyro_gpvae.runs.report import HTML, Report, Section, caption, describe, number

__all__ = [
    "GAP_FILES", "QUICK", "gap_caption", "gap_sections", "measure_gaps", "report_gaps", "summarise",
]  # fmt: skip

GAP_FILES = ("gap.csv", "gap.json", "gap.md", "gap.png", HTML)
#: A budget of about a second an image, without annealing.
QUICK = {"num_samples": 200, "reference_samples": 500, "num_chains": 0, "num_steps": 1}

QUANTITIES = (
    "log_evidence", "elbo", "gap", "approximation", "amortisation", *LADDER, "bound",
    "iwae", "refined", "annealed",
)  # fmt: skip

#: The costs of a random encoder, which its guide may leave unknown.
_COSTS = ["weight_information", "kl_global"]


def measure_gaps(
    runs: Sequence[Run],
    out: str | Path,
    budget: dict[str, Any],
    *,
    num_images: int = 100,
    labels: Sequence[str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Decomposes the gaps of the first test images of each run: one row for each image.

    Each chunk of 25 finished images is written to ``out/chunks``, under a name that is a hash of
    the weights, the images and the budget, and is not measured again: after an interrupt, with
    further runs, or with more images. A damaged chunk is measured again, with a warning.

    Arguments:
        runs: The runs; see :func:`pyro_gpvae.runs.programs.open_runs`.
        out: The folder of the chunks.
        budget: Further arguments of :func:`pyro_gpvae.decompose`.
        num_images: The number of images of each run.
        labels: A name for each run; by default its guide, or its folder where guides are not
            unique. Runs with the same label are seeds.
        progress: Whether to show a progress bar.
    """
    check_at_least(1, images=num_images)
    labels = labels_of(runs) if labels is None else labels
    counts = [min(num_images, len(run.data.test)) for run in runs]
    tables = []
    shown = None if progress else False
    with progress_bar(shown, "inference gap", sum(counts), unit="image") as bar:
        for run, count, label in zip(runs, counts, labels, strict=True):
            own: dict[str, Any] = {"run": str(run.folder), "label": label}
            own |= {"guide": run.config.guide, "seed": run.config.seed}
            for start in range(0, count, BATCH):
                chunk = _measure(run, slice(start, min(start + BATCH, count)), Path(out), budget)
                tables.append(chunk.assign(**own)[[*own, *chunk.columns]])
                bar.update(len(chunk))
    return pd.concat(tables, ignore_index=True)


def _measure(run: Run, chosen: slice, out: Path, budget: dict[str, Any]) -> pd.DataFrame:
    """Reads the chunk of some images, or measures and writes it."""
    images, num_train = run.data.test[chosen], run.record["data"]["train_images"]
    key = {  # everything that the numbers depend on
        "format": 2,  # 1 had no checksum, and trusted any annealing
        "version": pyro_gpvae.__version__,
        "weights": run.weights_sha256,
        "guide": run.config.guide,
        "likelihood": run.config.likelihood,
        "train_images": num_train,
        "images": sha256(images),
        "first_image": chosen.start,
        "budget": budget,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = out / "chunks" / f"{name}.csv"
    head, _, content = path.read_bytes().partition(b"\n") if path.is_file() else (b"", b"", b"")
    if head != b"# sha256 " + hashlib.sha256(content).hexdigest().encode():
        if path.is_file():
            warnings.warn(
                f"{path} is damaged (its checksum is wrong): its images are measured again",
                stacklevel=3,
            )
        gap = decompose(
            run.model, run.guide, images, num_train=num_train, first_image=chosen.start, **budget
        )
        content = gap.table().to_csv(index=False).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"# sha256 {hashlib.sha256(content).hexdigest()}\n{content.decode()}")
    table = pd.read_csv(io.BytesIO(content))
    return table.assign(image=table["image"] + chosen.start)


def report_gaps(
    folders: Sequence[str | Path],
    out: str | Path,
    budget: dict[str, Any],
    *,
    num_images: int = 100,
    overwrite: bool = False,
    progress: bool = True,
    **place: Unpack[Place],
) -> Report:
    """Decomposes the gaps of runs; writes table, record, text, picture and ``report.html``.

    The budget holds the arguments num_samples, reference_samples, num_chains, num_steps and seed of
    :func:`pyro_gpvae.decompose`. For folders and ``place`` see
    :func:`pyro_gpvae.runs.programs.open_run`.
    """
    out = Path(out)
    for name in GAP_FILES:
        if not overwrite and (out / name).exists():
            raise FileExistsError(
                f"{out / name} belongs to an earlier measurement: choose another --out, or replace "
                "it (--overwrite)"
            )
    runs = open_runs(folders, **place)
    table = measure_gaps(runs, out, budget, num_images=num_images, progress=progress)
    record = {
        "format": 1,
        "runs": [describe(run) for run in runs],
        "images": int(table.groupby("run").size().max()),
        "budget": budget,
        **environment(torch.device(runs[0].config.device or "cpu")),
        "summary": summarise(table).to_dict("records"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "gap.csv", table.to_csv(index=False))
    write_json(out / "gap.json", record)
    text = gap_caption(runs, record["images"], budget)
    report = Report("Inference gap", text, gap_sections(table, text))
    report.save(out, "gap.md")
    return report


def gap_caption(runs: Sequence[Run], num_images: int, budget: dict[str, Any]) -> str:
    """Returns data, training and budget of a measurement."""
    annealing = "no AIS"
    if budget["num_chains"]:
        annealing = f"AIS with {budget['num_chains']} chains of {budget['num_steps']} steps"
    samples = budget["num_samples"]
    text = (
        f"ELBO: K = {samples}; IWAE, own q: K = {min(100, samples)}; "
        f"refined q: K = {budget['reference_samples']}; {annealing}."
    )
    return caption(runs, num_images, text)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Averages each quantity of a table of images, in nats per image.

    The result has a row for each label and quantity: ``mean`` and ``median`` over the converged
    images (averaged over seeds, which are runs with the same label), ``standard_error`` over
    images, ``sd`` over seeds, ``mean_of_all`` images, and the numbers of images and seeds.
    """
    names, frames = list(QUANTITIES), {}
    for label, runs in table.groupby("label", sort=False):
        kept = runs[runs["converged"]]
        by_run = kept.groupby("run", sort=False)[names]
        columns = {
            "mean": by_run.mean().mean(),
            # all seeds have the same images: average over seeds first
            "standard_error": kept.groupby("image")[names].mean().sem(),
            "sd": by_run.mean().std(),
            "median": by_run.median().mean(),
            "images": len(kept),
            "mean_of_all": runs.groupby("run", sort=False)[names].mean().mean(),
            "images_of_all": len(runs),
            "seeds": runs["run"].nunique(),
        }
        frames[label] = pd.DataFrame(columns, index=names)
    return pd.concat(frames, names=["label", "quantity"]).reset_index()


_GAP_TEXT = (
    "Nats per image. Beyond Gaussian: log p(x) minus the ELBO of the best Gaussian with full "
    "covariance for each image. Independence: that ELBO minus the ELBO of the best diagonal "
    "Gaussian. Encoder: the latter ELBO minus that of the guide. The approximation gap ends and "
    "the amortisation gap begins at the best Gaussian of the guide's family (in brackets); flows "
    'and mixtures ("other") are compared with the full Gaussian, and may be better. A random '
    "encoder also pays I(z; (W, U) | x) and KL/N, which lead to eq. (2) of the supplement. "
)
_PROPOSAL_TEXT = (
    "The columns with the own q depend on the guide. The others score the decoder alone, with the "
    "best full Gaussian of each image as the proposal, or by annealed importance sampling. All are "
    "lower bounds of log p(x)."
)


def gap_sections(table: pd.DataFrame, caption: str = "") -> list[Section]:
    """Returns the decomposition with its picture, and "better model or better proposal"."""
    from pyro_gpvae.plots.gap import gap_ladder  # imports matplotlib

    summary = summarise(table).set_index(["label", "quantity"])
    groups = [
        (label, summary.loc[label], table.query("label == @label"))
        for label in table["label"].unique()
    ]
    seeds = summary["seeds"]
    deviation, error = "the standard deviation over seeds", "the standard error over images"
    explanation = _GAP_TEXT + (f"± is {error}." if seeds.max() == 1 else f"± is {deviation}.")
    if seeds.min() < seeds.max():
        explanation += f" Where there is one seed, it is {error}."
    text = [explanation]
    text += [_left_out(label, rows) for label, rows, x in groups if not x["converged"].all()]
    text += _doubts(table)
    unknown = table.loc[table[_COSTS].isna().any(axis=1), "label"].unique()
    if len(unknown):
        caption += f" Without the costs of random weights that {', '.join(unknown)} does not give."
    figures = {}
    if table["converged"].any():
        figures["gap.png"] = gap_ladder(table, caption)
    gaps = _known(pd.DataFrame([_gap_row(*group) for group in groups]))
    rows_of = [_proposal_row(label, rows["mean"]) for label, rows, _ in groups]
    proposals = _known(pd.DataFrame(rows_of))
    return [
        Section("Inference gap", text, gaps, figures),
        Section("Better model or better proposal?", [_PROPOSAL_TEXT], proposals),
    ]


def _gap_row(label: str, rows: pd.DataFrame, images: pd.DataFrame) -> dict[str, str]:
    means = rows["mean"].map(number)
    errors = rows["sd"].where(rows["seeds"] > 1, rows["standard_error"]).map(number)
    # zero where no weights are random, NaN where the guide does not give it
    random = bool((images[_COSTS] != 0).any(axis=None))
    costs = [means[name].replace("–", "not known") if random else "–" for name in _COSTS]
    return {
        "guide": f"`{label}` ({images['family'].iloc[0]})",
        "log p(x)": means["log_evidence"],
        "ELBO": means["elbo"],
        "approximation gap": f"{means['approximation']} ± {errors['approximation']}",
        "amortisation gap": f"{means['amortisation']} ± {errors['amortisation']}",
        "its median": number(rows.loc["amortisation", "median"]),
        "beyond Gaussian": means["beyond_gaussian"],
        "independence": means["independence"],
        "encoder": means["encoder"],
        "I(z; (W, U) | x)": costs[0],
        "KL/N": costs[1],
        "images": f"{images['converged'].sum()} of {len(images)}",
    }


def _proposal_row(label: str, means: pd.Series[float]) -> dict[str, str]:
    return {
        "guide": f"`{label}`",
        "ELBO, own q": number(means["elbo"]),
        "IWAE, own q": number(means["iwae"]),
        "IWAE, refined q": number(means["refined"]),
        "AIS": number(means["annealed"]),
    }


def _known(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the columns that hold more than dashes."""
    return table.loc[:, (table != "–").any()]


def _left_out(label: str, rows: pd.DataFrame) -> str:
    approximation, amortisation = rows.loc[["approximation", "amortisation"], "mean_of_all"]
    return (
        f"`{label}`: {rows['images_of_all'].iloc[0] - rows['images'].iloc[0]} images whose optimum "
        "has not converged are left out; with them, the approximation gap is "
        f"{number(approximation)} and the amortisation gap {number(amortisation)}."
    )


def _doubts(table: pd.DataFrame) -> list[str]:
    """Counts the images of each guide whose log p(x) may be wrong."""
    doubts = {
        f"The weights behind log p(x) have a Pareto k̂ above {PARETO_LIMIT}, so that it may be too "
        "low: ": table["pareto_k"] > PARETO_LIMIT,
        "No estimate of log p(x) is reliable, so that the largest one is given that no other "
        "estimate contradicts: ": ~table["trusted"].astype(bool),
    }
    lines = []
    for text, which in doubts.items():
        counts = table.loc[which, "label"].value_counts(sort=False)
        if len(counts):
            images = [f"{n} image{'s' * (n != 1)} of `{label}`" for label, n in counts.items()]
            lines.append(f"{text}{', '.join(images)}.")
    return lines
