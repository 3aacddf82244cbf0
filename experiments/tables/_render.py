"""Captions of the score tables; the tables in Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from _frames import COMPANION, OWN
from _records import DATA_NAMES, Collected, Column, Table

from pyro_gpvae.runs.results import seeds_text

PUBLISHED_EPOCHS = 2000

_TEST = "two-sided t-test, uncorrected as in the paper; Welch's and Holm's in the CSV"
_UNTESTED = "Not tested: a method of one seed, or any where the best mean is of one seed."
_COLOURS = (
    "Red: the best mean of the column. Blue: no evidence of a difference from it (p > 0.01, "
    f"{_TEST}). {_UNTESTED}"
)


def score_caption(collected: Collected, order: str, *, picture: bool = False) -> str:
    """Budget, seeds, tests, controls; of a table, or of a picture, whose legend tells the marks."""
    text = "Test log-likelihood, IWAE with each guide's own q, in nats per image: mean ± standard "
    text += f"deviation over seeds. {_budget_text(collected, 'scores')} "
    if picture:
        text += f"Best: the best mean of the column; p: of a difference from it ({_TEST}). "
        text += f"{_UNTESTED} "
    else:
        text += f"{_COLOURS} Δ is the difference to the VAE's row; paper: the published score, and "
        text += "its own Δ. "
    return " ".join(f"{text}{_control_text(collected, run_only=picture)} {order}".split())


def companion_caption(collected: Collected, order: str, *, picture: bool = False) -> str:
    text = "The same models, scored with better and better proposals, in nats per image: mean ± "
    text += "standard deviation over seeds"
    text += "" if picture else ", in parentheses the difference to the VAE's row"
    text += ". ELBO and IWAE with the guide's own q; IWAE with its spread multiplied by the factor "
    text += "c that is best on images that are no test images; IWAE with the best full Gaussian of "
    text += "each image, the reference; annealed importance sampling (AIS) from there. "
    text += f"{_budget_text(collected, 'companion')} {'' if picture else _COLOURS} "
    if collected.records:
        left = sum(int(r["companion.optimum.not_converged"]) for r in collected.records)
        count = sum(int(r["companion.num_images"]) for r in collected.records)
        text += f"The optimum of {left:,} of {count:,} images had not converged. "
        sources = sorted({str(r["companion.validation"]) for r in collected.records})
        text += f"c was chosen on {' or on '.join(sources)}. "
    return " ".join(f"{text}{order}".split())


def _budget_text(collected: Collected, part: str) -> str:
    records = collected.records
    if not records:
        return f"No records; the paper trains for {PUBLISHED_EPOCHS} epochs."
    first = records[0]
    texts = [
        f"{collected.epochs:,} epochs (the paper: {PUBLISHED_EPOCHS:,})",
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


def _control_text(collected: Collected, *, run_only: bool) -> str:
    texts, run = [], {row.label for row, _ in collected.cells}
    for multiple, reasons in collected.controls.items():
        name = "VAE" if multiple == 1 else f"VAE, {multiple:g} × epochs"
        if name not in run and run_only:
            continue
        texts.append(f"{name}: {', '.join(reasons)}")
    text = "Controls of equal compute (a gradient step: one latent vector decoded and "
    text += "differentiated for an image; those of methods that are not named here are not "
    text += "matched). A method that is not warm-started has the epochs of the "
    return f"{text}VAE. {'; '.join(texts)}." if texts else ""


def _index(frame: pd.DataFrame) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """The cells by panel, column, score and method: looking them up in a frame takes seconds."""
    return {
        (cell["panel"], cell["column"], cell["score"], cell["method"]): cell
        for cell in frame.to_dict("records")
    }


def _methods(frame: pd.DataFrame) -> dict[str, str]:
    """The rows in their order, as Markdown has them: a guide's own name is code."""
    guides = set(frame["guide"])
    return {m: f"`{m}`" if m in guides else m for m in dict.fromkeys(frame["method"])}


def score_markdown(table: Table, frame: pd.DataFrame, caption: str, flags: Sequence[str]) -> str:
    lines, found = [f"# {table.title}", ""], _index(frame)
    for panel, columns in table.panels.items():
        if len(table.panels) > 1:
            lines += [f"## {panel}", ""]
        heads = [f"{column.label} | Δ | paper" for column in columns]
        lines.append(f"| method | {' | '.join(heads)} | seeds |")
        lines.append("|---|" + "--:|" * (3 * len(columns) + 1))
        for method, name in _methods(frame).items():
            cells, seeds = [name], []
            for column in columns:
                cell = found[panel, column.label, "IWAE", method]
                cells += [_score(cell, _math), _signed(cell["difference_to_vae"]), _paper(cell)]
                seeds.append(str(cell["seeds"]))
            cells.append(seeds[0] if len(set(seeds)) == 1 else ", ".join(seeds))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, caption, *_flag_lines(flags), ""])


