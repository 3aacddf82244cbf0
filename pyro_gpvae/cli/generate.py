r"""``pyro-gpvae generate``."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import new_folder, read_json, write_json
from pyro_gpvae.evaluation.generation import (
    Decoded,
    PathKind,
    decode,
    latent_path,
    latent_traversals,
    reconstruct,
    sample_images,
    to_uint8,
)
from pyro_gpvae.evaluation.information import (
    ActiveUnits,
    LatentInformation,
    active_units,
    mutual_information,
)
from pyro_gpvae.runs.folder import Run, load_run

__all__ = ["GENERATE_FILES", "Generate"]

GENERATE_FILES = (
    "active_units.png",
    "arrays.npz",
    "interpolations.png",
    "latent.json",
    "reconstructions.png",
    "samples.png",
    "traversals.png",
)
_IMAGES = 8


@dataclass(kw_only=True)
class Generate:
    """Draw samples, reconstructions, interpolations and traversals; measure what z says.

    Attributes:
        run_folder: The run folder.
        out: Folder for samples.png, reconstructions.png, interpolations.png, traversals.png,
            active_units.png, all their numbers in arrays.npz, and latent.json with the active
            units and the mutual information.
        samples: Number of samples from the prior.
        images: Indices of the test images to reconstruct, in order; paths lead from each to the
            next, and the latent dimensions run around the first. None is the first 8.
        steps: Images along a path or a latent dimension, both ends included.
        span: Latent dimensions run from minus to plus so many standard deviations of the prior.
        path: "spherical" paths keep the norm of z, as the prior does; or "linear" ones.
        latent_images: Active units and mutual information of the first so many test images, or
            of all if there are fewer; the time of the latter grows with the square.
        num_samples: Draws of z for each of these images; at least 2 for standard errors.
        seed: Seed of all draws; None is the run's.
        data: Name or .npz path of the run's data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is the run's.
        trust_guide: Import the guide that the run names even if it is not registered.
        overwrite: Replace what this command wrote to that folder before.
        quiet: Show no progress bars.
    """

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    out: Path = Path("generated")
    samples: int = 64
    images: tuple[int, ...] | None = None
    steps: int = 9
    span: float = 3.0
    path: PathKind = "spherical"
    latent_images: int = 500
    num_samples: int = 2
    seed: int | None = None
    data: str | None = None
    root: str | None = None
    device: str | None = None
    trust_guide: bool = False
    overwrite: bool = False
    quiet: bool = False

    def run(self) -> None:
        import numpy as np

        from pyro_gpvae.plots.generation import generated_figures  # imports matplotlib

        begin = time.monotonic()
        with new_folder(self.out, overwrite=self.overwrite, files=GENERATE_FILES) as folder:
            run = load_run(
                self.run_folder,
                data=self.data,
                root=self.root,
                device=self.device,
                trust_guide=self.trust_guide,
            )
            seed = run.config.seed if self.seed is None else self.seed
            index = self._index(run.data.test)
            arrays = self._arrays(run, index, seed)
            units, information = self._measure(run, seed)
            content = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
            content["active_variances"] = units.variances.numpy()
            np.savez_compressed(folder / "arrays.npz", **content)  # type: ignore[arg-type]
            record = {
                "format": 1,
                "run": _origin(run),
                "seed": seed,
                "image_index": index,
                "path": self.path,
                "span": self.span,
                "active_units": {
                    "count": units.count,
                    "threshold": units.threshold,
                    "variances": units.variances.tolist(),
                    "num_images": units.num_images,
                },
                # none without the density q(z|x)
                "information": information
                and dataclasses.asdict(information) | {"bound": information.bound},
                **environment(next(run.model.parameters()).device),
                "seconds": time.monotonic() - begin,
            }
            write_json(folder / "latent.json", record)
            # from what was written: whoever has these two files can draw the figures again
            with np.load(folder / "arrays.npz") as saved:
                figures = generated_figures(saved, read_json(folder / "latent.json"))
            for name, figure in figures.items():
                figure.savefig(folder / name)
        _print(units, information)
        print(f"written to {self.out}")

    def _index(self, test: Tensor) -> list[int]:
        """The indices of the images, checked."""
        channels = test.shape[1]
        if channels not in (1, 3):
            raise ValueError(f"pictures need images with 1 or 3 channels, got {channels}")
        index = list(range(min(_IMAGES, len(test))) if self.images is None else self.images)
        for i in index:
            if not 0 <= i < len(test):
                raise ValueError(f"images: {i} is not between 0 and {len(test) - 1}")
        if len(index) < 2:
            raise ValueError(
                f"images: expected at least 2 of the {len(test)} test images, because paths lead "
                f"from one to the next, got {len(index)}"
            )
        if self.latent_images < 2:
            raise ValueError(f"latent_images must be at least 2, got {self.latent_images}")
        return index

    def _arrays(self, run: Run, index: list[int], seed: int) -> dict[str, Tensor]:
        """Images, decoded images and their latents, by name."""
        model, guide = run.model, run.guide
        images = run.data.test[index]
        mean = reconstruct(model, guide, images, seed=seed)
        # from one answer of the guide: some are random, and paths should end at reconstructions
        paths = latent_path(mean.z[:-1], mean.z[1:], self.steps, self.path)
        moved = latent_traversals(mean.z[:1], span=self.span, steps=self.steps)[0]
        decoded = {
            "samples": sample_images(model, self.samples, seed=seed),
            "samples_noise": sample_images(model, self.samples, noise=True, seed=seed),
            "reconstructions": mean,
            "reconstructions_draw": reconstruct(model, guide, images, draw=True, seed=seed),
            "interpolations": Decoded(paths, decode(model, paths)),
            "traversals": Decoded(moved, decode(model, moved)),
        }
        arrays = {
            "image_index": torch.tensor(index),
            "images": images,
            "traversal_values": torch.linspace(-self.span, self.span, self.steps),
        }
        for name, (z, pixels) in decoded.items():
            arrays |= {name: pixels, f"{name}_uint8": to_uint8(pixels), f"{name}_z": z}
        return arrays

    def _measure(self, run: Run, seed: int) -> tuple[ActiveUnits, LatentInformation | None]:
        test, progress = run.data.test[: self.latent_images], not self.quiet
        units = active_units(run.model, run.guide, test, seed=seed, progress=progress)
        if not hasattr(run.guide, "posterior"):
            return units, None
        information = mutual_information(
            run.model, run.guide, test, self.num_samples, seed=seed, progress=progress
        )
        return units, information


def _origin(run: Run) -> dict[str, Any]:
    """What the captions say about the run, and where it lies."""
    names = ("guide", "latent_dim", "likelihood", "epochs", "seed")
    return {
        "folder": str(run.folder),
        "data": run.data.name,
        **{name: getattr(run.config, name) for name in names},
        "commit": run.record.get("commit"),
    }


def _print(units: ActiveUnits, information: LatentInformation | None) -> None:
    print(
        f"active units        {units.count} of {len(units.variances)}  "
        f"(variance of E_q[z_j|x] over {units.num_images} test images > {units.threshold:g})"
    )
    if information is None:
        print("mutual information  unknown: the guide has no posterior(x), hence no density")
        return
    error = information.mutual_information_error
    print(
        f"mutual information  {information.mutual_information:.4f} nats  (of at most log N = "
        f"{information.bound:.4f}, N = {information.num_images}"
        + (f"; Monte-Carlo error {error:.2g})" if math.isfinite(error) else ")")
    )
    print(f"KL(q(z) || p(z))    {information.marginal_kl:.4f} nats")
    print(f"mean KL(q(z|x)||p)  {information.kl:.4f} nats, the sum of the two")
