r"""Pictures of what a run generates, and how much of an image its latent variable holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import new_folder, write_json
from pyro_gpvae.evaluation import generation
from pyro_gpvae.evaluation.active_units import active_units
from pyro_gpvae.evaluation.generation import PathKind
from pyro_gpvae.runs._report import caption, describe
from pyro_gpvae.runs.folder import Place, Run, load_run

__all__ = ["GENERATION_FILES", "report_generation"]

GENERATION_FILES = (
    "active_units.png", "arrays.npz", "interpolations.png", "latent.json", "reconstructions.png",
    "samples.png", "traversals.png",
)  # fmt: skip
#: Latent dimensions vary by so many standard deviations of the prior.
_SPAN = 3.0
#: Active units are counted on the first so many test images.
_LATENT_IMAGES = 500


def report_generation(
    run_folder: str | Path,
    out: str | Path,
    *,
    samples: int = 64,
    images: Sequence[int] | None = None,
    steps: int = 9,
    path: PathKind = "spherical",
    seed: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **place: Unpack[Place],
) -> str:
    """Draws from a run and writes pictures, arrays and a record; returns a summary.

    For the arguments see ``pyro-gpvae generate --help``, and for ``place``
    :func:`pyro_gpvae.load_run`.
    """
    begin = time.monotonic()
    with new_folder(out, overwrite=overwrite, files=GENERATION_FILES) as folder:
        run = load_run(run_folder, **place)
        seed = run.config.seed if seed is None else seed
        index = _index(run.data.test, images)
        arrays = _arrays(run, index, samples, steps, path, seed)
        test = run.data.test[:_LATENT_IMAGES]
        units = active_units(run.model, run.guide, test, seed=seed, progress=progress)
        arrays["active_variances"] = units.variances.numpy()
        np.savez_compressed(folder / "arrays.npz", **arrays)
        text = caption([describe(run)], len(run.data.test), f"Draws: seed {seed}.")
        text = f"Guide {run.config.guide}, {text}"
        counts = {name: getattr(units, name) for name in ("count", "threshold", "num_images")}
        record = {
            "format": 3,  # 1 described the run in other words, 2 had a span
            "run": describe(run),
            "caption": text,
            "seed": seed,
            "image_index": index,
            "path": path,
            "active_units": counts | {"variances": units.variances.tolist()},
            **environment(next(run.model.parameters()).device),
            "seconds": time.monotonic() - begin,
        }
        write_json(folder / "latent.json", record)
        for name, figure in _figures(arrays, run, path, counts, text).items():
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
    run: Run, index: list[int], samples: int, steps: int, path: PathKind, seed: int
) -> dict[str, Any]:
    """Returns images, decoded images and their latents by name."""
    model, guide, images = run.model, run.guide, run.data.test[index]
    mean = generation.reconstruct(model, guide, images, seed=seed)
    # some guides are random: paths must end at the reconstructions above
    paths = generation.latent_path(mean.z[:-1], mean.z[1:], steps, path)
    moved = generation.latent_traversals(mean.z[:1], span=_SPAN, steps=steps)[0]
    decoded = {
        "samples": generation.sample_images(model, samples, seed=seed),
        "samples_noise": generation.sample_images(model, samples, noise=True, seed=seed),
        "reconstructions": mean,
        "reconstructions_draw": generation.reconstruct(model, guide, images, draw=True, seed=seed),
        "interpolations": (paths, generation.decode(model, paths)),
        "traversals": (moved, generation.decode(model, moved)),
    }
    tensors = {
        "image_index": torch.tensor(index),
        "images": images,
        "traversal_values": torch.linspace(-_SPAN, _SPAN, steps),
    }
    for name, (z, pixels) in decoded.items():
        tensors |= {name: pixels, f"{name}_z": z}
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _figures(
    arrays: dict[str, Any], run: Run, path: PathKind, units: dict[str, Any], caption: str
) -> dict[str, Any]:
    """Returns the figures by file name."""
    from pyro_gpvae import plots  # imports matplotlib

    gaussian = run.config.likelihood == "gaussian"
    mean = "means of p(x|z)" if gaussian else "probabilities of p(x|z)"
    images, shown, variances = arrays["images"], arrays["image_index"], arrays["active_variances"]
    # the two images of each path stand at its ends, as floats as the path itself
    ends, paths = images[:, None] / np.float32(255), arrays["interpolations"]
    return {
        "samples.png": plots.image_grid(
            {mean: arrays["samples"], "draws from p(x|z), same z": arrays["samples_noise"]},
            caption=f"z from the prior N(0, I). {caption}",
            title="samples",
        ),
        "reconstructions.png": plots.reconstructions(
            images,
            {"its mean": arrays["reconstructions"], "a draw": arrays["reconstructions_draw"]},
            f"Test images, and the {mean} with z the mean of q(z|x), or one draw from it. "
            f"{caption}",
        ),
        "interpolations.png": plots.image_table(
            np.concatenate([ends[:-1], paths, ends[1:]], axis=1),
            [f"{a} → {b}" for a, b in pairwise(shown)],
            ["image", *(f"{t:.3g}" for t in np.linspace(0, 1, paths.shape[1])), "image"],
            ("test images", "position t on the path"),
            f"The {mean} on {path} paths between posterior means; t = 0 and t = 1 are the "
            f"reconstructions. {caption}",
        ),
        "traversals.png": plots.traversals(
            arrays["traversals"],
            arrays["traversal_values"],
            variances,
            f"The {mean} where one dimension varies and the others stay at the posterior mean of "
            f"test image {shown[0]}. {caption}",
        ),
        "active_units.png": plots.active_units_chart(
            variances, units["threshold"], f"N = {units['num_images']} test images. {caption}"
        ),
    }
