r"""The training loop: epochs, minibatches and checkpoints."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch.utils.data import DataLoader

from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._float32 import without_autocast
from pyro_gpvae.core._programs import PyroProgram, own_parameters
from pyro_gpvae.core._progress import progress_bar
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.core._signals import Interrupts, stopped
from pyro_gpvae.data.batch import Data, batch_of, take, to_batch
from pyro_gpvae.model.guide import check_program_data
from pyro_gpvae.training._batches import Batches, LoaderBatches, TensorBatches
from pyro_gpvae.training._divergence import check_updates
from pyro_gpvae.training._history import History, end_epoch
from pyro_gpvae.training._parameters import knows_members, modules_by_role
from pyro_gpvae.training._state import TrainingState
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.step import StepOptions, TrainingStep

__all__ = ["FitOptions", "History", "fit"]

logger = logging.getLogger(__name__)

#: The number of steps between readings of a GPU, each of which makes it wait for the host.
READ_EVERY = 100


class FitOptions(StepOptions, total=False):
    """Further options of :func:`fit`.

    Attributes:
        progress: Whether to show a progress bar on a terminal or in a notebook, and elsewhere log
            each epoch at the level INFO; a text is the label. True by default.
        callbacks: Functions that are called after each epoch with its row of the history, such as
            ``lambda row: writer.add_scalar("loss", row["loss"], row["step"])`` for TensorBoard.
            Both programs are in evaluation mode then. An exception ends the training.
    """

    progress: bool | str
    callbacks: Sequence[Callable[[Mapping[str, float]], object]]


def fit(
    model: PyroProgram,
    guide: PyroProgram,
    data: Data | DataLoader[Any],
    *,
    epochs: int,
    batch_size: int = 128,
    validation: Data | None = None,
    keep_best: bool = False,
    seed: int = 0,
    checkpoints: Checkpoints | str | Path | None = None,
    **options: Unpack[FitOptions],
) -> History:
    r"""Trains a model and a guide by Adam on eq. (2), in place.

    Training happens on the device of their parameters, and leaves both in evaluation mode. The same
    seed gives the same run, and the global random state is left as it was. An enclosing
    ``torch.autocast`` is switched off, because it would keep copies of weights from before an
    update. Other threads that train or evaluate wait.

    With ``checkpoints`` a training can be killed at any moment, and SIGINT and SIGTERM end it after
    the present step. With ``Checkpoints(folder, resume=True)`` it continues, and ends bit for bit
    (except ``seconds``) as if it was never stopped, on the same device with the same number of
    threads, on CUDA in torch's deterministic mode. Plain Python attributes of an objective or a
    guide are not part of a checkpoint.

    Arguments:
        model: A Pyro model, such as :class:`pyro_gpvae.ImageModel`.
        guide: A Pyro guide; see :mod:`pyro_gpvae.model.guide` for what both may be.
        data: Training data, a tensor (N, ...) or a tuple of tensors with which the programs are
            called, ``model(*batch)``: uint8 images become floats in [0, 1], other values are taken
            as they are. Or a ``torch.utils.data.DataLoader``, which decides the batch size and the
            order.
        epochs: How often each image is seen, each time in a new random order.
        batch_size: The number of images in a step.
        validation: Data of the same kind, whose ELBO is logged after each epoch.
        keep_best: Whether to end with the parameters and buffers of the epoch with the highest
            ELBO of the validation data, instead of those of the last epoch.
        seed: The seed of the permutations and of the samples.
        checkpoints: Where and how often to write checkpoints; a folder alone means every 5
            minutes. One is written before the first step and one at the end.
        options: ``progress`` and ``callbacks``, see :class:`FitOptions`, and the options of
            :class:`pyro_gpvae.training.TrainingStep`, such as ``learning_rate=5e-4``.

    Returns:
        The history, with one row an epoch: ``epoch``, ``step``, ``loss`` (the mean over the epoch's
        images, nats per image), the terms of eq. (2) on up to 512 training images (see
        :func:`pyro_gpvae.elbo_terms`), ``sigma``, the guide's diagnostics (after ``guide_`` if
        they are named like one of these columns), ``validation_elbo`` (per image, without the KL
        of global sites), ``skipped`` (updates so far), and ``seconds``.

    Raises:
        TypeError: If the data are something else, such as a list.
        ValueError: If an argument, the programs (see :class:`TrainingStep`) or the checkpoint
            cannot be used.
        RuntimeError: Inside ``torch.inference_mode()``.
        FileExistsError, InUseError: If the folder has the checkpoint of another training.
        NonFiniteError: If the loss or a gradient becomes NaN or infinite; names the step, the
            term, the images and the last checkpoint.
        KeyboardInterrupt, Terminated: With checkpoints, after SIGINT or SIGTERM.
    """
    epochs, seed = operator.index(epochs), operator.index(seed)
    progress, callbacks = options.pop("progress", True), options.pop("callbacks", ())
    step = cast(StepOptions, options)
    check_at_least(1, epochs=epochs)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit needs gradients: call it outside of torch.inference_mode()")
    batches = _load(data, batch_size, model, guide)
    if validation is not None:
        check_program_data(model, validation, "validation")
    elif keep_best:
        raise ValueError("keep_best chooses an epoch by the validation data: pass validation=")
    if isinstance(checkpoints, str | Path):
        checkpoints = Checkpoints(checkpoints)
    label = progress if isinstance(progress, str) else "training"
    num_steps = epochs * len(batches)
    device = to_batch(take(batches.sample, slice(1)), model, guide)[0].device
    if device.type == "cpu":
        keep_freed_memory()

    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device))
        stack.enter_context(own_parameters(model, guide))
        stack.enter_context(without_autocast())
        stack.enter_context(torch.enable_grad())
        interrupts = stack.enter_context(Interrupts() if checkpoints else nullcontext())
        for module in modules_by_role(model, guide).values():
            stack.callback(module.eval)
        if checkpoints:
            stack.enter_context(checkpoints.in_use())
        shown = None if progress else False
        bar = stack.enter_context(progress_bar(shown, label, num_steps, unit="step"))
        first = take(batches.sample, slice(batches.batch_size))
        make_step = TrainingStep(
            model, guide, first, batches.num_images, num_steps=num_steps, **step
        )
        if knows_members(guide, make_step.parameters, batches.num_images):
            batches.keep_order()
        for optimizer in make_step.optimizers:
            stack.callback(optimizer.zero_grad)
        if batches.last_size == 1:
            make_step.check_single(first)
        common = {
            "learning_rate": float(step.get("learning_rate", 5e-4)),
            "learning_rates": make_step.learning_rates,
            "source": batches.source,
            "data": batches.hash(),
            "keep_best": keep_best,
        }
        state = TrainingState(make_step, batches, seed, common)
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
                make_step(batch.data)
                bar.update()
                signal = interrupts.signal if interrupts else None
                save = checkpoints and (signal or checkpoints.due(state.step))
                if save or state.step % _read_interval(device) == 0:
                    check_updates(state, checkpoints)
                if checkpoints and save:
                    checkpoints.save(state.capture())
                if signal:
                    raise stopped(signal, f"stopped after step {state.step}")
            check_updates(state, checkpoints)
            make_step.train(False)  # evaluation must not change running statistics
            row = end_epoch(state, validation, checkpoints)
            state.rows.append(row)
            if keep_best:
                state.keep_if_best(row["validation_elbo"])
            loss = f"{row['loss']:.1f}"
            bar.set_postfix(epoch=state.epoch, loss=loss)
            if progress and bar.disable:  # standard error is no terminal
                logger.info("%s: epoch %d of %d, loss %s", label, state.epoch, epochs, loss)
            if checkpoints and state.epoch == epochs:
                checkpoints.save(state.capture())
            for callback in callbacks:
                callback(dict(row))
        best = state.restore_best() if keep_best else None
    return History(state.rows, make_step.backend, best)


def _load(
    data: Data | DataLoader[Any], batch_size: int, model: PyroProgram, guide: PyroProgram
) -> Batches:
    """The minibatches of tensors, which are moved to the device of the training, or of a loader."""
    if isinstance(data, DataLoader):
        loaded = LoaderBatches(data)
        check_program_data(model, loaded.sample)
        return loaded
    check_program_data(model, data)
    device = to_batch(take(data, slice(1)), model, guide)[0].device
    tensors = tuple(tensor.to(device) for tensor in batch_of(data))
    return TensorBatches(tensors, operator.index(batch_size))


def _read_interval(device: torch.device) -> int:
    return 1 if device.type == "cpu" else READ_EVERY
