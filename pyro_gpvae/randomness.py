r"""Random numbers of one's own: seeded inside a block, as they were after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch for work on a device inside the block, and restores its random state afterwards.

    Example:
        >>> state = torch.random.get_rng_state()
        >>> with seeded(0, torch.device("cpu")):
        ...     noise = torch.randn(3)
        >>> torch.equal(torch.random.get_rng_state(), state)
        True
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        if cuda:
            torch.manual_seed(seed)
        else:  # torch.manual_seed would seed the GPUs as well, which nothing restores
            torch.default_generator.manual_seed(seed)
        yield
