r"""Mutates configurations, records, weights and checkpoints of runs, and then uses the runs.

    OMP_NUM_THREADS=1 python experiments/reliability/mutated_records.py --attempts 2000

One field of ``config.json``, of ``record.json`` or of both gets another value or is deleted, or
bytes of one file change. Then the run is evaluated, repeated from its record, listed or continued.
Each attempt must be refused with an error that a command prints as one line, or give the numbers of
the run that nobody has touched, or say that its numbers differ from those on record ("told").
Anything else is broken: another error, 2 GiB of memory, a signal, or numbers that are wrong and
that nothing tells. A run that is continued with other options tells them in its record.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from _attempt import attempt, damaged, publish

import pyro_gpvae.plots  # before the attempts fork  # noqa: F401
from pyro_gpvae import Checkpoints, RunConfig, evaluate_run, resume_run, train_run
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs.folder import check_record
from pyro_gpvae.runs.results import differences, read_results
from pyro_gpvae.runs.run_report import report_runs

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**63, 10**40, 0.5, -2.5, 1e308, math.nan,
    math.inf, "", "vae", "gp", "gp:num_nodes=9999", "mnist", "evil:Guide", "../../etc/passwd",
    "cuda:7", "1" * 5000, "\x1b[2J", [], {}, [1, 28], [1, 784, 1], [10**6] * 3, [-1, -28, 28],
    {"config": {}},
)  # fmt: skip


@dataclass(kw_only=True)
class Options:
    """Options of the campaign.

    Attributes:
        attempts: How many mutated runs.
        seed: Of the mutations.
        out: Folder of the record; None is none.
    """

    attempts: int = 2000
    seed: int = 0
    out: Path | None = None


class _Stop(BaseException):
    """Ends a training as if it was killed."""


def main(options: Options) -> bool:
    choose = random.Random(options.seed)
    found = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _make(root)
        wanted = {}
        for victim in VICTIMS:
            outcome, _, text = _use(root, victim, None)
            if outcome != "accepted":
                raise RuntimeError(f"{victim} of a sound run is {outcome}: {text}")
            wanted[victim] = json.loads(text)
        for _ in range(options.attempts):
            victim = choose.choice(list(VICTIMS))
            outcome, what, text = _use(root, victim, choose)
            if outcome == "accepted":
                outcome = _compare(json.loads(text), dict(wanted[victim]))
            found.append((victim, outcome, f"{what}: {text}"))
    return publish("mutated_records", options.out, {"attempts": options.attempts}, found)


def _use(root: Path, victim: str, choose: random.Random | None) -> tuple[str, str, str]:
    """Uses a copy of the runs after a mutation; returns outcome, mutation and text."""
    scratch, what = root.with_name(f"{root.name}-used"), "nothing"
    shutil.copytree(root, scratch)
    try:
        if choose is not None:
            what = _mutate(scratch / ("b.partial" if victim == "resume" else "a"), choose)
        outcome, text = attempt(partial(VICTIMS[victim], scratch))
    finally:
        shutil.rmtree(scratch)
    return outcome, what, text


def _make(root: Path) -> None:
    """Makes a finished run and one that was killed after two steps."""
    config = RunConfig(
        guide="gp", latent_dim=2, decoder="fc", epochs=1, batch_size=16, train_images=64,
        validation=8, test_images=4, num_samples=4, chunk_size=16, device="cpu",
    )  # fmt: skip
    train_run(config, root / "a", progress=False)
    save, count = Checkpoints.save, 0

    def stop(self: Checkpoints, checkpoint: Any) -> None:
        nonlocal count
        save(self, checkpoint)
        count += 1
        if count == 3:
            raise _Stop

    Checkpoints.save = stop  # type: ignore[method-assign]
    try:
        train_run(config, root / "b", progress=False, checkpoint_every=1)
    except _Stop:
        pass
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]


def _evaluate(root: Path) -> dict[str, Any]:
    found = evaluate_run(root / "a")
    return {name: found[name] for name in ("scores", "recorded", "diagnostics")}


def _numbers(record: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    found = {name: record[name] for name in ("scores", "diagnostics", "weights_sha256", "config")}
    return found | {"recorded": recorded["scores"]}


def _repeat(root: Path) -> dict[str, Any]:
    source = root / "a" / "record.json"
    recorded = read_json(source)
    config = check_record(recorded, source)
    return _numbers(train_run(config, root / "again", progress=False), recorded)


def _resume(root: Path) -> dict[str, Any]:
    record = resume_run(root / "b", progress=False)
    return _numbers(record, record)


def _results(root: Path) -> dict[str, Any]:
    frame, _ = read_results(root)
    differences(frame)
    return {"listed": len(frame)}


def _report(root: Path) -> dict[str, Any]:
    report_runs([root / "a"], root / "report.html", images=0, progress=False)
    return {"listed": 1}


VICTIMS = {
    "evaluate": _evaluate, "repeat": _repeat, "resume": _resume, "results": _results,
    "report": _report,
}  # fmt: skip


def _compare(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if "listed" in found:
        return "accepted"
    if found == wanted:
        return "unchanged"
    told = found["recorded"] != found["scores"] or found.get("config") != wanted.get("config")
    return "told" if told else "broken"


def _mutate(folder: Path, choose: random.Random) -> str:
    """Changes one field, or some bytes, of the files of a run; returns what was done."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "lock")
    if choose.random() < 0.3:
        return _change_bytes(folder / choose.choice(names), choose)
    records = {n: json.loads((folder / n).read_text()) for n in names if n.endswith(".json")}
    name = choose.choice(sorted(records))
    path = choose.choice(list(_paths(records[name])))
    value, delete = choose.choice(VALUES), choose.random() < 0.1
    alike = {name: path}
    if "record.json" in records and choose.random() < 0.7:  # the same change in the other file
        if name == "config.json":
            alike["record.json"] = ("config", *path)
        elif path[0] == "config" and len(path) > 1:
            alike["config.json"] = path[1:]
    for each, place in alike.items():
        parent = records[each]
        for key in place[:-1]:
            parent = parent[key]
        if delete and isinstance(parent, dict):
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        (folder / each).write_text(json.dumps(records[each]))
    change = "deleted" if delete else repr(value)[:40]
    return f"{' and '.join(alike)}: {'.'.join(map(str, path))} {change}"


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in entries:
        yield (*prefix, key)
        if isinstance(item, dict | list):
            yield from _paths(item, (*prefix, key))


def _change_bytes(path: Path, choose: random.Random) -> str:
    kind = choose.choice(["bits", "cut", "repeat", "empty", "huge", "folder"])
    path.write_bytes(damaged(path.read_bytes(), kind, choose, flips=(1, 1, 8)))
    if kind == "huge":  # a hole, which takes no room on the disk
        with path.open("r+b") as file:
            file.truncate(4 << 30)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    return f"{path.name}: {kind}"


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
