r"""One step of Adam on eq. (2) for a minibatch."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, TypedDict

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._errors import (
    NonFiniteError,
    UnsupportedError,
    nonfinite_as_error,
    unvalidated,
)
from pyro_gpvae.core._programs import PyroProgram, check_precision
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.batch import Batch, Data, take, to_batch
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, DifferentiableELBO, Objective, PerImage
from pyro_gpvae.model.guide import HasBlocks, HasElbo
from pyro_gpvae.training._compiled import Evaluate, compile_blocks
from pyro_gpvae.training._counters import StepCounters, all_finite
from pyro_gpvae.training._objectives import without_host_sync
from pyro_gpvae.training._parameters import (
    check_leaves,
    modules_by_role,
    named_parameters,
    parameter_groups,
)

__all__ = ["Backend", "OnNonFinite", "StepOptions", "TrainingStep"]

_log = logging.getLogger(__name__)

Backend = Literal["eager", "compiled"]
OnNonFinite = Literal["stop", "skip"]

#: The number of steps on a CPU from which on compiling them, which takes half a minute, pays.
WORTH_COMPILING = 20_000


class StepOptions(TypedDict, total=False):
    """The options of :class:`TrainingStep`, which :func:`pyro_gpvae.fit` takes as well."""

    learning_rate: float
    learning_rates: Mapping[str, float] | None
    elbo: Objective | None
    backend: Backend | Literal["auto"]
    on_nonfinite: OnNonFinite


class TrainingStep:
    r"""One step of Adam on eq. (2) for a minibatch, without reading the device.

    An update whose loss or gradient is not finite is not made. The eager and the compiled step draw
    the same random numbers; minibatches of another shape than the first one are always eager.

    Arguments:
        model: A Pyro model, paired with the guide by :func:`pyro_gpvae.pair`.
        guide: A Pyro guide on the same device.
        data: A minibatch, a tensor or a tuple of tensors, which sets up the step and is not trained
            on.
        num_images: The number N of training images.
        learning_rate: The learning rate of Adam.
        learning_rates: Other learning rates of single parameters, by their names in ``parameters``.
            ``{"model.log_sigma": 1e-2}`` calibrates the noise σ of an image model within a few
            epochs. At 5e-4, the paper's rate, σ lags so far behind the root mean squared
            reconstruction error, its optimum (Rybkin, Daniilidis and Levine, 2021, "Simple and
            effective VAE training with calibrated decoders"), that it decides every comparison of
            few epochs.
        elbo: The objective: one of Pyro's with ``differentiable_loss`` and without enumeration, or
            ``RenyiELBO``, which is taken of each image. The default is ``guide.blocks(model)``,
            otherwise ``guide.elbo()``, otherwise ``Trace_ELBO()``.
        backend: "eager", "compiled", or "auto": "compiled" on CUDA, and on a CPU for at least
            20,000 steps, unless the programs cannot be compiled, which the log explains.
        on_nonfinite: "skip" omits updates that are not finite; "stop" also omits all later ones.
        num_steps: The number of steps that will be made, for "auto".

    Attributes:
        backend: How the step is made, "eager" or "compiled".
        modules: The modules of both programs, see ``pyro_gpvae.core._programs.modules_of``.
        blocks, programs, optimizers: The objectives and what they train, the scaled model and
            guide, and the optimiser, of each block.
        parameters: All parameters by name.
        counters: What happened so far, on the device.
        reason: Why the last update was refused, if a program said so.

    Raises:
        ValueError: If an option is wrong, a parameter is in half precision, the model observes
            nothing, there is no data plate, there is nothing to train, two blocks share a
            parameter, or the loss depends on parameters that are neither the model's nor the
            guide's.
        UnsupportedError: If the programs cannot be compiled although this was asked for.

    Example:
        >>> from pyro_gpvae import ImageModel, make_guide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> images = torch.zeros(100, 1, 28, 28, dtype=torch.uint8)
        >>> step = TrainingStep(model, make_guide("gp", model), images[:8], num_images=100)
        >>> step(images[:8]).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        data: Data,
        num_images: int,
        *,
        learning_rate: float = 5e-4,
        learning_rates: Mapping[str, float] | None = None,
        elbo: Objective | None = None,
        backend: Backend | Literal["auto"] = "auto",
        on_nonfinite: OnNonFinite = "stop",
        num_steps: int = 0,
    ) -> None:
        self.learning_rates = {name: float(rate) for name, rate in (learning_rates or {}).items()}
        for rate in (learning_rate, *self.learning_rates.values()):
            if not 0 < rate < math.inf:
                raise ValueError(f"learning_rate must be positive, got {rate}")
        if backend not in ("auto", "eager", "compiled"):
            raise ValueError(f"backend must be 'auto', 'eager' or 'compiled', got {backend!r}")
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
        check_precision(model, guide)
        self.model, self.guide = model, guide
        self.modules = modules_by_role(model, guide)
        own = [each for module in self.modules.values() for each in module.modules()]
        frozen = [m for m in own if not any(p.requires_grad for p in m.parameters())]
        self._frozen = [m for m in frozen if not m.training and any(True for _ in m.parameters())]
        batch = to_batch(data, model, guide)
        self.device = batch[0].device
        self.train(False)  # finding the parameters must not change running statistics
        self.parameters = named_parameters(model, guide, batch, num_images)
        self.train(True)
        trained = _trained(self.parameters)
        self.dtype = trained[0].dtype
        if elbo is None and isinstance(guide, HasBlocks):
            self.blocks: Sequence[Block] = guide.blocks(model)
        else:
            objective = elbo or (guide.elbo() if isinstance(guide, HasElbo) else Trace_ELBO())
            self.blocks = [Block(objective, trained)]
        self.objectives = [without_host_sync(block.elbo) for block in self.blocks]
        pairs = [(block.model or model, block.guide or guide) for block in self.blocks]
        self.programs = [
            (PerImage(pair(*p), num_images), PerImage(p[1], num_images)) for p in pairs
        ]
        for program in itertools.chain(*self.programs):
            with suppress(NonFiniteError):  # the first step reports it
                program.find_plate(*batch)
        self.counters = StepCounters(self.device, halt=on_nonfinite == "stop")
        on_cuda = self.device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(groups, float(learning_rate), fused=True, capturable=on_cuda)
            for groups in parameter_groups(self.blocks, self.parameters, self.learning_rates)
        ]
        for optimizer in self.optimizers:
            optimizer.found_inf = self.counters.refused  # type: ignore[attr-defined]
        self.reason = ""
        self._written = self._set_up(batch)
        self.backend: Backend = "eager"
        self._compiled: list[Evaluate] = []
        self._compiled_shapes = [tensor.shape for tensor in batch]
        worth_it = on_cuda or num_steps >= WORTH_COMPILING
        if backend == "compiled" or (backend == "auto" and worth_it):
            self._compile(batch, required=backend == "compiled")

    def __call__(self, data: Data) -> Tensor:
        """Makes one step on a minibatch, and returns the loss of the last block."""
        batch = to_batch(data, self.model, self.guide)
        if not self.counters.halt:  # otherwise the reason of the first refused update counts
            self.reason = ""
        fits = bool(self._compiled) and [t.shape for t in batch] == self._compiled_shapes
        buffers = [(buffer, buffer.clone()) for buffer in self._written]
        finite = []
        # All blocks are differentiated at the same point. A model that is updated after its guide
        # on the same minibatch learns far more slowly.
        for number in range(len(self.blocks)):
            evaluate = self._compiled[number] if fits else partial(self.evaluate, number)
            try:
                loss, gradients = evaluate(batch)
            except (NonFiniteError, LinAlgError) as error:  # the program checks for itself
                self.reason = str(error) if isinstance(error, NonFiniteError) else ""
                if not self.reason and not self._find_reason(batch):
                    raise
                loss, gradients = torch.full((), torch.nan, device=self.device), []
            finite.append(all_finite(loss, gradients))
        self.counters.check(torch.stack(finite).all())
        for buffer, before in buffers:
            buffer.copy_(torch.where(self.counters.refused > 0, before, buffer))
        for optimizer in self.optimizers:
            optimizer.step()
        self.counters.add(loss, len(batch[0]))
        return loss

    def evaluate(self, block: int, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss of a block and its gradients, which the parameters get as well."""
        self.optimizers[block].zero_grad()
        parameters = list(self.blocks[block].parameters)
        with unvalidated(), nonfinite_as_error():
            loss = self.loss(block, batch)
            loss.backward(inputs=parameters)
        return loss.detach(), [p.grad for p in parameters if p.grad is not None]

    def loss(self, block: int, batch: Batch) -> Tensor:
        """Returns the loss of a block, minus the ELBO per image, for a converted minibatch."""
        objective = self.objectives[block]
        if isinstance(objective, DifferentiableELBO):
            return objective.unread_loss(*self.programs[block], *batch)
        return objective.differentiable_loss(*self.programs[block], *batch)

    def train(self, mode: bool) -> None:
        """Sets the mode of modules, except of networks that came frozen in evaluation mode."""
        for module in self.modules.values():
            module.train(mode)
        for module in self._frozen:
            module.eval()

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the modules by name, also those that are not persistent."""
        modules = self.modules.items()
        return {f"{role}.{n}": b for role, module in modules for n, b in module.named_buffers()}

    def check_single(self, data: Data) -> None:
        """Raises ValueError if batch normalisation prevents a step on one member of the data."""
        one = take(to_batch(data, self.model, self.guide), slice(1))
        with preserve_rng(self.device, list(self.buffers.values())), suppress(NonFiniteError):
            try:
                with nonfinite_as_error():
                    for block in range(len(self.blocks)):
                        self.loss(block, one)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ValueError(
                    "the last minibatch of an epoch has one member, on which batch normalisation "
                    "cannot train: choose another batch_size, or give a DataLoader with "
                    "drop_last=True"
                ) from error

    def _set_up(self, batch: Batch) -> list[Tensor]:
        """Runs every objective once; returns the buffers that this has written."""
        buffers = list(self.buffers.values())
        blocks = itertools.chain(*(block.parameters for block in self.blocks))
        known = [*self.parameters.values(), *blocks]
        with preserve_rng(self.device, buffers):
            # compared by value: batch normalisation does not count its writes
            before = [(buffer, buffer.clone()) for buffer in buffers]
            for block in range(len(self.blocks)):
                with suppress(NonFiniteError), nonfinite_as_error():
                    check_leaves(self.loss(block, batch), known)
            return [b for b, old in before if not torch.equal(b, old)]

    def _compile(self, batch: Batch, required: bool) -> None:
        """Compiles the step; if that fails and is not required, the step stays eager."""
        try:
            self._compiled = compile_blocks(self, batch)
            self.backend = "compiled"
        except Exception as error:  # tracers and compilers raise errors of any kind
            if required:
                message = f"cannot be trained with backend 'compiled': {error}. Use backend 'eager'"
                raise UnsupportedError(f"model and guide {message} or 'auto'") from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            _log.warning("trained with backend 'eager', not 'compiled': %s", reason)

    def _find_reason(self, batch: Batch) -> bool:
        """Looks with Pyro's checks for something in the programs that is not finite."""
        try:
            with torch.no_grad(), nonfinite_as_error():
                for block in range(len(self.blocks)):
                    self.loss(block, batch)
        except NonFiniteError as error:
            self.reason = str(error)
        return bool(self.reason)


def _trained(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the parameters that have gradients, each once, in memory of their own."""
    trained = list({id(p): p for p in parameters.values() if p.requires_grad}.values())
    if not trained:
        raise ValueError(
            "model and guide have no parameter to train: they must be nn.Modules, and not all of "
            "their parameters may be frozen"
        )
    for parameter in trained:
        if torch.empty_like(parameter).stride() != parameter.stride():
            # fused kernels of Adam go through memory, whatever the strides
            parameter.data = parameter.data.contiguous()
    return trained
