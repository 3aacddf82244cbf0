"""Tables 4 and 5 of the paper, and the table of its main text, from the records of runs.

    python experiments/tables/score_tables.py table4 runs/cifar10
    python experiments/tables/score_tables.py table5 runs/mnist runs/omniglot
    python experiments/tables/score_tables.py main_table runs/mnist runs/omniglot runs/svhn

The folders hold runs of ``pyro-gpvae train`` and evaluations of ``pyro-gpvae evaluate RUN
--reference N --out FOLDER``, at any depth. A cell without a record is "not run". Published scores
stand beside the measured ones. The supplement does not repeat all scores of the main text, and has
VLAE with fully-connected decoders only. Writes NAME and, if there are evaluations, NAME_proposals,
a comparison of proposals, as Markdown, LaTeX, CSV and PNG.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro
from _cells import Collected, collect
from _dots import companion_dots, score_dots
from _format import Block, Cell, Score, latex, markdown, signed
from _frames import (
    OWN,
    PROPOSALS,
    WIDTH,
    estimate,
    order_text,
    score_frame,
    with_factors,
)
from _records import DATA_NAMES, Column, Table, part_of, read_records
from matplotlib.figure import Figure

from pyro_gpvae.core._files import write_text
from pyro_gpvae.runs.results import FULL, seeds_text

TABLE_4 = Table(
    "table4",
    "Table 4: CIFAR10",
    {"convolutional decoders": tuple(Column("cifar10", p) for p in (10, 20, 50))},
    (
        "vae", "sa:1", "sa:2", "sa:4", "sa:8", "iaf:1", "iaf:2", "iaf:4", "iaf:8", "hf:1", "hf:2",
        "hf:4", "hf:8", "me:2", "me:3", "me:4", "me:5", "rme:2", "rme:3", "rme:4", "rme:5", "gp",
    ),
)  # fmt: skip
TABLE_5 = Table(
    "table5",
    "Table 5: fully-connected and convolutional decoders",
    {
        f"{name} decoders": tuple(
            Column(data, p, decoder) for data in ("mnist", "omniglot") for p in (10, 50)
        )
        for name, decoder in (("fully-connected", "fc"), ("convolutional", "conv"))
    },
    ("vae", "sa:1", "sa:2", "sa:4", "sa:8", "vlae:1", "vlae:2", "vlae:4", "vlae:8", "gp"),
)
MAIN_TABLE = Table(
    "main_table",
    "MNIST, OMNIGLOT, SVHN and CelebA, convolutional decoders",
    {
        DATA_NAMES[data]: tuple(Column(data, p) for p in (10, 20, 50))
        for data in ("mnist", "omniglot", "svhn", "celeba")
    },
    TABLE_4.guides,
)
TABLES = {table.name: table for table in (TABLE_4, TABLE_5, MAIN_TABLE)}


@dataclass(kw_only=True)
class Options:
    """Options of a score table.

    Attributes:
        name: Which table.
        records: Folders with runs and evaluations. Without any, the table shows what is published.
        epochs: The budget of the table; by default the most frequent one.
        out: Folder of the results.
    """

    name: tyro.conf.Positional[Literal["table4", "table5", "main_table"]] = "table4"
    records: tyro.conf.Positional[tuple[Annotated[Path, tyro.conf.arg(metavar="FOLDER")], ...]] = ()
    epochs: int | None = None
    out: Path = Path("docs/results")


def main(table: Table, options: Options) -> None:
    """Makes the table, and the comparison of proposals if there are evaluations."""
    runs, evaluations, damaged = read_records(options.records)
    collected = collect(table, runs, epochs=options.epochs, others=runs)
    compared = collect(table, evaluations, epochs=options.epochs or collected.epochs, others=runs)
    scores = score_frame(table, collected, {"IWAE": lambda r: r.number("scores.log_evidence")})
    flags = list(dict.fromkeys([*damaged, *collected.flags, *compared.flags]))
    for flag in flags:
        print(f"warning: {flag}", file=sys.stderr)
    order = "The proposal comparison was not run."
    options.out.mkdir(parents=True, exist_ok=True)
    if compared.records:
        frame = with_factors(
            score_frame(table, compared, {name: estimate(name) for name in PROPOSALS}), compared
        )
        order = order_text(frame)
        title = f"{table.title.partition(':')[0]}: comparison of proposals"
        caption = proposal_caption(compared, order)
        path = options.out / f"{table.name}_proposals"
        _write(path, title, frame, proposal_blocks(frame), caption, flags, companion_dots)
    caption, path = score_caption(collected, order), options.out / table.name
    text = _write(path, table.title, scores, score_blocks(scores), caption, flags, score_dots)
    print(f"{text}\nwritten to {options.out}")


def _write(
    path: Path,
    title: str,
    frame: pd.DataFrame,
    blocks: list[Block],
    caption: str,
    flags: list[str],
    draw: Callable[[pd.DataFrame, str, str], Figure],
) -> str:
    text = markdown(title, blocks, caption, flags)
    write_text(path.with_suffix(".csv"), frame.to_csv(index=False))
    write_text(path.with_suffix(".md"), text)
    write_text(path.with_suffix(".tex"), latex(path.name, blocks, caption))
    # the legend of the picture explains its marks
    draw(shown(frame), caption.replace(f"{_MARKS} ", ""), title).savefig(path.with_suffix(".png"))
    return text


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the frame without the controls that were not run anywhere, for a picture."""
    run = set(frame.loc[frame["mean"].notna(), "method"])
    return frame[frame["method"].isin(run) | (frame["role"] == "method")]


