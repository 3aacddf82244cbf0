"""Tables 4 and 5 of the paper, and the table of its main text, from the records of runs.

    python experiments/tables/score_tables.py table4 runs/cifar10
    python experiments/tables/score_tables.py table5 runs/mnist runs/omniglot
    python experiments/tables/score_tables.py main_table runs/mnist runs/omniglot runs/svhn

The folders hold runs of ``pyro-gpvae train`` or of a sweep, at any depth. Published scores stand
beside the measured ones. The supplement does not repeat all scores of the main text, and has VLAE
with fully-connected decoders only. A VAE with a multiple of the budget's epochs is a control of
equal compute, with a row of its own. Writes NAME.md and NAME.csv.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import tyro
from _significance import LEAST_SEEDS, compare_methods

from pyro_gpvae.core._files import read_json, write_text
from pyro_gpvae.runs.results import COLUMNS, FULL, differences, read_results

PUBLISHED = Path(__file__).parent / "published"
NAMES = ("MNIST", "OMNIGLOT", "CIFAR10", "SVHN", "CelebA")
DATA_NAMES = {name.lower(): name for name in NAMES}
#: A column of a table.
KEY = ["data", "latent_dim", "decoder"]


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


@dataclass(kw_only=True)
class Options:
    """Options of a score table.

    Attributes:
        name: Which table.
        records: Folders with runs. Without any, the table shows what is published.
        epochs: The budget of the table; by default the most frequent one.
        out: Folder of the results.
    """

    name: tyro.conf.Positional[Literal["table4", "table5", "main_table"]] = "table4"
    records: tyro.conf.Positional[tuple[Annotated[Path, tyro.conf.arg(metavar="FOLDER")], ...]] = ()
    epochs: int | None = None
    out: Path = Path("docs/results")


def main(table: Table, options: Options) -> None:
    """Makes the table."""
    columns = table.frame()
    runs, flags = read_runs(options.records)
    runs, epochs = comparable_runs(runs.merge(columns[KEY], on=KEY), options.epochs)
    flags += differences(runs)
    for flag in flags:
        print(f"warning: {flag}", file=sys.stderr)
    frame = score_frame(table, runs)
    page = markdown(table.title, blocks_of(frame), caption(runs, epochs), flags)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"{table.name}.csv", frame.to_csv(index=False))
    write_text(options.out / f"{table.name}.md", page)
    print(page)


def read_runs(folders: Iterable[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the runs below folders, and lines of text about files that are left out.

    The columns are those of :func:`pyro_gpvae.runs.results.read_results`, ``file``, and ``total``,
    the epochs of the run and of those that it started from.
    """
    frames, flags = [pd.DataFrame(columns=[*COLUMNS, "file", "total"])], []
    for folder in folders:
        frame, skipped = read_results(folder)
        files = [folder / run / "record.json" for run in frame["run"]]
        totals = [_total_epochs(read_json(file)) for file in files]
        frames.append(frame.assign(run=[str(file) for file in files], file=files, total=totals))
        flags += [f"left out: {line}" for line in skipped]
    runs = pd.concat([f for f in frames if len(f)] or frames, ignore_index=True)
    data = runs["data"].map(lambda name: Path(name).stem)  # also of the user's own files
    return runs.assign(data=data).astype({"latent_dim": int, "total": int}), flags


def _total_epochs(record: dict[str, Any]) -> int:
    before = record.get("warm_start")
    return int(record["config"]["epochs"]) + (_total_epochs(before) if before else 0)


