"""Tables 4 and 5 of the paper, and the table of its main text, from the records of runs.

    python experiments/tables/score_tables.py table4 runs/cifar10
    python experiments/tables/score_tables.py table5 runs/mnist runs/omniglot
    python experiments/tables/score_tables.py main_table runs/mnist runs/omniglot runs/svhn

The folders hold runs of ``pyro-gpvae train`` and evaluations of ``pyro-gpvae evaluate RUN
--reference N --out FOLDER``, at any depth. A cell without a record is "not run". Published scores
stand beside the measured ones. The supplement does not repeat all scores of the main text, and has
VLAE with fully-connected decoders only. Writes NAME and, if there are evaluations, NAME_proposals,
a comparison of proposals, as Markdown, LaTeX and CSV.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import tyro
from _records import (
    KEY,
    OPTIMUM,
    OWN,
    PROPOSALS,
    Collected,
    collect,
    compare_methods,
    read_records,
)

from pyro_gpvae.core._files import write_text
from pyro_gpvae.runs.results import FULL, seeds_text

PUBLISHED = Path(__file__).parent / "published"
NAMES = ("MNIST", "OMNIGLOT", "CIFAR10", "SVHN", "CelebA")
DATA_NAMES = {name.lower(): name for name in NAMES}


class Table(NamedTuple):
    """A table of the paper: panel, data set, dimension p and decoder of each column, and rows."""

    name: str
    title: str
    columns: list[tuple[str, str, int, str]]
    guides: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """Returns a row per column of the table."""
        frame = pd.DataFrame(self.columns, columns=["panel", *KEY])
        names = frame["data"].map(DATA_NAMES) + ", p = " + frame["latent_dim"].map(str)
        return frame.assign(column=names)


TABLE_4 = Table(
    "table4",
    "Table 4: CIFAR10",
    [("convolutional decoders", "cifar10", p, "conv") for p in (10, 20, 50)],
    (
        "vae", "sa:1", "sa:2", "sa:4", "sa:8", "iaf:1", "iaf:2", "iaf:4", "iaf:8", "hf:1", "hf:2",
        "hf:4", "hf:8", "me:2", "me:3", "me:4", "me:5", "rme:2", "rme:3", "rme:4", "rme:5", "gp",
    ),
)  # fmt: skip
TABLE_5 = Table(
    "table5",
    "Table 5: fully-connected and convolutional decoders",
    [
        (f"{panel} decoders", data, p, decoder)
        for panel, decoder in (("fully-connected", "fc"), ("convolutional", "conv"))
        for data in ("mnist", "omniglot")
        for p in (10, 50)
    ],
    ("vae", "sa:1", "sa:2", "sa:4", "sa:8", "vlae:1", "vlae:2", "vlae:4", "vlae:8", "gp"),
)  # fmt: skip
MAIN_TABLE = Table(
    "main_table",
    "MNIST, OMNIGLOT, SVHN and CelebA, convolutional decoders",
    [(DATA_NAMES[d], d, p, "conv") for d in DATA_NAMES if d != "cifar10" for p in (10, 20, 50)],
    TABLE_4.guides,
)
TABLES = {table.name: table for table in (TABLE_4, TABLE_5, MAIN_TABLE)}
MARKS = (
    "Red: the best mean of the column. Blue: no evidence of a difference from it (p > 0.01, "
    "two-sided t-test, uncorrected as in the paper; Welch's and Holm's are in the CSV). Not "
    "tested: a method with one seed, or all methods where the best mean has one seed."
)


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
    columns = table.frame()
    runs, evaluations, damaged = read_records(options.records)
    collected = collect(columns, table.guides, runs, runs, options.epochs)
    compared = collect(columns, table.guides, evaluations, runs, options.epochs or collected.epochs)
    flags = list(dict.fromkeys([*damaged, *collected.flags, *compared.flags]))
    for flag in flags:
        print(f"warning: {flag}", file=sys.stderr)
    order, out = "The proposal comparison was not run.", options.out / table.name
    if len(compared.runs):
        frame = proposal_frame(columns, compared)
        order = order_text(frame)
        title = f"{table.title.partition(':')[0]}: comparison of proposals"
        caption, path = proposal_caption(compared, order), out.with_name(f"{out.name}_proposals")
        write(path, frame, proposal_blocks, title, caption, flags)
    frame, caption = score_frame(columns, collected, ["IWAE"]), score_caption(collected, order)
    print(write(out, frame, score_blocks, table.title, caption, flags))
    print(f"written to {options.out}")


def score_frame(columns: pd.DataFrame, collected: Collected, scores: list[str]) -> pd.DataFrame:
    """Returns a row per cell and score: statistics, differences and published scores."""
    key = [*KEY, "score"]
    kinds = pd.DataFrame({"score": scores})
    frame = columns.merge(kinds, how="cross").merge(collected.rows, how="cross")
    values = collected.runs.melt([*KEY, "method"], scores, "score", "value").dropna(subset="value")
    found = []
    for cell, part in values.groupby(key, sort=False):
        by_method = {str(m): v.to_list() for m, v in part.groupby("method", sort=False)["value"]}
        statistics = compare_methods(by_method).rename_axis("method").reset_index()
        found.append(statistics.assign(**dict(zip(key, cell, strict=True))))
    nothing = compare_methods({"": [0.0]}).rename_axis("method").reset_index()
    statistics = pd.concat(found or [nothing.assign(data="", latent_dim=0, decoder="", score="")])
    frame = frame.merge(statistics, how="left", on=[*key, "method"])
    frame = frame.fillna({"seeds": 0, "mark": "", "note": "not run"}).astype({"seeds": int})

    names = ["published", "published_sd"]
    tables = [pd.read_csv(PUBLISHED / f"table{n}.csv", comment="#") for n in (4, 5)]
    paper = pd.concat(tables).set_index(["guide", *KEY])[["score", "sd"]].sort_index()
    paper = paper.set_axis(names, axis=1)
    vae = paper.loc["vae", "published"].rename("vae")
    frame = frame.join(paper, on=["guide", *KEY]).join(vae, on=KEY)
    comparable = (frame["role"] == "method") & frame["score"].isin(["IWAE", OWN])
    comparable &= collected.runs["likelihood"].eq("gaussian").all()  # as all published ones
    frame[names] = frame[names].where(comparable)
    frame["published_difference_to_vae"] = frame["published"] - frame.pop("vae")
    means = frame[frame["method"] == "VAE"].set_index(key)["mean"].rename("vae")
    frame = frame.join(means, on=key)
    frame["difference_to_vae"] = frame["mean"] - frame.pop("vae")
    return frame


def proposal_frame(columns: pd.DataFrame, compared: Collected) -> pd.DataFrame:
    """Returns the scores of all proposals with the mean factor c, where there is a record."""
    frame = score_frame(columns, compared, PROPOSALS)
    key = [*KEY, "method"]
    frame = frame.join(compared.runs.groupby(key)["factor"].mean(), on=key)
    run = frame.groupby(["panel", "column"])["seeds"].transform("max") > 0
    run &= frame.groupby("score")["seeds"].transform("max") > 0
    return frame[run]


def order_text(frame: pd.DataFrame) -> str:
    """Says whether methods have the same order with their own q and with the optimal proposal."""
    changes = []
    for (_, label), rows in frame.groupby(["panel", "column"], sort=False):
        means = rows.pivot(index="method", columns="score", values="mean")
        pairs = [*combinations(means.reindex(columns=[OWN, OPTIMUM]).dropna().to_numpy(), 2)]
        if swapped := sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs):
            changes.append(f"{label} ({rows['decoder'].iloc[0]}): {swapped} of {len(pairs)} pairs")
    which = "between IWAE with the guide's own q and with the optimum of each image as proposal"
    if changes:
        return f"The order of methods changes {which}: {'; '.join(changes)}."
    return f"The order of methods is the same {which}."


Score = Callable[[Any], str]
#: Texts of a table by heading: a frame with a row per method, its heads as columns.
Blocks = dict[str, pd.DataFrame]


def score_blocks(frame: pd.DataFrame, score: Score) -> Blocks:
    """Returns a block per panel: score, difference to the VAE and published score."""
    blocks = {}
    for panel, part in frame.groupby("panel", sort=False):
        texts = []
        for column, cells in part.set_index("method").groupby("column", sort=False):
            texts += [
                cells.apply(score, axis=1).rename(column),
                cells["difference_to_vae"].map(signed).rename("Δ"),
                cells.apply(published_text, axis=1).rename("paper"),
            ]
        counts = part.groupby("method")["seeds"]
        texts += [counts.agg(lambda n: ", ".join(map(str, n if n.nunique() > 1 else n[:1])))]
        blocks[str(panel) if frame["panel"].nunique() > 1 else ""] = pd.concat(texts, axis=1)
    return blocks


def proposal_blocks(frame: pd.DataFrame, score: Score) -> Blocks:
    """Returns a block per column: all scores, and the factor c."""
    blocks = {}
    for (panel, column), part in frame.groupby(["panel", "column"], sort=False):
        factors = part["factor"].map(lambda c: "–" if math.isnan(c) else f"{c:.2f}")
        part = part.assign(text=part.apply(score, axis=1), c=factors)
        kinds = part.set_index("method").groupby("score", sort=False)
        texts = {str(kind): cells["text"] for kind, cells in kinds}
        blocks[f"{column}, {panel}"] = pd.DataFrame(texts | {"c": kinds.get_group(OWN)["c"]})
    return blocks


def score_text(cell: Any, latex: bool = False) -> str:
    """Returns the mean with its standard deviation, in the colour of its mark."""
    if cell["seeds"] == 0:
        return "not run"
    colour = {"best": "red", "no difference": "blue"}.get(cell["mark"])
    mean, sd = f"{cell['mean']:.1f}", "" if cell["seeds"] == 1 else f"{cell['sd']:.1f}"
    if latex:
        text = rf"\textcolor{{{colour}}}{{\textbf{{{mean}}}}}" if colour else mean
        text += f"$^{{{sd}}}$" if sd else ""
    else:  # Markdown has no colours, but mathematics in it has
        text = f"{mean} ± {sd}" if sd else mean
        coloured = text.replace("±", r"\pm")
        text = rf"$\color{{{colour}}}{{\mathbf{{{coloured}}}}}$" if colour else text
    untested = " (not tested)" if cell["mark"] == "untested" else ""
    return text + (untested if sd else " (1 seed)")


def published_text(cell: Any) -> str:
    """Returns the published score with its difference to the VAE."""
    difference = signed(cell["published_difference_to_vae"])
    return "–" if math.isnan(cell["published"]) else f"{cell['published']:.1f} ({difference})"


def signed(value: float) -> str:
    """Formats a difference, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.1f}"


