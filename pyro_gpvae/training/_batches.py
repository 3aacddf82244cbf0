r"""Minibatches of a training, from a tensor or from a ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_gpvae.core._seeds import preserve_rng, seeded

__all__ = ["SAMPLE_SIZE", "Batch", "Batches", "LoaderBatches", "TensorBatches"]

#: The number of training images on which the terms of eq. (2) are logged after an epoch.
SAMPLE_SIZE = 512


class Batch(NamedTuple):
    """Images (B, ...), as they were given to ``fit``, and their numbers (B,) in messages."""

    images: Tensor
    numbers: Tensor


class TensorBatches:
    """Minibatches of images (N, ...), each once an epoch in a random order."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.images = images
        self.num_images = len(images)
        self.batch_size = batch_size
        #: the first images, at least a minibatch
        self.sample = images[: max(SAMPLE_SIZE, batch_size)]

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        """Iterates over an epoch without its first minibatches; the generator decides the order."""
        order = torch.randperm(self.num_images, generator=generator).to(self.images.device)
        for numbers in order.split(self.batch_size)[skip:]:
            yield Batch(self.images[numbers], numbers)


class LoaderBatches:
    """Minibatches of a DataLoader of images, or of tuples that begin with them.

    Its samplers and workers are seeded at the start of each epoch, so that a resumed training sees
    the same minibatches; except in workers that outlive an epoch (``persistent_workers=True``).
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.batch_size is None:
            raise ValueError("the DataLoader must have a batch_size, not None or a batch_sampler")
        self.loader = loader
        self.batch_size = loader.batch_size
        dataset: Any = loader.dataset
        try:
            self.num_images = len(dataset)
            if len(loader) == 0:
                raise ValueError(
                    f"the DataLoader gives no minibatch of its {self.num_images} images: with "
                    f"drop_last=True its batch_size {self.batch_size} must not be larger than that"
                )
            count = min(self.num_images, max(SAMPLE_SIZE, self.batch_size))
            with seeded(0, torch.device("cpu")):  # transforms may be random
                self.sample = _batch(loader.collate_fn([dataset[i] for i in range(count)])).images
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"the data set must have len() and an index: {error}") from error

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        """Iterates over an epoch without its first minibatches; the generator decides the order."""
        seed = int(torch.randint(2**62, (), generator=generator))
        for own in (self.loader.generator, getattr(self.loader.sampler, "generator", None)):
            if own is not None:
                own.manual_seed(seed)
        with seeded(seed, torch.device("cpu")):
            # a sampler draws its seed when its first number is asked for
            iterator = iter(self.loader)
            first = next(iterator, None)
        if first is not None and skip == 0:
            yield _batch(first)
        with preserve_rng(torch.device("cpu")):
            for _ in range(skip - 1):
                next(iterator, None)
        for images in iterator:
            yield _batch(images)


Batches = TensorBatches | LoaderBatches


def _batch(item: Any) -> Batch:
    """The images of what a DataLoader gives."""
    images = item[0] if isinstance(item, tuple | list) else item
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise ValueError(f"the DataLoader must give tensors of images, or tuples, got {kind}")
    return Batch(images, torch.arange(len(images)))
