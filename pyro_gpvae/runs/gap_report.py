r"""Inference gaps of whole runs: measured chunk by chunk, resumed, averaged, tabulated."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import pyro_gpvae
from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.evaluation.gap import BATCH, LADDER, decompose
from pyro_gpvae.evaluation.importance import PARETO_LIMIT
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.training.checkpoint import weights_sha256

__all__ = [
    "describe",
    "gap_caption",
    "gap_markdown",
    "measure_gaps",
    "read_table",
    "summarise",
    "write_gaps",
]

_QUANTITIES = (
    "log_evidence", "elbo", "gap", "approximation", "amortisation", *LADDER, "bound",
    "iwae", "refined", "annealed",
)  # fmt: skip


def measure_gaps(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    num_images: int = 100,
    labels: Sequence[str] | None = None,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
    progress: bool = True,
    **budget: Any,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Decomposes the gaps of the first test images of each run.

    Every 25 images that are finished are written to ``out/chunks``, under a name that stands for
    the weights, the images and the budget: what was measured before is not measured again, after
    an interrupt, with further runs, or with more images. A chunk whose checksum is wrong is
    measured again, with a warning.

    Arguments:
        folders: Run folders.
        out: Where to keep finished chunks.
        num_images: How many test images; all of a run that has fewer.
        labels: A name for each run in tables and pictures; by default its guide, or its folder
            where guides are not unique.
        data, root, device, trust_guide: See :func:`pyro_gpvae.load_run`.
        progress: Whether to show a progress bar over the images of all runs.
        budget: Further arguments of :func:`pyro_gpvae.evaluation.gap.decompose`.

    Returns:
        A table with a row for each run and image: ``run`` (the folder), ``label``, ``guide``,
        ``seed``, and the columns of :meth:`pyro_gpvae.evaluation.gap.Gap.table`; and a description of each
        run for the record.

    Raises:
        FileNotFoundError, ValueError: If a run cannot be read, a folder is named twice, or an
            argument cannot be used.
    """
    if not folders or len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"expected one or more different run folders, got {len(folders)}")
    if num_images < 1:
        raise ValueError(f"images must be at least 1, got {num_images}")
    where: dict[str, Any] = {"data": data, "root": root, "device": device}
    runs = [load_run(folder, trust_guide=trust_guide, **where) for folder in folders]
    counts = [min(num_images, len(run.data.test)) for run in runs]
    labels = _labels(runs) if labels is None else labels
    tables = []
    with tqdm(total=sum(counts), desc="inference gap", unit="image", disable=not progress) as bar:
        for run, count, label in zip(runs, counts, labels, strict=True):
            bar.set_postfix_str(label)
            weights = weights_sha256(run.model, run.guide)
            parts = []
            for start in range(0, count, BATCH):
                stop = min(start + BATCH, count)
                path = Path(out) / "chunks" / f"{_key(run, weights, start, stop, budget)}.csv"
                part = _read_chunk(path)
                if part is None:
                    gap = decompose(
                        run.model,
                        run.guide,
                        run.data.test[start:stop],
                        num_train=run.record["data"]["train_images"],
                        first_image=start,
                        **budget,
                    )
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = _write_chunk(path, gap.table())
                part["image"] += start
                parts.append(part)
                bar.update(stop - start)
            table = pd.concat(parts, ignore_index=True)
            for position, (name, value) in enumerate(
                (
                    ("run", str(run.folder)),
                    ("label", label),
                    ("guide", run.config.guide),
                    ("seed", run.config.seed),
                )
            ):
                table.insert(position, name, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True), [describe(run) for run in runs]


def describe(run: Run) -> dict[str, Any]:
    """What a record says of a run: its folder, options, data and σ."""
    config = {k: v for k, v in vars(run.config).items() if k not in ("root", "download")}
    return {
        "run": str(run.folder),
        "config": config,
        "train_images": run.record["data"]["train_images"],
        "sigma": run.record.get("sigma"),
        "weights_sha256": weights_sha256(run.model, run.guide),
    }


def read_table(path: str | Path) -> pd.DataFrame:
    """Reads a table that was written here."""
    return pd.read_csv(path)