def write(path: Path, frame: pd.DataFrame, blocks: Any, title: str, *texts: Any) -> str:
    """Writes the frame as CSV and its blocks as Markdown and LaTeX; returns the Markdown."""
    page = markdown(title, blocks(frame, score_text), *texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".csv"), frame.to_csv(index=False))
    write_text(path.with_suffix(".md"), page)
    coloured = blocks(frame, partial(score_text, latex=True))
    write_text(path.with_suffix(".tex"), latex(path.name, coloured, texts[0]))
    return page


def markdown(title: str, blocks: Blocks, caption: str, flags: Sequence[str] = ()) -> str:
    """Returns a page in Markdown. Methods in lower case are names of guides, set as code."""
    lines = [f"# {title}", ""]
    for heading, texts in blocks.items():
        lines += [f"## {heading}", ""] if heading else []
        lines += [f"| method | {' | '.join(texts)} |", "|---|" + "--:|" * texts.shape[1]]
        for method, *cells in texts.itertuples(name=None):
            name = f"`{method}`" if method[:1].islower() else method
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    notes = ["", "Flagged:", "", *(f"* {flag}" for flag in flags)] if flags else []
    return "\n".join([*lines, caption, *notes, ""])


def latex(name: str, blocks: Blocks, caption: str) -> str:
    """Returns a table environment in LaTeX."""
    parts = []
    for heading, texts in blocks.items():
        rows = texts.reset_index(names="method").map(escape).rename(columns=escape)
        formats = "l" + "r" * texts.shape[1]
        parts += [escape(heading), rows.to_latex(index=False, column_format=formats)]
    body = "\n\n".join(part for part in parts if part)
    return (
        "% needs \\usepackage{booktabs,xcolor}\n"
        f"\\begin{{table}}\n\\centering\\scriptsize\n{body}"
        f"\\caption{{{escape(caption)}}}\n\\label{{tab:{name}}}\n\\end{{table}}\n"
    )


