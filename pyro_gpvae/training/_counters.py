r"""Counts the images, losses and refused updates of a training, without reading the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["StepCounters"]


class StepCounters:
    """Counters of a training, kept as tensors on its device.

    Reading one of them makes a GPU wait, so that is not done in every step.

    Arguments:
        device: The device of the training.
        halt: Whether all updates are refused after the first one that is not finite.

    Attributes:
        loss: The sum of the losses of this epoch's images, without those that are not finite.
        seen: The number of these images.
        skipped: The number of refused updates since the training began.
        refused: 1 if the present update is refused, otherwise 0; read by the optimisers.
    """

    def __init__(self, device: torch.device, halt: bool) -> None:
        self.halt = halt
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.seen, self.skipped = self.loss.clone(), self.loss.clone()
        self.refused = torch.zeros((), dtype=torch.float32, device=device)

    def check(self, is_finite: Tensor) -> None:
        """Refuses the present update if its loss or a gradient is not finite."""
        refused = (~is_finite).to(self.refused)
        self.refused.copy_(torch.maximum(self.refused, refused) if self.halt else refused)
        self.skipped += self.refused

    def add(self, loss: Tensor, num_images: int) -> None:
        """Adds a minibatch, unless its last update was refused."""
        weight = (1 - self.refused) * num_images
        self.loss += torch.where(weight > 0, loss.to(self.loss) * weight, 0.0)
        self.seen += weight

    def start_epoch(self) -> None:
        """Sets the counters of an epoch to zero."""
        self.loss.zero_()
        self.seen.zero_()
