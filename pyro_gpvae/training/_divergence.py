r"""Locates the log-density term, images or parameters that made a loss or gradient NaN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_gpvae.core._errors import NonFiniteError, name_images, unvalidated
from pyro_gpvae.core._plates import in_data_plate
from pyro_gpvae.model.elbo import Objective, PerImage

if TYPE_CHECKING:
    from pyro_gpvae.training.step import TrainingStep

__all__ = ["explain"]

_ERRORS = (ValueError, RuntimeError, ArithmeticError)


def explain(
    training_step: TrainingStep, block: int, step: int, x: Tensor, index: Tensor
) -> NonFiniteError:
    """Returns an error that says where the loss of a block or its gradient is not finite.

    The step was made on images x with the numbers ``index`` (B,).
    """
    objective, programs = training_step.objectives[block], training_step.programs[block]
    parameters = training_step.parameters
    broken = [name for name, p in parameters.items() if not bool(torch.isfinite(p).all())]
    if broken:
        where, images = f"before it, {', '.join(broken[:3])} is not finite", index
    else:
        terms, bad = _not_finite_terms(programs, x)
        if not terms:
            terms, bad = _not_finite_gradients(objective, programs, x, parameters)
        where = (
            training_step.reason
            or ", ".join(terms[:3])
            or "no single term, but their sum or a draw"
        )
        images = index[bad.to(index.device)] if bool(bad.any()) else index
    numbers = images.tolist()
    names = f"{'image' if len(numbers) == 1 else 'images'} {name_images(numbers)}"
    message = (
        f"the loss or its gradient is not finite at step {step}: {where}, in {names} "
        f"({len(numbers)} of the {len(index)} of the minibatch)"
    )
    return NonFiniteError(message, step, numbers)


@torch.no_grad()
def _not_finite_terms(programs: tuple[PerImage, PerImage], x: Tensor) -> tuple[list[str], Tensor]:
    """The sites whose log density is not finite, and for which images, (B,)."""
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    terms = []
    with unvalidated(), suppress(*_ERRORS):  # after an error, the gradients may tell more
        guide_trace = poutine.trace(programs[1]).get_trace(x)
        model_trace = poutine.trace(poutine.replay(programs[0], trace=guide_trace)).get_trace(x)
        for program, trace in (("model", model_trace), ("guide", guide_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                fn: Any = site["fn"]
                wrong = ~torch.isfinite(fn.log_prob(site["value"]))
                if bool(wrong.any()):
                    terms.append(f"log density of site {name!r} in the {program}")
                    if in_data_plate(site) and wrong.shape[-1:] == bad.shape:
                        bad |= wrong.reshape(-1, len(x)).any(0)
    return terms, bad


def _not_finite_gradients(
    objective: Objective,
    programs: tuple[PerImage, PerImage],
    x: Tensor,
    parameters: Mapping[str, Tensor],
) -> tuple[list[str], Tensor]:
    """The parameters whose gradient is not finite, and for which images alone, (B,)."""
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    names: dict[str, None] = {}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for module in itertools.chain(*(program.modules() for program in programs)):
        if isinstance(module, _BatchNorm):  # a single image has no batch statistics
            module.eval()
    for i in range(len(x)):
        try:
            loss: Any = objective.differentiable_loss(*programs, x[i : i + 1])
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        except _ERRORS:
            bad[i] = True
            continue
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                bad[i] = True
                names[f"gradient of {name}"] = None
    return list(names), bad
