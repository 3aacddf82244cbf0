"""The page of the study of Newton steps, made from its record."""

from __future__ import annotations

import statistics
from typing import Any

from _augmentation import ROTATION, SCALES, SHIFT

#: The guide whose training time is the budget of equal time.
BUDGET = "newton:1"
#: Importance samples for each image and proposal of the reference estimate, without annealing.
REFERENCE_SAMPLES = 500
#: How often each time is measured.
REPEATS = 60
#: The columns of the training from scratch, and their digits.
_JOINT = {"epochs": 0, "elbo": 1, "log_evidence": 1, "reference": 1, "sigma": 3, "step": 2}


def markdown(record: dict[str, Any]) -> str:
    """Returns the tables of the record, with means and standard deviations over seeds."""
    rows = record["rows"]
    frozen = [row for row in rows if row["decoder"] == "frozen"]
    lines = [
        "| q, on the decoder of the VAE | ELBO | median | IWAE | gap closed | decoder passes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row["guide"] for row in frozen):
        group = [row for row in frozen if row["guide"] == name]
        cells = [_mean(group, key, 1) for key in ("elbo", "median_elbo", "log_evidence")]
        cells += [_mean(group, "share", 0, 100) + " %", _mean(group, "decoder_passes", 1)]
        lines.append(f"| `{name}` ({len(group)}) | " + " | ".join(cells) + " |")
    joint = [row for row in rows if row["decoder"] != "frozen"]
    if joint:
        lines += ["", "| trained together | budget | epochs | ELBO | IWAE | log p(x) | σ | step |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
        for budget, name in dict.fromkeys((row["decoder"], row["guide"]) for row in joint):
            group = [row for row in joint if (row["guide"], row["decoder"]) == (name, budget)]
            cells = [_mean(group, key, digits) for key, digits in _JOINT.items()]
            lines.append(f"| `{name}` ({len(group)}) | {budget} | " + " | ".join(cells) + " |")
    text = caption(record) + (joint_caption(record) if joint else "")
    return "\n".join([*lines, "", text, ""])


def caption(record: dict[str, Any]) -> str:
    """Returns the data, the budget, the seeds and the machine, in sentences."""
    rate = record.get("sigma_learning_rate", 5e-4)
    sigma = "" if rate == 5e-4 else f" ({rate:g} for σ)"
    epochs = record.get("guide_epochs") or record["epochs"]
    augmented = ""
    if record.get("augment"):
        augmented = (
            f", on images of which half are rotated by up to {ROTATION}°, scaled by "
            f"{SCALES[0]:g} to {SCALES[1]:g} and shifted by up to {100 * SHIFT:g} %"
        )
    return (
        f"{record['data']}: {record['train_images']:,} training and {record['test_images']} "
        f"test images, p = {record['latent_dim']}, networks of the paper's tables, "
        f"{record['epochs']} epochs for the VAE and {epochs} more for every trained guide"
        f"{augmented}, learning rate 5e-4{sigma}, K = {record['num_samples']}. "
        "The number of seeds is in brackets; means ± standard deviations over seeds. `sa` and "
        "`vlae` take the encoder of the VAE without training. "
        "Decoder passes: the CPU time to infer 128 images in units of that to decode 128 latent "
        f"vectors, the fastest of {REPEATS} each, the encoder included, on one thread of "
        f"{record['device']}, which other processes used at the same time."
    )


def joint_caption(record: dict[str, Any]) -> str:
    """Returns what the second table needs in addition."""
    untrusted = max(row.get("untrusted", 0) for row in record["rows"])
    return (
        " Trained together: from random weights; equal epochs are equal gradient steps; the "
        "learning rate of σ is 1e-2; log p(x) by "
        f"`reference_evidence` with {REFERENCE_SAMPLES} samples of each proposal and no "
        f"annealing (not reliable for at most {untrusted} images of a guide); the CPU time of "
        "a training step is in units of that of the VAE, and equal time is that of "
        f"{record['epochs']} epochs of `{BUDGET}`."
    )


def _mean(rows: list[dict[str, Any]], key: str, digits: int, factor: float = 1.0) -> str:
    values = [factor * row[key] for row in rows if row.get(key) is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
