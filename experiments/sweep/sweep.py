r"""Runs a plan, or a part of it: any cells of the paper's grid, on one machine or on a cluster.

    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --dry-run
    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --epochs 20 --seeds 2 \
        --where guide=gp,vae latent_dim=10 --out runs/table4
    python experiments/sweep/sweep.py --plan experiments/plans/table4.toml --gpus 0.25 \
        --address auto --out /shared/table4                 # on a cluster that Ray runs on

Every cell is one run folder in --out, which all machines must see under the same path, with file
locks that end with the machine that holds them (a local disk, NFS 4). Ray Tune
(``pip install "pyro-gpvae[sweep]"``) gives cells to machines, and again to others when a machine
is lost. A run that was killed goes on from its own checkpoint: at most what was done since the
last one, or an evaluation, is lost. The same command, started again after whatever happened, does
what is left; a finished cell is never repeated. Runs that start from others wait until those are
finished. The images are read by this process only, and are sent once to each machine, where all
runs share them. The table of the plan's runs is written to --out.

The costs of --dry-run are those of finished runs in --out, or else of ``plans/step_times.csv``
(measured with one thread on a machine that was busy with other work: an upper bound there).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from _costs import duration, seconds, step_times
from _plans import WHERE_IT_RUNS, Cell, Plan, read_plan

from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._files import InUseError, locked, partial_folder, read_json, write_text
from pyro_gpvae.data.images import ImageData, load_data
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import load_images
from pyro_gpvae.runs.results import COLUMNS, parse_where, read_results, score_table
from pyro_gpvae.runs.train import complete_run

STEP_TIMES = Path(__file__).parents[1] / "plans" / "step_times.csv"


@dataclass(kw_only=True)
class Options:
    """Options of a sweep.

    Attributes:
        plan: The plan, a TOML file; see pyro_gpvae/plans.py.
        out: The results folder, with a run folder for each cell.
        dry_run: Only print the cells, their number and what they will cost.
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
        save_times: Only write the step times of the runs in --out to this file.
    """

    plan: Path
    out: Path = Path("runs/sweep")
    dry_run: bool = False
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
    save_times: Path | None = None


def main(options: Options) -> int:
    plan = read_plan(
        options.plan,
        epochs=options.epochs,
        seeds=options.seeds,
        train_images=options.train_images,
        test_images=options.test_images,
    ).select(parse_where(options.where))
    out = options.out.expanduser().resolve()
    frame = finished_runs(plan, out)
    times = pd.concat([step_times(frame), pd.read_csv(STEP_TIMES)], ignore_index=True)
    if options.save_times is not None:
        write_text(options.save_times, step_times(frame).to_csv(index=False))
        return 0
    costs = {cell.name: seconds(cell, times) for cell in plan.cells}
    if options.dry_run:
        print(describe(plan, out, set(frame["run"]), costs))
        return 0
    warn_of_commits(frame, out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".sweep.lock", f"runs a sweep in {out}"):
        failed = run(plan, out, frame, costs, options)
    frame = finished_runs(plan, out)
    if not frame.empty:
        text = score_table(frame, plan.title)
        write_text(out / f"{plan.source.stem}.md", text)
        write_text(out / f"{plan.source.stem}.csv", frame.to_csv(index=False))
        print(text)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def run(
    plan: Plan, out: Path, frame: pd.DataFrame, costs: Mapping[str, float | None], options: Options
) -> list[str]:
    """Trains the cells that are left; returns those that failed, and why."""
    left = [cell for cell in plan.cells if cell.name not in set(frame["run"])]
    if not left:
        return []
    images = load_images_once(plan, frame, out, options, {cell.config.data for cell in left})
    size = sum(data.train.nbytes + data.test.nbytes for data in images.values())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no tables but ours
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'a sweep needs Ray: pip install "pyro-gpvae[sweep]". A single cell can be trained '
            "without it, by pyro-gpvae train"
        ) from error

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if options.address is None:
        # its memory is that of the images, which all runs read in place
        memory = int(1.2 * size) + 100 * 2**20
        ray.init(include_dashboard=False, object_store_memory=memory, **quiet)
    else:
        ray.init(address=options.address, **quiet)
    try:
        stored = {name: ray.put(_arrays(data)) for name, data in images.items()}
        failed: dict[str, str] = {}
        for depth in sorted({cell.depth for cell in left}):
            failed |= {
                cell.name: f"{cell.config.warm_start}, which it starts from, failed"
                for cell in left
                if cell.depth == depth and cell.config.warm_start in failed
            }
            ready = [c.name for c in left if c.depth == depth and c.name not in failed]
            if ready:
                failed |= tune_cells(plan, depth, ready, out, stored, costs, options)
    finally:
        ray.shutdown()
    return [f"{name}: {why}" for name, why in failed.items()]


def tune_cells(
    plan: Plan,
    depth: int,
    left: Sequence[str],
    out: Path,
    images: Mapping[str, Any],
    costs: Mapping[str, float | None],
    options: Options,
) -> dict[str, str]:
    """Gives cells that do not wait for each other to Ray Tune; returns those that failed."""
    import ray
    from ray import tune

    cells = {cell.name: cell for cell in plan.cells if cell.depth == depth}
    resources = {"cpu": options.cpus, "gpu": options.gpus}
    trainable = tune.with_resources(
        tune.with_parameters(
            run_cell,
            cells=cells,
            about={name: plan.about(cell) for name, cell in cells.items()},
            images=images,
            out=str(out),
            threads=options.cpus,
            device="cuda" if options.gpus else "cpu",
            checkpoint_every=options.checkpoint_every,
        ),
        resources,
    )
    experiment = out / ".ray" / hashlib.sha256(" ".join(cells).encode()).hexdigest()[:12]
    tuner = None
    if tune.Tuner.can_restore(str(experiment)):
        try:
            tuner = tune.Tuner.restore(str(experiment), trainable, restart_errored=True)
        except Exception as error:  # killed while it wrote its state: the records are the truth
            print(f"Ray Tune cannot restore its state ({error}): it begins anew", flush=True)
            shutil.rmtree(experiment)
    if tuner is None:
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        slots = max(
            1,
            min(int(total.get(kind.upper(), 0) / n) for kind, n in resources.items() if n),
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"cell": tune.grid_search(list(left))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=experiment.name,
                storage_path=str(experiment.parent),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=options.retries),
                callbacks=[_progress(out, dict(costs), slots)],
            ),
        )
    results = tuner.fit()
    failed = {}
    for number in range(len(results)):
        result = results[number]
        if result.error is not None and result.config is not None:
            failed[str(result.config["cell"])] = str(result.error).strip().split("\n")[-1]
    missing = [n for n in left if n not in failed and not (out / n / "record.json").exists()]
    shutil.rmtree(experiment, ignore_errors=True)
    return failed | dict.fromkeys(missing, "not finished: start again")


def run_cell(
    config: dict[str, str],
    *,
    cells: Mapping[str, Cell],
    about: Mapping[str, dict[str, Any]],
    images: Mapping[str, Any],
    out: str,
    threads: int,
    device: str,
    checkpoint_every: str,
) -> None:
    """One trial of Ray Tune: starts a cell, or goes on with it. Runs in a worker's process."""
    import ray
    from ray import tune

    os.chdir(out)  # warm starts are siblings, named without a path in the records
    torch.set_num_threads(threads)
    cell = cells[config["cell"]]
    arrays = ray.get(images[cell.config.data])
    with warnings.catch_warnings():  # they lie in shared memory, which nobody writes to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        parts = {part: torch.from_numpy(arrays[part]) for part in ("train", "test")}
    data = ImageData(arrays["name"], **parts, note=arrays["note"])
    how: dict[str, Any] = {
        "progress": False,
        "checkpoint_every": checkpoint_every,
        "trust_guide": True,  # the plan names it, and its reader has imported it
        "data": data,
        "plan": about[cell.name],
    }
    while True:
        try:
            record = complete_run(replace(cell.config, device=device), cell.name, **how)
            break
        except InUseError:  # by a process that a lost node or a killed driver has left behind
            time.sleep(1)
    tune.report({"log_evidence": record["scores"]["log_evidence"]})


