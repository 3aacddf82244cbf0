r"""Kills trainings over and over, with SIGKILL, and checks that nothing is lost.

    OMP_NUM_THREADS=1 python experiments/reliability/crash_campaign.py --kills 130

Each guide is trained on the embedded digits with a checkpoint every few steps. The process is
killed in turn at a random moment, start-up included; while it writes a checkpoint; and after the
training, while it evaluates and makes its last writes. It is then continued, until the run is
finished; then the next run begins. Every finished run must have the weights, history and scores of
the undisturbed one, bit for bit, and no kill may cost more steps than one interval.
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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from _attempt import publish
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_gpvae import Checkpoints, RunConfig, train_run
from pyro_gpvae.core._files import partial_folder, read_json
from pyro_gpvae.core._registry import registered_guides

AIMS = ("at a random moment", "writing a checkpoint", "after training")


@dataclass(kw_only=True)
class Options:
    """Options of the campaign.

    Attributes:
        kills: How many kills, of all guides together.
        guides: What is trained; by default all registered guides.
        train_images: On how many digits.
        interval: Steps between checkpoints.
        seed: Of the moments of the kills, and of the training.
        out: Folder of the record; None is none.
    """

    kills: int = 130
    guides: tuple[str, ...] = ()
    train_images: int = 256
    interval: int = 3
    seed: int = 0
    out: Path | None = None


class Campaign:
    """The runs of one guide in a folder, and what happened to them."""

    def __init__(self, guide: str, options: Options, root: Path) -> None:
        self.config = RunConfig(
            guide=guide, latent_dim=3, epochs=2, batch_size=32, train_images=options.train_images,
            test_images=10, num_samples=10, seed=options.seed, device="cpu",
        )  # fmt: skip
        self.root, self.interval = root, options.interval
        self.moments = random.Random(f"{options.seed} {guide}")
        self.counts: Counter[str] = Counter()
        begin = time.monotonic()
        process = self.start(root / "undisturbed")
        trained = self.kill(process, root / "undisturbed", AIMS[2], None)
        self.duration = time.monotonic() - begin
        self.total = read_json(root / "undisturbed" / "record.json")["steps"]
        # a step of several optimisers adds several bytes
        self.bytes = _size(root / "undisturbed.steps") // self.total
        self.tail = time.monotonic() - trained

    def run(self, name: str, kills: int) -> bool:
        """Trains one run that is killed up to so many times; True if it is the undisturbed one."""
        out, steps = self.root / name, self.root / f"{name}.steps"
        while True:
            reached, before = self.last_checkpoint(out), _size(steps)
            process, aim = self.start(out), AIMS[self.counts.total() % 3]
            if self.kill(process, out, aim, self.moments if kills else None):
                break
            kills -= 1
            self.counts[aim if reached is not None or _size(steps) else "before a checkpoint"] += 1
            now = self.total if out.exists() else self.last_checkpoint(out)
            made = -(-(_size(steps) - before) // self.bytes)
            if (lost := (reached or 0) + made - (now or 0)) > self.interval:
                raise RuntimeError(f"a kill cost {lost} steps of {self.config.guide}")
        return _equal(self.root / "undisturbed", out)

    def start(self, out: Path) -> int:
        """Forks a process that trains, or goes on training; every step adds a byte to a file."""
        sys.stdout.flush()
        if process := os.fork():
            return process
        code = 1
        try:
            steps = os.open(
                out.with_name(f"{out.name}.steps"), os.O_WRONLY | os.O_APPEND | os.O_CREAT
            )

            def note(*_: object) -> None:
                os.write(steps, b".")

            register_optimizer_step_post_hook(note)
            warnings.simplefilter("ignore")
            train_run(self.config, out, resume=True, progress=False, checkpoint_every=self.interval)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, process: int, out: Path, aim: str, moments: random.Random | None) -> Any:
        """Kills a process with the aim, if there are moments; else returns when it was trained.

        Returns:
            None if it was killed; otherwise the time at which the training was seen to be over.
        """
        begin, trained = time.monotonic(), 0.0
        wait = moments.uniform(0, self.tail if aim == AIMS[2] else self.duration) if moments else 0
        while True:
            now = time.monotonic()
            if not trained and (partial_folder(out) / "history.csv").exists():
                trained = now
            ready = now >= begin + wait
            if aim == AIMS[1]:
                ready = ready and any(partial_folder(out).glob(".checkpoint.pt.*"))
            elif aim == AIMS[2]:
                ready = bool(trained) and now >= trained + wait
            if moments and ready:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended and status:
                raise RuntimeError(f"a training that nobody killed ended with status {status}")
            if ended:
                return trained or now
            time.sleep(0.0002)

    @staticmethod
    def last_checkpoint(out: Path) -> int | None:
        """The step of the newest checkpoint that is whole."""
        state = Checkpoints(partial_folder(out)).latest()
        return None if state is None else state.step


def main(options: Options) -> bool:
    found = []
    guides = options.guides or tuple(registered_guides())
    # a kill may lose time, never damage a checkpoint: a warning of one is an error here
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        for guide in guides:
            (Path(folder) / guide).mkdir()
            campaign, number = Campaign(guide, options, Path(folder) / guide), 0
            while (left := options.kills // len(guides) - campaign.counts.total()) > 0:
                number += 1
                same = campaign.run(f"run-{number}", left)
                found.append((guide, "identical" if same else "broken", f"run {number} differs"))
            found += [(guide, f"killed {aim}", "") for aim in campaign.counts.elements()]
    chosen = {"kills": options.kills, "interval": options.interval, "seed": options.seed}
    return publish("crash_campaign", options.out, chosen, found)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _equal(first: Path, second: Path) -> bool:
    """Whether two runs have the same weights, history and scores."""
    same = all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("weights.safetensors", "scores.csv", "config.json")
    )
    scores = [read_json(run / "record.json")["scores"] for run in (first, second)]
    frames = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (first, second)]
    return same and scores[0] == scores[1] and frames[0].equals(frames[1])


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