def _write_chunk(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Writes a table under a line with its checksum, and returns it as it is read back."""
    text = table.to_csv(index=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, f"# sha256 {digest}\n{text}")
    return pd.read_csv(io.StringIO(text))


def _read_chunk(path: Path) -> pd.DataFrame | None:
    """Reads a table back; None if there is none, or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    head, _, rest = path.read_bytes().partition(b"\n")
    if head == f"# sha256 {hashlib.sha256(rest).hexdigest()}".encode():
        return pd.read_csv(io.BytesIO(rest))
    warnings.warn(
        f"{path} is damaged (its checksum is wrong): its images are measured again", stacklevel=3
    )
    return None


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Averages each quantity of a table of images, in nats per image.

    Means are dominated by a few badly encoded images, so medians stand beside them. Images whose
    optimum has not converged are left out, and counted; ``mean_of_all`` has them too.

    Arguments:
        table: As :func:`measure_gaps` returns it. Runs with the same label are seeds of one.

    Returns:
        A row for each label and quantity: ``mean`` and ``median`` over the converged images
        (averaged over seeds), ``standard_error`` of the mean from the choice of images, ``sd``
        of the mean over seeds, ``images`` (converged, all seeds together), ``mean_of_all``,
        ``images_of_all``, and ``seeds``. A quantity that was not measured is not a number.
    """
    rows = []
    for label, runs in table.groupby("label", sort=False):
        kept = runs[runs["converged"]]
        for name in _QUANTITIES:
            means = kept.groupby("run", sort=False)[name].mean()
            # the same images for every seed: average over seeds first
            by_image = kept.groupby("image")[name].mean()
            rows.append(
                {
                    "label": label,
                    "quantity": name,
                    "mean": means.mean(),
                    "standard_error": by_image.sem(),
                    "sd": means.std(),
                    "median": kept.groupby("run", sort=False)[name].median().mean(),
                    "images": len(kept),
                    "mean_of_all": runs.groupby("run", sort=False)[name].mean().mean(),
                    "images_of_all": len(runs),
                    "seeds": runs["run"].nunique(),
                }
            )
    return pd.DataFrame(rows)


def gap_markdown(table: pd.DataFrame, caption: str) -> str:
    """The decomposition, and "better model or better proposal", as two Markdown tables."""
    summary = summarise(table).set_index(["label", "quantity"])
    first = [
        "| | log p(x) | ELBO | approximation gap | amortisation gap | its median "
        "| beyond Gaussian | independence | encoder | I(z; (W, U) \\| x) | KL/N | images |",
        "|---|" + "--:|" * 11,
    ]
    second = [
        "| | ELBO, own q | IWAE, own q | IWAE, refined q | AIS |",
        "|---|" + "--:|" * 4,
    ]
    notes = []
    for label in table["label"].unique():
        rows = summary.loc[label]
        family = table.loc[table["label"] == label, "family"].iloc[0]

        def mean(name: str, spread: bool = False, rows: pd.DataFrame = rows) -> str:
            row = rows.loc[name]
            error = row["sd"] if row["seeds"] > 1 else row["standard_error"]
            return _number(row["mean"]) + (f" ± {_number(error)}" if spread else "")

        counts = rows.iloc[0]
        # zero where nothing is random, not a number where the guide does not tell
        random = bool(
            (table.loc[table["label"] == label, ["spread", "kl_global"]] != 0).any(axis=None)
        )
        cells = [
            f"`{label}` ({family})",
            mean("log_evidence"),
            mean("elbo"),
            mean("approximation", True),
            mean("amortisation", True),
            _number(rows.loc["amortisation", "median"]),
            *(mean(name) for name in ("beyond_gaussian", "independence", "encoder")),
            *(
                "–" if not random else mean(name).replace("–", "not known")
                for name in ("spread", "kl_global")
            ),
            f"{counts['images']:.0f} of {counts['images_of_all']:.0f}",
        ]
        first.append("| " + " | ".join(cells) + " |")
        cells = [f"`{label}`", *map(mean, ("elbo", "iwae", "refined", "annealed"))]
        second.append("| " + " | ".join(cells) + " |")
        left = int(counts["images_of_all"] - counts["images"])
        if left:
            notes.append(
                f"`{label}`: {left} images whose optimum has not converged are left out; with them "
                f"approximation gap {_number(rows.loc['approximation', 'mean_of_all'])}, "
                f"amortisation gap {_number(rows.loc['amortisation', 'mean_of_all'])}."
            )
    heavy = table[table["pareto_k"] > PARETO_LIMIT]
    if len(heavy):
        counts = heavy.groupby("label", sort=False).size()
        notes.append(
            f"The weights behind log p(x) have a Pareto k̂ above {PARETO_LIMIT}, so that it may be "
            "too low: " + ", ".join(f"{n} images of `{label}`" for label, n in counts.items()) + "."
        )
    if "trusted" in table:  # tables of before have no such column
        counts = table[~table["trusted"]].groupby("label", sort=False).size()
        if len(counts):
            notes.append(
                "No estimate of log p(x) is reliable, the highest that nothing refutes is given: "
                + ", ".join(f"{n} images of `{label}`" for label, n in counts.items())
                + "."
            )
    seeds = summary["seeds"]
    sd, error = "the standard deviation over seeds", "the error from the images"
    explanation = (
        "Nats per image. Beyond Gaussian: log p(x) - ELBO of the best Gaussian with full "
        "covariance for each image; independence: that ELBO minus the ELBO of the best diagonal "
        "one; encoder: the latter minus the guide's. The approximation gap ends and the "
        "amortisation gap begins at the best Gaussian of the guide's family (in brackets; flows "
        'and mixtures, "other", are compared with the full one, which they may beat). A random '
        "encoder pays I(z; (W, U) | x) and KL/N besides, until eq. (2) of the supplement. ± is "
        + (f"{error}." if seeds.max() == 1 else f"{sd}.")
        + (f" Where there is one seed, it is {error}." if seeds.min() < seeds.max() else "")
    )
    question = (
        "Better model or better proposal? The first two columns depend on the guide's own q; the "
        "last two score the decoder alone, with the best full Gaussian of each image as proposal, "
        "and by annealed importance sampling. All are lower bounds of log p(x)."
    )
    paragraphs = [caption, "\n".join(first), explanation, *notes, "\n".join(second), question]
    return "\n\n".join(paragraphs) + "\n"


def gap_caption(record: dict[str, Any]) -> str:
    """The budget of a record in a sentence or two."""
    budget, images = record["budget"], record["images"]
    configs = [run["config"] for run in record["runs"]]

    def common(name: str) -> str:
        values = sorted({str(config[name]) for config in configs})
        return " / ".join(values)

    train = " / ".join(sorted({f"{run['train_images']:,}" for run in record["runs"]}))
    annealing = (
        f"AIS with {budget['num_chains']} chains of {budget['num_steps']} steps"
        if budget["num_chains"]
        else "no AIS"
    )
    return (
        f"{common('data')}: {train} training and {images} test images, p = {common('latent_dim')}, "
        f"{common('epochs')} epochs, seed {common('seed')}. ELBO: K = {budget['num_samples']}; "
        f"IWAE, own q: K = {min(100, budget['num_samples'])}; refined q: "
        f"K = {budget['reference_samples']}; {annealing}."
    )


def write_gaps(
    out: str | Path,
    table: pd.DataFrame,
    runs: list[dict[str, Any]],
    budget: dict[str, Any],
    **extra: Any,
) -> dict[str, Any]:
    """Writes ``gap.csv``, ``gap.json`` and ``gap.md``; returns the content of the JSON.

    ``extra`` is added to it."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "format": 1,
        "runs": runs,
        "images": int(table.groupby("run").size().max()),
        "budget": budget,
        **environment(torch.device(runs[0]["config"]["device"] or "cpu")),
        "summary": summarise(table).to_dict("records"),
        **extra,
    }
    write_text(out / "gap.csv", table.to_csv(index=False))
    write_json(out / "gap.json", record)
    write_text(out / "gap.md", gap_markdown(table, gap_caption(record)))
    return record


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"


def _labels(runs: Sequence[Run]) -> list[str]:
    """The guides, with seeds or as folders where that does not tell the runs apart."""
    for names in (
        [run.config.guide for run in runs],
        [f"{run.config.guide}, seed {run.config.seed}" for run in runs],
    ):
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def _key(run: Run, weights: str, start: int, stop: int, budget: dict[str, Any]) -> str:
    """A name for what the numbers of a chunk depend on."""
    content = {
        "format": 2,  # 1 had no checksum, and trusted any annealing
        "version": pyro_gpvae.__version__,
        "weights": weights,
        "guide": run.config.guide,
        "likelihood": run.config.likelihood,
        "train_images": run.record["data"]["train_images"],
        "images": sha256(run.data.test[start:stop]),
        "first_image": start,
        "budget": budget,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
