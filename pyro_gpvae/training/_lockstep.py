r"""One run, or several that are stacked, as one thing that makes steps."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_gpvae.core._programs import PyroProgram, own_parameters
from pyro_gpvae.core._seeds import global_generator, seeded
from pyro_gpvae.training._stacked import StackedStep
from pyro_gpvae.training._state import Progress, merge_states, split_state
from pyro_gpvae.training._streaming import Gathering
from pyro_gpvae.training.checkpoint import TrainingState
from pyro_gpvae.training.step import Backend, TrainingStep

__all__ = ["Lockstep"]


class Lockstep:
    """One run, or several that are stacked: their steps and their progress.

    Arguments:
        programs: Seed, model and guide of every run.
        images: Training images, uint8 (N, C, H, W).
        device: Where to train.
        backend: Of the step.
        strict: Whether it is an error if that cannot be.
        options: What a checkpoint must have in common with the training that goes on from it.
        gather: What fetches pixels, if the images stay on the host.
        how: Keyword arguments of :class:`pyro_gpvae.training.step.TrainingStep`.

    Attributes:
        seeds: Of every run.
        steps: Of every run.
        states: The progress of every run.
        stacked: The step of all, if there are several.
    """

    def __init__(
        self,
        programs: Sequence[tuple[int, PyroProgram, PyroProgram]],
        images: Tensor,
        device: torch.device,
        *,
        backend: Backend,
        strict: bool,
        options: Mapping[str, Any],
        gather: Gathering | None = None,
        **how: Any,
    ) -> None:
        begin = time.monotonic()
        self.seeds = [seed for seed, *_ in programs]
        self.gather = gather
        self.stacked: StackedStep | None = None
        generators: list[torch.Generator | None] = [None]
        if len(programs) == 1:
            ((_, model, guide),) = programs
            self.steps = [TrainingStep(model, guide, images, backend=backend, strict=strict, **how)]
        else:
            self.steps, own = [], []
            for seed, model, guide in programs:
                with seeded(seed, device), own_parameters(model, guide):
                    self.steps.append(TrainingStep(model, guide, images, **how))
                    own.append(global_generator(device))
            self.stacked = StackedStep(self.steps, own, backend, strict)
            generators = [*own]
        self.states = [
            Progress(step, {"seed": seed, **options, **_trained(step)}, generator, begin)
            for seed, step, generator in zip(self.seeds, self.steps, generators, strict=True)
        ]

    @property
    def backend(self) -> Backend:
        """The backend that was taken."""
        return self.steps[0].backend if self.stacked is None else self.stacked.backend

    def step(self) -> None:
        """Makes one step of every run."""
        index = self._index([state.next() for state in self.states])
        batch = self._part(index)
        if self.gather is not None:
            following = [state.following() for state in self.states]
            ahead = self._part(self._index([i for i in following if i is not None]))
            batch = self.gather(batch, ahead if ahead.numel() else None)
        if self.stacked is None:
            self.steps[0](batch, index.shape[-1])
        else:
            self.stacked(batch)

    def _index(self, numbers: Sequence[Tensor]) -> Tensor:
        """Numbers of images: (B,), or (S, B) for stacked runs."""
        if not numbers:
            return torch.empty(0, dtype=torch.long)
        return numbers[0] if self.stacked is None else torch.stack(list(numbers))

    def _part(self, index: Tensor) -> Tensor:
        """What of a minibatch this process looks at."""
        return index if self.stacked is not None else self.steps[0].part(index)

    def train(self, mode: bool) -> None:
        """Puts all modules into training or evaluation mode."""
        for step in self.steps:
            step.train(mode)

    def capture(self) -> TrainingState:
        """The state of all runs."""
        return merge_states([state.capture() for state in self.states])

    def restore(self, saved: TrainingState) -> None:
        """Puts all runs back as :meth:`capture` found them.

        Raises:
            ValueError: If it is the state of another training.
        """
        for state, part in zip(self.states, split_state(saved, len(self.states)), strict=True):
            state.restore(part)
        if len({(state.step, state.epoch, state.position) for state in self.states}) > 1:
            raise ValueError(f"the runs of the checkpoint of step {saved.step} are not at one step")
        if self.stacked is not None:
            self.stacked.share_moments()


def _trained(step: TrainingStep) -> dict[str, Any]:
    """The objectives of a step with their options, and the names of what they train."""
    names = {id(p): name for name, p in step.parameters.items()}
    options = {
        f"objective {number}'s {name}": repr(value)
        for number, block in enumerate(step.blocks)
        for name, value in _options(block.elbo).items()
    }
    return {
        **options,
        "objectives": [type(block.elbo).__name__ for block in step.blocks],
        "trained": [[names.get(id(p), "?") for p in b.parameters] for b in step.blocks],
    }


def _options(objective: Any) -> dict[str, Any]:
    """What an objective was made with: scalars that Pyro's constructor takes.

    Others may be state, which is no part of a checkpoint.
    """
    taken = inspect.signature(ELBO.__init__).parameters
    scalars = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in getattr(objective, "__dict__", {}).items()
        if name in taken and isinstance(value, scalars)
    }
