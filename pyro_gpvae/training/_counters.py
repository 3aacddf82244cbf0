r"""What a training counts while it runs, on the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tally"]


_TENSORS = ("loss", "seen", "skipped", "refused")


class Tally:
    """What a training counts, on the device: read it once in a while, not in a step.

    Attributes:
        loss: Sum of the losses of the images of this epoch, without those that are not finite.
        seen: The number of those images.
        skipped: Updates that were not made, since the training began.
        refused: Whether the present update is not to be made, 0 or 1.
    """

    def __init__(self, device: torch.device, halt: bool, shape: Sequence[int] = ()) -> None:
        self.halt = halt
        self.loss = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        self.seen, self.skipped = self.loss.clone(), self.loss.clone()
        self.refused = torch.zeros(tuple(shape), dtype=torch.float32, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step writes to."""
        return [getattr(self, name) for name in _TENSORS]

    def of(self, run: int) -> Tally:
        """The part of one run, where the tensors have a dimension for runs."""
        part = copy.copy(self)
        for name in _TENSORS:
            setattr(part, name, getattr(self, name)[run])
        return part

    def note(self, ok: Tensor) -> None:
        """Notes whether an update is finite."""
        if self.halt:  # an update that was refused is the last one
            self.refused.copy_(torch.maximum(self.refused, (~ok).to(self.refused)))
        else:
            self.refused.copy_(~ok)
        self.skipped += self.refused

    def add(self, loss: Tensor, count: int) -> None:
        """Adds a minibatch, unless its last update was refused."""
        weight = (1 - self.refused) * count
        self.loss += torch.where(weight > 0, loss.to(self.loss) * weight, 0.0)
        self.seen += weight

    def start_epoch(self) -> None:
        self.loss.zero_()
        self.seen.zero_()
