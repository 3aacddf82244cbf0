r"""Reports of the inference gaps of runs: averages over images and seeds, tables, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.evaluation.gap import LADDER
from pyro_gpvae.evaluation.importance import PARETO_LIMIT
from pyro_gpvae.runs._markdown import markdown_table
from pyro_gpvae.runs.gap_chunks import measure_gaps

__all__ = [
    "gap_caption",
    "gap_markdown",
    "report_gaps",
    "summarise",
    "write_gaps",
]

GAP_FILES = ("gap.csv", "gap.json", "gap.md", "gap.png")

QUANTITIES = (
    "log_evidence", "elbo", "gap", "approximation", "amortisation", *LADDER, "bound",
    "iwae", "refined", "annealed",
)  # fmt: skip

#: The costs of a random encoder, which its guide may leave unknown.
_COSTS = ["weight_information", "kl_global"]


def report_gaps(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    num_samples: int = 500,
    reference_samples: int = 1000,
    num_chains: int = 8,
    num_steps: int = 30,
    seed: int = 0,
    **options: Any,
) -> str:
    """Decomposes the gaps of runs and writes table, record, text and picture; returns the text.

    Arguments:
        folders: Run folders.
        out: Folder for ``gap.csv``, ``gap.json``, ``gap.md``, ``gap.png`` and finished chunks.
        overwrite: Whether these four files may be replaced.
        num_samples, reference_samples, num_chains, num_steps, seed: See
            :func:`pyro_gpvae.decompose`.
        options: Further arguments of :func:`measure_gaps`.

    Raises:
        FileExistsError: If one of the files exists and may not be replaced.
        FileNotFoundError, ValueError: As :func:`measure_gaps`.
    """
    from pyro_gpvae.plots.gap import gap_ladder  # imports matplotlib

    out = Path(out)
    for name in GAP_FILES:
        if not overwrite and (out / name).exists():
            raise FileExistsError(
                f"{out / name} belongs to an earlier measurement: choose another --out, or replace "
                "it (--overwrite)"
            )
    budget: dict[str, Any] = {
        "num_samples": num_samples,
        "reference_samples": reference_samples,
        "num_chains": num_chains,
        "num_steps": num_steps,
        "seed": seed,
    }
    table, runs = measure_gaps(folders, out, **budget, **options)
    record = write_gaps(out, table, runs, budget)
    caption = gap_caption(record)
    unknown = table.loc[table[_COSTS].isna().any(axis=1), "label"].unique()
    if len(unknown):
        caption += f" Without the costs of random weights that {', '.join(unknown)} does not give."
    gap_ladder(table, caption).savefig(out / "gap.png")
    return (out / "gap.md").read_text(encoding="utf-8")


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Averages each quantity of a table of images, in nats per image.

    A few badly encoded images dominate means; therefore medians are given as well. Images whose
    optimum has not converged are left out and counted; ``mean_of_all`` includes them.

    Arguments:
        table: As :func:`measure_gaps` returns it. Runs with the same label are seeds of one method.

    Returns:
        A row for each label and quantity: ``mean`` and ``median`` over the converged images
        (averaged over seeds), ``standard_error`` of the mean from the choice of images, ``sd``
        of the mean over seeds, ``images`` (converged, all seeds together), ``mean_of_all``,
        ``images_of_all``, and ``seeds``. The mean of a quantity that was not measured is NaN.
    """
    rows = []
    for label, runs in table.groupby("label", sort=False):
        kept = runs[runs["converged"]]
        for name in QUANTITIES:
            by_run = kept.groupby("run", sort=False)[name]
            # all seeds have the same images: average over seeds first
            by_image = kept.groupby("image")[name].mean()
            rows.append(
                {
                    "label": label,
                    "quantity": name,
                    "mean": by_run.mean().mean(),
                    "standard_error": by_image.sem(),
                    "sd": by_run.mean().std(),
                    "median": by_run.median().mean(),
                    "images": len(kept),
                    "mean_of_all": runs.groupby("run", sort=False)[name].mean().mean(),
                    "images_of_all": len(runs),
                    "seeds": runs["run"].nunique(),
                }
            )
    return pd.DataFrame(rows)


