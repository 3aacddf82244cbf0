r"""Minibatches of a training, from tensors or from a ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._seeds import preserve_rng, seeded
from pyro_gpvae.data.batch import Batch, Data, batch_of, take

#: The number of training images on which the terms of eq. (2) are logged after an epoch.
SAMPLE_SIZE = 512
#: Where samplers draw; as a context it replaces a default device, on which they cannot.
CPU = torch.device("cpu")


class Minibatch(NamedTuple):
    """Tensors (B, ...), as they were given to ``fit``, and their members' numbers in messages."""

    data: Batch
    numbers: Tensor


class TensorBatches:
    """Minibatches of tensors (N, ...), each member once an epoch in a random order."""

    def __init__(self, data: Data, batch_size: int) -> None:
        check_at_least(1, batch_size=batch_size)
        self.data = batch_of(data)
        self.num_images = len(self.data[0])
        self.batch_size = batch_size
        self.last_size = (self.num_images - 1) % batch_size + 1  #: of the last minibatch
        #: the first members, at least a minibatch
        self.sample = take(data, slice(max(SAMPLE_SIZE, batch_size)))
        self.source = "tensors"
        self._keeps_order = False

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def hash(self) -> str:
        """Returns the SHA-256 of all data."""
        return sha256(*self.data)

    def keep_order(self) -> None:
        """Keeps the order of all members, if they are one minibatch."""
        self._keeps_order = True

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Minibatch]:
        """Iterates over an epoch without its first minibatches; the generator decides the order."""
        # a default device is not that of the generator
        order = torch.randperm(self.num_images, generator=generator, device=CPU)
        if self._keeps_order and len(self) == 1:
            order = order.sort().values
        for numbers in order.to(self.data[0].device).split(self.batch_size)[skip:]:
            yield Minibatch(take(self.data, numbers), numbers)


class LoaderBatches:
    """Minibatches of a DataLoader of tensors, or of tuples or lists of them.

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
                    f"the DataLoader gives no minibatch of its {self.num_images} members: with "
                    f"drop_last=True its batch_size {self.batch_size} must not be larger than that"
                )
            count = min(self.num_images, max(SAMPLE_SIZE, self.batch_size))
            with seeded(0, CPU), CPU:  # transforms may be random
                self.sample = _tensors(loader.collate_fn([dataset[i] for i in range(count)]))
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"the data set must have len() and an index: {error}") from error
        rest = self.num_images % self.batch_size
        self.last_size = self.batch_size if loader.drop_last else rest or self.batch_size
        sampler = loader.sampler
        names = {RandomSampler: "shuffle=True", SequentialSampler: "shuffle=False"}
        order = names.get(type(sampler), type(sampler).__name__)
        self.source = f"a DataLoader with {order}, drop_last={loader.drop_last}"

    def __len__(self) -> int:
        return len(self.loader)

    def hash(self) -> str:
        """Returns the SHA-256 of the first members, because all may be more than memory holds."""
        return sha256(*self.sample)

    def keep_order(self) -> None:
        """Raises ValueError if the loader gives all members in one minibatch in a random order."""
        if len(self) == 1 and not isinstance(self.loader.sampler, SequentialSampler):
            raise ValueError(
                "the guide has parameters for each member of the data, so that their order "
                "counts: give a DataLoader with shuffle=False, or tensors"
            )

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Minibatch]:
        """Iterates over an epoch without its first minibatches; the generator decides the order."""
        seed = int(torch.randint(2**62, (), generator=generator, device=CPU))
        for own in (self.loader.generator, getattr(self.loader.sampler, "generator", None)):
            if own is not None:
                own.manual_seed(seed)
        with seeded(seed, CPU), CPU:
            # a sampler draws its seed when its first number is asked for
            iterator = iter(self.loader)
            item = next(iterator, None)
        if skip:
            with preserve_rng(CPU), CPU:
                for _ in range(skip - 1):
                    next(iterator, None)
            with CPU:
                item = next(iterator, None)
        while item is not None:
            tensors = _tensors(item)
            yield Minibatch(tensors, torch.arange(len(tensors[0]), device=CPU))
            with CPU:
                item = next(iterator, None)


Batches = TensorBatches | LoaderBatches


def _tensors(item: Any) -> Batch:
    """The tensors that a DataLoader gives as one item."""
    tensors = tuple(item) if isinstance(item, tuple | list) else (item,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
        raise ValueError(f"the DataLoader must give a tensor or a tuple of tensors, got {kinds}")
    return tensors
