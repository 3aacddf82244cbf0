r"""Several independent trainings in one program: their tensors are stacked, their step is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gpvae.core._errors import UnsupportedError
from pyro_gpvae.core._seeds import preserve_rng, set_global_state
from pyro_gpvae.training._counters import Tally
from pyro_gpvae.training._cuda_graph import CudaGraph
from pyro_gpvae.training._tracing import PureLoss, attributes
from pyro_gpvae.training.step import (
    Backend,
    TrainingStep,
    log_fallback,
    loss_and_norm,
    match_layout,
    without_advice,
)

__all__ = ["StackedStep"]


class StackedStep:
    r"""One step of S trainings that differ in their parameters, images and noise.

    The objective as a pure function (:func:`pyro_gpvae.training._tracing.pure_loss`) is vectorised over a
    leading dimension by ``torch.func.vmap``. The parameters of every run become views of the
    stacked ones, and so do the moments of its optimisers: all runs are trained, looked at and
    saved through their own modules, until :meth:`release`. Adam works element by element, so one
    Adam serves all.

    Run i draws from a generator of its own the numbers that it would draw if it were alone.

    Arguments:
        steps: The runs, all of the same programs, shapes and batch size, each with its own
            parameters.
        generators: Of each run, in the state in which its first step is to find it.
        backend: "eager" runs the vectorised function operator by operator; "compiled"; or, on
            CUDA, "captured": one CUDA graph for the step of all runs.
        strict: Whether it is an error if it cannot be compiled or captured; otherwise a line in
            the log says why it runs operator by operator.

    Attributes:
        tally: What happened so far, each tensor (S,).

    Raises:
        ValueError: If runs share a parameter or buffer, theirs have other names or shapes, or
            ``"captured"`` is asked for without CUDA.
        UnsupportedError: If the programs cannot be made a pure function, or not vectorised, or
            if runs differ in more than parameters and buffers.
    """

    def __init__(
        self,
        steps: Sequence[TrainingStep],
        generators: Sequence[torch.Generator],
        backend: Backend = "eager",
        strict: bool = True,
    ) -> None:
        self.steps = list(steps)
        self.generators = list(generators)
        self.backend: Backend = backend
        self._strict = strict
        first = self.steps[0]
        if any(name.startswith("param.") for name in first.parameters):
            raise UnsupportedError(
                "model and guide cannot be stacked: parameters of pyro.param statements belong to "
                "no module. Train seed by seed"
            )
        self.images = first.images
        self.device = first.device
        if backend == "captured":
            CudaGraph.check(self.device)
        self.tally = Tally(self.device, halt=True, shape=(len(self.steps),))
        self._stop = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, step in enumerate(self.steps):
            step.tally = self.tally.of(number)
        self._stack: dict[str, Tensor] = {}
        self._functions: dict[tuple[int, int], Callable[..., list[Tensor]]] = {}
        self._pure: dict[tuple[int, int], PureLoss] = {}
        self._graphs: dict[int, CudaGraph] = {}
        self.optimizers: list[torch.optim.Adam] = []
        try:
            self._share_tensors()
            self._compare_attributes()
            with first.flags():
                for block in range(len(first.blocks)):  # now, if it cannot be done at all
                    self._verify(block)
        except BaseException:
            self.release()
            raise
        for block, optimizer in enumerate(first.optimizers):
            leaves = [self._stack[name] for name in self._names(block)]
            stacked = torch.optim.Adam(
                leaves,
                optimizer.param_groups[0]["lr"],
                fused=True,
                capturable=self.device.type == "cuda",
            )
            stacked.found_inf = self._stop  # type: ignore[attr-defined]
            self.optimizers.append(stacked)
        self.share_moments()

    def __call__(self, batches: Tensor) -> Tensor:
        """Makes one step of every run.

        Arguments:
            batches: Numbers of training images (S, B), or uint8 pixels (S, B, C, H, W).

        Returns:
            The losses of the last block, (S,).
        """
        with self.steps[0].flags():
            if self.backend != "captured" or batches.shape[1] != self.steps[0].batch_size:
                return self._update(batches)
            form = batches.dim()  # numbers, or pixels
            if form not in self._graphs:
                try:
                    self._graphs[form] = self._captured(batches)
                except Exception as error:  # of any kind, as in compilers
                    self._fall_back(error)
                    return self._update(batches)
            return self._graphs[form](batches)

    def _captured(self, batches: Tensor) -> CudaGraph:
        """A step on minibatches of this size, as one CUDA graph."""
        return CudaGraph(
            self._update,
            batches.to(self.device, copy=True),
            self.optimizers,
            [*self.tally.tensors, self._stop, *self._stack.values()],
            self.generators,
        )

    def _fall_back(self, error: Exception) -> None:
        """Goes on operator by operator, unless strict."""
        if self._strict:
            raise error
        log_fallback(self.backend, error)
        self.backend = "eager"

    def _update(self, batches: Tensor) -> Tensor:
        pixels = batches if batches.dim() > 2 else self.images[batches]
        x = self.steps[0].prepare(pixels.flatten(0, 1)).unflatten(0, batches.shape[:2])
        for block, optimizer in enumerate(self.optimizers):
            function, pure = self._function(block, pixels[0])
            noise = [pure.noise(generator) for generator in self.generators]
            with torch.no_grad():
                losses, *gradients = function(x, *self._inputs(pure, noise))
                norms = [g.reshape(len(g), -1).norm(dim=1, dtype=torch.float64) for g in gradients]
                ok = torch.isfinite(torch.stack([losses.double(), *norms]).sum(0))
                self.tally.note(ok)
                self._stop.copy_(self.tally.refused.max())
            for name, gradient in zip(pure.used, gradients, strict=True):
                self._stack[name].grad = match_layout(self._stack[name].detach(), gradient)
            optimizer.step()
        self.tally.add(losses, batches.shape[1])
        return losses

    def release(self) -> None:
        """Gives the parameters and buffers of every run memory of their own again; the last call.

        A view of the stack would keep all runs in memory, and be saved with them.
        """
        for step in self.steps:
            named = _named_once(step)
            for name in self._stack:
                named[name].data = named[name].detach().clone()

    def share_moments(self) -> None:
        """Stacks the moments of the runs' own optimisers, which become views of the stack."""
        for block, stacked in enumerate(self.optimizers):
            leaves = stacked.param_groups[0]["params"]
            for name, leaf in zip(self._names(block), leaves, strict=True):
                owners = [(s.optimizers[block].state, s.parameters[name]) for s in self.steps]
                states = [state.get(parameter, {}) for state, parameter in owners]
                resumed = all("step" in state for state in states)
                if len({float(state["step"]) for state in states if "step" in state}) > 1:
                    raise ValueError(f"the runs have made different numbers of steps of {name}")
                moments = {
                    key: torch.stack([s[key] for s in states])
                    if resumed
                    else leaf.new_zeros(leaf.shape)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                count = (
                    states[0]["step"].clone() if resumed else torch.zeros((), device=self.device)
                )
                stacked.state[leaf] = {"step": count} | moments
                for number, (state, parameter) in enumerate(owners):
                    own = {key: moment[number] for key, moment in moments.items()}
                    state[parameter] = {"step": count} | own

    def _names(self, block: int) -> list[str]:
        """The names of what a block trains."""
        first = self.steps[0]
        names = {id(tensor): name for name, tensor in _named_once(first).items()}
        return [names[id(p)] for p in first.blocks[block].parameters]

    def _compare_attributes(self) -> None:
        """Refuses runs that differ in what modules keep in Python: all would get the first's."""
        first, *others = (
            attributes(torch.nn.ModuleDict(step.modules), lambda t: repr(t.tolist()))
            for step in self.steps
        )
        for number, other in enumerate(others, 1):
            wrong = [name for name in first | other if first.get(name) != other.get(name)]
            if wrong:
                raise UnsupportedError(
                    f"model and guide cannot be stacked: {wrong[0]} of run {number} is not that of "
                    "run 0, and only parameters and buffers may differ. Train seed by seed"
                )

    def _share_tensors(self) -> None:
        """Stacks the parameters and buffers of the runs, which become views of the stack."""
        runs = [_named_once(step) for step in self.steps]
        for run in runs[1:]:
            for name in run.keys() | runs[0].keys():
                mine, other = (r.get(name) for r in (runs[0], run))
                if mine is None or other is None or mine.shape != other.shape:
                    shapes = [None if t is None else tuple(t.shape) for t in (mine, other)]
                    raise ValueError(
                        f"{name} is not the same tensor in all runs, build them alike: "
                        f"shapes {shapes[0]} and {shapes[1]}"
                    )
                if mine.requires_grad != other.requires_grad:
                    raise ValueError(f"{name} is trained in some runs only: build them alike")
        owners: dict[int, int] = {}
        for number, run in enumerate(runs):
            for name, tensor in run.items():
                if owners.setdefault(id(tensor), number) != number:
                    raise ValueError(
                        f"runs {owners[id(tensor)]} and {number} share {name}: every seed needs a "
                        "model and a guide of its own"
                    )
        memory: dict[int, str] = {}
        for name, tensor in runs[0].items():
            place = tensor.data_ptr()  # 0 if there is no memory
            if place and (tied := memory.setdefault(place, name)) != name:
                raise ValueError(
                    f"{name} is in the memory of {tied}, which stacking would part: let both be "
                    "one torch.nn.Parameter"
                )
            stack = torch.stack([run[name].detach() for run in runs])
            self._stack[name] = stack
            for number, run in enumerate(runs):
                run[name].data = stack[number]
            stack.requires_grad_(tensor.requires_grad)

    def _inputs(self, pure: PureLoss, noise: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What a vectorised objective takes after the images: all tensors, and noise by run."""
        tensors = [self._stack[name].detach() for name in (*pure.leaves, *pure.others)]
        return [*tensors, *(torch.stack(draws) for draws in zip(*noise, strict=True))]

    def _function(self, block: int, x: Tensor) -> tuple[Callable[..., list[Tensor]], PureLoss]:
        """The vectorised objective of a block, for minibatches of this size."""
        key = block, len(x)
        if key not in self._functions:
            first, generator = self.steps[0], torch.Generator(self.device)
            try:
                pure = first.pure(block, first.prepare(x))
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"model and guide cannot be stacked: {error}. Train seed by seed"
                ) from error
            count = len(self.steps)
            others = self._inputs(pure, [pure.noise(generator)] * count)
            inputs = [torch.stack([first.prepare(x)] * count), *(t.clone() for t in others)]
            try:
                with torch.no_grad():
                    graph = make_fx(torch.func.vmap(pure.graph))(*inputs)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise UnsupportedError(
                    f"model and guide cannot be stacked: {reason}. Train seed by seed"
                ) from error
            self._functions[key], self._pure[key] = graph, pure
            if self.backend == "compiled" and len(x) == first.batch_size:
                try:
                    compiled = torch.compile(graph, fullgraph=True, dynamic=False)
                    with torch.no_grad(), without_advice():
                        compiled(*inputs)
                    self._functions[key] = compiled
                except Exception as error:  # of any kind: compilers raise what they like
                    self._fall_back(error)
        return self._functions[key], self._pure[key]

    def _verify(self, block: int) -> None:
        """Compares the part of every run with its own eager step, on the same noise and on images
        of its own; leaves no trace."""
        first = self.steps[0]
        size, count = min(first.batch_size, len(self.images)), len(self.images)
        rows = [(torch.arange(size) + 1 + run) % count for run in range(len(self.steps))]
        x = torch.stack([first.prepare(self.images[i.to(self.images.device)]) for i in rows])
        function, pure = self._function(block, self.images[:size])
        states = [generator.get_state() for generator in self.generators]
        noise = [pure.noise(generator) for generator in self.generators]
        with torch.no_grad():
            losses, *gradients = function(x, *(t.clone() for t in self._inputs(pure, noise)))
        rtol = 1e-8 if x.dtype == torch.float64 else 0.1 if first.precision == "bf16" else 1e-3
        for run, (step, state) in enumerate(zip(self.steps, states, strict=True)):
            self.generators[run].set_state(state)
            with preserve_rng(self.device, step.buffers):
                set_global_state(state, self.device)
                loss, own = step.eager(block)(x[run])
            step.optimizers[block].zero_grad()
            found = loss_and_norm(losses[run], [g[run] for g in gradients])
            alone = loss_and_norm(loss, own)
            if not torch.allclose(found, alone, rtol=rtol, equal_nan=True):
                raise UnsupportedError(
                    f"model and guide cannot be stacked: run {run} has loss and gradient norm "
                    f"{alone.tolist()} alone, {found.tolist()} with the others; what "
                    "differs between runs must be a parameter or a buffer. Train seed by seed"
                )


def _named_once(step: TrainingStep) -> dict[str, Tensor]:
    """All parameters and buffers; those that several modules share by their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in step.named_tensors():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