def comparable_runs(
    runs: pd.DataFrame, epochs: int | None = None
) -> tuple[pd.DataFrame, int | None]:
    """Returns the runs with the ``method`` of their row, and the budget of the table.

    The epochs of a method, alone or with those of its warm start, must be the budget, by default
    the most frequent number. A VAE may have a multiple of it, and is then a control. A VAE with
    other epochs that runs started from is left out.

    Raises:
        ValueError: If budgets or images are mixed, or a run is there twice. Names file and field.
    """
    for file in runs.loc[runs["freeze_decoder"].eq(True), "file"]:
        raise ValueError(f"{file}: freeze_decoder is true: its decoder is that of another run")
    vae = runs["guide"].eq("vae")
    if epochs is None and len(runs):
        methods = runs if vae.all() else runs[~vae]
        epochs = int(Counter(methods["epochs"]).most_common(1)[0][0])
    rates = ("learning_rate", "sigma_learning_rate")
    _check_same(runs, "batch_size", *rates, "keep_best", "likelihood", "num_samples")
    for _, group in runs.groupby("data"):
        _check_same(group, "train_sha256", "test_sha256", "validation", "num_test")
    multiple = (runs["total"] / (epochs or 1)).where(vae, 1.0)
    fits = multiple.where(vae).mod(1).eq(0) & multiple.ge(1)
    fits |= ~vae & (runs["epochs"].eq(epochs) | runs["total"].eq(epochs))
    starts = {Path(name).name for name in runs["warm_start"].dropna()}
    is_start = vae & runs["file"].map(lambda file: file.parent.name).isin(starts)
    for odd in runs[~fits & ~is_start].itertuples():
        raise ValueError(
            f"{odd.file}: epochs is {odd.epochs} ({odd.total} with its warm start), expected "
            f"{epochs}, or for a VAE a multiple of that for a control. Give only the folders of "
            "one budget, or name it with --epochs"
        )
    warm = runs["warm_start"].notna()
    labels = [_label(*row) for row in zip(runs["guide"], multiple, warm, strict=True)]
    runs = runs.assign(method=labels, multiple=multiple)[fits]
    for method, row in runs.groupby("method", sort=False):
        _check_same(row, "total", where=f"the row {method}")
        twice = row[row.duplicated([*KEY, "seed"], keep=False)].sort_values("seed")
        if len(twice):
            files = " and ".join(map(str, twice["file"][:2]))
            raise ValueError(f"{files}: seed is {twice['seed'].iloc[0]} in both, of {method}")
    return runs, epochs


def _check_same(runs: pd.DataFrame, *names: str, where: str = "one table") -> None:
    for name in names:
        usual = runs[name].mode()[:1].tolist()
        for odd in runs[~runs[name].isin(usual)].to_dict("records"):
            other = runs.loc[runs[name].isin(usual), "file"].iloc[0]
            raise ValueError(
                f"{odd['file']}: {name} is {odd[name]!r}, but {usual[0]!r} in {other}: records of "
                f"{where} must agree. Give only the folders of some of them"
            )


def method_label(guide: str) -> str:
    """Returns the paper's name, such as SA(4), or the guide's own name if the paper has none."""
    name, _, options = guide.partition(":")
    names = {"vae": "VAE", "gp": "GPVAE"} | {
        n: n.upper() for n in ("sa", "iaf", "hf", "me", "rme", "vlae")
    }
    if name in names and (not options or options.isdigit()):
        return names[name] + (f"({options})" if options else "")
    return guide


def _label(guide: str, multiple: float = 1, warm: bool = False) -> str:
    longer = f", {multiple:g} × epochs" if multiple != 1 else ""
    return method_label(guide) + longer + (", warm start" if warm else "")


