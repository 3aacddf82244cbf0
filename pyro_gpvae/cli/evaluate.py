r"""``pyro-gpvae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pyro_gpvae.cli._options import Where, keywords
from pyro_gpvae.cli._text import print_scores

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
        companion: For the first so many test images, also IWAE with a wider q and with each
            image's optimum as proposal, and annealed importance sampling: what is a better
            model, and what only a better proposal? Takes seconds per image at worst.
        out: Folder for record.json and for scores.csv with one row per image; None writes none.
        overwrite: Replace an earlier evaluation in that folder.
    """

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    guide: str | None = None
    num_samples: int | None = None
    seed: int | None = None
    test_images: int | None = None
    chunk_size: int | None = None
    companion: int | None = None
    out: Path | None = None
    overwrite: bool = False

    def run(self) -> None:
        from pyro_gpvae.runs.evaluate import evaluate_run

        options = keywords(self)
        result = evaluate_run(options.pop("run_folder"), **options)
        print_scores(result)
        if "companion" in result:
            _print_companion(result["companion"])
        recorded, found = result["recorded"]["log_evidence"], result["scores"]["log_evidence"]
        if self.guide is not None:
            note = "the run's own guide"
        else:
            note = "equal" if recorded == found else "differs"
        print(f"recorded log p(x)  {recorded:.4f}  ({note})")


def _print_companion(companion: dict[str, Any]) -> None:
    """The scores of better and better proposals, a line each."""
    k = companion["num_samples"]
    print(f"of the first {companion['num_images']} test images:")
    for name, label in (
        ("own", f"IWAE({k}), its own q"),
        ("width", f"IWAE({k}), q of best width"),
        ("optimum", f"IWAE({k}), optimal q"),
        ("annealed", "annealed sampling"),
    ):
        found = companion[name]
        if "missing" in found:
            print(f"{label:<25} - ({found['missing']})")
            continue
        notes = [f"Monte-Carlo error {found['monte_carlo_error']:.3f}"]
        if "elbo" in found and name != "width":
            notes.append(f"ELBO {found['elbo']:.4f}")
        if "factor" in found:
            images = f"{found['validation_images']} {companion['validation']}"
            notes.append(f"c = {found['factor']:g}, chosen on {images}")
        if found.get("not_converged"):
            notes.append(f"{found['not_converged']} images not converged")
        print(f"{label:<25} {found['log_evidence']:.4f}  ({'; '.join(notes)})")
