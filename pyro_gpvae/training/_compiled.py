r"""The compiled training step: traced once, compiled by torch, and compared with the eager one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.training._tracing import TracedLoss, snapshot, trace_loss

if TYPE_CHECKING:
    from pyro_gpvae.training.step import TrainingStep

__all__ = ["compile_blocks"]

Evaluate = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def compile_blocks(step: TrainingStep, x: Tensor) -> list[Evaluate]:
    """Compiles each block of a step, for images of the shape of x.

    On CUDA the compiled function is replayed as a CUDA graph (``mode="reduce-overhead"``).

    Returns:
        For each block a function like ``step.evaluate`` of that block: it returns the loss and the
        gradients of a minibatch, and gives the gradients to the parameters.

    Raises:
        UnsupportedError: If a block cannot be traced, or the compiled function computes something
            else than the eager one. The compiler raises errors of its own.
    """
    compiled = []
    mode = "reduce-overhead" if x.device.type == "cuda" else None
    for block in range(len(step.blocks)):
        traced = _trace_block(step, block, x)
        graph = torch.compile(traced.graph, fullgraph=True, dynamic=False, mode=mode)
        evaluate = _evaluation(traced, graph, x.device)
        with warnings.catch_warnings():
            # whether to compute in TF32 is the user's decision
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            _verify(step, block, evaluate, x)
            # a graph that has frozen values read from x computes something else from other images
            _verify(step, block, evaluate, 1 - x)
        compiled.append(evaluate)
    return compiled


def _trace_block(step: TrainingStep, block: int, x: Tensor) -> TracedLoss:
    objective = step.objectives[block]
    before = snapshot(getattr(objective, "__dict__", {}))
    traced = trace_loss(
        lambda x: step.loss(block, x), step.modules, step.blocks[block].parameters, x
    )
    if snapshot(getattr(objective, "__dict__", {})) != before:
        raise UnsupportedError("its objective changes its attributes, which a graph cannot")
    return traced


def _evaluation(
    traced: TracedLoss, graph: Callable[..., list[Tensor]], device: torch.device
) -> Evaluate:
    """The graph with noise from the global generator; the parameters get the gradients."""
    targets = [traced.leaves[name] for name in traced.used]
    unused = [leaf for name, leaf in traced.leaves.items() if name not in traced.used]
    on_cuda = device.type == "cuda"

    def evaluate(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if on_cuda:  # the results of the call before are no longer needed
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            loss, *gradients = graph(x, *traced.inputs, *traced.noise())
        if on_cuda:  # the next replay overwrites it
            loss = loss.clone()
        for parameter, gradient in zip(targets, gradients, strict=True):
            parameter.grad = _match_layout(parameter, gradient)
        for parameter in unused:  # another block may have left one
            parameter.grad = None
        return loss, gradients

    return evaluate


def _match_layout(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient, laid out in memory like the parameter.

    Adam's fused kernels go through the memory of both in the same order, whatever the strides.
    ``backward`` takes care of that; a compiled graph does not.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _verify(step: TrainingStep, block: int, compiled: Evaluate, x: Tensor) -> None:
    """Compares a compiled block with the eager one on the same noise, and changes nothing."""

    def eager(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return step.evaluate(block, x)

    results: list[Tensor] = []
    # eager twice: a program that counts its calls returns something else the second time
    for evaluate in (eager, eager, compiled):
        try:
            with preserve_rng(step.device, step.buffers):
                results.append(_loss_and_norm(*evaluate(x)))
        finally:
            step.optimizers[block].zero_grad()
    # a GPU may multiply in TF32, which has 10 bits, and adds in any order
    on_cpu = x.device.type == "cpu"
    rtol = 1e-8 if x.dtype == torch.float64 else 1e-4 if on_cpu else 1e-3
    first, second, found = results
    if not torch.allclose(first, found, rtol=rtol, equal_nan=True):
        raise UnsupportedError(
            f"loss and gradient norm are {found.tolist()} with backend 'compiled', "
            f"{first.tolist()} with 'eager'"
        )
    exact = 8 * torch.finfo(x.dtype).eps if on_cpu else rtol
    if not torch.allclose(first, second, rtol=exact, atol=0, equal_nan=True):
        raise UnsupportedError(
            f"loss and gradient norm are {first.tolist()}, and {second.tolist()} of a second "
            "call on the same noise: it depends on what a graph would freeze"
        )


def _loss_and_norm(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The loss and the norm of all gradients, (2,)."""
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    return torch.stack([loss.detach(), norm.to(loss)]).double()
