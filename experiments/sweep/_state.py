"""The state of a sweep: its finished runs, and what is left."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
from _plans import Plan

from pyro_gpvae.core._files import partial_folder, read_json
from pyro_gpvae.runs.config import RunConfig, check_same
from pyro_gpvae.runs.report import markdown_table
from pyro_gpvae.runs.results import COLUMNS, differences, over_seeds, read_results


def finished_runs(plan: Plan, out: Path) -> pd.DataFrame:
    """Returns the plan's runs in the results folder, under the plan's names of methods.

    Raises:
        ValueError: If one is damaged, or has other options than its cell. Names file and field.
    """
    frame: pd.DataFrame = pd.DataFrame(columns=COLUMNS)
    skipped: list[str] = []
    if out.is_dir():
        frame, skipped = read_results(out)
    cells = {cell.name: cell for cell in plan.cells}
    for line in skipped:
        if any(line.startswith(f"{out / name}{os.sep}") for name in cells):
            raise ValueError(f"{line}. Delete the folder to train the cell again")
    frame = frame[frame["run"].isin(list(cells))].reset_index(drop=True)
    for name in frame["run"]:
        source = out / name / "record.json"
        found = RunConfig.from_json(read_json(source)["config"], source)
        check_same(found, cells[name].config, source)
    order = {name: number for number, name in enumerate(cells)}
    frame = frame.sort_values("run", key=lambda names: names.map(order), ignore_index=True)
    return frame.assign(method=[cells[name].method for name in frame["run"]])


def describe(plan: Plan, out: Path, done: set[str]) -> str:
    """Describes the cells, and which of them are done or begun."""
    lines = []
    for cell in plan.cells:
        begun = partial_folder(out / cell.name).is_dir()
        state = "done" if cell.name in done else "partial" if begun else ""
        lines.append(f"{cell.name:<60} {cell.config.epochs:,} epochs  {state:<7} {cell.method}")
    count = sum(cell.name in done for cell in plan.cells)
    cut = _cut(plan)
    lines.append(f"{len(plan.cells)} cells, {count} done. " + (cut or "The paper's budget."))
    return "\n".join(lines)


def _cut(plan: Plan) -> str:
    """Says in what the budget of a plan differs from the paper's, if in anything."""
    cut = [
        f"{name} {both['used']} (the paper: {both['full'] or 'all'})"
        for name, both in plan.budget_overrides.items()
    ]
    return f"CUT BUDGET: {', '.join(cut)}." if cut else ""


def score_table(plan: Plan, frame: pd.DataFrame) -> str:
    """Returns a Markdown table of means ± standard deviations over seeds, with its caption."""
    table = over_seeds(frame)
    table["log p(x)"] = [
        f"{row.log_evidence:.1f}" + (f" ± {row.sd:.1f}" if row.seeds > 1 else "")
        for row in table.itertuples()
    ]
    table = table.drop(columns=["log_evidence", "sd"]).astype(str)
    text = f"{plan.title}. log p(x), nats per image, by importance sampling, ± over seeds."
    if cut := _cut(plan):
        text += f" {cut} Compare these numbers with each other, not with published ones."
    notes = [f"Note: {line}." for line in differences(frame)]
    return "\n".join([markdown_table(table.astype(str)), "", text, *notes, ""])