def escape(text: str) -> str:
    """Replaces characters that LaTeX does not print as they are."""
    commands = {character: "\\" + character for character in "&%#_"}
    commands |= {"Δ": r"$\Delta$", "×": r"$\times$", "±": r"$\pm$", ">": "$>$", "–": "--"}
    return text.translate({ord(character): command for character, command in commands.items()})


def score_caption(collected: Collected, order: str) -> str:
    """Says what the scores are, the budget, the tests and the controls."""
    controls = "; ".join(
        f"{'VAE' if multiple == 1 else f'VAE, {multiple:g} × epochs'}: {', '.join(reasons)}"
        for multiple, reasons in collected.controls.items()
    )
    return (
        "Test log-likelihood, IWAE with the own q of each guide, in nats per image: mean ± "
        f"standard deviation over seeds. {budget_text(collected)} {MARKS} Δ is the difference to "
        "the row of the VAE; paper: the published score, and its Δ. Controls of equal compute (a "
        "gradient step: one latent vector decoded and differentiated for an image; those of "
        "methods that are not named here are not matched). A method without a warm start has the "
        f"epochs of the VAE. {controls or 'There is no control'}. {order}"
    )


def proposal_caption(compared: Collected, order: str) -> str:
    """Says what the proposals are, the budget, the tests and how many references are reliable."""
    runs = compared.runs
    left, count = int(runs["unreliable"].sum()), int(runs["num_test"].sum())
    chosen = sorted(set(runs["width_images"].dropna())) or ["each image, with other draws"]
    return (
        "The same models with better and better proposals, in nats per image: mean ± standard "
        "deviation over seeds. ELBO and IWAE with the guide's own q; IWAE with its spread "
        "multiplied by the best factor c; IWAE with the optimal full Gaussian of each image, the "
        f"reference; annealed importance sampling (AIS) from there. {budget_text(compared)} "
        f"{MARKS} The reference of {left:,} of {count:,} images is not reliable. c was chosen on "
        f"{' or on '.join(chosen)}. {order}"
    )


def budget_text(collected: Collected) -> str:
    """Says epochs, K, images and seeds."""
    runs = collected.runs
    if runs.empty:
        return f"No records; the paper trains for {FULL['epochs']} epochs."
    texts = [
        f"{collected.epochs:,} epochs (the paper: {FULL['epochs']:,})",
        f"K = {runs['num_samples'].iloc[0]}",
    ]
    for run in runs.drop_duplicates("data").itertuples():
        train = "all" if pd.isna(run.train_images) else f"{run.train_images:,.0f}"
        name = DATA_NAMES.get(run.data, run.data)
        texts.append(f"{name}: {train} training and {run.num_test:,} test images")
    if (likelihood := runs["likelihood"].iloc[0]) != "gaussian":
        texts.append(f"{likelihood} likelihood, and no published scores, which are Gaussian")
    texts.append(seeds_text(runs.groupby([*KEY, "method"]).size()))
    return "; ".join(texts) + "."


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    main(TABLES[options.name], options)
