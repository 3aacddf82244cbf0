r"""What changes while a training goes on: all that a checkpoint must hold."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gpvae.core._seeds import random_state, set_random_state
from pyro_gpvae.training.checkpoint import TrainingState, copy_tensors, state_of
from pyro_gpvae.training.step import TrainingStep

__all__ = ["Progress", "merge_states", "split_state"]


class Progress:
    """What changes while a training goes on: all that a checkpoint must hold."""

    def __init__(
        self,
        stepper: TrainingStep,
        options: Mapping[str, Any],
        generator: torch.Generator | None = None,
        begin: float | None = None,
    ) -> None:
        self.generator = generator  # of the run's own noise, if that is not the global one
        self.optimizers = stepper.optimizers
        self.tally = stepper.tally
        self.options = dict(options)
        self.device = stepper.device
        self.images_device = stepper.images.device
        self.modules = stepper.modules
        self.parameters = stepper.parameters
        self.permutations = torch.Generator().manual_seed(self.options["seed"])
        self.epoch = self.step = 0
        self.skips_known = 0  # when the device was last read
        self.rows: list[dict[str, float]] = []
        self._begin = time.monotonic() if begin is None else begin
        self._start_epoch()

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now, and parameters of programs without modules."""
        found = {n: p for n, p in self.parameters.items() if n.startswith("param.")}
        for role, module in self.modules.items():
            found |= state_of(role, module)
        return found

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers that are not persistent, and therefore not among the weights."""
        named = {
            f"{role}.{name}": buffer
            for role, module in self.modules.items()
            for name, buffer in module.named_buffers()
        }
        return {name: named[name] for name in named.keys() - self.weights.keys()}

    def _start_epoch(self) -> None:
        order = torch.randperm(self.options["num_images"], generator=self.permutations)
        self.order = order.to(self.images_device)
        self.position = 0
        self.tally.start_epoch()

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return time.monotonic() - self._begin

    @property
    def seen(self) -> int:
        """Images of this epoch whose loss is finite; reads the device."""
        return int(self.tally.seen)

    @property
    def skipped(self) -> int:
        """Updates that were not made; reads the device."""
        return int(self.tally.skipped)

    def next(self) -> Tensor:
        """The numbers of the images of the next minibatch."""
        index = self.order[self.position : self.position + self.options["batch_size"]]
        self.position += len(index)
        self.step += 1
        return index

    def following(self) -> Tensor | None:
        """What :meth:`next` will return; None at the end of an epoch."""
        index = self.order[self.position : self.position + self.options["batch_size"]]
        return index if len(index) else None

    def end_epoch(self) -> float:
        """Returns the mean loss of the epoch, and draws the order of the next."""
        mean = float(self.tally.loss) / self.seen if self.seen else math.nan
        self.epoch += 1
        self._start_epoch()
        return mean

    @property
    def _own(self) -> str:
        """Which of the random states is that of the run's own generator."""
        return "cuda" if self.device.type == "cuda" else "torch"

    def capture(self) -> TrainingState:
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"buffers.{name}": tensor for name, tensor in self.buffers.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"moments.{number}.{index}.{key}": m for key, m in moments.items()}
        random = random_state(self.device)
        if self.generator is not None:
            random[self._own] = self.generator.get_state()
        tensors |= {f"random.{n}": t for n, t in random.items()}
        tensors["random.permutations"] = self.permutations.get_state()
        tensors |= {"order": self.order, "loss": self.tally.loss}
        names = ("options", "epoch", "position", "seen", "skipped", "seconds", "rows")
        return TrainingState(self.step, tensors, {name: getattr(self, name) for name in names})

    def restore(self, saved: TrainingState) -> None:
        """Puts everything back as :meth:`capture` found it.

        Raises:
            ValueError: If the checkpoint is of another training, or makes no sense.
        """
        name = f"the checkpoint of step {saved.step}"
        try:
            self._check(saved.values, name)
            self._restore(saved, name)
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"{name} makes no sense: {error!r}; delete it") from error

    def _check(self, values: Mapping[str, Any], name: str) -> None:
        """Compares the options, and the types and ranges of all that is no tensor."""
        for option, wanted in self.options.items():
            # older versions did not save the options of objectives
            known = wanted if option.startswith("objective ") else None
            found = values["options"].get(option, known)
            if found != wanted:
                raise ValueError(
                    f"{name} is of another training: its {option} is {found}, not {wanted}"
                )
        counts = [values[key] for key in ("epoch", "position", "seen", "skipped")]
        whole = all(type(count) is int and count >= 0 for count in counts)
        seconds = values["seconds"]
        if not whole or counts[1] > self.options["num_images"] or not isinstance(seconds, float):
            raise TypeError(f"{counts} and {seconds} seconds are no place in a training")
        if len(values["rows"]) != values["epoch"] or not all(
            isinstance(row, dict) for row in values["rows"]
        ):
            raise TypeError("its history is not one row an epoch")

    def _restore(self, saved: TrainingState, name: str) -> None:
        values, tensors = saved.values, dict(saved.tensors)

        def take(prefix: str) -> dict[str, Tensor]:
            found = [key for key in tensors if key.startswith(prefix)]
            return {key.removeprefix(prefix): tensors.pop(key) for key in found}

        weights, expected = take("weights."), self.weights
        for key in weights.keys() & expected.keys():
            if weights[key].dtype != expected[key].dtype:
                raise ValueError(
                    f"{name} is of another training: {key} is {weights[key].dtype} there, "
                    f"{expected[key].dtype} here"
                )
        copy_tensors(weights, expected, name)
        buffers = self.buffers
        for key, tensor in take("buffers.").items():
            # a cache of a shape that its program chooses by itself is left to it
            if key not in buffers or buffers[key].shape != tensor.shape:
                continue
            if not torch.equal(buffers[key], tensor.to(buffers[key])):  # else it may be expanded
                buffers[key].copy_(tensor)
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            trained = optimizer.param_groups[0]["params"]
            for key, tensor in take(f"moments.{number}.").items():
                index, _, moment = key.partition(".")
                parameter = trained[int(index)]
                if tensor.shape != (torch.Size() if moment == "step" else parameter.shape):
                    raise ValueError(f"{name}: {moment} has shape {tuple(tensor.shape)}")
                if moment != "step":
                    # Adam's fused kernels go through both in the order of memory
                    tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
                moments.setdefault(int(index), {})[moment] = tensor
            if any(m.keys() != {"step", "exp_avg", "exp_avg_sq"} for m in moments.values()):
                raise KeyError("moments of Adam are missing")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if take("moments."):
            raise KeyError("it has moments of other parameters")
        self.permutations.set_state(tensors.pop("random.permutations"))
        random = take("random.")
        if self.device.type == "cuda" and "cuda" not in random:
            warnings.warn(
                "the checkpoint was written on another device: the training goes on with other "
                "random numbers",
                stacklevel=4,
            )
        set_random_state(random, self.device)
        if self.generator is not None and self._own in random:
            self.generator.set_state(random[self._own])
        order = tensors["order"]
        if not torch.equal(order.sort().values, torch.arange(self.options["num_images"])):
            raise TypeError("its order of images is no permutation")
        self.order = order.to(self.images_device)
        self.tally.loss.copy_(tensors["loss"])
        self.tally.seen.fill_(values["seen"])
        self.tally.skipped.fill_(values["skipped"])
        self.skips_known = values["skipped"]
        self.step = saved.step
        for key in ("epoch", "position", "rows"):
            setattr(self, key, values[key])
        self._begin = time.monotonic() - values["seconds"]


