r"""Captions, tables and numbers of all reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["caption", "markdown_table", "number"]


def caption(runs: Sequence[dict[str, Any]], test_images: int, budget: str) -> str:
    """Returns data, training and budget of runs that :func:`.gap_chunks.describe` described."""

    def common(values: Sequence[Any]) -> str:
        return " / ".join(sorted({str(value) for value in values}))

    data, latent_dim, epochs, seed = (
        common([run["config"][name] for run in runs])
        for name in ("data", "latent_dim", "epochs", "seed")
    )
    train = common([f"{run['train_images']:,}" for run in runs])
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
    table = [head, *rows]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(head))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in table
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])
