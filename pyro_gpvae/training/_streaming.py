r"""Minibatches of images that stay on the host: each is gathered while the step before it runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pyro_gpvae.core._memory import free_memory
from pyro_gpvae.data.images import is_memory_mapped

__all__ = ["Gathering", "stays_on_host"]


def stays_on_host(images: Tensor, device: torch.device) -> bool:
    """Whether images are to be gathered on the host, minibatch by minibatch.

    On CUDA, if they would take more than half of the memory that a program may take there; on a
    CPU, if they are memory-mapped, so that a step need not wait for the disk.
    """
    free = free_memory(device)
    if free is None or images.device.type == "cuda":
        return is_memory_mapped(images)
    return images.nbytes > free // 2


class Gathering:
    """Gathers minibatches, the next one in a thread of its own. The thread ends with the block.

    Arguments:
        images: uint8 (N, C, H, W), on the host.
        device: Where the pixels go: for CUDA they lie in pinned memory.

    Example:
        >>> images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
        >>> with Gathering(images, torch.device("cpu")) as gather:
        ...     pixels = gather(torch.tensor([2, 0]), following=torch.tensor([1, 3]))
        >>> pixels.flatten()
        tensor([2, 0], dtype=torch.uint8)
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images = images
        self.pinned = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "gathering")
        self._next: tuple[Tensor, Future[Tensor]] | None = None

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, index: Tensor, following: Tensor | None = None) -> Tensor:
        """Pixels of the images of these numbers; what was an error in the thread is one here.

        Arguments:
            index: Numbers of images, of any shape.
            following: The next ``index``, if it is known.
        """
        index = index.cpu()
        expected, self._next = self._next, None
        if expected is not None and expected[0].equal(index):
            pixels = expected[1].result()
        else:
            pixels = self._gather(index)
        if following is not None:
            following = following.cpu()
            self._next = following, self._pool.submit(self._gather, following)
        return pixels

    def _gather(self, index: Tensor) -> Tensor:
        pixels = self.images[index]
        return pixels.pin_memory() if self.pinned else pixels
