r"""Locates the log-density term, images or parameters that made a loss or gradient NaN."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_gpvae.core._errors import NonFiniteError, name_images, nonfinite_as_error, unvalidated
from pyro_gpvae.core._plates import in_plate
from pyro_gpvae.core._seeds import preserve_rng
from pyro_gpvae.data.batch import Batch, take, to_batch
from pyro_gpvae.model.elbo import Objective, PerImage
from pyro_gpvae.training._state import TrainingState
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.step import TrainingStep

#: With ``on_nonfinite="skip"``, the training stops when more updates than this were skipped.
MAX_SKIPPED = 100
_ERRORS = (ValueError, RuntimeError, ArithmeticError)


def check_updates(state: TrainingState, checkpoints: Checkpoints | None) -> None:
    """Reads the device: warns about updates that were skipped, or raises NonFiniteError."""
    recent, state.recent = state.recent, []
    skipped = state.skipped
    if skipped == state.skips_seen:
        return
    step = state.training_step
    # if the training halts, nothing was updated after the first one
    late = skipped - state.skips_seen - 1 if step.counters.halt else 0
    if step.counters.halt or skipped > MAX_SKIPPED:
        found = recent[-1 - late]
        batch = to_batch(found.data, step.model, step.guide)
        with preserve_rng(step.device, list(step.buffers.values())):
            error = _explain(step, state.step - late, batch, found.numbers)
        raise with_advice(error, skipped, checkpoints)
    if not state.skips_seen:
        message = f"the loss or its gradient is not finite at step {state.step}: "
        warnings.warn(f"{message}this update is skipped; the history counts them", stacklevel=3)
    state.skips_seen = skipped


def with_advice(
    error: NonFiniteError, skipped: int, checkpoints: Checkpoints | None
) -> NonFiniteError:
    """Returns the error with what happened before it and what can be done."""
    advice = f", after {skipped - 1} skipped updates" if skipped > 1 else ""
    if checkpoints and checkpoints.last_step is not None:
        last, folder = checkpoints.last_step, checkpoints.folder
        advice += f". The last good checkpoint is of step {last}, in {folder}"
    advice += ". A smaller learning rate, or float64, often helps."
    return NonFiniteError(f"{error}{advice}", error.step, error.images)


def _explain(training_step: TrainingStep, step: int, batch: Batch, index: Tensor) -> NonFiniteError:
    """Returns an error that says where the loss of a block or its gradient is not finite.

    The step was made on a minibatch whose members have the numbers ``index`` (B,).
    """
    parameters = training_step.parameters
    broken = [name for name, p in parameters.items() if not bool(torch.isfinite(p).all())]
    terms: list[str] = []
    bad = torch.zeros(len(index), dtype=torch.bool, device=batch[0].device)
    if broken:
        terms = [f"before it, {', '.join(broken[:3])} is not finite"]
    else:
        for block, objective, programs in zip(
            training_step.blocks, training_step.objectives, training_step.programs, strict=True
        ):
            terms, bad = _not_finite_terms(programs, batch)
            if not terms:
                own = {id(p) for p in block.parameters}
                trained = {name: p for name, p in parameters.items() if id(p) in own}
                terms, bad = _not_finite_gradients(objective, programs, batch, trained)
            if terms:
                break
        terms = [training_step.reason] if training_step.reason else terms
    where = ", ".join(terms[:3]) or "no single term, but their sum or a draw"
    images = index[bad.to(index.device)] if bool(bad.any()) else index
    numbers = images.tolist()
    names = f"{'image' if len(numbers) == 1 else 'images'} {name_images(numbers)}"
    message = (
        f"the loss or its gradient is not finite at step {step}: {where}, in {names} "
        f"({len(numbers)} of the {len(index)} of the minibatch)"
    )
    return NonFiniteError(message, step, numbers)


@torch.no_grad()
def _not_finite_terms(
    programs: tuple[PerImage, PerImage], batch: Batch
) -> tuple[list[str], Tensor]:
    """The sites whose log density is not finite, and for which images, (B,)."""
    bad = torch.zeros(len(batch[0]), dtype=torch.bool, device=batch[0].device)
    terms = []
    with unvalidated(), suppress(*_ERRORS):  # after an error, the gradients may tell more
        guide_trace = poutine.trace(programs[1]).get_trace(*batch)
        replayed = poutine.replay(programs[0], trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*batch)
        for program, trace in (("model", model_trace), ("guide", guide_trace)):
            plate = programs[program == "guide"].find_plate(*batch)
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                fn: Any = site["fn"]
                wrong = ~torch.isfinite(fn.log_prob(site["value"]))
                if bool(wrong.any()):
                    terms.append(f"log density of site {name!r} in the {program}")
                    if in_plate(site, plate) and wrong.shape[-1:] == bad.shape:
                        bad |= wrong.reshape(-1, len(bad)).any(0)
    return terms, bad


def _not_finite_gradients(
    objective: Objective,
    programs: tuple[PerImage, PerImage],
    batch: Batch,
    trained: Mapping[str, Tensor],
) -> tuple[list[str], Tensor]:
    """The trained parameters whose gradient is not finite, and for which images alone, (B,)."""
    bad = torch.zeros(len(batch[0]), dtype=torch.bool, device=batch[0].device)
    names: dict[str, None] = {}
    for module in itertools.chain(*(program.modules() for program in programs)):
        if isinstance(module, _BatchNorm):  # a single image has no batch statistics
            module.eval()
    for i in range(len(bad)):
        try:
            one = take(batch, slice(i, i + 1))
            with nonfinite_as_error():
                loss: Any = objective.differentiable_loss(*programs, *one)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        except _ERRORS:
            bad[i] = True
            continue
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                bad[i] = True
                names[f"gradient of {name}"] = None
    return list(names), bad
