r"""Counters of a training that stay on its device, and whether an update is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCounters:
    """Counters of a training, kept as tensors on its device, so that no step reads it."""

    def __init__(self, device: torch.device, halt: bool) -> None:
        self.halt = halt  #: whether all updates after the first that is not finite are refused
        #: the sum of the finite losses of this epoch's images
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.seen = self.loss.clone()  #: the number of these images
        self.skipped = self.loss.clone()  #: the number of refused updates
        #: 1 if the present update is refused, otherwise 0; the optimisers read it
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


def all_finite(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Returns a boolean scalar on the device: whether the loss and all gradients are finite."""
    # a norm is finite only if all its terms are; in float64 it does not overflow
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float64) if gradients else []
    return torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())
