r"""Options that several commands share, their way into functions of the library, and texts."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

_Folder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
RunFolder = tyro.conf.Positional[_Folder]
RunFolders = tyro.conf.Positional[tuple[_Folder, ...]]
Quiet = Annotated[bool, tyro.conf.arg(aliases=["-q"])]


@dataclass(kw_only=True)
class Command:
    """What all commands share.

    Attributes:
        verbose: Show every warning, all files that are skipped, and the traceback of an error.
    """

    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False


@dataclass(kw_only=True)
class Where(Command):
    """Where the data and the device of a run are now, and whether its code is trusted.

    Attributes:
        data: Name or .npz path of the run's data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is that of the run.
        trust_guide: Import the guide MODULE:CLASS that the run names.
    """

    data: str | None = None
    root: str | None = None
    device: str | None = None
    trust_guide: bool = False


def keywords(command: Command) -> dict[str, Any]:
    """Returns the options of a command as keyword arguments; ``quiet`` becomes ``progress``.

    There is no progress bar in a file.
    """
    options = dict(vars(command))
    del options["verbose"]
    if "quiet" in options:
        options["progress"] = not options.pop("quiet") and sys.stderr.isatty()
    return options


def printable(text: str) -> str:
    """Returns a text with escapes for control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Returns the message of an error as one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def print_scores(record: dict[str, Any]) -> None:
    """Prints the scores of a record, one a line."""
    scores = record["scores"]
    notes = [f"K = {scores['num_samples']}"]
    if not math.isnan(scores["monte_carlo_error"]):
        notes.append(f"Monte-Carlo error {scores['monte_carlo_error']:.3f}")
    if scores["sampling_error"] is not None:
        notes.append(f"error from the choice of images {scores['sampling_error']:.2f}")
    size = scores["mean_effective_sample_size"]
    print(f"{record['config']['guide']}: {scores['num_images']} test images, nats per image")
    print(f"log p(x)           {scores['log_evidence']:.4f}  ({'; '.join(notes)})")
    print(f"median log p(x)    {scores['median_log_evidence']:.4f}")
    print(f"ELBO               {scores['elbo']:.4f}")
    print(f"effective samples  {size:.1f} of {scores['num_samples']}")
    for name, value in record["diagnostics"].items():
        print(f"{name:<18} {value:.4g}")