_GAP_HEAD = (
    "", "log p(x)", "ELBO", "approximation gap", "amortisation gap", "its median",
    "beyond Gaussian", "independence", "encoder", "I(z; (W, U) \\| x)", "KL/N", "images",
)  # fmt: skip
_GAP_TEXT = (
    "Nats per image. Beyond Gaussian: log p(x) minus the ELBO of the best Gaussian with full "
    "covariance for each image. Independence: that ELBO minus the ELBO of the best diagonal "
    "Gaussian. Encoder: the latter ELBO minus that of the guide. The approximation gap ends and "
    "the amortisation gap begins at the best Gaussian of the guide's family (in brackets); flows "
    'and mixtures ("other") are compared with the full Gaussian, and may be better. A random '
    "encoder also pays I(z; (W, U) | x) and KL/N, which lead to eq. (2) of the supplement. "
)
_PROPOSAL_HEAD = ("", "ELBO, own q", "IWAE, own q", "IWAE, refined q", "AIS")
_PROPOSAL_TEXT = (
    "Better model or better proposal? The first two columns depend on the guide's own q. The last "
    "two score the decoder alone, with the best full Gaussian of each image as the proposal, and "
    "by annealed importance sampling. All are lower bounds of log p(x)."
)


def gap_markdown(table: pd.DataFrame, caption: str) -> str:
    """Returns the decomposition, and "better model or better proposal", as Markdown tables."""
    summary = summarise(table).set_index(["label", "quantity"])
    gaps, proposals, notes = [], [], []
    for label in table["label"].unique():
        rows, images = summary.loc[label], table[table["label"] == label]

        def mean(name: str, error: bool = False, rows: pd.DataFrame = rows) -> str:
            row = rows.loc[name]
            deviation = row["sd"] if row["seeds"] > 1 else row["standard_error"]
            return _number(row["mean"]) + (f" ± {_number(deviation)}" if error else "")

        # zero where no weights are random, NaN where the guide does not give it
        random = bool((images[_COSTS] != 0).any(axis=None))
        kept, all_images = (int(rows.iloc[0][name]) for name in ("images", "images_of_all"))
        gaps.append(
            [
                f"`{label}` ({images['family'].iloc[0]})",
                *map(mean, ("log_evidence", "elbo")),
                *(mean(name, True) for name in ("approximation", "amortisation")),
                _number(rows.loc["amortisation", "median"]),
                *map(mean, ("beyond_gaussian", "independence", "encoder")),
                *(mean(n).replace("–", "not known") if random else "–" for n in _COSTS),
                f"{kept} of {all_images}",
            ]
        )
        proposals.append(
            [f"`{label}`", *map(mean, ("elbo", "iwae", "refined", "annealed"))],
        )
        if kept < all_images:
            notes.append(
                f"`{label}`: {all_images - kept} images whose optimum has not converged are left "
                "out; with them, the approximation gap is "
                f"{_number(rows.loc['approximation', 'mean_of_all'])} and the amortisation gap "
                f"{_number(rows.loc['amortisation', 'mean_of_all'])}."
            )
    doubts = [
        (
            table["pareto_k"] > PARETO_LIMIT,
            f"The weights behind log p(x) have a Pareto k̂ above {PARETO_LIMIT}, so that it may be "
            "too low: ",
        )
    ]
    if "trusted" in table:  # absent from older tables
        doubts.append(
            (
                ~table["trusted"].astype(bool),
                "No estimate of log p(x) is reliable, so that the largest one is given that no "
                "other estimate contradicts: ",
            )
        )
    for doubtful, text in doubts:
        counts = table[doubtful].groupby("label", sort=False).size()
        if len(counts):
            listed = ", ".join(f"{n} images of `{label}`" for label, n in counts.items())
            notes.append(f"{text}{listed}.")
    seeds = summary["seeds"]
    deviation, error = "the standard deviation over seeds", "the standard error over images"
    explanation = _GAP_TEXT + (f"± is {error}." if seeds.max() == 1 else f"± is {deviation}.")
    if seeds.min() < seeds.max():
        explanation += f" Where there is one seed, it is {error}."
    paragraphs = [
        caption,
        markdown_table(_GAP_HEAD, gaps),
        explanation,
        *notes,
        markdown_table(_PROPOSAL_HEAD, proposals),
        _PROPOSAL_TEXT,
    ]
    return "\n\n".join(paragraphs) + "\n"


def gap_caption(record: dict[str, Any]) -> str:
    """Returns the budget of a record in two sentences."""
    budget, runs = record["budget"], record["runs"]

    def common(values: Iterable[Any]) -> str:
        return " / ".join(sorted({str(value) for value in values}))

    data, latent_dim, epochs, seed = (
        common(run["config"][name] for run in runs)
        for name in ("data", "latent_dim", "epochs", "seed")
    )
    train = common(f"{run['train_images']:,}" for run in runs)
    annealing = "no AIS"
    if budget["num_chains"]:
        annealing = f"AIS with {budget['num_chains']} chains of {budget['num_steps']} steps"
    return (
        f"{data}: {train} training and {record['images']} test images, p = {latent_dim}, "
        f"{epochs} epochs, seed {seed}. ELBO: K = {budget['num_samples']}; "
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
    """Writes ``gap.csv``, ``gap.json`` with the entries ``extra``, and ``gap.md``.

    Returns the content of the JSON file.
    """
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
