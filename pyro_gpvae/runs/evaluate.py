r"""The evaluation of a run: its scores, a table with a row an image, and what its guide reports."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import new_folder, write_json, write_text
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import to_batch
from pyro_gpvae.evaluation import PARETO_LIMIT, WIDTHS, Evidence, log_evidence, reference_evidence
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import load_run, named_device, warm_guide

__all__ = ["diagnostics", "evaluate", "evaluate_run"]


def evaluate_run(
    folder: str | Path,
    guide: str | None = None,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
    test_images: int | None = None,
    chunk_size: int | None = None,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    reference: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_guide: bool = False,
) -> dict[str, Any]:
    """Evaluates a finished run again; as it stands, with exactly the recorded score.

    "Exactly" holds on the same device with the same number of threads, and versions of the
    libraries. Every argument but the first changes something: see :class:`pyro_gpvae.RunConfig`.

    Arguments:
        folder: The run folder.
        guide: Another guide over the run's decoder, such as "vlae:2"; it starts from the run's
            encoder if it takes a ``warm_start``, and from random weights otherwise. It is not
            trained.
        reference: For the first so many of the images, also the estimates of
            :func:`pyro_gpvae.reference_evidence`, which tell a better model from a better proposal.
        out: A folder to write ``record.json`` and ``scores.csv`` to.
        overwrite: Whether to replace an earlier evaluation there.
        trust_guide: Whether the run's guide may be code outside the registered guides.

    Returns:
        ``run``, ``guide``, ``trained_guide`` (the run's own), ``config``, ``data``, ``scores``,
        ``recorded`` (the scores of the run), ``diagnostics``, ``seconds``, versions, commit,
        device and threads, and ``reference`` if asked for.

    Raises:
        FileNotFoundError, ValueError: As :func:`pyro_gpvae.load_run`; or if an option is wrong.
        FileExistsError: If ``out`` is not empty.
    """
    run = load_run(folder, data=data, root=root, device=device, trust_guide=trust_guide)
    config = dataclasses.replace(
        run.config,
        guide=guide or run.config.guide,
        num_samples=run.config.num_samples if num_samples is None else num_samples,
        seed=run.config.seed if seed is None else seed,
        chunk_size=run.config.chunk_size if chunk_size is None else chunk_size,
    )
    config.check()
    target = named_device(config.device)
    program = run.guide
    if guide is not None:
        with seeded(config.seed, target):
            program = warm_guide(guide, run.model, run.guide)
        if isinstance(program, torch.nn.Module):
            program.to(target).eval()
    images = run.data.take(test=test_images).test
    if reference is not None and not 1 <= reference <= len(images):
        raise ValueError(f"reference must be 1 to {len(images)} test images, got {reference}")

    files = ("record.json", "scores.csv")
    with (
        nullcontext()
        if out is None
        else new_folder(out, overwrite=overwrite, files=files) as target_folder
    ):
        begin = time.monotonic()
        if target.type == "cpu":
            keep_freed_memory()
        scores, table = evaluate(run.model, program, images, config)
        config = dataclasses.replace(config, chunk_size=scores["chunk_size"])
        result = {
            "run": str(folder),
            "guide": config.guide,
            "trained_guide": run.config.guide,
            "config": dataclasses.asdict(config),
            "data": run.record["data"],
            **environment(target),
            "seconds": {"evaluation": time.monotonic() - begin},
            "scores": scores,
            "recorded": run.record["scores"],
            "diagnostics": diagnostics(program, images, target, run.record["data"]["train_images"]),
        }
        if reference is not None:
            begin = time.monotonic()
            result["reference"], columns = _reference(
                run.model, program, images[:reference], config
            )
            result["seconds"]["reference"] = time.monotonic() - begin
            table = table.join(columns)  # empty for the images that follow
        if target_folder is not None:
            write_text(target_folder / "scores.csv", table.to_csv(index=False))
            write_json(target_folder / "record.json", result)
    return result


def _reference(
    model: ImageModel, guide: Any, images: Tensor, config: RunConfig
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The means of all reference estimates over images, and their table with a row per image."""
    found = reference_evidence(
        model, images, guide, num_samples=config.num_samples, num_chains=8, num_steps=30,
        widths=WIDTHS, chunk_size=config.chunk_size, seed=config.seed,
    )  # fmt: skip
    rows = {
        name: {
            "log_evidence": float(value.mean()),
            "monte_carlo_error": float(error.square().sum().sqrt() / len(images)),
            "heavy_tails": int((k > PARETO_LIMIT).sum()),
        }
        for name, (value, error, k) in found.estimates.items()
    }
    has_width = f"IWAE({config.num_samples}), width c" in rows
    record = {
        "num_images": len(images),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "log_evidence": float(found.log_evidence.mean()),
        "not_trusted": int((~found.trusted).sum()),
        "mean_width": float(found.width.mean()) if has_width else None,
        "estimates": rows,
    }
    columns = {name: value.cpu().numpy() for name, (value, _, _) in found.estimates.items()}
    return record, pd.DataFrame(columns)


def evaluate(
    model: ImageModel, guide: Any, images: Tensor, config: RunConfig
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The scores of a record, and a table with a row for each image."""
    evidence = log_evidence(
        model, guide, images, config.num_samples, chunk_size=config.chunk_size, seed=config.seed
    )
    table = _table(evidence)
    if hasattr(guide, "uncertainty"):
        table["uncertainty"] = _uncertainty(guide, images, named_device(config.device)).numpy()
    scores = {
        "elbo": float(evidence.elbo.mean()),
        "log_evidence": evidence.mean,
        "monte_carlo_error": evidence.monte_carlo_error,
        "sampling_error": evidence.sampling_error if len(images) > 1 else None,
        "median_log_evidence": float(evidence.log_evidence.quantile(0.5)),
        "mean_effective_sample_size": float(evidence.effective_sample_size.mean()),
        "num_images": len(images),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "chunk_size": evidence.chunk_size,
    }
    return scores, table


def _table(evidence: Evidence) -> pd.DataFrame:
    names = ("log_evidence", "standard_error", "effective_sample_size", "elbo")
    table = pd.DataFrame({name: getattr(evidence, name).cpu().numpy() for name in names})
    table.insert(0, "image", range(len(table)))
    return table


@torch.no_grad()
def _uncertainty(guide: Any, images: Tensor, device: torch.device) -> Tensor:
    """The inference uncertainty of uint8 images (N, C, H, W): shape (N,), on the CPU."""
    chunks = [guide.uncertainty(to_batch(x, guide)).cpu() for x in images.split(512)]
    return torch.cat(chunks)


@torch.no_grad()
def diagnostics(
    guide: Any, images: Tensor, device: torch.device, num_train: int
) -> dict[str, float]:
    """What the guide reports on up to 512 test images, and KL(q(W, U) ‖ p)/N in nats."""
    if not hasattr(guide, "diagnostics"):
        return {}
    found = guide.diagnostics(to_batch(images[:512], guide))
    values = {name: float(value) for name, value in found.items()}
    if "kl_weights" in values:
        values["kl_weights_per_image"] = values["kl_weights"] / num_train
    return values