def merge_states(states: Sequence[TrainingState]) -> TrainingState:
    """One state of several runs that go on together."""
    if len(states) == 1:
        return states[0]
    tensors = {f"{i}.{n}": t for i, state in enumerate(states) for n, t in state.tensors.items()}
    return TrainingState(states[0].step, tensors, {"runs": [state.values for state in states]})


def split_state(merged: TrainingState, count: int) -> list[TrainingState]:
    """The states of the runs that :func:`merge_states` merged.

    Raises:
        ValueError: If it holds another number of runs.
    """
    runs = merged.values.get("runs", [merged.values])
    if not isinstance(runs, list) or not all(isinstance(values, dict) for values in runs):
        raise ValueError(f"the checkpoint of step {merged.step} makes no sense; delete it")
    found = len(runs)
    if found != count:
        raise ValueError(
            f"the checkpoint of step {merged.step} is of {found} runs, not {count}: "
            "give the same seeds"
        )
    if count == 1:
        return [merged]
    parts = []
    for i, values in enumerate(merged.values["runs"]):
        prefix = f"{i}."
        tensors = {
            n.removeprefix(prefix): t for n, t in merged.tensors.items() if n.startswith(prefix)
        }
        parts.append(TrainingState(merged.step, tensors, values))
    return parts
