r"""Minibatches of a training, from a tensor or from a ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_gpvae.core._seeds import preserve_rng, seeded

__all__ = ["SAMPLE_SIZE", "Batch", "Batches", "LoaderBatches", "TensorBatches"]

#: The number of training images on which the terms of eq. (2) are logged after an epoch.
SAMPLE_SIZE = 512


class Batch(NamedTuple):
    """A minibatch.

    Attributes:
        images: (B, ...), as they were given to ``fit``: uint8 or floats.
        numbers: What error messages call them, (B,).
    """

    images: Tensor
    numbers: Tensor


class Batches(Protocol):
    """The training images of one run.

    Attributes:
        num_images: The number N of training images.
        batch_size: The number of images in a minibatch; the last one may have fewer.
        sample: The first images, at least a minibatch.
    """

    num_images: int
    batch_size: int
    sample: Tensor

    def __len__(self) -> int:
        """Returns the number of minibatches in an epoch."""

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        """Iterates over the minibatches of an epoch, without the first ``skip`` ones.

        The generator alone decides their order, and is advanced once an epoch.
        """


class TensorBatches:
    """Minibatches of a tensor, which visit each image once an epoch, in a random order.

    Arguments:
        images: (N, ...), kept on the device of the training.
        batch_size: Images in a minibatch.
    """

    def __init__(self, images: Tensor, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.images = images
        self.num_images = len(images)
        self.batch_size = batch_size
        self.sample = images[: max(SAMPLE_SIZE, batch_size)]

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        order = torch.randperm(self.num_images, generator=generator).to(self.images.device)
        for numbers in order.split(self.batch_size)[skip:]:
            yield Batch(self.images[numbers], numbers)


class LoaderBatches:
    """Minibatches of a DataLoader, for images that are larger than memory.

    Its samplers and workers are seeded at the start of each epoch, so that a resumed training sees
    the same minibatches. Random transforms are repeated as well, except in workers that outlive
    an epoch (``persistent_workers=True``).

    Arguments:
        loader: A loader of tensors of images, or of tuples that begin with one. Its data set must
            have a length and an index.
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
                self.sample = _images(loader.collate_fn([dataset[i] for i in range(count)]))
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                f"the data set of the DataLoader must have len() and an index: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        seed = int(torch.randint(2**62, (), generator=generator))
        own = (self.loader.generator, getattr(self.loader.sampler, "generator", None))
        for each in own:
            if each is not None:
                each.manual_seed(seed)
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


def _batch(item: Any) -> Batch:
    images = _images(item)
    return Batch(images, torch.arange(len(images)))


def _images(item: Any) -> Tensor:
    """The images of what a DataLoader gives."""
    images = item[0] if isinstance(item, tuple | list) else item
    if not isinstance(images, Tensor):
        raise ValueError(
            f"the DataLoader must give tensors of images, or tuples that begin with one, got "
            f"{type(images).__name__}"
        )
    return images
