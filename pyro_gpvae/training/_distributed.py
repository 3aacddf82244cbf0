r"""One training in several processes: each takes its part of every minibatch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.training._tracing import Draw, PureLoss

__all__ = ["SharedDraw", "World", "shared_draws"]


@dataclass(frozen=True)
class World:
    r"""The processes that train together, and which of them this one is.

    .. math:: \nabla L = \frac{1}{R} \sum_{r=1}^{R} \nabla L_r

    is the gradient of eq. (2) on a minibatch of B images, where process r has the loss
    :math:`L_r` of its B/R images and of all global sites: the former weigh R/B there, the latter
    1/N in every process, with the same draws of W and U.

    Attributes:
        rank: Which process this is, from 0.
        size: The number of processes R.

    Example:
        >>> World.present()
        World(rank=0, size=1)
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def present() -> World:
        """The processes of ``torch.distributed``, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return World()
        return World(dist.get_rank(), dist.get_world_size())

    def device(self, wanted: torch.device) -> torch.device:
        """On CUDA, the device of this process unless a number is given: LOCAL_RANK."""
        if self.size == 1 or wanted.type != "cuda":
            return wanted
        if wanted.index is None:
            wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(wanted)  # NCCL talks over the current one
        return wanted

    def check(self, batch_size: int, num_images: int) -> None:
        """Raises ValueError unless a minibatch can be shared evenly."""
        whole = min(batch_size, num_images)
        if whole % self.size:
            below = whole - whole % self.size
            above = below + self.size
            choices = [str(b) for b in (below, above) if 0 < b <= num_images]
            raise ValueError(
                f"batch_size={batch_size}: {self.size} processes cannot share {whole} of the "
                f"{num_images} images evenly: use batch_size={' or '.join(choices)}"
                if choices
                else f"{num_images} images are too few for {self.size} processes"
            )

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a minibatch."""
        count = len(batch) // self.size
        return batch[self.rank * count : (self.rank + 1) * count]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes, from one message for each dtype."""
        if self.size == 1:
            return list(tensors)
        results = list(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            numbers = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            bucket = torch.cat([tensors[i].reshape(-1) for i in numbers])
            dist.all_reduce(bucket)
            bucket /= self.size
            pieces = bucket.split([tensors[i].numel() for i in numbers])
            for i, piece in zip(numbers, pieces, strict=True):
                results[i] = piece.view(tensors[i].shape)
        return results

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors what they are in the first process."""
        if self.size > 1:
            for tensor in tensors:
                dense = tensor.detach().contiguous()
                dist.broadcast(dense, 0)
                tensor.detach().copy_(dense)

    def from_first(self, value: Any) -> Any:
        """A value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def from_all(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What fails here in one process fails in all, which would wait for it otherwise.

        Raises:
            RuntimeError: Where it did not fail.
        """
        try:
            yield
        except BaseException as error:
            self.from_all(f"{type(error).__name__}: {error}")
            raise
        failed = [text for text in self.from_all(None) if text is not None]
        if failed:
            raise RuntimeError(f"another process of this training failed: {failed[0]}")


@dataclass(frozen=True)
class SharedDraw:
    """One random operator of a program, in one of several processes.

    All draw the same numbers, those of a whole minibatch, and each keeps those of its images.

    Attributes:
        whole: How to draw the numbers of a minibatch.
        own: The same for the part of one process.
        dim: The dimension of images; None if a draw does not depend on their number.
    """

    whole: Draw
    own: Draw
    dim: int | None

    def __call__(self, world: World, generator: torch.Generator | None = None) -> Tensor:
        """Draws from the generator, or from the global one."""
        numbers = self.whole(generator)
        return self.keep(numbers, world.rank)

    def keep(self, numbers: Tensor, rank: int) -> Tensor:
        """The part of one process."""
        if self.dim is None:
            return numbers
        count = self.own.size[self.dim]
        found = torch.empty_strided(
            self.own.size, self.own.stride, dtype=numbers.dtype, device=numbers.device
        )
        return found.copy_(numbers.narrow(self.dim, rank * count, count))


