r"""Training: the loop, nothing else."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, overload

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._precision import Precision
from pyro_gpvae.core._programs import PyroProgram, own_parameters
from pyro_gpvae.core._seeds import preserve_rng, seeded
from pyro_gpvae.core._signals import Interrupts, stopped
from pyro_gpvae.data.images import check_images
from pyro_gpvae.model.elbo import Objective, elbo_terms
from pyro_gpvae.training._cuda_graph import CudaGraph
from pyro_gpvae.training._distributed import World
from pyro_gpvae.training._divergence import explain
from pyro_gpvae.training._lockstep import Lockstep
from pyro_gpvae.training._state import Progress
from pyro_gpvae.training._streaming import Gathering, stays_on_host
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.step import Backend, TrainingStep

__all__ = ["History", "NonFiniteError", "fit"]

OnNonFinite = Literal["stop", "skip"]

#: Steps between readings of a GPU, which waits for the host meanwhile; a CPU is read every step.
READ_EVERY = 100
#: What a row of a history can hold beside the guide's diagnostics.
COLUMNS = (
    *("epoch", "step", "loss", "log_likelihood", "kl_z", "kl_global", "sigma"),
    *("validation_elbo", "skipped", "seconds"),
)
#: Images that are looked at together after an epoch, which bounds the memory.
LOOKED_AT = 512
#: Steps of a training on the CPU from which on it is worth half a minute of compiling.
WORTH_COMPILING = 20_000


@dataclass
class History:
    """What happened in each epoch: one dictionary a row.

    Attributes:
        rows: One dictionary for each epoch.
        backend: How steps were made; see :class:`pyro_gpvae.training.step.TrainingStep`.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    backend: Backend = "eager"

    def frame(self) -> pd.DataFrame:
        """The rows as a table, one column a quantity."""
        return pd.DataFrame(self.rows)


@overload
def fit(
    model: PyroProgram,
    guide: PyroProgram,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = ...,
    learning_rate: float = ...,
    elbo: Objective | None = ...,
    validation: Tensor | None = ...,
    seed: int = ...,
    seeds: None = ...,
    device: torch.device | str | None = ...,
    progress: bool | str = ...,
    checkpoints: Checkpoints | str | Path | None = ...,
    resume: bool = ...,
    on_nonfinite: OnNonFinite = ...,
    max_skipped: int = ...,
    backend: Backend | Literal["auto"] = ...,
    precision: Precision | None = ...,
) -> History: ...


@overload
def fit(
    model: Sequence[PyroProgram],
    guide: Sequence[PyroProgram],
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = ...,
    learning_rate: float = ...,
    elbo: Objective | None = ...,
    validation: Tensor | None = ...,
    seeds: Sequence[int],
    device: torch.device | str | None = ...,
    progress: bool | str = ...,
    checkpoints: Checkpoints | str | Path | None = ...,
    resume: bool = ...,
    on_nonfinite: OnNonFinite = ...,
    max_skipped: int = ...,
    backend: Backend | Literal["auto"] = ...,
    precision: Precision | None = ...,
) -> list[History]: ...


