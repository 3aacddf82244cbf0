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
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, Objective, PerImage, without_host_sync
from pyro_gpvae.model.guide import HasBlocks, HasElbo
from pyro_gpvae.training._compiled import Evaluate, compile_blocks
from pyro_gpvae.training._parameters import leaves_of, named_parameters, parameter_groups

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


class StepCounters:
    """Counters of a training, kept as tensors on its device, so that no step reads it."""

    def __init__(self, device: torch.device, halt: bool) -> None:
        self.halt = halt  #: whether all updates after the first that is not finite are refused
        #: the sum of the finite losses of this epoch's images
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.seen = self.loss.clone()  #: the number of these images
        self.skipped = self.loss.clone()  #: the number of refused updates
        #: 1 if the present update is refused, otherwise 0; the optimisers read it
        self.refused = torch.zeros((), dtype=torch.float32, device=device)

    def check(self, is_finite: Tensor) -> None:
        """Refuses the present update if its loss or a gradient is not finite."""
        refused = (~is_finite).to(self.refused)
        self.refused.copy_(torch.maximum(self.refused, refused) if self.halt else refused)
        self.skipped += self.refused

    def add(self, loss: Tensor, num_images: int) -> None:
        """Adds a minibatch, unless its last update was refused."""
        weight = (1 - self.refused) * num_images
        self.loss += torch.where(weight > 0, loss.to(self.loss) * weight, 0.0)
        self.seen += weight


