r"""Texts that several commands print."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["one_line", "print_scores"]


def one_line(error: BaseException) -> str:
    """Returns the message of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_scores(record: dict[str, Any]) -> None:
    """Prints the scores of a record, one a line."""
    scores, diagnostics = record["scores"], record["diagnostics"]
    error, spread, count = (
        scores[name] for name in ("monte_carlo_error", "sampling_error", "num_samples")
    )
    notes = [f"K = {count}"]
    if not math.isnan(error):
        notes.append(f"Monte-Carlo error {error:.3f}")
    if spread is not None:
        notes.append(f"error from the choice of images {spread:.2f}")
    print(f"{record['config']['guide']}: {scores['num_images']} test images, nats per image")
    print(f"log p(x)           {scores['log_evidence']:.4f}  ({'; '.join(notes)})")
    print(f"median log p(x)    {scores['median_log_evidence']:.4f}")
    print(f"ELBO               {scores['elbo']:.4f}")
    print(f"effective samples  {scores['mean_effective_sample_size']:.1f} of {count}")
    for name, value in diagnostics.items():
        print(f"{name:<18} {value:.4g}")
