r"""Random numbers of one's own: seeded inside a block, as they were after it."""

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
    """Seeds torch, numpy and Python for work on a device inside the block.

    Afterwards their global random states are what they were.

    Example:
        >>> state = torch.random.get_rng_state()
        >>> with seeded(0, torch.device("cpu")):
        ...     noise = torch.randn(3)
        >>> torch.equal(torch.random.get_rng_state(), state)
        True
    """
    seed = operator.index(seed)
    cuda = device.type == "cuda"
    # the global generator of numpy is meant: a guide of the user's may draw from it
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if cuda else [], device_type="cuda"):
        # torch.manual_seed would seed all GPUs, which nothing restores
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
    """A generator of one's own in the state of the global one of a device."""
    generator = torch.Generator(device)
    if device.type == "cuda":
        generator.set_state(torch.cuda.get_rng_state(device))
    else:
        generator.set_state(torch.random.get_rng_state())
    return generator


def set_global_state(state: Tensor, device: torch.device) -> None:
    """Puts the global generator of a device into the state of a generator."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.random.set_rng_state(state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The global random states of torch (CPU and, on CUDA, the device), numpy and Python."""
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
    """Sets what :func:`random_state` returned; a CUDA device's state only where there is one."""
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
    """Afterwards the global random states are what they were, and so are the given tensors.

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
                if not torch.equal(tensor, value):  # nobody can write to an expanded one
                    tensor.copy_(value)


def image_seed(seed: int, image: int, purpose: str = "") -> int:
    """The seed of one image's stream of random numbers: the same in whatever chunk it comes."""
    text = f"{seed} {image} {purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
