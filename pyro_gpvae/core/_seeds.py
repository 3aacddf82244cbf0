r"""Context managers that seed the global random generators and restore them on exit."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.core._programs import kept_values, pyro_lock


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch, numpy and Python inside the block, and restores their states on exit."""
    seed = operator.index(seed)
    with preserve_rng(device):
        # torch.manual_seed would seed all GPUs, of which only this one is restored
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the global random states of torch, numpy, Python and a CUDA device as tensors."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.random.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restores the states that :func:`random_state` returned."""
    torch.random.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    gauss = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, *words = state["python"].tolist()
    left = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), left[0] if left else None))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def preserve_rng(device: torch.device, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restores the global random states and the values of the given tensors on exit.

    Other threads that use Pyro wait until the block ends.
    """
    devices = [device] if device.type == "cuda" else []
    with pyro_lock, torch.random.fork_rng(devices, device_type="cuda"), kept_values(tensors):
        # numpy and Python too, because a user's guide may draw from them
        others = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


def image_seed(seed: int, image: int, purpose: str = "") -> int:
    """Returns the seed of one image's random numbers, which does not depend on the chunk."""
    text = f"{seed} {image} {purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
