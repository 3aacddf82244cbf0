r"""One optimiser step on eq. (2), in Python, compiled, or as one CUDA graph."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._errors import (
    NonFiniteError,
    UnsupportedError,
    finite,
    nonfinite_as_error,
    unvalidated,
)
from pyro_gpvae.core._precision import Precision, autocast, lowered
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.images import to_float
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, Objective, PerImage, without_host_sync
from pyro_gpvae.training._counters import Tally
from pyro_gpvae.training._cuda_graph import CudaGraph
from pyro_gpvae.training._distributed import World, shared_draws
from pyro_gpvae.training._tracing import PureLoss, pure_loss, snapshot

__all__ = [
    "Backend",
    "TrainingStep",
    "log_fallback",
    "loss_and_norm",
    "match_layout",
    "to_batch",
    "without_advice",
]

_log = logging.getLogger(__name__)

Backend = Literal["eager", "compiled", "captured"]
Evaluate = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class TrainingStep:
    r"""One step of Adam on eq. (2) for a minibatch; nothing in it reads the device.

    * ``"eager"`` runs model and guide as the Pyro programs that they are, without Pyro's checks.
    * ``"compiled"`` traces them, objective and gradient included, into a pure function
      (:func:`pyro_gpvae.training._tracing.pure_loss`), and compiles that.
    * ``"captured"`` puts everything, from the gather of the images to Adam, into one CUDA graph.

    All draw the same random numbers in the same order. A minibatch of another size than the first
    takes the eager way.

    An update whose loss or gradient is not finite is not made, on the device: the optimisers
    get a flag.

    Arguments:
        model: A Pyro model, on its device; see :meth:`train`.
        guide: A Pyro guide.
        images: Training images, uint8 (N, C, H, W), on that device, or on the host if they are
            too many; then :meth:`__call__` takes pixels.
        batch_size: Images per step.
        learning_rate: Of Adam.
        elbo: The objective; by default ``guide.elbo()`` if there is one, else ``Trace_ELBO()``.
        backend: See above.
        strict: Whether a backend that cannot run these programs is an error. Otherwise the step
            is an eager one, and a line in the log says why.
        halt: Whether the first update that is not made is the last one that is tried.
        precision: Of the matrix products and convolutions of the networks, which are the modules
            in model and guide, see :class:`pyro_gpvae.core._precision.Precision`; densities and
            parameters keep their dtype. None leaves it to torch's settings.
        world: The processes that train together. Each then takes its part of every minibatch of
            ``batch_size``, by way of :func:`pyro_gpvae.training._tracing.pure_loss` also with ``"eager"``.

    Attributes:
        blocks: Objectives and what they train, in the order of a step.
        programs: Scaled model and guide of each block.
        optimizers: Of each block.
        parameters: All parameters by name.
        tally: What happened so far, on the device.

    Raises:
        ValueError: If there is nothing to train, the loss depends on parameters that are neither
            the model's nor the guide's, ``"captured"`` is asked for without CUDA or in several
            processes, these cannot share a minibatch evenly, or there is no such precision.
        UnsupportedError: If the programs cannot be compiled or captured, and why.

    Example:
        >>> from pyro_gpvae import ImageModel, make_guide
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> images = torch.zeros(100, 1, 28, 28, dtype=torch.uint8)
        >>> step = TrainingStep(model, make_guide("gp", model), images, batch_size=8)
        >>> step(torch.arange(8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        images: Tensor,
        *,
        batch_size: int,
        learning_rate: float = 5e-4,
        elbo: Objective | None = None,
        backend: Backend = "eager",
        strict: bool = True,
        halt: bool = False,
        precision: Precision | None = None,
        world: World | None = None,
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
        if precision is not None and precision not in get_args(Precision):
            names = ", ".join(map(repr, get_args(Precision)))
            raise ValueError(f"precision must be one of {names}, or None, got {precision!r}")
        self.model, self.guide = model, guide
        named = {"model": model, "guide": guide}
        self.modules = {n: m for n, m in named.items() if isinstance(m, torch.nn.Module)}
        self.images = images
        self.precision = precision
        self.world = world or World()
        first = next((p for m in self.modules.values() for p in m.parameters()), None)
        self.device = images.device if first is None else first.device
        x = self.prepare(images[:batch_size])
        self._resting = [n for m in self.modules.values() for n in m.modules() if _rests(n)]
        self.train(False)  # to find the parameters is not to train
        self.parameters = _parameters(model, guide, x)
        self.train(True)
        trained = list({id(p): p for p in self.parameters.values() if p.requires_grad}.values())
        if not trained:
            raise ValueError("model and guide have no parameter to train: are they nn.Modules?")
        for parameter in trained:
            if torch.empty_like(parameter).stride() != parameter.stride():
                # a part of a larger tensor, or its elements share memory: see match_layout
                parameter.data = parameter.data.contiguous()
        if hasattr(guide, "blocks") and elbo is None:
            self.blocks: Sequence[Block] = guide.blocks(model)
        else:
            objective = elbo or (guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO())
            self.blocks = [Block(objective, trained)]
        pairs = [(b.model or model, b.guide or guide) for b in self.blocks]
        self.programs = [
            (PerImage(pair(m, g), len(images)), PerImage(g, len(images))) for m, g in pairs
        ]
        self.optimizers = [
            torch.optim.Adam(
                b.parameters, learning_rate, fused=True, capturable=self.device.type == "cuda"
            )
            for b in self.blocks
        ]
        self.objectives = [without_host_sync(b.elbo) for b in self.blocks]
        self.tally = Tally(self.device, halt)
        for optimizer in self.optimizers:
            optimizer.found_inf = self.tally.refused  # type: ignore[attr-defined]
        self.backend: Backend = backend
        self.batch_size = min(batch_size, len(images))
        #: Why the last update was not made, if a program said so.
        self.reason = ""
        self._written: list[Tensor] = []
        self._fast: list[Evaluate] = []
        self._graphs: dict[int, CudaGraph] = {}
        self._strict = strict
        if backend == "captured":
            CudaGraph.check(self.device)
        if backend == "captured" and self.world.size > 1:
            raise ValueError("backend='captured' is for one process: use 'compiled'")
        self.world.check(batch_size, len(images))
        with self.flags():
            self._set_up(x)
            if backend != "eager":
                with self._or_eager():
                    self._build(x)
            if self.world.size > 1 and not self._fast:
                self._build_parts(x)

    def __call__(self, batch: Tensor, count: int | None = None) -> Tensor:
        """Makes one step, and returns the loss of the last block, on the device.

        Arguments:
            batch: Numbers of training images (B,), or uint8 pixels (B, C, H, W).
            count: The number of images B of the minibatch, if this is already the :meth:`part`
                of it for this process.
        """
        whole = len(batch) if count is None else count
        if count is None:
            batch = self.part(batch)
        with self.flags():
            if whole != self.batch_size or not self._fast:
                evaluations = [self.eager(i, self.world.size > 1) for i in range(len(self.blocks))]
                return self._update(evaluations, batch, whole)
            if self.backend != "captured":
                return self._update(self._fast, batch, whole)
            form = batch.dim()  # numbers, or pixels
            if form not in self._graphs:
                with self._or_eager():
                    self._graphs[form] = self._captured(batch)
                if form not in self._graphs:
                    return self(batch)
            return self._graphs[form](batch)

    def train(self, mode: bool) -> None:
        """Puts model and guide into training or evaluation mode.

        Networks that came in evaluation mode and are frozen as a whole stay in it, so that their
        running statistics are frozen as well.
        """
        for module in self.modules.values():
            module.train(mode)
        for module in self._resting:
            module.eval()

    def part(self, batch: Tensor) -> Tensor:
        """What of a minibatch this process looks at: a smaller one than usual goes to all."""
        return self.world.part(batch) if len(batch) == self.batch_size else batch

    @contextmanager
    def flags(self) -> Iterator[None]:
        """Sets torch's flags for the precision; the casts to bfloat16 are elsewhere."""
        exact: Precision = "tf32" if self.precision == "tf32" else "float32"
        with autocast(self.precision and exact, self.device.type):
            yield

    def prepare(self, images: Tensor) -> Tensor:
        """Images as floats in [0, 1], on the model's device, in the dtype of its parameters."""
        return to_batch(images, self.modules, self.device)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers of the modules, by name."""
        for role, module in self.modules.items():
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                yield f"{role}.{name}", tensor

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers of the modules, which a program may write to when it is called."""
        return [buffer for module in self.modules.values() for buffer in module.buffers()]

    def pure(self, block: int, x: Tensor) -> PureLoss:
        """The objective of a block as a pure function, for images of the shape of x."""
        objective, programs = self.objectives[block], self.programs[block]
        before = snapshot(getattr(objective, "__dict__", {}))
        found = pure_loss(
            lambda x: self._loss(objective, programs, x),
            self.modules,
            self.blocks[block].parameters,
            x,
        )
        if snapshot(getattr(objective, "__dict__", {})) != before:
            raise UnsupportedError("its objective changes its attributes, which a graph cannot")
        return found

    def _loss(self, objective: Objective, programs: tuple[PerImage, PerImage], x: Tensor) -> Tensor:
        """The objective, with its networks in the precision asked for."""
        with ExitStack() as stack:
            if self.precision == "bf16":
                for network in itertools.chain(*map(_networks, self.modules.values())):
                    stack.enter_context(lowered(network, self.precision))
            return objective.differentiable_loss(*programs, x)

    def _build(self, x: Tensor) -> None:
        """Makes the blocks pure functions, of this process's part of a minibatch."""
        mine = x[: len(x) // self.world.size]
        for block in range(len(self.blocks)):
            pure = self.pure(block, mine)
            graph: Callable[..., list[Tensor]] = pure.graph
            if self.backend == "compiled":
                graph = torch.compile(pure.graph, fullgraph=True, dynamic=False)
            self._fast.append(_traced(pure, graph, pure.noise))
            with without_advice():
                self._verify(block, mine)
                self._verify(block, 1 - mine)  # what was read of those traced is wrong here
            if self.world.size > 1:
                self._fast[block] = self._shared(block, pure, graph, x)

    def _captured(self, batch: Tensor) -> CudaGraph:
        """A step on minibatches of this size, as one CUDA graph."""
        written = [*self.tally.tensors, *self.buffers]
        written += [p for block in self.blocks for p in block.parameters]
        return CudaGraph(
            lambda batch: self._update(self._fast, batch, len(batch)),
            batch.to(self.device, copy=True),
            self.optimizers,
            written,
        )

    def _build_parts(self, x: Tensor) -> None:
        """As :meth:`_build`, for several processes, which cannot do without."""
        try:
            self._build(x)
        except Exception as error:  # of any kind, see _or_eager
            reason = str(error).rstrip(".") or type(error).__name__
            raise UnsupportedError(
                "model and guide cannot train in several processes, which need the objective as "
                f"a pure function: {reason}. Train them in one process"
            ) from error

    def _shared(
        self, block: int, pure: PureLoss, graph: Callable[..., list[Tensor]], x: Tensor
    ) -> Evaluate:
        """A block in one of several processes: noise, loss and gradients as if there were one."""
        world, mine = self.world, len(x) // self.world.size
        count = max(mine // 2, 1)
        few = x[: 2 * count]
        both = pure if mine == 2 * count else self.pure(block, few)
        with preserve_rng(self.device):
            draws = shared_draws(pure, self.pure(block, few[:count]), both, few, world)
        targets = [pure.leaves[name].detach() for name in pure.used]

        def reduced(*inputs: Tensor) -> list[Tensor]:
            try:
                found = graph(*inputs)
            except LinAlgError:  # in this part: the other processes wait for its message
                nan = torch.full((), torch.nan, device=self.device, dtype=inputs[0].dtype)
                found = [nan, *(torch.full_like(target, torch.nan) for target in targets)]
            return world.mean(found)

        return _traced(pure, reduced, lambda: [draw(world) for draw in draws])

    def _set_up(self, x: Tensor) -> None:
        """Runs every objective once, with Pyro's checks: what is set up at first use, is."""
        leaves: list[Tensor] = []
        # running statistics are not to see these images twice
        with preserve_rng(self.device, self.buffers):
            # by value: batch normalisation does not count its writes
            before = [(buffer, buffer.clone()) for buffer in self.buffers]
            for objective, programs in zip(self.objectives, self.programs, strict=True):
                with suppress(NonFiniteError), nonfinite_as_error():
                    leaves += _leaves(self._loss(objective, programs, x))
            self._written = [b for b, old in before if not torch.equal(b, old)]
        known = {id(p) for p in self.parameters.values()}
        known |= {id(p) for block in self.blocks for p in block.parameters}
        # other leaves are what a program differentiates in by itself
        unknown = [p for p in leaves if isinstance(p, torch.nn.Parameter) and id(p) not in known]
        strangers = [str(tuple(p.shape)) for p in unknown]
        if strangers:
            raise ValueError(
                f"the loss depends on parameters of shape {', '.join(strangers[:3])} that are "
                "neither the model's nor the guide's, and would never be trained. Let both be "
                "torch.nn.Modules that hold all of theirs (in an nn.ModuleList, not in a list; not "
                "inside a function), and a guide that knows the decoder be made for this model; or "
                "call requires_grad_(False) on what is to stay as it is"
            )

    @contextmanager
    def _or_eager(self) -> Iterator[None]:
        """Takes the eager way if anything goes wrong inside, unless strict."""
        try:
            yield
        except Exception as error:  # of any kind: tracers and compilers raise what they like
            if self._strict and isinstance(error, UnsupportedError):
                raise UnsupportedError(
                    f"model and guide cannot be trained with backend {self.backend!r}: {error}. "
                    "Otherwise use 'eager', or 'auto'"
                ) from error
            if self._strict:
                raise
            log_fallback(self.backend, error)
            self.backend = "eager"
            self._fast.clear()

    def _verify(self, block: int, x: Tensor) -> None:
        """Compares a block with its eager equal, on the same noise; leaves no trace."""
        results: list[Tensor] = []
        # the eager way twice: a program that counts its calls counts from one to the other
        for evaluate in (self.eager(block), self.eager(block), self._fast[block]):
            try:
                with preserve_rng(self.device, self.buffers):
                    loss, gradients = evaluate(x)
                results.append(loss_and_norm(loss, gradients))
            finally:
                self.optimizers[block].zero_grad()
        # a GPU may multiply in TF32, which has 10 bits, and adds in any order
        on_cpu = x.device.type == "cpu"
        rtol = 1e-8 if x.dtype == torch.float64 else 1e-4 if on_cpu else 1e-3
        eager, again, fast = results
        if not torch.allclose(eager, fast, rtol=rtol, equal_nan=True):
            raise UnsupportedError(
                f"loss and gradient norm are {fast.tolist()} with backend {self.backend!r}, "
                f"{eager.tolist()} with 'eager'"
            )
        exact = 8 * torch.finfo(x.dtype).eps if on_cpu else rtol
        if not torch.allclose(eager, again, rtol=exact, atol=0, equal_nan=True):
            raise UnsupportedError(
                f"loss and gradient norm are {eager.tolist()}, and {again.tolist()} of a second "
                "call on the same noise: it depends on what a graph would freeze"
            )

    def eager(self, block: int, shared: bool = False) -> Evaluate:
        """The objective of a block as it is: from a batch to the loss and the gradients."""
        objective, programs = self.objectives[block], self.programs[block]
        parameters = list(self.blocks[block].parameters)

        def evaluate(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.optimizers[block].zero_grad()
            with unvalidated(), nonfinite_as_error():
                loss = self._loss(objective, programs, x)
                loss.backward(inputs=parameters)
            trained = [p for p in parameters if p.grad is not None]
            gradients = [p.grad for p in trained if p.grad is not None]
            if shared:  # all processes have computed the same; rounding could tell them apart
                _, *gradients = self.world.mean([loss.detach(), *gradients])
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = match_layout(parameter, gradient)
            return loss.detach(), gradients

        return evaluate

    def _update(self, evaluations: Sequence[Evaluate], batch: Tensor, count: int) -> Tensor:
        """One step of Adam for each block: the body of a CUDA graph as well."""
        if not self.tally.halt:  # what an earlier one was refused for
            self.reason = ""
        x = self.prepare(batch if batch.dim() > 1 else self.images[batch])
        for optimizer, evaluate in zip(self.optimizers, evaluations, strict=True):
            before = [buffer.clone() for buffer in self._written]
            try:
                loss, gradients = evaluate(x)
            except (NonFiniteError, LinAlgError) as error:  # a program that checks by itself
                self.reason = str(error) if isinstance(error, NonFiniteError) else ""
                if not self.reason and not self._refuses(x):
                    raise
                loss, gradients = torch.full((), torch.nan, device=self.device), []
            self.tally.note(finite(loss, gradients))
            for buffer, old in zip(self._written, before, strict=True):
                buffer.copy_(torch.where(self.tally.refused > 0, old, buffer))
            optimizer.step()
        self.tally.add(loss, count)
        return loss

    def _refuses(self, x: Tensor) -> bool:
        """Whether Pyro's checks find something in these programs that is not finite."""
        try:
            with torch.no_grad(), nonfinite_as_error():
                for objective, programs in zip(self.objectives, self.programs, strict=True):
                    self._loss(objective, programs, x)
        except NonFiniteError as error:
            self.reason = str(error)
        return bool(self.reason)


def _traced(
    pure: PureLoss, graph: Callable[..., list[Tensor]], noise: Callable[[], list[Tensor]]
) -> Evaluate:
    """A pure function with noise from the global generator; gradients go to the parameters."""
    targets = [pure.leaves[name] for name in pure.used]
    unused = [leaf for name, leaf in pure.leaves.items() if name not in pure.used]

    def evaluate(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            loss, *gradients = graph(x, *pure.inputs, *noise())
        for parameter, gradient in zip(targets, gradients, strict=True):
            parameter.grad = match_layout(parameter, gradient)
        for parameter in unused:  # another block may have left one
            parameter.grad = None
        return loss, gradients

    return evaluate


@contextmanager
def without_advice() -> Iterator[None]:
    """Without the compiler's advice to compute in TF32: that is the user's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield


def loss_and_norm(loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """A loss, and the norm of all its gradients: what two ways to compute them must agree in."""
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    return torch.stack([loss.detach(), norm.to(loss)]).double()


def log_fallback(backend: Backend, error: Exception) -> None:
    """The one line that says why a step is an eager one."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    _log.warning("trained with backend 'eager', not '%s': %s", backend, reason)


def match_layout(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, laid out in memory like the parameter.

    The fused kernels of Adam go through both in the order of memory, whatever their strides;
    ``backward`` sees to it that these agree, and nothing else does.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def to_batch(
    images: Tensor, modules: Mapping[str, torch.nn.Module], device: torch.device
) -> Tensor:
    """Images as floats in [0, 1] on a device, in the dtype of the parameters of modules."""
    first = next((p for module in modules.values() for p in module.parameters()), None)
    dtype = torch.get_default_dtype() if first is None else first.dtype
    return to_float(images.to(device, non_blocking=True), dtype)


def _networks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules in a program; of lists, which nobody calls, those inside."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from _networks(child)
        else:
            yield child


def _rests(module: torch.nn.Module) -> bool:
    """Whether a module is in evaluation mode, and has parameters, which are all frozen."""
    frozen = [not p.requires_grad for p in module.parameters()]
    return not module.training and bool(frozen) and all(frozen)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of the graph of a loss: those that ``backward`` would give gradients to."""
    found, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [inner for inner, _ in node.next_functions]
    return found


def _parameters(model: PyroProgram, guide: PyroProgram, x: Tensor) -> dict[str, Tensor]:
    """The parameters of modules and of ``pyro.param`` statements, by name.

    The guide is run once, since Pyro's autoguides create their parameters then.
    """
    capture = poutine.trace(param_only=True)
    # what is not finite here will not be in the first step, which says where
    with suppress(NonFiniteError), torch.no_grad(), nonfinite_as_error(), capture:
        guide_trace = poutine.trace(guide).get_trace(x)
        poutine.replay(model, trace=guide_trace)(x)
    named: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, torch.nn.Module):
            named |= {f"{role}.{name}": p for name, p in program.named_parameters()}
    known = {id(p) for p in named.values()}
    programs: dict[str, int] = {}
    for site in capture.trace.nodes.values():
        value: Any = site["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if id(leaf) not in known:
            known.add(id(leaf))
            # a Program that is called inside a function has a name of this process only
            owner, dot, attribute = str(site["name"]).partition(".")
            if re.fullmatch(r"\w+-[0-9a-f]+", owner) and dot:
                owner = f"program-{programs.setdefault(owner, len(programs))}"
            named[f"param.{owner}{dot}{attribute}"] = leaf
    return named
