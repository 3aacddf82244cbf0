r"""What the commands print."""

from __future__ import annotations

from typing import Any

__all__ = ["one_line", "print_scores"]


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def print_scores(record: dict[str, Any]) -> None:
    """The scores of a record, a line each."""
    scores = record["scores"]
    error = scores["monte_carlo_error"]
    spread = scores["sampling_error"]
    print(f"{record['config']['guide']}: {scores['num_images']} test images, nats per image")
    print(
        f"log p(x)           {scores['log_evidence']:.4f}  (K = {scores['num_samples']}"
        + (f"; Monte-Carlo error {error:.3f}" if error == error else "")
        + (f"; error from the choice of images {spread:.2f})" if spread is not None else ")")
    )
    print(f"median log p(x)    {scores['median_log_evidence']:.4f}")
    print(f"ELBO               {scores['elbo']:.4f}")
    print(
        f"effective samples  {scores['mean_effective_sample_size']:.1f} of {scores['num_samples']}"
    )
    for name, value in record["diagnostics"].items():
        print(f"{name:<18} {value:.4g}")
