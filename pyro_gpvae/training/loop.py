r"""The training loop: epochs, minibatches, checkpoints and the history."""

from __future__ import annotations

import logging
import operator
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._programs import PyroProgram, own_parameters
from pyro_gpvae.core._seeds import preserve_rng, seeded
from pyro_gpvae.core._signals import Interrupts, stopped
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.model.elbo import elbo_terms
from pyro_gpvae.model.guide import HasDiagnostics
from pyro_gpvae.training._batches import SAMPLE_SIZE, Batches, LoaderBatches, TensorBatches
from pyro_gpvae.training._divergence import explain
from pyro_gpvae.training._state import TrainingState
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.step import Backend, StepOptions, TrainingStep

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "fit"]

logger = logging.getLogger(__name__)

#: The number of steps between readings of a GPU, each of which makes it wait for the host.
READ_EVERY = 100
#: With ``on_nonfinite="skip"``, the training stops when more updates than this were skipped.
MAX_SKIPPED = 100
#: The columns of a history, apart from the guide's diagnostics.
COLUMNS = [
    *("epoch", "step", "loss", "log_likelihood", "kl_z", "kl_global", "sigma", "validation_elbo"),
    *("skipped", "seconds"),
]


@dataclass
class History:
    """One row for each epoch of a training, see :func:`fit`, and how its steps were made."""

    rows: list[dict[str, float]] = field(default_factory=list)
    backend: Backend = "eager"

    def frame(self) -> pd.DataFrame:
        """Returns the rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def fit(
    model: PyroProgram,
    guide: PyroProgram,
    images: Tensor | DataLoader[Any],
    *,
    epochs: int,
    batch_size: int = 128,
    validation: Tensor | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | str | Path | None = None,
    progress: bool | str = True,
    **step: Unpack[StepOptions],
) -> History:
    r"""Trains a model and a guide on images by Adam on eq. (2), in place.

    Training happens on the device of their parameters, and leaves both in evaluation mode. The same
    seed gives the same run, and the global random state is left as it was.

    With ``checkpoints`` a training can be killed at any moment, and SIGINT and SIGTERM end it after
    the present step. With ``Checkpoints(folder, resume=True)`` it continues, and ends bit for bit
    (except ``seconds``) as if it was never stopped, on the same device with the same number of
    threads, on CUDA in torch's deterministic mode. Plain Python attributes of an objective or a
    guide are not part of a checkpoint.

    Arguments:
        model: A Pyro model, such as :class:`pyro_gpvae.ImageModel`.
        guide: A Pyro guide; see :mod:`pyro_gpvae.model.guide` for its optional methods.
        images: Training images, uint8 (N, C, H, W) or floats in [0, 1]; or a
            ``torch.utils.data.DataLoader``, which decides the batch size and the order.
        epochs: How often each image is seen, each time in a new random order.
        batch_size: The number of images in a step.
        validation: Images, whose ELBO is logged after each epoch.
        seed: The seed of the permutations and of the samples.
        checkpoints: Where and how often to write checkpoints; a folder alone means every 5
            minutes. One is written before the first step and one at the end.
        progress: Whether to show a progress bar on a terminal, or else log each epoch at the level
            INFO; a text is the label.
        step: Options of :class:`pyro_gpvae.training.TrainingStep`, such as ``learning_rate=5e-4``.

    Returns:
        The history, with one row an epoch: ``epoch``, ``step``, ``loss`` (the mean over the epoch's
        images, nats per image), the terms of eq. (2) on up to 512 training images (see
        :func:`pyro_gpvae.elbo_terms`), ``sigma``, the guide's diagnostics (after ``guide_`` if
        they are named like one of these columns), ``validation_elbo`` (per image, without the KL
        of global sites), ``skipped`` (updates so far), and ``seconds``.

    Raises:
        ValueError: If an argument, the programs (see :class:`TrainingStep`) or the checkpoint
            cannot be used.
        FileExistsError, InUseError: If the folder has the checkpoint of another training.
        NonFiniteError: If the loss or a gradient becomes NaN or infinite; names the step, the
            term, the images and the last checkpoint.
        KeyboardInterrupt, Terminated: With checkpoints, after SIGINT or SIGTERM.
    """
    epochs, seed = operator.index(epochs), operator.index(seed)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    data = _load(images, batch_size, model, guide)
    if validation is not None:
        _check_images(validation, model, "validation")
    if isinstance(checkpoints, str | Path):
        checkpoints = Checkpoints(checkpoints)
    on_nonfinite = step.get("on_nonfinite", "stop")
    label = progress if isinstance(progress, str) else "training"
    num_steps = epochs * len(data)
    device = to_batch(data.sample[:1], model, guide)[0].device
    modules = [program for program in (model, guide) if isinstance(program, torch.nn.Module)]
    if device.type == "cpu":
        keep_freed_memory()

    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device))
        stack.enter_context(own_parameters(*modules))
        interrupts = stack.enter_context(Interrupts() if checkpoints else nullcontext())
        for module in modules:
            stack.callback(module.eval)
        if checkpoints:
            stack.enter_context(checkpoints.in_use())
        bar = stack.enter_context(
            tqdm(total=num_steps, desc=label, disable=None if progress else True)
        )
        first = data.sample[: data.batch_size]
        make_step = TrainingStep(model, guide, first, data.num_images, num_steps=num_steps, **step)
        for optimizer in make_step.optimizers:
            stack.callback(optimizer.zero_grad)
        options = {
            "learning_rate": float(step.get("learning_rate", 5e-4)),
            "learning_rates": make_step.learning_rates,
            "images": sha256(images if isinstance(images, Tensor) else data.sample),
        }
        state = TrainingState(make_step, data, seed, options)
        if checkpoints:
            saved = checkpoints.latest() if checkpoints.resume else None
            if saved is None:
                checkpoints.save(state.capture())
            else:
                state.restore(saved)
                bar.update(state.step)
        if state.epoch > epochs:
            raise ValueError(f"the checkpoint has {state.epoch} epochs, more than epochs={epochs}")

        while state.epoch < epochs:
            make_step.train(True)
            for batch in state.batches():
                make_step(batch.images)
                bar.update()
                signal = interrupts.signal if interrupts else None
                save = checkpoints and (signal or checkpoints.due(state.step))
                if save or state.step % _read_interval(device) == 0:
                    _check_updates(state, checkpoints, on_nonfinite)
                if checkpoints and save:
                    checkpoints.save(state.capture())
                if signal:
                    raise stopped(signal, f"stopped after step {state.step}")
            _check_updates(state, checkpoints, on_nonfinite)
            make_step.train(False)  # evaluation must not change running statistics
            state.rows.append(_end_epoch(state, validation, checkpoints, on_nonfinite))
            loss = f"{state.rows[-1]['loss']:.1f}"
            bar.set_postfix(epoch=state.epoch, loss=loss)
            if progress and bar.disable:  # standard error is no terminal
                logger.info("%s: epoch %d of %d, loss %s", label, state.epoch, epochs, loss)
            if checkpoints and state.epoch == epochs:
                checkpoints.save(state.capture())
    return History(state.rows, make_step.backend)


def _load(
    images: Tensor | DataLoader[Any], batch_size: int, model: PyroProgram, guide: PyroProgram
) -> Batches:
    """The minibatches of a tensor, which is moved to the device of the training, or of a loader."""
    if isinstance(images, DataLoader):
        data = LoaderBatches(images)
        _check_images(data.sample, model, "images")
        return data
    _check_images(images, model, "images")
    device = to_batch(images[:1], model, guide)[0].device
    return TensorBatches(images.to(device), operator.index(batch_size))


def _check_images(images: Tensor, model: PyroProgram, name: str) -> None:
    if not isinstance(images, Tensor):
        kinds = "a torch.Tensor" if name == "validation" else "a torch.Tensor or a DataLoader"
        raise TypeError(f"{name} must be {kinds}, got {type(images).__name__}")
    if images.numel() == 0:
        raise ValueError(f"{name} must hold at least one image, got shape {tuple(images.shape)}")
    if hasattr(model, "check_images"):
        model.check_images(images)


def _read_interval(device: torch.device) -> int:
    return 1 if device.type == "cpu" else READ_EVERY


def _check_updates(state: TrainingState, checkpoints: Checkpoints | None, action: str) -> None:
    """Reads the device: stops the training, or warns, if an update was not finite."""
    recent, state.recent = state.recent, []
    skipped = state.skipped
    if skipped == state.skips_seen:
        return
    step = state.training_step
    late, block = 0, 0
    if step.counters.halt:  # nothing was updated after the first one
        later = skipped - state.skips_seen - 1
        late, block = later // len(step.blocks), len(step.blocks) - 1 - later % len(step.blocks)
    if action == "stop" or skipped > MAX_SKIPPED:
        batch = recent[-1 - late]
        x = to_batch(batch.images, step.model, step.guide)[0]
        with preserve_rng(step.device, list(step.buffers.values())):
            error = explain(step, block, state.step - late, x, batch.numbers)
        raise _with_advice(error, skipped, checkpoints)
    if not state.skips_seen:
        message = f"the loss or its gradient is not finite at step {state.step}: "
        warnings.warn(f"{message}this update is skipped; the history counts them", stacklevel=3)
    state.skips_seen = skipped


def _with_advice(
    error: NonFiniteError, skipped: int, checkpoints: Checkpoints | None
) -> NonFiniteError:
    """The error, with what happened before it and what can be done."""
    advice = f", after {skipped - 1} skipped updates" if skipped > 1 else ""
    if checkpoints and checkpoints.last_step is not None:
        last, folder = checkpoints.last_step, checkpoints.folder
        advice += f". The last good checkpoint is of step {last}, in {folder}"
    advice += ". A smaller learning rate, or float64, often helps."
    return NonFiniteError(f"{error}{advice}", error.step, error.images)


def _end_epoch(
    state: TrainingState, validation: Tensor | None, checkpoints: Checkpoints | None, action: str
) -> dict[str, float]:
    """Ends an epoch, and returns its row of the history."""
    row: dict[str, float] = {"epoch": state.epoch + 1, "step": state.step}
    row["loss"] = state.end_epoch()
    try:
        # seeded: evaluation must not change the training's random numbers
        with seeded(state.options["seed"], state.training_step.device), nonfinite_as_error():
            row |= _terms(state, validation)
    except NonFiniteError as error:
        if action == "stop":
            found = NonFiniteError(f"not finite after step {state.step}: {error}", state.step)
            raise _with_advice(found, state.skipped, checkpoints) from error
    return row | {"skipped": state.skipped, "seconds": state.seconds()}


def _terms(state: TrainingState, validation: Tensor | None) -> dict[str, float]:
    """The terms of eq. (2), σ, and the guide's diagnostics, on some training images."""
    model, guide = state.training_step.model, state.training_step.guide
    num_images = state.data.num_images
    x = to_batch(state.data.sample[:SAMPLE_SIZE], model, guide)[0]
    row = elbo_terms(model, guide, x, num_images)
    sigma = getattr(model, "sigma", None)
    if sigma is not None:
        row["sigma"] = float(sigma.detach())
    if isinstance(guide, HasDiagnostics):
        with torch.no_grad():
            for name, value in guide.diagnostics(x).items():
                row[f"guide_{name}" if name in COLUMNS else name] = float(value)
    if validation is not None:
        row["validation_elbo"] = 0.0
        for part in validation.split(SAMPLE_SIZE):
            terms = elbo_terms(model, guide, to_batch(part, model, guide)[0], num_images)
            bound = terms["log_likelihood"] - terms["kl_z"]
            row["validation_elbo"] += len(part) / len(validation) * bound
    return row
