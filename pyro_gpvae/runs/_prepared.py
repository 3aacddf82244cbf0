"""A run before and after its training: images, model and guide, and the files of its folder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_gpvae.core._environment import environment, sha256
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._files import write_json, write_text
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import ImageData, split_validation
from pyro_gpvae.model.guide import make_guide
from pyro_gpvae.model.image_model import ImageModel, initial_sigma
from pyro_gpvae.model.networks import ImageShape, autocast_networks
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import diagnostics, evaluate
from pyro_gpvae.runs.folder import (
    FORMAT,
    Run,
    build_model,
    load_images,
    memory_as_error,
    named_device,
    warm_guide,
)
from pyro_gpvae.runs.weights import save_weights
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.loop import History, fit

__all__ = ["PreparedRun", "prepare"]


@dataclass
class PreparedRun:
    """A run whose images are loaded and whose model and guide are built.

    Attributes:
        config: The options, with the device filled in.
        data: The images that the options ask for.
        train_images: The training images that are not held out.
        validation: The images that are held out.
        model: The model.
        guide: The guide.
        start: The run it starts from.
    """

    config: RunConfig
    data: ImageData
    train_images: Tensor
    validation: Tensor | None
    model: ImageModel
    guide: torch.nn.Module
    start: Run | None

    def begun_with(self) -> dict[str, str]:
        """Returns the SHA-256 of what must not change until the run is finished."""
        hashes = {
            "train images": sha256(self.data.train),
            "test images": sha256(self.data.test),
        }
        if self.start is not None:
            hashes["warm start"] = self.start.weights_sha256
        return hashes

    def train(self, progress: bool | str, checkpoints: Checkpoints | None = None) -> History:
        """Trains model and guide as the options say."""
        config = self.config
        low = config.precision == "bf16"
        with autocast_networks(torch.bfloat16) if low else nullcontext():
            return fit(
                self.model,
                self.guide,
                self.train_images,
                epochs=config.epochs,
                batch_size=config.batch_size,
                validation=self.validation,
                seed=config.seed,
                checkpoints=checkpoints,
                progress=config.guide if progress is True else progress,
                learning_rate=config.learning_rate,
                learning_rates=None
                if config.sigma_learning_rate is None
                else {"model.log_sigma": config.sigma_learning_rate},
                backend=config.backend,
                on_nonfinite=config.on_nonfinite,
            )

    def finish(
        self, folder: Path, trained: History, plan: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Evaluates the trained guide, writes the files of the run, and returns the record."""
        data, model, guide = self.data, self.model, self.guide
        history = trained.frame()
        write_text(folder / "history.csv", history.to_csv(index=False))
        self._check_finite(folder, loss=history["loss"].iloc[-1])
        begin = time.monotonic()
        scores, table = evaluate(model, guide, data.test, self.config)
        self._check_finite(folder, elbo=scores["elbo"], log_evidence=scores["log_evidence"])
        config = dataclasses.replace(self.config, chunk_size=scores["chunk_size"])
        record: dict[str, Any] = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "data": {
                "name": data.name,
                "note": data.note,
                "image_shape": list(data.image_shape),
                "train_images": len(self.train_images),
                "validation_images": config.validation,
                "test_images": len(data.test),
                "train_sha256": sha256(data.train),
                "test_sha256": sha256(data.test),
            },
            **environment(named_device(config.device)),
            "backend": trained.backend,
            "steps": int(history["step"].iloc[-1]),
            "seconds": {
                "training": float(history["seconds"].iloc[-1]),
                "evaluation": time.monotonic() - begin,
            },
            "scores": scores,
            "sigma": None if model.sigma is None else float(model.sigma.detach()),
            "diagnostics": diagnostics(guide, data.test, len(self.train_images)),
        }
        if self.start is not None:  # so that the record alone tells how to repeat the run
            record["warm_start"] = self.start.record
        if plan is not None:
            record["plan"] = dict(plan)
        record["weights_sha256"] = save_weights(folder / "weights.safetensors", model, guide)
        write_text(folder / "scores.csv", table.to_csv(index=False))
        write_json(folder / "config.json", dataclasses.asdict(config))
        write_json(folder / "record.json", record)
        return record

    def _check_finite(self, folder: Path, **values: float) -> None:
        """Refuses to record numbers that are not finite: with "skip", a training may diverge."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the training of {self.config.guide!r} diverged: its {name} is {value}, see "
                    f"{folder / 'history.csv'}. Train again (--overwrite), with a smaller learning "
                    "rate"
                )


def prepare(config: RunConfig, start: Run | None, data: ImageData) -> PreparedRun:
    """Builds model and guide of a run.

    Arguments:
        config: The options.
        start: The run it starts from.
        data: The whole data set that the options name.

    Raises:
        ValueError: If an option is wrong, or the warm start does not fit.
    """
    config.check()
    device = named_device(config.device)
    config = dataclasses.replace(config, device=str(device))
    data = load_images(config, data)
    train, validation = data.train, None
    if config.validation:
        train, validation = split_validation(data.train, config.validation)
    if start is not None:
        _check_start(config, data.image_shape, start)
    with seeded(config.seed, device), memory_as_error(config):
        model = build_model(config, data.image_shape, initial_sigma(train))
        if start is None:
            guide = make_guide(config.guide, model)
        else:
            model.load_state_dict(start.model.state_dict())
            guide = warm_guide(config.guide, model, start.guide)
    model.requires_grad_(not config.freeze_decoder)
    if not isinstance(guide, torch.nn.Module):
        raise ValueError(
            f"the guide {config.guide!r} is a {type(guide).__name__}, expected a "
            "torch.nn.Module or PyroModule: only a module's weights can be saved"
        )
    model, guide = model.to(device), guide.to(device)
    return PreparedRun(config, data, train, validation, model, guide, start)


def _check_start(config: RunConfig, image_shape: ImageShape, start: Run) -> None:
    for name in ("latent_dim", "decoder", "likelihood"):
        ours, theirs = getattr(config, name), getattr(start.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours!r}, but the warm start {start.folder} has {theirs!r}: "
                "the model starts from its weights, so they must agree"
            )
    if tuple(image_shape) != start.model.image_shape:
        raise ValueError(
            f"the images of {config.data!r} have shape {tuple(image_shape)}, but the warm start "
            f"{start.folder} was trained on {start.model.image_shape}"
        )
