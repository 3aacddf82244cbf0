r"""``pyro-gpvae train``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pyro_gpvae.cli._shared import Command, Quiet, print_scores
from pyro_gpvae.core._files import finished_folder, partial_folder, read_json
from pyro_gpvae.core._registry import registered_guides
from pyro_gpvae.runs.config import RunConfig


@dataclass(kw_only=True)
class Train(RunConfig, Command):
    """Train a guide and a model, evaluate them on the test images, write a run folder.

    Attributes:
        seeds: Train so many runs in turn, with the seeds SEED, SEED + 1, ...: OUT/seed-N are
            their run folders. The same command again continues where it was stopped.
        out: The run folder. It appears when the run is finished; until then it is OUT.partial.
        resume: Continue this run folder with its own options, on another device if one is given;
            a finished one is left as it is. None starts a new run.
        from_record: Train again with the options of this record.json; data, root and device may
            say where things are now. The score is the same with the same versions, device and
            number of threads.
        overwrite: Replace an earlier run in that folder, finished or not.
        checkpoint_every: Steps between checkpoints, or minutes such as "5m".
        on_checkpoint_error: If the disk is full or read-only, "continue" without a checkpoint, or
            "stop".
        download: Download the data set if it is missing.
        trust_guide: Import the guide MODULE:CLASS that the run or the warm start names.
        quiet: Show no progress on standard error.
    """

    seeds: int | None = None
    out: Path = Path("run")
    resume: Path | None = None
    from_record: Path | None = None
    overwrite: bool = False
    checkpoint_every: str = "5m"
    on_checkpoint_error: Literal["continue", "stop"] = "continue"
    download: bool = False
    trust_guide: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        self._check_options()
        if self.seeds is None:
            self._run(self.seed, self.out if self.resume is None else finished_folder(self.resume))
            return
        for seed in range(self.seed, self.seed + self.seeds):
            print(f"seed {seed}:")
            self._run(seed, self.out / f"seed-{seed}")

    def _run(self, seed: int, out: Path) -> None:
        """Trains one run, and prints its scores."""
        from pyro_gpvae.runs.run_report import report_runs
        from pyro_gpvae.runs.train import resume_run, train_run

        names = ("checkpoint_every", "on_checkpoint_error", "download", "trust_guide")
        train_kwargs: dict[str, Any] = {name: getattr(self, name) for name in names}
        train_kwargs["progress"] = not self.quiet
        try:
            if self.resume is not None:
                record = resume_run(out, device=self.device, **train_kwargs)
            else:
                train_kwargs["overwrite"] = self.overwrite
                train_kwargs["resume"] = self.seeds is not None and not self.overwrite
                record = train_run(self._config(seed), out, **train_kwargs)
        except (KeyboardInterrupt, SystemExit):
            if partial_folder(out).is_dir():
                own = self.guide.partition(":")[0] not in registered_guides()
                trust = " --trust-guide" if own or self.trust_guide else ""
                print(f"continue with: pyro-gpvae train --resume {out}{trust}", file=sys.stderr)
            raise
        print_scores(record)
        # a guide that was named here, and by no file, is trusted
        trusted = self.trust_guide or (self.resume is None and self.from_record is None)
        report_runs([out], out / "report.html", images=0, overwrite=True, trust_guide=trusted)
        print(f"written to {out}; the report is {out / 'report.html'}")

    def _config(self, seed: int) -> RunConfig:
        """Returns the options given here, or those of a record."""
        if self.from_record is None:
            options = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
            return RunConfig(**options | {"seed": seed})
        from pyro_gpvae.runs.folder import check_record, check_trust

        config = check_record(read_json(self.from_record), self.from_record)
        check_trust(config.guide, self.from_record, self.trust_guide)
        data = self.data if self.data != RunConfig.data else None
        return config.moved(data, self.root, self.device)

    def _check_options(self) -> None:
        """Refuses options that come from the run which is continued or repeated."""
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        options = {field.name for field in fields(RunConfig)} | {"seeds"}
        if self.resume is not None:
            source = f"--resume continues {self.resume}"
            options = options - {"device"} | {"out", "overwrite", "from_record"}
        elif self.from_record is not None:
            source = f"--from-record repeats {self.from_record}"
            options -= {"data", "root", "device"}
        else:
            return
        for name in sorted(options):
            if getattr(self, name) != getattr(Train, name):
                raise ValueError(f"{source} with its own options: drop --{name.replace('_', '-')}")
