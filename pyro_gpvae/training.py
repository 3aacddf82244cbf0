r"""Training: the loop, nothing else."""

from __future__ import annotations

import math
import operator
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.checkpoint import Checkpoints, TrainingState, copy_tensors
from pyro_gpvae.data import check_images, to_float
from pyro_gpvae.elbo import Objective, PerImage, elbo_terms
from pyro_gpvae.interrupts import Interrupts, stopped
from pyro_gpvae.nonfinite import NonFiniteError, all_finite, explain, refused_parameters
from pyro_gpvae.provenance import sha256
from pyro_gpvae.randomness import random_state, seeded, set_random_state

__all__ = ["Block", "History", "NonFiniteError", "fit"]

OnNonFinite = Literal["stop", "skip"]
Program = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Block:
    """An objective and the parameters that it trains, with an Adam optimiser of their own.

    Attributes:
        elbo: The objective.
        parameters: What it trains; all other parameters stay as they are in this block.
        model: The model of the objective, by default the one that is trained.
        guide: The guide of the objective, by default the one that is trained.
    """

    elbo: Objective
    parameters: Sequence[Tensor]
    model: Program | None = None
    guide: Program | None = None


@dataclass
class History:
    """What happened in each epoch: one dictionary a row."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """The rows as a table, one column a quantity."""
        return pd.DataFrame(self.rows)


def fit(
    model: Program,
    guide: Program,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 5e-4,
    elbo: Objective | None = None,
    validation: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | str = True,
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
    on_nonfinite: OnNonFinite = "stop",
    max_skipped: int = 100,
) -> History:
    r"""Trains model and guide on images by Adam on eq. (2), in place.

    The images are kept as uint8 on the device. Every epoch visits each of them once, in a fresh
    permutation from a generator of the run's own; the last batch may be smaller. The same seed
    gives the same run, and the global random state is left as it was.

    With ``checkpoints`` a training can be killed at any moment. With ``resume`` as well, it goes
    on from the newest checkpoint, in the middle of an epoch, and ends with the parameters, the
    moments and the history of a training that was never stopped, bit for bit (``seconds``
    excepted) on the same device with the same number of threads. SIGINT and SIGTERM end it after
    the step at hand, with a checkpoint. What an objective or a guide keeps in plain Python
    attributes, such as a step counter, is not part of a checkpoint.

    Arguments:
        model: A Pyro model, such as :class:`pyro_gpvae.ImageModel`.
        guide: A Pyro guide; see :mod:`pyro_gpvae.guide` for what is discovered in it.
        images: Training images, uint8 (N, C, H, W).
        epochs: How often each image is seen.
        batch_size: Images per step.
        learning_rate: Of Adam.
        elbo: The objective; by default ``guide.elbo()`` if there is one, else ``Trace_ELBO()``.
        validation: Images, uint8 (M, C, H, W), whose ELBO is logged after each epoch.
        seed: Of the permutations and of the samples.
        device: Where to train; by default CUDA if there is one, else the CPU.
        progress: Whether to show a progress bar; a text is its label.
        checkpoints: Where and how often to write checkpoints; a folder alone is every 5 minutes.
            One is written before the first step and one at the end.
        resume: Go on from the newest checkpoint there, if there is one.
        on_nonfinite: What to do if the loss or a gradient is NaN or infinite: "stop", or "skip"
            the update, and count it.
        max_skipped: With "skip": stop when more updates than this were skipped.

    Returns:
        One row an epoch: ``epoch``, ``step``, ``loss`` (mean over the epoch's images, nats per
        image), the terms of eq. (2) on up to 512 training images (see
        :func:`pyro_gpvae.elbo_terms`), ``sigma`` where the model has one, the guide's
        diagnostics, ``validation_elbo``, ``skipped`` (updates so far), and ``seconds`` of training.

    Raises:
        ValueError: If images, epochs, batch size or learning rate cannot be used, model and
            guide have nothing to train, or a checkpoint is of another training or damaged.
        FileExistsError: If there are checkpoints, but not ``resume``.
        InUseError: If another process writes checkpoints to the same folder.
        NonFiniteError: If the loss or a gradient becomes NaN or infinite; names the step, the
            term, the images and the last checkpoint.
        KeyboardInterrupt, Terminated: With checkpoints, after SIGINT or SIGTERM.
    """
    check_images(images)
    epochs, batch_size, seed = map(operator.index, (epochs, batch_size, seed))
    learning_rate = float(learning_rate)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if on_nonfinite not in get_args(OnNonFinite):
        raise ValueError(f"on_nonfinite must be one of {get_args(OnNonFinite)}, got {on_nonfinite}")
    if resume and checkpoints is None:
        raise ValueError("resume=True needs checkpoints: the folder to go on from")
    if elbo is not None and not hasattr(elbo, "differentiable_loss"):
        raise ValueError(
            f"elbo must have differentiable_loss, as Trace_ELBO has; {type(elbo).__name__} has not"
        )
    if validation is not None:
        check_images(validation, "validation")
    if hasattr(model, "check_shape"):
        for batch in (images, validation):
            if batch is not None:
                model.check_shape(batch)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    modules = [program for program in (model, guide) if isinstance(program, torch.nn.Module)]
    for module in modules:
        module.to(device).eval()
    if hasattr(model, "pair"):
        model.pair(guide)
    options: dict[str, Any] = {
        "seed": seed,
        "num_images": len(images),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "images": sha256(images) if checkpoints is not None else None,
    }
    images = images.to(device)
    num_images = len(images)
    if isinstance(checkpoints, str | Path):
        checkpoints = Checkpoints(checkpoints)

    in_use = checkpoints.in_use(resume) if checkpoints else nullcontext()
    listening = Interrupts() if checkpoints else nullcontext()
    with seeded(seed, device), in_use, listening as interrupts:
        parameters = _parameters(model, guide, _prepare(images[:batch_size], modules))
        trained = list({id(p): p for p in parameters.values() if p.requires_grad}.values())
        if not trained:
            raise ValueError("model and guide have no parameter to train: are they nn.Modules?")
        if hasattr(guide, "blocks") and elbo is None:
            blocks: Sequence[Block] = guide.blocks(model)
        else:
            objective = elbo or (guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO())
            blocks = [Block(objective, trained)]
        programs = [
            (PerImage(b.model or model, num_images), PerImage(b.guide or guide, num_images))
            for b in blocks
        ]
        optimizers = [torch.optim.Adam(b.parameters, learning_rate, fused=True) for b in blocks]
        names = {id(p): name for name, p in parameters.items()}
        options["objectives"] = [type(block.elbo).__name__ for block in blocks]
        options["trained"] = [[names.get(id(p), "?") for p in b.parameters] for b in blocks]
        state = _State(model, guide, parameters, optimizers, options, device)
        if checkpoints is not None:
            saved = checkpoints.latest() if resume else None
            if saved is not None:
                # what is set up at first use, with random numbers even, is not to happen later
                x = _prepare(images[:batch_size], modules)
                for block, pair in zip(blocks, programs, strict=True):
                    with torch.no_grad(), refused_parameters(), suppress(NonFiniteError):
                        block.elbo.differentiable_loss(*pair, x)
                state.restore(saved)
            else:
                checkpoints.save(state.capture())

        def keep(now: bool = False) -> None:
            """Writes a checkpoint if it is time for one, and ends if a signal asks for it."""
            if checkpoints is None or interrupts is None:
                return
            if now or interrupts.signal or checkpoints.due(state.step):
                checkpoints.save(state.capture())
            if interrupts.signal is not None:
                raise stopped(interrupts.signal, f"stopped after step {state.step}")

        if state.epoch >= epochs:
            if state.epoch == epochs:
                return History(state.rows)
            raise ValueError(f"the checkpoint has {state.epoch} epochs, more than epochs={epochs}")
        label = progress if isinstance(progress, str) else "training"
        total = epochs * -(-num_images // batch_size)
        bar = tqdm(total=total, initial=state.step, desc=label, disable=not progress, leave=True)
        with bar:
            while state.epoch < epochs:
                for module in modules:
                    module.train()
                while state.position < num_images:
                    index = state.order[state.position : state.position + batch_size]
                    x = _prepare(images[index], modules)
                    state.step += 1
                    for block, pair, optimizer in zip(blocks, programs, optimizers, strict=True):
                        loss, reason = _update(block, pair, optimizer, x)
                        if loss is not None:
                            continue
                        state.skipped += 1
                        if on_nonfinite == "stop" or state.skipped > max_skipped:
                            found = explain(
                                state.step, block.elbo, pair, x, index, parameters, reason
                            )
                            raise _with_advice(found, state.skipped, checkpoints)
                        if state.skipped == 1:
                            warnings.warn(
                                f"the loss or its gradient is not finite at step {state.step}: "
                                "this update is skipped; the history counts them",
                                stacklevel=2,
                            )
                    state.add(loss, len(index))
                    bar.update()
                    keep()
                for module in modules:
                    module.eval()  # what is only looked at must not change running statistics
                loss_per_image = state.end_epoch()
                bar.set_postfix(epoch=state.epoch, loss=f"{loss_per_image:.1f}")
                row = {"epoch": state.epoch, "step": state.step, "loss": loss_per_image}
                try:
                    # noise of its own: looking at a run does not change it either
                    with seeded(seed, device), refused_parameters():
                        row |= _monitor(model, guide, _prepare(images[:512], modules), num_images)
                        if validation is not None:
                            x = _prepare(validation.to(device), modules)
                            terms = elbo_terms(model, guide, x, num_images)
                            row["validation_elbo"] = terms["log_likelihood"] - terms["kl_z"]
                except NonFiniteError as error:
                    if on_nonfinite == "skip":  # then it is only not logged
                        state.rows.append(
                            row | {"skipped": state.skipped, "seconds": state.seconds}
                        )
                        continue
                    found = NonFiniteError(
                        f"not finite after step {state.step}: {error}", state.step
                    )
                    raise _with_advice(found, state.skipped, checkpoints) from error
                row |= {"skipped": state.skipped, "seconds": state.seconds}
                state.rows.append(row)
        keep(now=True)
    return History(state.rows)


class _State:
    """What changes while a training goes on: all that a checkpoint must hold."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        parameters: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.optimizers = optimizers
        self.options = dict(options)
        self.device = device
        self.programs = {"model": model, "guide": guide}
        self.parameters = parameters
        self.permutations = torch.Generator().manual_seed(self.options["seed"])
        self.epoch = self.step = self.skipped = 0
        self.rows: list[dict[str, float]] = []
        self._begin = time.monotonic()
        self._start_epoch()

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now, and parameters of programs without modules."""
        found = {n: p for n, p in self.parameters.items() if n.startswith("param.")}
        for role, program in self.programs.items():
            if isinstance(program, torch.nn.Module):
                found |= {f"{role}.{n}": t for n, t in program.state_dict().items()}
        return found

    def _start_epoch(self) -> None:
        order = torch.randperm(self.options["num_images"], generator=self.permutations)
        self.order = order.to(self.device)
        self.position = 0
        self.loss = torch.zeros((), device=self.device, dtype=torch.float64)
        self.seen = 0

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return time.monotonic() - self._begin

    def add(self, loss: Tensor | None, count: int) -> None:
        """Notes that the next images of the epoch were seen, and their loss unless skipped."""
        self.position += count
        if loss is not None:
            self.seen += count
            self.loss += loss.detach() * count

    def end_epoch(self) -> float:
        """Returns the mean loss of the epoch, and draws the order of the next."""
        mean = float(self.loss) / self.seen if self.seen else math.nan
        self.epoch += 1
        self._start_epoch()
        return mean

    def capture(self) -> TrainingState:
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"moments.{number}.{index}.{key}": m for key, m in moments.items()}
        tensors |= {f"random.{n}": t for n, t in random_state(self.device).items()}
        tensors["random.permutations"] = self.permutations.get_state()
        tensors |= {"order": self.order, "loss": self.loss}
        names = ("options", "epoch", "position", "seen", "skipped", "seconds", "rows")
        return TrainingState(self.step, tensors, {name: getattr(self, name) for name in names})

    def restore(self, saved: TrainingState) -> None:
        """Puts everything back as :meth:`capture` found it.

        Raises:
            ValueError: If the checkpoint is of another training, or makes no sense.
        """
        name = f"the checkpoint of step {saved.step}"
        try:
            self._check(saved.values, name)
            self._restore(saved, name)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{name} makes no sense: {error!r}; delete it") from error

    def _check(self, values: Mapping[str, Any], name: str) -> None:
        """Compares the options, and the types and ranges of all that is no tensor."""
        for option, wanted in self.options.items():
            found = values["options"].get(option)
            if found != wanted:
                raise ValueError(
                    f"{name} is of another training: its {option} is {found}, not {wanted}"
                )
        counts = [values[key] for key in ("epoch", "position", "seen", "skipped")]
        whole = all(type(count) is int and count >= 0 for count in counts)
        seconds = values["seconds"]
        if not whole or counts[1] > self.options["num_images"] or not isinstance(seconds, float):
            raise TypeError(f"{counts} and {seconds} seconds are no place in a training")
        if len(values["rows"]) != values["epoch"] or not all(
            isinstance(row, dict) for row in values["rows"]
        ):
            raise TypeError("its history is not one row an epoch")

    def _restore(self, saved: TrainingState, name: str) -> None:
        values, tensors = saved.values, dict(saved.tensors)

        def take(prefix: str) -> dict[str, Tensor]:
            found = [key for key in tensors if key.startswith(prefix)]
            return {key.removeprefix(prefix): tensors.pop(key) for key in found}

        weights, expected = take("weights."), self.weights
        for key in weights.keys() & expected.keys():
            if weights[key].dtype != expected[key].dtype:
                raise ValueError(
                    f"{name} is of another training: {key} is {weights[key].dtype} there, "
                    f"{expected[key].dtype} here"
                )
        copy_tensors(weights, expected, name)
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            trained = optimizer.param_groups[0]["params"]
            for key, tensor in take(f"moments.{number}.").items():
                index, _, moment = key.partition(".")
                parameter = trained[int(index)]
                if tensor.shape == parameter.shape:
                    # Adam's fused kernels go through both in the order of memory
                    tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
                elif tensor.dim():
                    raise ValueError(f"{name}: {moment} has shape {tuple(tensor.shape)}")
                moments.setdefault(int(index), {})[moment] = tensor
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        self.permutations.set_state(tensors.pop("random.permutations"))
        random = take("random.")
        if self.device.type == "cuda" and "cuda" not in random:
            warnings.warn(
                "the checkpoint was written on another device: the training goes on with other "
                "random numbers",
                stacklevel=4,
            )
        set_random_state(random, self.device)
        self.order, self.loss = tensors["order"].to(self.device), tensors["loss"].to(self.device)
        self.step = saved.step
        for key in ("epoch", "position", "seen", "skipped", "rows"):
            setattr(self, key, values[key])
        self._begin = time.monotonic() - values["seconds"]


def _update(
    block: Block,
    pair: tuple[PerImage, PerImage],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
) -> tuple[Tensor | None, str]:
    """One step of Adam. Returns the loss; or None, and why, if anything was not finite."""
    optimizer.zero_grad()
    try:
        with refused_parameters():
            loss = block.elbo.differentiable_loss(*pair, x)
            loss.backward(inputs=list(block.parameters))
    except NonFiniteError as error:
        return None, str(error)
    if not all_finite(loss, [p.grad for p in block.parameters if p.grad is not None]):
        return None, ""
    optimizer.step()
    return loss, ""


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


def _prepare(images: Tensor, modules: Sequence[torch.nn.Module]) -> Tensor:
    """Images as floats in [0, 1], in the dtype of the parameters."""
    first = next((p for module in modules for p in module.parameters()), None)
    return to_float(images, torch.get_default_dtype() if first is None else first.dtype)


def _parameters(model: Program, guide: Program, x: Tensor) -> dict[str, Tensor]:
    """The parameters of modules and of ``pyro.param`` statements, by name.

    The guide is run once, since Pyro's autoguides create their parameters then.
    """
    capture = poutine.trace(param_only=True)
    # what is not finite here will not be in the first step, which says where
    with suppress(NonFiniteError), torch.no_grad(), refused_parameters(), capture:
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


def _monitor(model: Program, guide: Program, x: Tensor, num_images: int) -> dict[str, float]:
    """The terms of eq. (2), σ, and the guide's diagnostics, on some training images."""
    row = elbo_terms(model, guide, x, num_images)
    sigma = getattr(model, "sigma", None)
    if sigma is not None:
        row["sigma"] = float(sigma.detach())
    if hasattr(guide, "diagnostics"):
        with torch.no_grad():
            row |= {name: float(value) for name, value in guide.diagnostics(x).items()}
    return row
