r"""Pictures of what a run generates, and how much of an image its latent variable holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import new_folder, read_json, write_json
from pyro_gpvae.evaluation import generation
from pyro_gpvae.evaluation.active_units import active_units
from pyro_gpvae.evaluation.generation import Decoded, PathKind
from pyro_gpvae.runs._text import caption
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.gap_chunks import describe

__all__ = ["GENERATION_FILES", "report_generation"]

GENERATION_FILES = (
    "active_units.png", "arrays.npz", "interpolations.png", "latent.json", "reconstructions.png",
    "samples.png", "traversals.png",
)  # fmt: skip


def report_generation(
    run_folder: str | Path,
    out: str | Path,
    *,
    samples: int = 64,
    images: Sequence[int] | None = None,
    steps: int = 9,
    span: float = 3.0,
    path: PathKind = "spherical",
    latent_images: int = 500,
    seed: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **where: Any,
) -> str:
    """Draws from a run and writes pictures, arrays and a record; returns a summary.

    For the arguments see ``pyro-gpvae generate --help``, and for ``where``
    :func:`pyro_gpvae.load_run`.
    """
    from pyro_gpvae.plots.generation import generated_figures  # imports matplotlib

    begin = time.monotonic()
    if latent_images < 2:
        raise ValueError(f"latent_images must be at least 2, got {latent_images}")
    with new_folder(out, overwrite=overwrite, files=GENERATION_FILES) as folder:
        run = load_run(run_folder, **where)
        seed = run.config.seed if seed is None else seed
        index = _index(run.data.test, images)
        arrays = _arrays(run, index, samples, steps, span, path, seed)
        test = run.data.test[:latent_images]
        units = active_units(run.model, run.guide, test, seed=seed, progress=progress)
        content = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        content["active_variances"] = units.variances.numpy()
        np.savez_compressed(folder / "arrays.npz", **content)  # type: ignore[arg-type]
        text = caption([describe(run)], len(run.data.test), f"Draws: seed {seed}.")
        record = {
            "format": 2,  # 1 described the run in other words
            "run": describe(run),
            "caption": f"Guide {run.config.guide}, {text}",
            "seed": seed,
            "image_index": index,
            "path": path,
            "span": span,
            "active_units": {
                **{name: getattr(units, name) for name in ("count", "threshold", "num_images")},
                "variances": units.variances.tolist(),
            },
            **environment(next(run.model.parameters()).device),
            "seconds": time.monotonic() - begin,
        }
        write_json(folder / "latent.json", record)
        # drawn from the two files, so that a reader of these can draw the figures again
        with np.load(folder / "arrays.npz") as saved:
            figures = generated_figures(saved, read_json(folder / "latent.json"))
        for name, figure in figures.items():
            figure.savefig(folder / name)
    return (
        f"active units  {units.count} of {len(units.variances)}  "
        f"(variance of E_q[z_j|x] over {units.num_images} test images > {units.threshold:g})"
    )


def _index(test: Tensor, images: Sequence[int] | None) -> list[int]:
    """Returns the indices of the images to show, which are the first eight by default."""
    if test.shape[1] not in (1, 3):
        raise ValueError(f"pictures need images with 1 or 3 channels, got {test.shape[1]}")
    index = list(range(min(8, len(test))) if images is None else images)
    for i in index:
        if not 0 <= i < len(test):
            raise ValueError(f"images: {i} is not between 0 and {len(test) - 1}")
    if len(index) < 2:
        raise ValueError(f"images: expected at least 2 of {len(test)}, got {len(index)}")
    return index


def _arrays(
    run: Run, index: list[int], samples: int, steps: int, span: float, path: PathKind, seed: int
) -> dict[str, Tensor]:
    """Returns images, decoded images and their latents by name."""
    model, guide = run.model, run.guide
    images = run.data.test[index]
    mean = generation.reconstruct(model, guide, images, seed=seed)
    # some guides are random: paths must end at the reconstructions above
    paths = generation.latent_path(mean.z[:-1], mean.z[1:], steps, path)
    moved = generation.latent_traversals(mean.z[:1], span=span, steps=steps)[0]
    decoded = {
        "samples": generation.sample_images(model, samples, seed=seed),
        "samples_noise": generation.sample_images(model, samples, noise=True, seed=seed),
        "reconstructions": mean,
        "reconstructions_draw": generation.reconstruct(model, guide, images, draw=True, seed=seed),
        "interpolations": Decoded(paths, generation.decode(model, paths)),
        "traversals": Decoded(moved, generation.decode(model, moved)),
    }
    arrays = {
        "image_index": torch.tensor(index),
        "images": images,
        "traversal_values": torch.linspace(-span, span, steps),
    }
    for name, (z, pixels) in decoded.items():
        arrays |= {name: pixels, f"{name}_uint8": generation.to_uint8(pixels), f"{name}_z": z}
    return arrays
