r"""What all reports share: the description of a run, captions, tables and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_gpvae.runs.folder import Run

__all__ = ["caption", "describe", "markdown_table", "number"]


def describe(run: Run) -> dict[str, Any]:
    """Returns what a record tells about a run: its folder, options, data, epochs, σ and weights."""
    return {
        "run": str(run.folder),
        "config": {k: v for k, v in vars(run.config).items() if k != "root"},
        "train_images": run.record["data"]["train_images"],
        "epochs": run.total_epochs,
        "sigma": run.record.get("sigma"),
        "weights_sha256": run.weights_sha256,
    }


def caption(runs: Sequence[dict[str, Any]], test_images: int, budget: str) -> str:
    """Returns data, training and budget of runs that :func:`describe` described."""

    def common(values: Sequence[Any]) -> str:
        return " / ".join(sorted({str(value) for value in values}))

    configs = [run["config"] for run in runs]
    data = common([Path(config["data"]).name for config in configs])
    train = common([f"{run['train_images']:,}" for run in runs])
    # records of older versions do not count the epochs of warm starts
    epochs = common([run.get("epochs", run["config"]["epochs"]) for run in runs])
    latent_dim, seed = (
        common([config[name] for config in configs]) for name in ("latent_dim", "seed")
    )
    return (
        f"{data}: {train} training and {test_images} test images, p = {latent_dim}, "
        f"{epochs} epochs, seed {seed}. {budget}"
    )


def number(value: float | None) -> str:
    """Returns a number with three digits, and a dash for NaN and None."""
    if value is None or value != value:
        return "–"
    return f"{value:.1f}" if abs(value) >= 9.95 else f"{value:.2f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (head, *rows)
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])
