r"""Runs a plan or a part of it: any cells of the paper's grid, on one machine or on a cluster.

    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --dry-run
    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --epochs 20 --seeds 2 \
        --where guide=gp,vae latent_dim=10 --out runs/table4 --in-turn
    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --gpus 0.25 \
        --address auto --out /shared/table4                 # on a Ray cluster

Every cell is one run folder in --out. With ``--in-turn`` this process trains them one after the
other. Otherwise Ray Tune (``pip install "pyro-gpvae[sweep]"``) gives cells to machines, and to
others when a machine is lost; all machines must see --out under the same path, with file locks that
end with the machine that holds them (a local disk, NFS 4). A run that was killed continues from its
own checkpoint, and a finished cell is never repeated: start the same command again to finish a
sweep. Runs that start from others wait for them. The table of the plan's runs is written to --out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from _plans import Cell, Plan, parse_where, read_plan
from _ray import cluster, tune_cells
from _state import describe, finished_runs, score_table

from pyro_gpvae.core._files import InUseError, locked, write_text
from pyro_gpvae.data.images import ImageData, load_data
from pyro_gpvae.runs.train import train_run


@dataclass(kw_only=True)
class Options:
    """Options of a sweep.

    Attributes:
        plan: The plan, a TOML file; see _plans.py.
        out: The results folder, with a run folder for each cell.
        dry_run: Only print the cells, and which of them are done.
        in_turn: Train in this process, one cell after the other, without Ray.
        trust_guide: Import guides MODULE:CLASS that the plan names. They are code.
        where: Only cells that fit: KEY=VALUE,VALUE with a key of method, guide, data, latent_dim,
            decoder, seed. A guide's name without options fits all its options. What they start
            from is run as well.
        epochs: Cut the epochs to so many (and in proportion where a method has a multiple).
        seeds: Cut the number of seeds.
        train_images: Cut the training images to the first so many.
        test_images: Cut the test images to the first so many.
        root: Folder of data sets, as for "pyro-gpvae train".
        download: Download data sets that are not there.
        address: A Ray cluster, such as "auto" or HOST:PORT; None starts Ray on this machine.
        cpus: Processor cores, and threads, of each run.
        gpus: Share of a GPU of each run, such as 0.25; 0 trains on the CPU.
        retries: How often a cell is tried again after an error or a lost machine.
        checkpoint_every: Steps between checkpoints, or minutes such as "5m".
    """

    plan: Path
    out: Path = Path("runs/sweep")
    dry_run: bool = False
    in_turn: bool = False
    trust_guide: bool = False
    where: tuple[str, ...] = ()
    epochs: int | None = None
    seeds: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    root: str | None = None
    download: bool = False
    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0
    retries: int = 10
    checkpoint_every: str = "5m"


def main(options: Options) -> int:
    plan = read_plan(
        options.plan,
        trust_guide=options.trust_guide,
        epochs=options.epochs,
        seeds=options.seeds,
        train_images=options.train_images,
        test_images=options.test_images,
    ).select(parse_where(options.where))
    out = options.out.expanduser().resolve()
    frame = finished_runs(plan, out)
    if options.dry_run:
        print(describe(plan, out, set(frame["run"])))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".sweep.lock", f"runs a sweep in {out}"):
        failed = run(plan, out, frame, options)
    frame = finished_runs(plan, out)
    if not frame.empty:
        text = score_table(plan, frame)
        write_text(out / f"{plan.source.stem}.md", text)
        write_text(out / f"{plan.source.stem}.csv", frame.to_csv(index=False))
        print(text)
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def run(plan: Plan, out: Path, frame: pd.DataFrame, options: Options) -> dict[str, str]:
    """Trains the cells that are left; returns those that failed, and why."""
    left = [cell for cell in plan.cells if cell.name not in set(frame["run"])]
    if not left:
        return {}
    names = sorted({cell.config.data for cell in left})
    images = {n: load_data(n, root=options.root, download=options.download) for n in names}
    train_cell = partial(
        train,
        cells={cell.name: cell for cell in plan.cells},
        metadata={cell.name: plan.metadata(cell) for cell in plan.cells},
        device="cuda" if options.gpus else "cpu",
        checkpoint_every=options.checkpoint_every,
    )
    if options.in_turn:
        return _train_in_turn(train_cell, left, images, out)
    data_of = {cell.name: cell.config.data for cell in plan.cells}
    failed: dict[str, str] = {}
    with cluster(options.address, images) as stored:
        for depth in sorted({cell.depth for cell in left}):
            failed |= {
                cell.name: f"its warm start {cell.config.warm_start} failed"
                for cell in left
                if cell.depth == depth and cell.config.warm_start in failed
            }
            ready = [c.name for c in left if c.depth == depth and c.name not in failed]
            if ready:
                resources: Any = {
                    "cpus": options.cpus,
                    "gpus": options.gpus,
                    "retries": options.retries,
                }
                failed |= tune_cells(train_cell, ready, data_of, stored, out, **resources)
    return failed


def _train_in_turn(
    train_cell: Callable[[str, ImageData], float],
    cells: list[Cell],
    images: Mapping[str, ImageData],
    out: Path,
) -> dict[str, str]:
    failed: dict[str, str] = {}
    before = Path.cwd()
    os.chdir(out)  # records name warm starts without a path
    try:
        for number, cell in enumerate(cells, 1):
            print(f"{number} of {len(cells)}: {cell.name}", flush=True)
            try:
                train_cell(cell.name, images[cell.config.data])
            except (ValueError, OSError) as error:  # the other cells do not depend on it
                failed[cell.name] = str(error)
    finally:
        os.chdir(before)
    return failed


def train(
    name: str,
    images: ImageData,
    *,
    cells: Mapping[str, Cell],
    metadata: Mapping[str, dict[str, Any]],
    device: str,
    checkpoint_every: str,
) -> float:
    """Trains a cell in the working directory, or continues it, and returns its score."""
    while True:
        try:
            record = train_run(
                replace(cells[name].config, device=device),
                name,
                resume=True,
                progress=False,
                checkpoint_every=checkpoint_every,
                trust_guide=True,  # read_plan has refused a guide that is not trusted
                data=images,
                plan=metadata[name],
            )
            return float(record["scores"]["log_evidence"])
        except InUseError:  # by a process that a lost node or a killed driver has left behind
            time.sleep(1)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except (ValueError, OSError, ImportError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        sys.exit(2)