class TrainingStep:
    r"""One step of Adam on eq. (2) for a minibatch, without reading the device.

    An update whose loss or gradient is not finite is not made. The eager and the compiled step draw
    the same random numbers; minibatches of another shape than the first one are always eager.

    Arguments:
        model: A Pyro model, paired with the guide by :func:`pyro_gpvae.pair`.
        guide: A Pyro guide on the same device.
        batch: A minibatch of images, which sets up the step and is not trained on.
        num_images: The number N of training images.
        learning_rate: The learning rate of Adam.
        learning_rates: Other learning rates of single parameters, by their names in ``parameters``.
            ``{"model.log_sigma": 1e-2}`` calibrates the noise σ of an image model within a few
            epochs. At 5e-4, the paper's rate, σ lags so far behind the root mean squared
            reconstruction error, its optimum (Rybkin, Daniilidis and Levine, 2021, "Simple and
            effective VAE training with calibrated decoders"), that it decides every comparison of
            few epochs.
        elbo: The objective, with ``differentiable_loss`` and without enumeration. The default is
            ``guide.blocks(model)``, otherwise ``guide.elbo()``, otherwise ``Trace_ELBO()``.
        backend: "eager", "compiled", or "auto": "compiled" on CUDA, and on a CPU for at least
            20,000 steps, unless the programs cannot be compiled, which the log explains.
        on_nonfinite: "skip" omits updates that are not finite; "stop" also omits all later ones.
        num_steps: The number of steps that will be made, for "auto".

    Attributes:
        backend: How the step is made, "eager" or "compiled".
        blocks, programs, optimizers: The objectives and what they train, the scaled model and
            guide, and the optimiser, of each block.
        parameters: All parameters by name.
        counters: What happened so far, on the device.
        reason: Why the last update was refused, if a program said so.

    Raises:
        ValueError: If an option is wrong, there is nothing to train, or the loss depends on
            parameters that are neither the model's nor the guide's.
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
        batch: Tensor,
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
        self.model, self.guide = model, guide
        named = {"model": model, "guide": guide}
        self.modules = {n: m for n, m in named.items() if isinstance(m, torch.nn.Module)}
        own = [each for module in self.modules.values() for each in module.modules()]
        frozen = [m for m in own if not any(p.requires_grad for p in m.parameters())]
        self._frozen = [m for m in frozen if not m.training and any(True for _ in m.parameters())]
        x = to_batch(batch, model, guide)[0]
        self.device = x.device
        self.train(False)  # finding the parameters must not change running statistics
        self.parameters = named_parameters(model, guide, x)
        self.train(True)
        trained = list({id(p): p for p in self.parameters.values() if p.requires_grad}.values())
        if not trained:
            raise ValueError(
                "model and guide have no parameter to train: they must be nn.Modules, and not all "
                "of their parameters may be frozen"
            )
        for parameter in trained:
            if torch.empty_like(parameter).stride() != parameter.stride():
                # fused kernels of Adam go through memory, whatever the strides
                parameter.data = parameter.data.contiguous()
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
                program.find_plate(x)
        self.counters = StepCounters(self.device, halt=on_nonfinite == "stop")
        on_cuda = self.device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(groups, float(learning_rate), fused=True, capturable=on_cuda)
            for groups in parameter_groups(self.blocks, self.parameters, self.learning_rates)
        ]
        for optimizer in self.optimizers:
            optimizer.found_inf = self.counters.refused  # type: ignore[attr-defined]
        self.reason = ""
        self._set_up(x)
        self.backend: Backend = "eager"
        self._compiled: list[Evaluate] = []
        self._compiled_shape = x.shape
        worth_it = on_cuda or num_steps >= WORTH_COMPILING
        if backend == "compiled" or (backend == "auto" and worth_it):
            self._compile(x, required=backend == "compiled")

    def __call__(self, images: Tensor) -> Tensor:
        """Makes one step on images (B, ...), and returns the loss of the last block."""
        x = to_batch(images, self.model, self.guide)[0]
        if not self.counters.halt:  # otherwise the reason of the first refused update counts
            self.reason = ""
        for number, optimizer in enumerate(self.optimizers):
            compiled = bool(self._compiled) and x.shape == self._compiled_shape
            evaluate = self._compiled[number] if compiled else partial(self.evaluate, number)
            buffers = [(buffer, buffer.clone()) for buffer in self._written]
            try:
                loss, gradients = evaluate(x)
            except (NonFiniteError, LinAlgError) as error:  # the program checks for itself
                self.reason = str(error) if isinstance(error, NonFiniteError) else ""
                if not self.reason and not self._find_reason(x):
                    raise
                loss, gradients = torch.full((), torch.nan, device=self.device), []
            self.counters.check(_finite(loss, gradients))
            for buffer, before in buffers:
                buffer.copy_(torch.where(self.counters.refused > 0, before, buffer))
            optimizer.step()
        self.counters.add(loss, len(x))
        return loss

    def evaluate(self, block: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss of a block and its gradients, which the parameters get as well."""
        self.optimizers[block].zero_grad()
        parameters = list(self.blocks[block].parameters)
        with unvalidated(), nonfinite_as_error():
            loss = self.loss(block, x)
            loss.backward(inputs=parameters)
        return loss.detach(), [p.grad for p in parameters if p.grad is not None]

    def loss(self, block: int, x: Tensor) -> Tensor:
        """Returns the loss of a block, minus the ELBO per image, for x as floats."""
        return self.objectives[block].differentiable_loss(*self.programs[block], x)

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

    def _set_up(self, x: Tensor) -> None:
        """Runs every objective once; finds written buffers and parameters nobody trains."""
        leaves: list[Tensor] = []
        buffers = list(self.buffers.values())
        with preserve_rng(self.device, buffers):
            # compared by value: batch normalisation does not count its writes
            before = [(buffer, buffer.clone()) for buffer in buffers]
            for block in range(len(self.blocks)):
                with suppress(NonFiniteError), nonfinite_as_error():
                    leaves += leaves_of(self.loss(block, x))
            self._written = [b for b, old in before if not torch.equal(b, old)]
        known = {id(p) for block in self.blocks for p in block.parameters}
        known |= {id(p) for p in self.parameters.values()}
        # leaves that are no nn.Parameter are those in which a program differentiates by itself
        unknown = [p for p in leaves if isinstance(p, torch.nn.Parameter) and id(p) not in known]
        if unknown:
            raise ValueError(
                f"the loss depends on a parameter of shape {tuple(unknown[0].shape)} that is "
                "neither the model's nor the guide's, and would never be trained. Let both be "
                "torch.nn.Modules that hold all of theirs (in an nn.ModuleList, not in a list or a "
                "function), and make the guide for this model; or call requires_grad_(False)"
            )

    def _compile(self, x: Tensor, required: bool) -> None:
        """Compiles the step; if that fails and is not required, the step stays eager."""
        try:
            self._compiled = compile_blocks(self, x)
            self.backend = "compiled"
        except Exception as error:  # tracers and compilers raise errors of any kind
            if required:
                message = f"cannot be trained with backend 'compiled': {error}. Use backend 'eager'"
                raise UnsupportedError(f"model and guide {message} or 'auto'") from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            _log.warning("trained with backend 'eager', not 'compiled': %s", reason)

    def _find_reason(self, x: Tensor) -> bool:
        """Looks with Pyro's checks for something in the programs that is not finite."""
        try:
            with torch.no_grad(), nonfinite_as_error():
                for block in range(len(self.blocks)):
                    self.loss(block, x)
        except NonFiniteError as error:
            self.reason = str(error)
        return bool(self.reason)


def _finite(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Returns a boolean scalar on the device: whether the loss and all gradients are finite."""
    # a norm is finite only if all its terms are; in float64 it does not overflow
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float64) if gradients else []
    return torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())
