r"""``pyro-gpvae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_gpvae.cli._shared import Quiet, RunFolder, Where, keywords, print_scores

__all__ = ["Evaluate"]


@dataclass(kw_only=True)
class Evaluate(Where):
    """Evaluate a run folder again; without options, the score is exactly the recorded one.

    Attributes:
        run_folder: The run folder.
        guide: Another guide for the run's decoder, such as "vae" or "my_guides:MyGuide"; it
            starts from the run's encoder where it can, and is not trained. None is the run's.
        num_samples: Importance samples K per image; None is as recorded.
        seed: Seed of the samples; None is as recorded.
        test_images: The number of the run's test images, from the first on; None is all.
        chunk_size: Latent vectors decoded at once, which bounds the memory; None is as recorded.
        reference: For the first so many test images, also IWAE with a wider q and with each
            image's optimum as the proposal, and annealed importance sampling. They tell a better
            model from a better proposal. Takes seconds per image at worst.
        out: Folder for record.json and for scores.csv with one row per image; None writes none.
        overwrite: Replace an earlier evaluation in that folder.
        quiet: Show no progress on standard error.
    """

    run_folder: RunFolder
    guide: str | None = None
    num_samples: int | None = None
    seed: int | None = None
    test_images: int | None = None
    chunk_size: int | None = None
    reference: int | None = None
    out: Path | None = None
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.evaluate import evaluate_run

        options = keywords(self)
        result = evaluate_run(options.pop("run_folder"), **options)
        print_scores(result)
        if "reference" in result:
            _print_reference(result["reference"])
        recorded, found = result["recorded"]["log_evidence"], result["scores"]["log_evidence"]
        note = "equal" if recorded == found else "differs"
        note = note if self.guide is None else "the run's own guide"
        print(f"recorded log p(x)  {recorded:.4f}  ({note})")


def _print_reference(reference: dict[str, Any]) -> None:
    """Prints one line per estimator."""
    print(f"of the first {reference['num_images']} test images:")
    for name, found in reference["estimates"].items():
        notes = [f"Monte-Carlo error {found['monte_carlo_error']:.3f}"]
        if name.endswith("width c"):
            notes.append(f"mean c = {reference['mean_width']:.2f}")
        print(f"{name:<25} {found['log_evidence']:.4f}  ({'; '.join(notes)})")
    left = reference["not_trusted"]
    note = f"  ({left} images without a reliable estimate)" if left else ""
    print(f"{'most reliable':<25} {reference['log_evidence']:.4f}{note}")