def load_images_once(
    plan: Plan, frame: pd.DataFrame, out: Path, options: Options, names: set[str]
) -> dict[str, ImageData]:
    """The data sets, whole; ValueError if finished runs were on other images."""
    images = {
        name: load_data(name, root=options.root, download=options.download)
        for name in sorted(names)
    }
    finished = frame.set_index("run")

    @cache
    def hashes(name: str, *cuts: Any) -> dict[str, str]:
        used = load_images(RunConfig(**dict(zip(_CUTS, cuts, strict=True))), images[name])
        return {"train_sha256": sha256(used.train), "test_sha256": sha256(used.test)}

    for cell in plan.cells:
        if cell.config.data not in images:
            continue
        expected = hashes(cell.config.data, *(getattr(cell.config, name) for name in _CUTS))
        for name, value in expected.items():
            if cell.name in finished.index and finished.loc[cell.name, name] != value:
                raise ValueError(
                    f"{out / cell.name / 'record.json'}: data.{name} is not that of the images "
                    f"of {cell.config.data!r} here: point --root to those, or choose another --out"
                )
    return images


_CUTS = ("train_images", "test_images", "likelihood")


def _arrays(data: ImageData) -> dict[str, Any]:
    return {
        "name": data.name,
        "note": data.note,
        "train": data.train.numpy(),
        "test": data.test.numpy(),
    }


