"""The evaluation of a run: its scores, also per image, and the diagnostics of its guide."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
from torch import Tensor

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import check_replaceable, write_json, write_text
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation import PARETO_LIMIT, WIDTHS, log_evidence, reference_evidence
from pyro_gpvae.model.guide import HasDiagnostics, HasUncertainty
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Place, load_run, named_device, warm_guide

__all__ = ["diagnostics", "evaluate", "evaluate_run"]


def evaluate_run(
    folder: str | Path,
    guide: str | None = None,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
    test_images: int | None = None,
    chunk_size: int | None = None,
    reference: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **place: Unpack[Place],
) -> dict[str, Any]:
    """Evaluates a finished run again; without further arguments, with exactly the recorded score.

    The score is the same on the same device with the same number of threads and the same versions
    of the libraries.

    Arguments:
        folder: The run folder.
        guide: Another guide for the run's decoder, such as "vlae:2"; it starts from the run's
            encoder if it takes a ``warm_start``, and from random weights otherwise. It is not
            trained.
        num_samples, seed, chunk_size: See :class:`pyro_gpvae.RunConfig`; None is as recorded.
        test_images: The number of the run's test images to use, from the first on; None is all.
        reference: For the first so many of them, also the estimates of
            :func:`pyro_gpvae.reference_evidence`, which tell a better model from a better proposal.
        out: A folder to write ``record.json`` and ``scores.csv`` to.
        overwrite: Whether to replace an earlier evaluation there.
        progress: Whether to show progress bars.
        place: See :class:`pyro_gpvae.runs.folder.Place`.

    Returns:
        ``run``, ``guide``, ``trained_guide`` (the run's own), ``config``, ``data``, ``scores``,
        ``recorded`` (the scores of the run), ``diagnostics``, ``seconds``, versions, commit,
        device and threads, and ``reference`` if asked for.

    Raises:
        FileNotFoundError: As :func:`pyro_gpvae.load_run`.
        ValueError: As :func:`pyro_gpvae.load_run`, or if an option is wrong.
        FileExistsError: If ``out`` is not empty.
    """
    run = load_run(folder, **place)
    own = run.config
    given = {"guide": guide, "num_samples": num_samples, "seed": seed, "chunk_size": chunk_size}
    given["test_images"] = test_images
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(own, **given)  # type: ignore[arg-type]
    config.check()
    config = dataclasses.replace(config, test_images=own.test_images)  # the options of the run
    device = named_device(config.device)
    program = run.guide
    if guide is not None:
        with seeded(config.seed, device):
            program = warm_guide(guide, run.model, run.guide)
        if isinstance(program, torch.nn.Module):
            program.to(device).eval()
    images = run.data.take(test=test_images).test
    if reference is not None and not 1 <= reference <= len(images):
        raise ValueError(f"reference must be 1 to {len(images)} test images, got {reference}")

    if out is not None:
        out = Path(out).expanduser()
        check_replaceable(out, overwrite, ("record.json", "scores.csv"))
        out.mkdir(parents=True, exist_ok=True)  # fails before the work
    begin = time.monotonic()
    scores, table = evaluate(run.model, program, images, config, progress)
    config = dataclasses.replace(config, chunk_size=scores["chunk_size"])
    result = {
        "run": str(folder),
        "guide": config.guide,
        "trained_guide": own.guide,
        "config": dataclasses.asdict(config),
        "data": run.record["data"],
        **environment(device),
        "seconds": {"evaluation": time.monotonic() - begin},
        "scores": scores,
        "recorded": run.record["scores"],
        "diagnostics": diagnostics(program, images, run.record["data"]["train_images"]),
    }
    if reference is not None:
        begin = time.monotonic()
        shown = images[:reference]
        found, columns = _reference(run.model, program, shown, config, progress)
        result["reference"] = found
        result["seconds"]["reference"] = time.monotonic() - begin
        table = table.join(columns)  # empty for the images that follow
    if out is not None:
        write_text(out / "scores.csv", table.to_csv(index=False))
        write_json(out / "record.json", result)
    return result


def _reference(
    model: ImageModel, guide: Any, images: Tensor, config: RunConfig, progress: bool
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Returns the means of all reference estimates, and a table with one row per image."""
    found = reference_evidence(
        model, images, guide, num_samples=config.num_samples, num_chains=8, num_steps=30,
        widths=WIDTHS, chunk_size=config.chunk_size, seed=config.seed, progress=progress,
    )  # fmt: skip
    rows = {
        name: {
            "log_evidence": float(value.mean()),
            "monte_carlo_error": float(error.square().sum().sqrt() / len(images)),
            "heavy_tails": int((k > PARETO_LIMIT).sum()),
        }
        for name, (value, error, k) in found.estimates.items()
    }
    record = {
        "num_images": len(images),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "log_evidence": float(found.log_evidence.mean()),
        "not_trusted": int((~found.trusted).sum()),
        "mean_width": None,
        "estimates": rows,
    }
    if any(name.endswith("width c") for name in rows):
        record["mean_width"] = float(found.width.mean())
    columns = {name: value.cpu().numpy() for name, (value, _, _) in found.estimates.items()}
    return record, pd.DataFrame(columns)


def evaluate(
    model: ImageModel, guide: Any, images: Tensor, config: RunConfig, progress: bool = False
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Returns the scores of a record, and a table with one row per image."""
    evidence = log_evidence(
        model,
        guide,
        images,
        config.num_samples,
        chunk_size=config.chunk_size,
        seed=config.seed,
        progress=progress,
    )
    names = ("log_evidence", "standard_error", "effective_sample_size", "elbo")
    table = pd.DataFrame({name: getattr(evidence, name).cpu().numpy() for name in names})
    table.insert(0, "image", range(len(table)))
    if isinstance(guide, HasUncertainty):
        with torch.no_grad():
            parts = [guide.uncertainty(to_batch(x, guide)[0]).cpu() for x in images.split(512)]
        table["uncertainty"] = torch.cat(parts).numpy()
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


@torch.no_grad()
def diagnostics(guide: Any, images: Tensor, num_train: int) -> dict[str, float]:
    """Returns the guide's diagnostics on up to 512 test images, and KL(q(W, U) ‖ p)/N in nats."""
    if not isinstance(guide, HasDiagnostics):
        return {}
    found = guide.diagnostics(to_batch(images[:512], guide)[0])
    values = {name: float(value) for name, value in found.items()}
    if "kl_weights" in values:
        values["kl_weights_per_image"] = values["kl_weights"] / num_train
    return values