def shared_draws(
    pure: PureLoss, one: PureLoss, two: PureLoss, x: Tensor, world: World
) -> list[SharedDraw]:
    """How the processes draw the noise of a minibatch: each that of its part of it.

    Where the images are in a draw is seen from its shape for two numbers of images.

    Arguments:
        pure: The objective for B/R images.
        one: The same for b images.
        two: The same for 2b images.
        x: 2b images.

    Raises:
        UnsupportedError: If the noise of a minibatch is not one part for each image, or its
            loss is not the mean of those of two halves (as with batch normalisation).
    """
    count = len(x) // 2
    if not len(pure.draws) == len(one.draws) == len(two.draws):
        raise UnsupportedError("how often it draws depends on the number of images")
    draws = []
    for own, less, more in zip(pure.draws, one.draws, two.draws, strict=True):
        own_count = _own_count(own, less, more, count)
        dims = [d for d, (a, b) in enumerate(zip(less.size, more.size, strict=True)) if a != b]
        images = own_count * world.size
        whole = replace(
            own,
            size=_line(less.size, more.size, count, images),
            stride=_line(less.stride, more.stride, count, images),
        )
        draws.append(SharedDraw(whole, own, dims[0] if dims else None))
    _check_mean(one, two, x, draws)
    return draws


def _line(less: Sequence[int], more: Sequence[int], count: int, images: int) -> tuple[int, ...]:
    """Sizes for a number of images, from those for ``count`` and for twice as many."""
    return tuple(a + (b - a) * (images - count) // count for a, b in zip(less, more, strict=True))


def _own_count(own: Draw, less: Draw, more: Draw, count: int) -> int:
    """The number of images in a draw; 1 if it does not depend on it."""
    if len(own.size) == len(less.size) == len(more.size):
        differ = [
            d for d, pair in enumerate(zip(less.size, more.size, strict=True)) if len({*pair}) > 1
        ]
        if not differ and own.size == less.size:
            return count
        if len(differ) == 1 and (less.size[differ[0]], more.size[differ[0]]) == (count, 2 * count):
            images = own.size[differ[0]]
            if own.size == _line(less.size, more.size, count, images):
                return images
    raise UnsupportedError(
        f"it draws random numbers of shape {less.size} for {count} images and of shape "
        f"{more.size} for {2 * count}, in which no dimension is that of images"
    )


def _check_mean(one: PureLoss, two: PureLoss, x: Tensor, draws: Sequence[SharedDraw]) -> None:
    """Compares a small minibatch with the mean of its halves; changes nothing."""
    count = len(x) // 2
    buffers = {name: (tensor, tensor.clone()) for name, tensor in two.others.items()}
    noise = two.noise(torch.Generator(x.device).manual_seed(0))
    loss, gradients = two(x, noise)
    results = []
    for half in range(2):
        mine = [
            replace(draw, own=own).keep(numbers, half)
            for draw, own, numbers in zip(draws, one.draws, noise, strict=True)
        ]
        results.append(one(x[half * count : (half + 1) * count], mine))
    changed = [name for name, (tensor, old) in buffers.items() if not tensor.equal(old)]
    for tensor, old in buffers.values():
        tensor.copy_(old)
    if changed:
        raise UnsupportedError(
            f"it changes {changed[0]}, which would depend on the part of the minibatch that a "
            f"process sees (batch normalisation?)"
        )
    if one.used != two.used:
        raise UnsupportedError("what it trains depends on the number of images")
    whole = [loss, *gradients]
    halves = zip(*([value, *found] for value, found in results), strict=True)
    rtol = 1e-8 if loss.dtype == torch.float64 else 1e-3
    for tensor, (a, b) in zip(whole, halves, strict=True):
        scale = tensor.norm() + (a - b).norm()
        error = (tensor - (a + b) / 2).norm()
        if error > rtol * scale + torch.finfo(tensor.dtype).tiny:
            raise UnsupportedError(
                "its loss on a minibatch is not the mean of those on two halves of it "
                "(batch normalisation?)"
            )
