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
from pyro_gpvae.training._batches import Batches, Minibatch
from pyro_gpvae.training.checkpoint import Checkpoint, check_extra_state, copy_tensors
from pyro_gpvae.training.step import TrainingStep


class TrainingState:
    """The state of a training, for the minibatches ``data``.

    ``options`` is what a training that continues from a checkpoint must have in common with it.
    """

    def __init__(
        self, training_step: TrainingStep, data: Batches, seed: int, options: Mapping[str, Any]
    ) -> None:
        for role, module in training_step.modules.items():
            check_extra_state(role, module)
        self.training_step = training_step
        self.data = data
        sizes = {"num_images": data.num_images, "batch_size": data.batch_size}
        self.options = {"seed": seed, **sizes, **options, **_trained(training_step)}
        self.epoch = self.batch = self.step = 0  # finished epochs, minibatches in this one, steps
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}  # the epoch to keep: its number, ELBO, weights and buffers
        self.recent: list[Minibatch] = []  # the minibatches since skips_seen was read
        self.skips_seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._start_of_epoch = self._generator.get_state()
        self._begin = time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds of training, also those before the checkpoint."""
        return time.monotonic() - self._begin

    @property
    def skipped(self) -> int:
        """The number of updates that were not made; reads the device."""
        return int(self.training_step.counters.skipped)

    def batches(self) -> Iterator[Minibatch]:
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
        counters.loss.zero_()
        counters.seen.zero_()
        self.epoch += 1
        self.batch = 0
        self._start_of_epoch = self._generator.get_state()
        return mean

    def keep_if_best(self, elbo: float) -> None:
        """Keeps a copy of the parameters and buffers if this epoch's ELBO is the highest so far."""
        if self.best and not (elbo > self.best["elbo"] or math.isnan(self.best["elbo"])):
            return
        step = self.training_step
        self.best = {
            "epoch": self.epoch,
            "elbo": elbo,
            "weights": {name: p.detach().clone() for name, p in step.parameters.items()},
            "buffers": {name: buffer.clone() for name, buffer in step.buffers.items()},
        }

    def restore_best(self) -> int:
        """Sets the parameters and buffers of the best epoch, and returns its number."""
        epoch = int(self.best["epoch"])
        copy_tensors(self.best["weights"], self.training_step.parameters, f"epoch {epoch}")
        self._restore_buffers(self.best["buffers"])
        return epoch

    def capture(self) -> Checkpoint:
        """Returns the state, to be written at once: its tensors are not copies."""
        step = self.training_step
        state = {
            "options": self.options,
            "weights": {name: p.detach() for name, p in step.parameters.items()},
            "buffers": step.buffers,
            "optimizers": [optimizer.state_dict()["state"] for optimizer in step.optimizers],
            "random": {**random_state(step.device), "permutations": self._start_of_epoch},
            "counters": [float(getattr(step.counters, name)) for name in _COUNTERS],
            "position": [self.epoch, self.batch],
            "seconds": self.seconds(),
            "rows": self.rows,
            "best": self.best,
        }
        return Checkpoint(self.step, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Sets the state of a checkpoint; ValueError if it is of another training."""
        name = f"the checkpoint of step {checkpoint.step}"
        try:
            for option, wanted in self.options.items():
                found = checkpoint.state["options"].get(option)
                if found != wanted:
                    raise ValueError(
                        f"{name} is of another training: its {option} is {found}, not {wanted}"
                    )
            copy_tensors(checkpoint.state["weights"], self.training_step.parameters, name)
            self._restore_buffers(checkpoint.state["buffers"])
            self._restore_optimizers(checkpoint.state["optimizers"])
            self._restore_position(checkpoint)
            self._restore_random(dict(checkpoint.state["random"]))
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"{name} is inconsistent: {error!r}; delete it") from error

    def _restore_buffers(self, saved: Mapping[str, Tensor]) -> None:
        for key, buffer in self.training_step.buffers.items():
            # a buffer that its program resizes by itself is left to the program
            if key in saved and saved[key].shape == buffer.shape:
                value = saved[key].to(buffer)
                if not torch.equal(buffer, value):  # an expanded one cannot be written to
                    buffer.copy_(value)

    def _restore_optimizers(self, saved: list[dict[int, dict[str, Tensor]]]) -> None:
        _require(len(saved) == len(self.training_step.optimizers), "moments of each optimiser")
        for optimizer, state in zip(self.training_step.optimizers, saved, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, moments in state.items():
                shapes = {moment: value.shape for moment, value in moments.items()}
                shape = parameters[index].shape
                wanted = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
                _require(shapes == wanted, "moments of Adam in the shape of their parameter")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _restore_position(self, checkpoint: Checkpoint) -> None:
        state, counters = checkpoint.state, self.training_step.counters
        epoch, batch = state["position"]
        _require(type(batch) is int and 0 <= batch <= len(self.data), "a position in the epoch")
        _require(epoch == len(state["rows"]), "one row an epoch")
        for number, name in enumerate(_COUNTERS):
            getattr(counters, name).fill_(state["counters"][number])
        self.epoch, self.batch, self.step = epoch, batch, checkpoint.step
        self.rows = [dict(row) for row in state["rows"]]
        self.best = dict(state["best"])
        self.skips_seen = self.skipped
        self._begin = time.monotonic() - state["seconds"]

    def _restore_random(self, random: dict[str, Tensor]) -> None:
        self._start_of_epoch = random.pop("permutations")
        self._generator.set_state(self._start_of_epoch)
        device = self.training_step.device
        if device.type == "cuda" and "cuda" not in random:
            warnings.warn("the random numbers are new: the device is another one", stacklevel=4)
        set_random_state(random, device)


_COUNTERS = ("loss", "seen", "skipped")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise TypeError(f"expected {what}")


def _trained(step: TrainingStep) -> dict[str, Any]:
    """The objectives of a step with their options, and the parameters they train."""
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