def score_blocks(frame: pd.DataFrame) -> list[Block]:
    """Returns a block for each panel: score, difference to the VAE and published score."""
    blocks = []
    for panel, part in frame.groupby("panel", sort=False):
        heads = [h for c in dict.fromkeys(part["column"]) for h in (c, "Δ", "paper")]
        rows = []
        for method, cells in part.groupby("method", sort=False):
            texts = [t for _, c in cells.iterrows() for t in (_score(c), *_differences(c))]
            seeds = [str(count) for count in cells["seeds"]]
            texts.append(seeds[0] if len(set(seeds)) == 1 else ", ".join(seeds))
            rows.append((str(method), texts))
        heading = str(panel) if frame["panel"].nunique() > 1 else ""
        blocks.append(Block(heading, [*heads, "seeds"], rows))
    return blocks


def proposal_blocks(frame: pd.DataFrame) -> list[Block]:
    """Returns a block for each column: all scores, with the difference to the VAE in brackets."""
    scores = dict.fromkeys(frame["score"])
    heads = [h for name in scores for h in ((name, "c") if name == WIDTH else (name,))]
    blocks = []
    for (panel, column), part in frame.groupby(["panel", "column"], sort=False):
        rows = []
        for method, cells in part.groupby("method", sort=False):
            by_score = {cell["score"]: cell for _, cell in cells.iterrows()}
            texts: list[Cell] = []
            for name, cell in by_score.items():
                difference = signed(cell["difference_to_vae"])
                texts.append(_score(cell, f" ({difference})" if difference != "–" else ""))
                if name == WIDTH:
                    c = cell["factor"]
                    texts.append("–" if math.isnan(c) else f"{c:.2f}")
            own = by_score[OWN]
            rows.append((str(method), [*texts, _differences(own)[1], str(own["seeds"])]))
        heading = str(column) if frame["panel"].nunique() == 1 else f"{column}, {panel}"
        blocks.append(Block(heading, [*heads, "paper", "seeds"], rows))
    return blocks


def _score(cell: Any, suffix: str = "") -> Score:
    return Score(cell["mean"], cell["sd"], cell["mark"], cell["seeds"], suffix)


def _differences(cell: Any) -> tuple[str, str]:
    paper = "–"
    if not math.isnan(cell["published"]):
        paper = f"{cell['published']:.1f} ({signed(cell['published_difference_to_vae'])})"
    return signed(cell["difference_to_vae"]), paper


_MARKS = (
    "Red: the best mean of the column. Blue: no evidence of a difference from it (p > 0.01, "
    "two-sided t-test, uncorrected as in the paper; Welch's and Holm's are in the CSV). Not "
    "tested: a method with one seed, or all methods where the best mean has one seed."
)


def score_caption(collected: Collected, order: str) -> str:
    """Says what the scores are, the budget, the tests and the controls."""
    text = (
        "Test log-likelihood, IWAE with the own q of each guide, in nats per image: mean ± "
        f"standard deviation over seeds. {_budget_text(collected)} {_MARKS} Δ is the difference to "
        "the row of the VAE; paper: the published score, and its Δ. "
    )
    controls = [
        f"{'VAE' if multiple == 1 else f'VAE, {multiple:g} × epochs'}: {', '.join(reasons)}"
        for multiple, reasons in collected.controls.items()
    ]
    if controls:
        text += (
            "Controls of equal compute (a gradient step: one latent vector decoded and "
            "differentiated for an image; those of methods that are not named here are not "
            "matched). A method without a warm start has the epochs of the VAE. "
            f"{'; '.join(controls)}. "
        )
    return text + order


def proposal_caption(collected: Collected, order: str) -> str:
    """Says what the proposals are, the budget, the tests and how many optima converged."""
    parts = [record[part_of(record)] for record in collected.records]
    count = sum(int(part["num_images"]) for part in parts)
    if part_of(collected.records[0]) == "companion":
        left = sum(int(part["optimum"]["not_converged"]) for part in parts)
        sources = sorted({str(part["validation"]) for part in parts})
        notes = f"The optimum of {left:,} of {count:,} images had not converged. "
        notes += f"c was chosen on {' or on '.join(sources)}."
    else:
        left = sum(int(part["not_trusted"]) for part in parts)
        notes = f"The reference of {left:,} of {count:,} images is not reliable. "
        notes += "c was chosen for each image with random numbers of its own."
    return (
        "The same models with better and better proposals, in nats per image: mean ± standard "
        "deviation over seeds, in brackets the difference to the row of the VAE. ELBO and IWAE "
        "with the guide's own q; IWAE with its spread multiplied by the best factor c; IWAE with "
        "the optimal full Gaussian of each image, the reference; annealed importance sampling "
        f"(AIS) from there. {_budget_text(collected)} {_MARKS} {notes} {order}"
    )


def _budget_text(collected: Collected) -> str:
    records = collected.records
    if not records:
        return f"No records; the paper trains for {FULL['epochs']} epochs."
    first, part = records[0], part_of(records[0])
    texts = [
        f"{collected.epochs:,} epochs (the paper: {FULL['epochs']:,})",
        f"K = {first[f'{part}.num_samples']}",
    ]
    for data in dict.fromkeys(record["data.name"] for record in records):
        of_data = next(record for record in records if record["data.name"] == data)
        texts.append(
            f"{DATA_NAMES.get(data, data)}: {of_data['data.train_images']:,} training and "
            f"{of_data[f'{part}.num_images']:,} test images"
        )
    likelihood = first["config.likelihood"]
    if likelihood != "gaussian":
        texts.append(f"{likelihood} likelihood, and no published scores, which are Gaussian")
    texts.append(seeds_text(len(cell) for cell in collected.cells.values()))
    return "; ".join(texts) + "."


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    main(TABLES[options.name], options)
