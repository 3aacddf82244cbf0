r"""Kills a training over and over, with SIGKILL, and checks that nothing is lost.

    OMP_NUM_THREADS=1 python experiments/reliability/crash_campaign.py --kills 100

A GPVAE is trained on the embedded digits with a checkpoint every few steps. Its process is killed
at random moments, every second time as soon as it is seen writing a checkpoint, and is then
continued, until the run is finished; then the next run begins. Every finished run must have the
weights, history and scores of the undisturbed one, bit for bit, and no kill may cost more steps
than one interval between checkpoints.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_gpvae import Checkpoints, RunConfig, resume_run, train_run
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import partial_folder, write_json, write_text


@dataclass(kw_only=True)
class Options:
    """Options of the campaign.

    Attributes:
        kills: How many kills.
        guide: What is trained.
        train_images: On how many digits.
        epochs: For how long.
        interval: Steps between checkpoints.
        seed: Of the moments of the kills, and of the training.
        out: Folder of the summary; None is none.
    """

    kills: int = 100
    guide: str = "gp"
    train_images: int = 512
    epochs: int = 2
    interval: int = 3
    seed: int = 0
    out: Path | None = None


@dataclass
class Summary:
    """What happened; counts."""

    kills: int = 0
    inside_a_checkpoint: int = 0
    finished_runs: int = 0
    identical_runs: int = 0
    steps_of_a_run: int = 0
    interval: int = 0
    most_steps_repeated: int = 0
    seconds: float = 0.0


def main(options: Options) -> Summary:
    config = RunConfig(
        guide=options.guide,
        latent_dim=5,
        epochs=options.epochs,
        batch_size=32,
        train_images=options.train_images,
        test_images=20,
        num_samples=10,
        seed=options.seed,
        device="cpu",
    )
    moments = random.Random(options.seed)
    summary = Summary(interval=options.interval)
    # a kill may lose time, never damage a checkpoint: a warning of one is an error here
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        root = Path(folder)
        begin = time.monotonic()
        _wait(_start(config, root / "undisturbed", root / "steps", options.interval))
        duration = time.monotonic() - begin
        summary.steps_of_a_run = _count(root / "steps")
        number = 0
        while summary.kills < options.kills:
            number += 1
            out, steps = root / f"run-{number}", root / f"steps-{number}"
            finished = False
            while not finished:
                reached, before = _last_checkpoint(out), _count(steps)
                process = _start(config, out, steps, options.interval)
                if summary.kills < options.kills:
                    aim = summary.kills % 2 == 1
                    finished = _kill(process, out, moments.uniform(0, duration), aim)
                else:
                    finished = _wait(process)
                if finished:
                    break
                summary.kills += 1
                summary.inside_a_checkpoint += bool(list(partial_folder(out).glob(".*.partial")))
                now = summary.steps_of_a_run if out.exists() else _last_checkpoint(out)
                lost = (reached or 0) + _count(steps) - before - (now or 0)
                summary.most_steps_repeated = max(summary.most_steps_repeated, lost)
            summary.finished_runs += 1
            summary.identical_runs += _equal(root / "undisturbed", out)
        summary.seconds = time.monotonic() - begin
    text = report(options, summary)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "options": asdict(options) | {"out": str(options.out)},
            "summary": asdict(summary),
            **environment(torch.device("cpu")),
        }
        write_json(options.out / "crash_campaign.json", record)
        write_text(options.out / "crash_campaign.md", text)
    return summary


def kept(summary: Summary) -> bool:
    """Whether every promise was kept."""
    identical = summary.finished_runs == summary.identical_runs > 0
    return identical and summary.most_steps_repeated <= summary.interval


def report(options: Options, summary: Summary) -> str:
    """The summary as Markdown."""
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value:.0f} |" for name, value in asdict(summary).items()
    )
    return (
        f"| crash campaign | count |\n|---|--:|\n{rows}\n\n"
        f"`{options.guide}` on {options.train_images} digits, {options.epochs} epochs, a "
        f"checkpoint every {options.interval} steps, seed {options.seed}. Every second kill is "
        "aimed at a process that is writing a checkpoint. "
        f"{'All promises were kept.' if kept(summary) else 'A PROMISE WAS BROKEN.'}\n"
    )


def _start(config: RunConfig, out: Path, steps: Path, interval: int) -> int:
    """Forks a process that trains, or goes on training; every step adds a byte to a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(steps, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def note(*_: object) -> None:
            os.write(log, b".")

        register_optimizer_step_post_hook(note)
        warnings.simplefilter("ignore")
        if partial_folder(out).is_dir() and (partial_folder(out) / "config.json").is_file():
            resume_run(out, progress=False, checkpoint_every=interval)
        elif not out.exists():
            train_run(config, out, progress=False, checkpoint_every=interval)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill(process: int, out: Path, seconds: float, aim: bool) -> bool:
    """Kills a process after so many seconds, or when it next writes; True if it ended before."""
    end = time.monotonic() + seconds
    while True:
        left = time.monotonic() >= end
        if left and (not aim or list(partial_folder(out).glob(".*.partial"))):
            os.kill(process, signal.SIGKILL)
            break
        if os.waitpid(process, os.WNOHANG)[0]:
            return True
        time.sleep(0.0002)
    os.waitpid(process, 0)
    return False


def _wait(process: int) -> bool:
    status = os.waitpid(process, 0)[1]
    if status != 0:
        raise RuntimeError(f"a training that nobody killed ended with status {status}")
    return True


def _last_checkpoint(out: Path) -> int | None:
    """The step of the newest checkpoint that is whole."""
    state = Checkpoints(partial_folder(out)).latest()
    return None if state is None else state.step


def _count(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _equal(first: Path, second: Path) -> bool:
    """Whether two runs have the same weights, history and scores."""
    same = all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("weights.safetensors", "scores.csv", "config.json")
    )
    histories = [
        pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (first, second)
    ]
    return same and histories[0].equals(histories[1])


if __name__ == "__main__":
    sys.exit(0 if kept(main(tyro.cli(Options, description=__doc__))) else 1)
