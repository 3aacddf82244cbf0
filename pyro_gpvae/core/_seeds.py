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

__all__ = [
    "global_generator",
    "image_seed",
    "preserve_rng",
    "random_state",
    "seeded",
    "set_global_state",
    "set_random_state",
]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch, numpy and Python inside the block, and restores their states on exit.

    Arguments:
        seed: The seed of all generators.
        device: The device of the computation; a CUDA device is seeded, too.

    Example:
        >>> state = torch.random.get_rng_state()
        >>> with seeded(0, torch.device("cpu")):
        ...     noise = torch.randn(3)
        >>> torch.equal(torch.random.get_rng_state(), state)
        True
    """
    seed = operator.index(seed)
    cuda = device.type == "cuda"
    # numpy's global generator is seeded because a user's guide may draw from it
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if cuda else [], device_type="cuda"):
        # torch.manual_seed would seed all GPUs, and fork_rng restores only this one
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


def global_generator(device: torch.device) -> torch.Generator:
    """Returns a new generator in the state of the global one of a device."""
    generator = torch.Generator(device)
    if device.type == "cuda":
        generator.set_state(torch.cuda.get_rng_state(device))
    else:
        generator.set_state(torch.random.get_rng_state())
    return generator


def set_global_state(state: Tensor, device: torch.device) -> None:
    """Sets the state of the global generator of a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.random.set_rng_state(state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the global random states of torch, numpy and Python as tensors.

    On a CUDA device, the state of the device is included.
    """
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

    Example:
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with preserve_rng(torch.device("cpu"), norm.buffers()):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    state = random_state(device)
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        set_random_state(state, device)
        with torch.no_grad():
            for tensor, value in kept:
                if not torch.equal(tensor, value):  # expanded tensors cannot be written to
                    tensor.copy_(value)


def image_seed(seed: int, image: int, purpose: str = "") -> int:
    """Returns the seed of one image's random numbers, which does not depend on the chunk."""
    text = f"{seed} {image} {purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