def companion_markdown(
    table: Table, frame: pd.DataFrame, caption: str, flags: Sequence[str]
) -> str:
    lines, found = [f"# {table.title}: better model or better proposal?", ""], _index(frame)
    heads = " | ".join("IWAE, best width | c" if s == "IWAE, best width" else s for s in COMPANION)
    for panel, columns in table.panels.items():
        for column in columns:
            lines += [f"## {_heading(table, panel, column)}", ""]
            lines.append(f"| method | {heads} | paper | seeds |")
            lines.append("|---|" + "--:|" * (len(COMPANION) + 3))
            for method, name in _methods(frame).items():
                cells = [name]
                for score in COMPANION:
                    cell = found[panel, column.label, score, method]
                    difference = _signed(cell["difference_to_vae"])
                    text = _score(cell, _math)
                    cells.append(text + (f" ({difference})" if difference != "–" else ""))
                    if score == "IWAE, best width":
                        c = cell["factor"]
                        cells.append("–" if math.isnan(c) else f"{c:.2f}")
                cell = found[panel, column.label, OWN, method]
                cells += [_paper(cell), str(cell["seeds"])]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join([*lines, caption, *_flag_lines(flags), ""])


def score_latex(table: Table, frame: pd.DataFrame, caption: str) -> str:
    blocks, found = [], _index(frame)
    for panel, columns in table.panels.items():
        lines = []
        for method in _methods(frame):
            cells, seeds = [escape(method)], []
            for column in columns:
                cell = found[panel, column.label, "IWAE", method]
                seeds.append(str(cell["seeds"]))
                difference = escape(_signed(cell["difference_to_vae"]))
                cells += [_score(cell, _tex), difference, escape(_paper(cell))]
            cells.append(seeds[0] if len(set(seeds)) == 1 else ", ".join(seeds))
            lines.append(" & ".join(cells))
        heads = [*([column.label, "Δ", "paper"] for column in columns), ["seeds"]]
        blocks.append(tabular(panel if len(table.panels) > 1 else "", heads, lines))
    return latex_table(table.name, caption, blocks)


def companion_latex(table: Table, frame: pd.DataFrame, caption: str) -> str:
    blocks, found = [], _index(frame)
    for panel, columns in table.panels.items():
        for column in columns:
            lines = []
            for method in _methods(frame):
                row = [found[panel, column.label, score, method] for score in COMPANION]
                lines.append(" & ".join([escape(method), *(_score(cell, _tex) for cell in row)]))
            blocks.append(tabular(_heading(table, panel, column), [list(COMPANION)], lines))
    return latex_table(f"{table.name}_companion", caption, blocks)


def _heading(table: Table, panel: str, column: Column) -> str:
    return (
        column.label
        if len({c.decoder for c in table.columns}) == 1
        else (f"{column.label}, {panel}")
    )


def _score(row: dict[str, Any], style: Callable[[str, str, str], str]) -> str:
    """The mean of a cell in its colour, never without a record."""
    if row["seeds"] == 0:
        return "not run"
    sd = "" if row["seeds"] == 1 else f"{row['sd']:.1f}"
    text = style(f"{row['mean']:.1f}", sd, row["mark"])
    if row["seeds"] == 1:
        return f"{text} (1 seed)"
    return f"{text} (not tested)" if row["mark"] == "untested" else text


def _math(mean: str, sd: str, mark: str) -> str:
    """Mathematics, because Markdown has no colours of its own."""
    colour = {"best": "red", "no difference": "blue"}.get(mark)
    if colour is None:
        return f"{mean} ± {sd}" if sd else mean
    value = rf"{mean} \pm {sd}" if sd else mean
    return rf"$\color{{{colour}}}{{\mathbf{{{value}}}}}$"


def _tex(mean: str, sd: str, mark: str) -> str:
    colour = {"best": "red", "no difference": "blue"}.get(mark)
    text = mean if colour is None else rf"\textcolor{{{colour}}}{{\textbf{{{mean}}}}}"
    return rf"{text}$^{{{sd}}}$" if sd else text


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1f}"


def _paper(row: dict[str, Any]) -> str:
    if math.isnan(row["published"]):
        return "–"
    return f"{row['published']:.1f} ({_signed(row['published_difference_to_vae'])})"


def _flag_lines(flags: Sequence[str]) -> list[str]:
    return ["", "Flagged:", "", *(f"* {flag}" for flag in flags)] if flags else []


def tabular(heading: str, heads: list[list[str]], lines: list[str]) -> str:
    names = ["method", *(name for head in heads for name in head)]
    rule = rf"\multicolumn{{{len(names)}}}{{l}}{{{escape(heading)}}} \\" if heading else ""
    return "\n".join(
        part
        for part in (
            rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"\toprule",
            rule,
            " & ".join(map(escape, names)) + r" \\",
            r"\midrule",
            *(line + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        )
        if part
    )


def latex_table(name: str, caption: str, blocks: list[str]) -> str:
    body = "\n\n\\medskip\n\n".join(blocks)
    return (
        "% needs \\usepackage{booktabs,xcolor}\n"
        f"\\begin{{table}}\n\\centering\\scriptsize\n{body}\n"
        f"\\caption{{{escape(caption)}}}\n\\label{{tab:{name}}}\n\\end{{table}}\n"
    )


def escape(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, "\\" + character)
    for character, command in (("Δ", r"\Delta"), ("×", r"\times"), ("±", r"\pm"), (">", ">")):
        text = text.replace(character, f"${command}$")
    return text.replace("–", "--")