def fit(
    model: PyroProgram | Sequence[PyroProgram],
    guide: PyroProgram | Sequence[PyroProgram],
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 5e-4,
    elbo: Objective | None = None,
    validation: Tensor | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool | str = True,
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
    on_nonfinite: OnNonFinite = "stop",
    max_skipped: int = 100,
    backend: Backend | Literal["auto"] = "auto",
    precision: Precision | None = None,
) -> History | list[History]:
    r"""Trains model and guide on images by Adam on eq. (2), in place.

    Both are left on ``device``, without gradients, and in evaluation mode, ready for
    :func:`pyro_gpvae.log_evidence`; also if the training is interrupted.

    The images are kept as uint8 on the device. If they are memory-mapped
    (:func:`pyro_gpvae.data.images.memory_mapped`) or would fill more than half of a GPU's free memory,
    they stay on the host, and a thread gathers every minibatch while the step before it runs;
    the numbers are the same. Every epoch visits each of them once, in a fresh
    permutation from a generator of the run's own; the last batch may be smaller. The same seed
    gives the same run, and the global random state is left as it was.

    With ``checkpoints`` a training can be killed at any moment. With ``resume`` as well, it goes
    on from the newest checkpoint, in the middle of an epoch, and ends with the parameters, the
    moments and the history of a training that was never stopped, bit for bit (``seconds``
    excepted) on the same device with the same number of threads, on CUDA in torch's deterministic
    mode. SIGINT and SIGTERM end it after the step at hand, with a checkpoint. What an objective or
    a guide keeps in plain Python attributes, such as a step counter, is not part of a checkpoint.

    With ``seeds``, model and guide are sequences, one of each for every seed with parameters of
    its own, and all are trained in one program: see :class:`pyro_gpvae.training._stacked.StackedStep`. Run i
    ends where it would have ended alone with seed i, up to rounding.

    In several processes with ``torch.distributed``, one training uses all of them: each takes its
    part of every minibatch of ``batch_size`` images, and the parameters are those that one
    process finds, up to rounding: all begin with those of the first process. All are given all
    images; on CUDA, process r takes device LOCAL_RANK; the first one writes the checkpoints.
    ``torchrun --nproc-per-node 2 script.py``::

        torch.distributed.init_process_group()
        fit(model, guide, images, epochs=100, batch_size=256)

    Arguments:
        model: A Pyro model, such as :class:`pyro_gpvae.ImageModel`.
        guide: A Pyro guide; see :mod:`pyro_gpvae.model.guide` for what is discovered in it.
        images: Training images, uint8 (N, C, H, W).
        epochs: How often each image is seen.
        batch_size: Images per step.
        learning_rate: Of Adam.
        elbo: The objective; by default ``guide.elbo()`` if there is one, else ``Trace_ELBO()``.
            It must have ``differentiable_loss``, and enumerate no sites.
        validation: Images, uint8 (M, C, H, W), whose ELBO is logged after each epoch.
        seed: Of the permutations and of the samples.
        seeds: Those of several runs, which are trained side by side; instead of ``seed``. They
            are checkpointed as one, and stop together.
        device: Where to train; by default CUDA if there is one, else the CPU.
        progress: Whether to show a progress bar; a text is its label.
        checkpoints: Where and how often to write checkpoints; a folder alone is every 5 minutes.
            One is written before the first step and one at the end.
        resume: Go on from the newest checkpoint there, if there is one.
        on_nonfinite: What to do if the loss or a gradient is NaN or infinite: "stop", or "skip"
            the update, and count it.
        max_skipped: With "skip": stop when more updates than this were skipped.
        backend: How a step is made, see :class:`pyro_gpvae.training.step.TrainingStep`: "eager",
            "compiled" or, on CUDA, "captured". "auto" is "captured" on CUDA, on a CPU "compiled"
            for trainings of 20,000 steps or more, and "eager" otherwise, and for programs that
            can be neither; then one line in the log says why. In several processes "auto" is
            "compiled" on CUDA, and "captured" is not possible.
        precision: Of the networks' matrix products and convolutions: "float32", "tf32" (NVIDIA
            GPUs) or "bf16"; None leaves it to torch's settings.

    Returns:
        The history, or a list of them, one for each of ``seeds``: ``.frame()`` is a table,
        ``.rows`` its rows, ``.backend`` the one that was taken. It has one row an epoch:
        ``epoch``, ``step``, ``loss`` (mean over the epoch's images, nats per image), the terms of
        eq. (2) on up to 512 training images (see :func:`pyro_gpvae.elbo_terms`), ``sigma`` where
        the model has one, the guide's diagnostics (after ``guide_`` if they are named like a
        column of these), ``validation_elbo`` (without the KL of global sites; mean over all
        validation images), ``skipped`` (updates so far), and ``seconds`` of training, compiling
        included.

    Raises:
        ValueError: If several processes cannot share a minibatch evenly, or are given different
            images or options, or ``seeds``; if images, epochs, batch size, learning rate,
            precision or objective cannot be used, model and guide have nothing to train, or a
            checkpoint is of another training or damaged.
        FileExistsError: If there are checkpoints, but not ``resume``.
        InUseError: If another process writes checkpoints to the same folder.
        UnsupportedError: If a backend cannot run the programs, or they cannot be stacked, or not
            be trained in several processes.
        RuntimeError: If another process of this training failed.
        NonFiniteError: If the loss or a gradient becomes NaN or infinite; names the step, the
            term, the images and the last checkpoint.
        KeyboardInterrupt, Terminated: With checkpoints, after SIGINT or SIGTERM.
    """
    check_images(images)
    programs = _programs(model, guide, seed, seeds)
    epochs, batch_size = map(operator.index, (epochs, batch_size))
    learning_rate = float(learning_rate)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if on_nonfinite not in get_args(OnNonFinite):
        raise ValueError(f"on_nonfinite must be one of {get_args(OnNonFinite)}, got {on_nonfinite}")
    if backend not in ("auto", *get_args(Backend)):
        raise ValueError(f"backend must be 'auto' or one of {get_args(Backend)}, got {backend!r}")
    if resume and checkpoints is None:
        raise ValueError("resume=True needs checkpoints: the folder to go on from")
    if validation is not None:
        check_images(validation, "validation")
    if seeds is not None and on_nonfinite == "skip":
        raise ValueError("on_nonfinite='skip' is for single runs: with seeds= it must be 'stop'")
    world = World.present()
    if seeds is not None and world.size > 1:
        raise ValueError("seeds= is for one process: train one seed in several, or seed by seed")
    world.check(batch_size, len(images))
    for batch in (images, validation):
        if batch is not None and hasattr(programs[0][1], "check_images"):  # later, nobody looks
            programs[0][1].check_images(batch)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = world.device(device)
    modules = [p for _, *pair in programs for p in pair if isinstance(p, torch.nn.Module)]
    for module in modules:
        module.to(device)
    options: dict[str, Any] = {
        "num_images": len(images),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "images": sha256(images) if checkpoints is not None else None,
        "precision": precision,
    }
    if isinstance(checkpoints, str | Path):
        checkpoints = Checkpoints(checkpoints)
    total = epochs * -(-len(images) // batch_size)
    chosen = _choose(device, total, world.size == 1) if backend == "auto" else backend
    # a sample of the images, since all of them may be many
    same = {**options, "seed": seed, "epochs": epochs, "first images": sha256(images[:64])}
    for other in world.from_all(same):
        differ = [name for name, value in same.items() if other[name] != value]
        if differ:
            raise ValueError(
                f"{differ[0]} is {other[differ[0]]} in another process of this training, "
                f"{same[differ[0]]} here: give all of them the same; fit shares out the images"
            )

    if device.type == "cpu":
        keep_freed_memory()
    label = progress if isinstance(progress, str) else "training"
    listening = Interrupts() if checkpoints else nullcontext()
    with seeded(programs[0][0], device), listening as interrupts, ExitStack() as stack:
        stack.enter_context(own_parameters(*modules))
        for module in modules:
            stack.callback(module.eval)
        with world.agreed():
            if checkpoints is not None and world.rank == 0:
                stack.enter_context(checkpoints.in_use(resume))
            gather = None
            if stays_on_host(images, device):
                gather = stack.enter_context(Gathering(images, device))
            else:
                images = images.to(device)
            if chosen == "compiled" and progress and world.rank == 0:
                tqdm.write(f"{label}: compiling, which can take a minute", file=sys.stderr)
            runs = Lockstep(
                programs,
                images,
                device,
                backend=chosen,
                strict=backend != "auto",
                options=options,
                gather=gather,
                batch_size=batch_size,
                learning_rate=learning_rate,
                elbo=elbo,
                halt=on_nonfinite == "stop",
                precision=precision,
                world=world,
            )
            stack.callback(_release, runs)
        for step in runs.steps:  # processes may have seeded their networks differently
            world.copy_first([tensor for _, tensor in step.named_tensors()])
        if checkpoints is not None:
            with world.agreed():
                saved = checkpoints.latest() if resume and world.rank == 0 else None
            saved = world.from_first(saved)
            with world.agreed():
                if saved is not None:
                    runs.restore(saved)
                elif world.rank == 0:
                    checkpoints.save(runs.capture())

        watch = _Watch(runs, world, checkpoints, interrupts, on_nonfinite, max_skipped)
        first = runs.states[0]
        if first.epoch > epochs:
            raise ValueError(f"the checkpoint has {first.epoch} epochs, more than epochs={epochs}")
        bar = tqdm(
            total=total,
            initial=first.step,
            desc=label,
            disable=not progress or first.epoch == epochs or world.rank > 0,
            leave=True,
        )
        with bar:
            while first.epoch < epochs:
                runs.train(True)
                while first.position < len(images):
                    runs.step()
                    if first.step % watch.interval == 0:
                        watch.check()
                    bar.update()
                    watch.keep()
                watch.check()
                runs.train(False)  # what is only looked at must not change running statistics
                watch.look(images, validation)
                bar.set_postfix(epoch=first.epoch, loss=f"{first.rows[-1]['loss']:.1f}")
                if first.epoch == epochs:
                    watch.keep(now=True)
    histories = [History(state.rows, runs.backend) for state in runs.states]
    return histories[0] if seeds is None else histories


def _programs(
    model: PyroProgram | Sequence[PyroProgram],
    guide: PyroProgram | Sequence[PyroProgram],
    seed: int,
    seeds: Sequence[int] | None,
) -> list[tuple[int, PyroProgram, PyroProgram]]:
    """Seed, model and guide of every run."""
    if seeds is None:
        if isinstance(model, Sequence) or isinstance(guide, Sequence):
            raise ValueError("several models and guides need seeds=, one for each")
        return [(operator.index(seed), model, guide)]
    numbers = [operator.index(number) for number in seeds]
    if not (isinstance(model, Sequence) and isinstance(guide, Sequence)):
        raise ValueError("with seeds=, model and guide must be sequences, one for each seed")
    if not len(numbers) == len(model) == len(guide) > 0:
        raise ValueError(
            f"{len(numbers)} seeds need as many models and guides, "
            f"got {len(model)} and {len(guide)}"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must differ, got {numbers}")
    return list(zip(numbers, model, guide, strict=True))


def _choose(device: torch.device, steps: int, alone: bool) -> Backend:
    """The fastest backend for a training of so many steps, in one process or several."""
    if CudaGraph.supports(device):
        return "captured" if alone else "compiled"
    return "compiled" if steps >= WORTH_COMPILING else "eager"


def _release(runs: Lockstep) -> None:
    """Leaves models and guides with their parameters and buffers, and no other memory."""
    if runs.stacked is not None:
        runs.stacked.release()
    for step in runs.steps:
        for optimizer in step.optimizers:
            optimizer.zero_grad()  # on a GPU, gradients are memory of the captured graph


@dataclass
class _Watch:
    """What happens between steps: devices are read, checkpoints and histories written.

    Attributes:
        runs: What makes the steps.
        world: The processes that train together.
        checkpoints: Where to write them.
        interrupts: Which signals were caught.
        on_nonfinite, max_skipped: As for :func:`fit`.
    """

    runs: Lockstep
    world: World
    checkpoints: Checkpoints | None
    interrupts: Interrupts | None
    on_nonfinite: OnNonFinite
    max_skipped: int

    @property
    def interval(self) -> int:
        """Steps between readings of the device."""
        return 1 if self.runs.steps[0].device.type == "cpu" else READ_EVERY

    def check(self) -> None:
        """Reads the device: were all updates made?"""
        states = zip(self.runs.steps, self.runs.states, strict=True)
        found = [(state.skipped, step, state) for step, state in states]
        # stacked runs stop together, and the first that broke has skipped most since
        for skipped, step, state in sorted(found, key=lambda run: -run[0]):
            if skipped == state.skips_known:
                continue
            if self.on_nonfinite == "stop" or skipped > self.max_skipped:
                raise _explained(step, state, skipped, self.checkpoints)
            if not state.skips_known:
                warnings.warn(
                    f"the loss or its gradient is not finite at step {state.step}: "
                    "this update is skipped; the history counts them",
                    stacklevel=3,
                )
            state.skips_known = skipped

    def keep(self, now: bool = False) -> None:
        """Writes a checkpoint if it is time for one, and ends if a signal asks for it."""
        if self.checkpoints is None or self.interrupts is None:
            return
        step, world = self.runs.states[0].step, self.world
        signal = self.interrupts.signal
        due = now or bool(signal) or self.checkpoints.due(step)
        if world.size > 1:
            if step % self.interval and not now:  # the device is not read now
                return
            found = world.from_all((signal, due and world.rank == 0))
            signal = max((number for number, _ in found if number), default=None)
            due = bool(signal) or found[0][1]
        if due:
            self.check()
            with world.agreed():
                if world.rank == 0:
                    self.checkpoints.save(self.runs.capture())
        if signal is not None:
            raise stopped(signal, f"stopped after step {step}")

    def look(self, images: Tensor, validation: Tensor | None) -> None:
        """Ends an epoch: adds a row to the history of every run."""
        for seed, step, state in zip(
            self.runs.seeds, self.runs.steps, self.runs.states, strict=True
        ):
            row = {"epoch": state.epoch + 1, "step": state.step, "loss": state.end_epoch()}
            try:
                # noise of its own: looking at a run does not change it either
                with seeded(seed, step.device), nonfinite_as_error():
                    row |= _terms(step, images, validation)
            except NonFiniteError as error:
                if self.on_nonfinite == "stop":  # otherwise it is only not logged
                    text = f"not finite after step {state.step}: {error}"
                    found = NonFiniteError(text, state.step)
                    raise _with_advice(found, state.skipped, self.checkpoints) from error
            state.rows.append(row | {"skipped": state.skipped, "seconds": state.seconds})


def _explained(
    step: TrainingStep, state: Progress, skipped: int, checkpoints: Checkpoints | None
) -> NonFiniteError:
    """Says which update was not finite, and what can be done."""
    blocks = len(step.blocks)
    number, block = state.step, 0
    if step.tally.halt:  # nothing was updated since: find the first
        since = skipped - state.skips_known - 1
        number, block = state.step - since // blocks, blocks - 1 - since % blocks
    per_epoch = -(-state.options["num_images"] // state.options["batch_size"])
    first = ((number - 1) % per_epoch) * state.options["batch_size"]
    index = state.order[first : first + state.options["batch_size"]]
    with preserve_rng(step.device, step.buffers):
        found = explain(
            number,
            step.objectives[block],
            step.programs[block],
            step.prepare(step.images[index]),
            index,
            step.parameters,
            step.reason,
        )
    return _with_advice(found, skipped, checkpoints)


def _with_advice(
    error: NonFiniteError, skipped: int, checkpoints: Checkpoints | None
) -> NonFiniteError:
    """The error, with what happened before it and what can be done."""
    advice = f", after {skipped - 1} skipped updates" if skipped > 1 else ""
    step = None if checkpoints is None else checkpoints.last_step()
    if checkpoints is not None and step is not None:
        advice += f". The last good checkpoint is of step {step}, in {checkpoints.folder}"
    advice += ". A smaller learning rate, or float64, often helps."
    return NonFiniteError(f"{error}{advice}", error.step, error.images)


def _terms(step: TrainingStep, images: Tensor, validation: Tensor | None) -> dict[str, float]:
    """The terms of eq. (2), σ, and the guide's diagnostics, on some training images."""
    model, guide = step.model, step.guide
    x = step.prepare(images[:LOOKED_AT])
    row = elbo_terms(model, guide, x, len(images))
    sigma = getattr(model, "sigma", None)
    if sigma is not None:
        row["sigma"] = float(sigma.detach())
    if hasattr(guide, "diagnostics"):
        with torch.no_grad():
            for name, value in guide.diagnostics(x).items():
                row[f"guide_{name}" if name in COLUMNS else name] = float(value)
    if validation is not None:
        row["validation_elbo"] = 0.0
        for part in validation.split(LOOKED_AT):
            terms = elbo_terms(model, guide, step.prepare(part), len(images))
            bound = terms["log_likelihood"] - terms["kl_z"]
            row["validation_elbo"] += len(part) / len(validation) * bound
    return row
