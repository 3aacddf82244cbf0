r"""A training step that the GPU replays without the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_gpvae.core._seeds import preserve_rng

__all__ = ["CudaGraph"]


class CudaGraph:
    """A step of some optimisers, captured as one CUDA graph. Capturing it changes nothing.

    Arguments:
        step: From the numbers or pixels of a minibatch, on the GPU, to its loss. It must neither
            read the device nor give tensors another place in memory.
        batch: A minibatch of the shape of all.
        optimizers: What it steps.
        tensors: All else that it writes to: parameters, buffers, counts.
        generators: Those that it draws from, beside the global one.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        batch: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        tensors: Iterable[Tensor],
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.batch = batch
        device = batch.device
        before = [_moments(optimizer) for optimizer in optimizers]
        states = [generator.get_state() for generator in generators]
        stream = torch.cuda.Stream(device)
        with preserve_rng(device, tensors):
            stream.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(stream):
                    for _ in range(2):  # libraries choose their kernels, and Adam makes its moments
                        step(batch)
                    with _refusing_waits():
                        step(batch)
            finally:
                torch.cuda.current_stream(device).wait_stream(stream)
                for optimizer, moments in zip(optimizers, before, strict=True):
                    _restore(optimizer, moments)
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        # another thread may pin the memory of the next minibatch meanwhile
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # again, whatever goes wrong
            torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self.loss = step(batch)

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Whether graphs can be captured on a device."""
        return device.type == "cuda"

    @classmethod
    def check(cls, device: torch.device) -> None:
        """Raises a ValueError if no graphs can be captured on a device."""
        if not cls.supports(device):
            raise ValueError(
                f"backend='captured' needs CUDA, and the model is on {device}: use 'compiled', "
                "'eager' or 'auto'"
            )

    def __call__(self, batch: Tensor) -> Tensor:
        self.batch.copy_(batch, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """A wait for the device is an error here that says so; in a capture it would spoil that."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _moments(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Tensor]]:
    return {p: {n: v.clone() for n, v in s.items()} for p, s in optimizer.state.items()}


def _restore(optimizer: torch.optim.Optimizer, moments: dict[Any, dict[str, Tensor]]) -> None:
    """Puts moments back in their place in memory; those that are new become zero."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            old = moments.get(parameter, {}).get(name)
            value.zero_() if old is None else value.copy_(old)