def finished_runs(plan: Plan, out: Path) -> pd.DataFrame:
    """The plan's runs in the results folder, under the plan's names of methods.

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
        found = read_json(source)["config"]
        for option in fields(RunConfig):
            value, wanted = found.get(option.name), getattr(cells[name].config, option.name)
            if option.name not in WHERE_IT_RUNS and value != wanted:
                raise ValueError(
                    f"{source}: config.{option.name} is {value!r}, the plan says {wanted!r}: "
                    "delete the folder, or choose another --out"
                )
    order = {name: number for number, name in enumerate(cells)}
    frame = frame.sort_values("run", key=lambda names: names.map(order), ignore_index=True)
    return frame.assign(method=[cells[name].method for name in frame["run"]])


def warn_of_commits(frame: pd.DataFrame, out: Path) -> None:
    """Warns of finished runs that were trained by other code."""
    commit = environment(torch.device("cpu"))["commit"]
    others = frame[frame["commit"] != commit]
    if len(others):
        first = others.iloc[0]
        warnings.warn(
            f"{len(others)} finished runs are of other code than this ({commit}): commit is "
            f"{first['commit']} in {out / first['run'] / 'record.json'}. They are kept, and the "
            "table says so; for one commit choose another --out.",
            stacklevel=2,
        )


def describe(plan: Plan, out: Path, done: set[str], costs: Mapping[str, float | None]) -> str:
    """The cells, which of them are done, and what is left to pay."""
    lines = []
    for cell in plan.cells:
        cost = costs[cell.name]
        state = "done" if cell.name in done else ""
        if not state and partial_folder(out / cell.name).is_dir():
            state = "begun"
        lines.append(
            f"{cell.name:<60} {'unknown' if cost is None else duration(cost):>12}  "
            f"{cell.config.epochs:,} epochs  {state:<6}{cell.method}"
        )
    left = [cost for name, cost in costs.items() if name not in done]
    known = [cost for cost in left if cost is not None]
    lines.append(
        f"{len(plan.cells)} cells, {len(done)} done. Left: {duration(sum(known))} in all, one at "
        f"a time"
        + (f", and {len(left) - len(known)} without a recorded step time" * (left != known))
    )
    cut = [f"{k} {v['used']} (the paper: {v['full'] or 'all'})" for k, v in plan.cut.items()]
    lines.append(f"CUT BUDGET: {', '.join(cut)}" if cut else "The paper's budget.")
    return "\n".join(lines)


def _progress(out: Path, costs: Mapping[str, float | None], slots: int) -> Any:
    """A callback of Ray Tune: prints what is done and what is left, whenever it changes."""
    from ray import tune

    class Progress(tune.Callback):
        """Begins anew after a restart: the records count, not what it remembers."""

        def __init__(self) -> None:
            self.begun: dict[str, float] = {}
            self.took: dict[str, float] = {}
            self.printed = ("", 0.0)

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self.begun[trial.config["cell"]] = time.time()

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            name = trial.config["cell"]
            self.took[name] = time.time() - self.begun.get(name, time.time())

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            states = [trial.status for trial in trials]
            state = f"{states.count('RUNNING')} running, {states.count('ERROR')} failed"
            key = f"{states.count('ERROR')} {states.count('TERMINATED')}"
            now = time.time()
            if key == self.printed[0] and now - self.printed[1] < 60:
                return
            self.printed = key, now
            done = {name for name in costs if (out / name / "record.json").exists()}
            failed = {t.config["cell"] for t in trials if t.status == "ERROR"}
            left = _time_left(costs, done | failed, self.begun, self.took, now)
            when = "" if left is None else f"; about {duration(left / slots)} left"
            print(f"{len(done)} of {len(costs)} cells done, {state}{when}", flush=True)

    return Progress()


def _time_left(
    costs: Mapping[str, float | None],
    ended: Collection[str],
    begun: Mapping[str, float],
    took: Mapping[str, float],
    now: float,
) -> float | None:
    """Seconds of all runs that have not ended: their costs, in proportion to what others took."""
    known = {name: cost for name in took if (cost := costs[name]) is not None}
    ratio = sum(took[name] for name in known) / sum(known.values()) if known else 1.0
    typical = sum(took.values()) / len(took) if took else None
    left = 0.0
    for name in costs.keys() - set(ended):
        cost = costs[name]
        whole = typical if cost is None else cost * ratio
        if whole is None:
            return None
        left += max(0.0, whole - (now - begun[name] if name in begun else 0.0))
    return left


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except (ValueError, OSError, ImportError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        sys.exit(2)
