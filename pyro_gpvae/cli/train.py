r"""``pyro-gpvae train``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pyro_gpvae.cli._text import print_scores
from pyro_gpvae.core._files import finished_folder
from pyro_gpvae.model.guide import available_guides
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.reproduce import reproduce_run
from pyro_gpvae.runs.seeds import is_stacked, resume_seeds, train_seeds
from pyro_gpvae.runs.train import resume_run, train_run

__all__ = ["Train"]


@dataclass(kw_only=True)
class Train(RunConfig):
    """Train a guide and a model, evaluate them on the test images, write a run folder.

    Attributes:
        seeds: Train so many runs in one program, with the seeds SEED, SEED + 1, ...: OUT/seed-N
            are their run folders. Cheaper than one by one where a step is short.
        out: The run folder: it appears when the run is finished; until then it is OUT.partial.
        resume: Continue this run folder, stopped or killed, with its own options; a finished one
            is left as it is. None starts a new run.
        from_record: Repeat the run of this record.json in OUT, with its options, images and
            threads: on the same device it gets the same score. The options data, root and device
            may say where things are now.
        overwrite: Replace an earlier run in that folder, finished or not.
        checkpoint_every: Steps between checkpoints, or minutes such as "5m".
        on_checkpoint_error: If the disk is full or read-only, "continue" without a checkpoint, or
            "stop".
        trust_guide: Import the guide MODULE:CLASS that the run or the warm start names.
        quiet: Show no progress bar.
    """

    seeds: int | None = None
    out: Path = Path("run")
    resume: Path | None = None
    from_record: Path | None = None
    overwrite: bool = False
    checkpoint_every: str = "5m"
    on_checkpoint_error: Literal["continue", "stop"] = "continue"
    trust_guide: bool = False
    quiet: bool = False

    def run(self) -> None:
        options = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        out = self.out if self.resume is None else finished_folder(self.resume)
        how: dict[str, Any] = {
            "progress": not self.quiet,
            "checkpoint_every": self.checkpoint_every,
            "on_checkpoint_error": self.on_checkpoint_error,
            "trust_guide": self.trust_guide,
        }
        if self.seeds is not None or (self.resume is not None and is_stacked(out)):
            self._run_seeds(options, out, how)
            return
        try:
            if self.from_record is not None:
                self._check_options(options, self.from_record, ("data", "root", "device"))
                record = reproduce_run(
                    self.from_record,
                    out,
                    data=self.data if self.data != RunConfig.data else None,
                    root=self.root,
                    device=self.device,
                    overwrite=self.overwrite,
                    **how,
                )
            elif self.resume is None:
                record = train_run(RunConfig(**options), out, overwrite=self.overwrite, **how)
            else:
                self._check_options(options, self.resume)
                record = resume_run(out, **how)
        except (KeyboardInterrupt, SystemExit):
            self._print_advice(out)
            raise
        print_scores(record)
        print(f"written to {out}")

    def _run_seeds(self, options: dict[str, Any], out: Path, how: dict[str, Any]) -> None:
        """Trains several runs as one."""
        if self.from_record is not None:
            raise ValueError("--from-record repeats one run: drop --seeds")
        try:
            if self.resume is not None:
                self._check_options(options, self.resume)
                records = resume_seeds(out, **how)
            else:
                assert self.seeds is not None
                seeds = range(self.seed, self.seed + self.seeds)
                records = train_seeds(
                    RunConfig(**options), seeds, out, overwrite=self.overwrite, **how
                )
        except (KeyboardInterrupt, SystemExit):
            self._print_advice(out)
            raise
        for record in records:
            print(f"seed {record['config']['seed']}:")
            print_scores(record)
        print(f"written to {out}")

    def _print_advice(self, out: Path) -> None:
        own = self.guide.partition(":")[0] not in available_guides()
        trust = " --trust-guide" if own or self.trust_guide else ""
        print(f"continue with: pyro-gpvae train --resume {out}{trust}", file=sys.stderr)

    def _check_options(
        self, options: dict[str, Any], source: Path, but: tuple[str, ...] = ()
    ) -> None:
        """A run that is continued or repeated has its options already."""
        given = [
            f.name for f in fields(RunConfig) if options[f.name] != f.default and f.name not in but
        ]
        if self.resume is not None:
            given += [
                name
                for name, value in (
                    ("out", self.out != Path("run")),
                    ("overwrite", self.overwrite),
                    ("seeds", self.seeds is not None),
                    ("from_record", self.from_record is not None),
                )
                if value
            ]
        if given:
            what = "--from-record repeats" if self.resume is None else "--resume continues"
            raise ValueError(
                f"{what} {source} with its own options: drop --{given[0].replace('_', '-')}"
            )