def score_frame(table: Table, runs: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per cell of the table: statistics, differences and published scores."""
    found = runs.sort_values("multiple", kind="stable").drop_duplicates("method")
    methods: dict[str, str] = {}
    for guide in dict.fromkeys([*table.guides, *found["guide"]]):
        labels = found.loc[found["guide"].eq(guide) & found["multiple"].eq(1), "method"]
        methods |= dict.fromkeys(sorted(labels) or [_label(guide)], guide)
    methods |= dict.fromkeys(found.loc[found["multiple"] > 1, "method"], "vae")
    frame = pd.DataFrame(methods.items(), columns=["method", "guide"])
    frame = table.frame().merge(frame, how="cross")
    cells = [
        compare_methods(part.groupby("method")["log_evidence"].agg(list).to_dict())
        .rename_axis("method")
        .reset_index()
        .assign(**dict(zip(KEY, cell, strict=True)))
        for cell, part in runs.groupby(KEY)
    ]
    nothing = compare_methods({"": [0.0]}).iloc[:0].assign(method="", data="", decoder="")
    statistics = pd.concat(cells or [nothing.assign(latent_dim=0)])
    frame = frame.merge(statistics, how="left", on=[*KEY, "method"])
    frame = frame.fillna({"seeds": 0, "mark": ""}).astype({"seeds": int})

    names = ["published", "published_sd"]
    tables = [pd.read_csv(PUBLISHED / f"table{n}.csv", comment="#") for n in (4, 5)]
    paper = pd.concat(tables).set_index(["guide", *KEY])[["score", "sd"]].set_axis(names, axis=1)
    frame = frame.join(paper, on=["guide", *KEY])
    control = frame["method"].str.contains(" × ")
    if not runs["likelihood"].eq("gaussian").all():  # all published scores are
        control |= True
    frame[names] = frame[names].mask(control)
    vae = frame[frame["method"] == "VAE"].set_index(KEY)
    for name, column in (("difference_to_vae", "mean"), ("published_difference", "published")):
        frame[name] = frame[column] - frame.join(vae[column].rename("vae"), on=KEY)["vae"]
    return frame


#: Texts of a table by heading: a frame with a row per method, its heads as columns.
Blocks = dict[str, pd.DataFrame]


def blocks_of(frame: pd.DataFrame) -> Blocks:
    """Returns a block per panel: score, difference to the VAE and published score."""
    blocks = {}
    for panel, part in frame.groupby("panel", sort=False):
        texts = []
        for column, cells in part.set_index("method").groupby("column", sort=False):
            texts += [
                cells.apply(score_text, axis=1).rename(column),
                cells["difference_to_vae"].map(signed).rename("Δ"),
                cells.apply(published_text, axis=1).rename("paper"),
            ]
        blocks[str(panel)] = pd.concat(texts, axis=1)
    return blocks


def score_text(cell: Any) -> str:
    """Returns the mean with its standard deviation, in the colour of its mark."""
    if cell["seeds"] == 0:
        return "not run"
    text = f"{cell['mean']:.1f}"
    text += f" ± {cell['sd']:.1f}" if cell["seeds"] > 1 else ""
    if cell["seeds"] < LEAST_SEEDS:
        return f"{text} ({seeds_text([cell['seeds']])})"
    if colour := {"best": "red", "no difference": "blue"}.get(cell["mark"]):
        coloured = text.replace("±", r"\pm")  # Markdown has no colours, but mathematics in it has
        return rf"$\color{{{colour}}}{{\mathbf{{{coloured}}}}}$"
    return text


def published_text(cell: Any) -> str:
    """Returns the published score with its difference to the VAE."""
    difference = signed(cell["published_difference"])
    return "–" if math.isnan(cell["published"]) else f"{cell['published']:.1f} ({difference})"


def signed(value: float) -> str:
    """Formats a difference, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.1f}"


def markdown(title: str, blocks: Blocks, caption: str, flags: Sequence[str] = ()) -> str:
    """Returns a page in Markdown. Methods in lower case are names of guides, set as code."""
    lines = [f"# {title}", ""]
    for heading, texts in blocks.items():
        lines += [f"## {heading}", ""] if len(blocks) > 1 else []
        lines += [f"| method | {' | '.join(texts)} |", "|---|" + "--:|" * texts.shape[1]]
        for method, *cells in texts.itertuples(name=None):
            name = f"`{method}`" if method[:1].islower() else method
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    notes = ["", "Flagged:", "", *(f"* {flag}" for flag in flags)] if flags else []
    return "\n".join([*lines, caption, *notes, ""])


def seeds_text(counts: Iterable[int]) -> str:
    """Returns how many seeds there are, from the numbers of several cells."""
    low, high = min(counts := [*counts]), max(counts)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def caption(runs: pd.DataFrame, epochs: int | None) -> str:
    """Says what the scores are, the budget, the tests and the controls."""
    if runs.empty:
        return f"No records; the paper trains for {FULL['epochs']} epochs."
    texts = [f"{epochs:,} epochs (the paper: {FULL['epochs']:,})", f"K = {runs['num_samples'][0]}"]
    for run in runs.drop_duplicates("data").itertuples():
        train = "all" if pd.isna(run.train_images) else f"{run.train_images:,.0f}"
        name = DATA_NAMES.get(run.data, run.data)
        texts.append(f"{name}: {train} training and {run.num_test:,} test images")
    if (likelihood := runs["likelihood"].iloc[0]) != "gaussian":
        texts.append(f"{likelihood} likelihood, and no published scores, which are Gaussian")
    texts.append(seeds_text(runs.groupby([*KEY, "method"]).size()))
    return (
        "Test log-likelihood, IWAE with the own q of each guide, in nats per image: mean ± "
        f"standard deviation over seeds. {'; '.join(texts)}. Red: the best mean of the column. "
        "Blue: no evidence of a difference from it (p > 0.01, two-sided t-test, uncorrected as in "
        f"the paper; Welch's and Holm's are in the CSV). With fewer than {LEAST_SEEDS} seeds there "
        "is no test: a method has no mark then, and a column none if this is so for its best mean. "
        "Δ is the difference to the row of the VAE; paper: the published score, and its Δ. "
        "Controls of equal compute: VAEs with a multiple of the epochs. A method without a warm "
        "start has the epochs of the VAE."
    )


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    main(TABLES[options.name], options)
