"""How many latent vectors are decoded at once, and what happens where they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._seeds import random_state, set_random_state

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def default_chunk_size(device: torch.device) -> int:
    """Returns how many latent vectors are decoded at once by default; a CPU's fit in its cache."""
    return 65_536 if device.type == "cuda" else 640


def halving_chunks(
    work: Callable[[int], _Result], chunk_size: int | None, device: torch.device
) -> _Result:
    """Returns ``work(chunk_size)``, repeated with half the size where CUDA runs out of memory.

    Every repetition starts from the same random state, so that the result is the one that the
    smaller chunk size gives. The work must not change what it works on.
    """
    size = default_chunk_size(device) if chunk_size is None else chunk_size
    check_at_least(1, chunk_size=size)
    state = random_state(device)
    while True:
        try:
            return work(size)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
        # outside the except clause, because the traceback keeps tensors alive
        set_random_state(state, device)
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning("out of GPU memory: starting again with chunk_size=%d", size)
