r"""The state of a training: everything that a checkpoint must hold."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_gpvae.core._seeds import random_state, set_random_state
from pyro_gpvae.training._batches import Batch, Batches
from pyro_gpvae.training.checkpoint import Checkpoint, check_extra_state, copy_tensors
from pyro_gpvae.training.step import TrainingStep

__all__ = ["TrainingState"]


class TrainingState:
    """The state of a training: everything that a checkpoint must hold.

    Arguments:
        training_step: The step, with its parameters, optimisers and counters.
        data: The training images.
        options: What a training that continues from a checkpoint must have in common with it.

    Attributes:
        epoch: The number of finished epochs.
        batch: The number of minibatches seen in this epoch.
        step: The number of steps made.
        rows: The history, one dictionary for each finished epoch.
        recent: The minibatches since :attr:`skips_seen` was read.
        skips_seen: The number of skipped updates when the device was last read.
    """

    def __init__(
        self, training_step: TrainingStep, data: Batches, options: Mapping[str, Any]
    ) -> None:
        for role, module in training_step.modules.items():
            check_extra_state(role, module)
        self.training_step = training_step
        self.data = data
        self.options = {**options, **_trained(training_step)}
        self.epoch = self.batch = self.step = self.skips_seen = 0
        self.rows: list[dict[str, float]] = []
        self.recent: list[Batch] = []
        self._generator = torch.Generator().manual_seed(self.options["seed"])
        self._start_of_epoch = self._generator.get_state()
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training, with those before the checkpoint it continues from."""
        return time.monotonic() - self._begin

    @property
    def skipped(self) -> int:
        """The number of updates that were not made; reads the device."""
        return int(self.training_step.counters.skipped)

    def batches(self) -> Iterator[Batch]:
        """Iterates over the minibatches that are left in this epoch."""
        for batch in self.data.epoch(self._generator, skip=self.batch):
            self.batch += 1
            self.step += 1
            self.recent.append(batch)
            yield batch

    def end_epoch(self) -> float:
        """Starts the next epoch, and returns the mean loss of this one; reads the device."""
        counters = self.training_step.counters
        seen = int(counters.seen)
        mean = float(counters.loss) / seen if seen else math.nan
        counters.start_epoch()
        self.epoch += 1
        self.batch = 0
        self._start_of_epoch = self._generator.get_state()
        return mean

    def capture(self) -> Checkpoint:
        """Returns the state, to be written at once: its tensors are not copies."""
        step = self.training_step
        state = {
            "options": self.options,
            "weights": _parameters(step),
            "buffers": _buffers(step),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in step.optimizers],
            "random": {**random_state(step.device), "permutations": self._start_of_epoch},
            "counters": [float(getattr(step.counters, name)) for name in _COUNTERS],
            "position": [self.epoch, self.batch],
            "seconds": self.seconds,
            "rows": self.rows,
        }
        return Checkpoint(self.step, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Sets the state that :meth:`capture` returned.

        Raises:
            ValueError: If the checkpoint is of another training, or inconsistent.
        """
        name = f"the checkpoint of step {checkpoint.step}"
        try:
            self._check_options(checkpoint.state["options"], name)
            self._restore_weights(checkpoint.state["weights"], name)
            self._restore_buffers(checkpoint.state["buffers"])
            self._restore_optimizers(checkpoint.state["optimizers"])
            self._restore_position(checkpoint)
            self._restore_random(dict(checkpoint.state["random"]))
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"{name} is inconsistent: {error!r}; delete it") from error

    def _check_options(self, options: Mapping[str, Any], name: str) -> None:
        for option, wanted in self.options.items():
            if options[option] != wanted:
                raise ValueError(
                    f"{name} is of another training: its {option} is {options[option]}, "
                    f"not {wanted}"
                )

    def _restore_weights(self, saved: Mapping[str, Tensor], name: str) -> None:
        expected = _parameters(self.training_step)
        for key in saved.keys() & expected.keys():
            if saved[key].dtype != expected[key].dtype:
                raise ValueError(
                    f"{name} is of another training: {key} is {saved[key].dtype} there, "
                    f"{expected[key].dtype} here"
                )
        copy_tensors(saved, expected, name)

    def _restore_buffers(self, saved: Mapping[str, Tensor]) -> None:
        for key, buffer in _buffers(self.training_step).items():
            # a buffer that its program resizes by itself is left to the program
            if key in saved and saved[key].shape == buffer.shape:
                value = saved[key].to(buffer)
                if not torch.equal(buffer, value):  # an expanded one cannot be written to
                    buffer.copy_(value)

    def _restore_optimizers(self, saved: list[dict[int, dict[str, Tensor]]]) -> None:
        _require(len(saved) == len(self.training_step.optimizers), "moments of each optimiser")
        for optimizer, state in zip(self.training_step.optimizers, saved, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            for index, moments in state.items():
                _require(moments.keys() == {"step", "exp_avg", "exp_avg_sq"}, "moments of Adam")
                _require(moments["step"].shape == (), "a number of steps")
                for moment in ("exp_avg", "exp_avg_sq"):
                    fits = moments[moment].shape == parameters[index].shape
                    _require(fits, f"{moment} in the shape of its parameter")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _restore_position(self, checkpoint: Checkpoint) -> None:
        state, counters = checkpoint.state, self.training_step.counters
        epoch, batch = state["position"]
        _require(type(epoch) is type(batch) is int, "a position")
        _require(0 <= batch <= len(self.data), "a position")
        _require(epoch == len(state["rows"]), "one row an epoch")
        _require(len(state["counters"]) == len(_COUNTERS), "all counters")
        for name, value in zip(_COUNTERS, state["counters"], strict=True):
            getattr(counters, name).fill_(value)
        self.epoch, self.batch, self.step = epoch, batch, checkpoint.step
        self.rows = [dict(row) for row in state["rows"]]
        self.skips_seen = self.skipped
        self._begin = time.monotonic() - state["seconds"]

    def _restore_random(self, random: dict[str, Tensor]) -> None:
        device = self.training_step.device
        self._start_of_epoch = random.pop("permutations")
        self._generator.set_state(self._start_of_epoch)
        if device.type == "cuda" and "cuda" not in random:
            warnings.warn(
                "the checkpoint was written on another device: the training continues with other "
                "random numbers",
                stacklevel=4,
            )
        set_random_state(random, device)


_COUNTERS = ("loss", "seen", "skipped")


def _parameters(step: TrainingStep) -> dict[str, Tensor]:
    """All parameters by name, without gradients."""
    return {name: parameter.detach() for name, parameter in step.parameters.items()}


def _buffers(step: TrainingStep) -> dict[str, Tensor]:
    """All buffers by name, also those that are not persistent."""
    return {
        f"{role}.{name}": buffer
        for role, module in step.modules.items()
        for name, buffer in module.named_buffers()
    }


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise TypeError(f"expected {what}")


def _trained(step: TrainingStep) -> dict[str, Any]:
    """The objectives of a step with their options, and the names of what they train."""
    names = {id(p): name for name, p in step.parameters.items()}
    taken = inspect.signature(ELBO.__init__).parameters
    found: dict[str, Any] = {
        "objectives": [type(block.elbo).__name__ for block in step.blocks],
        "trained": [[names.get(id(p), "?") for p in block.parameters] for block in step.blocks],
    }
    for number, block in enumerate(step.blocks):
        for name, value in getattr(block.elbo, "__dict__", {}).items():
            # other attributes may be state, which is not part of a checkpoint
            if name in taken and isinstance(value, int | float | str | bool | None):
                found[f"objective {number}'s {name}"] = repr(value)
    return found
