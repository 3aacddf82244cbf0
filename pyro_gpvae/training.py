r"""Training: the loop, nothing else."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gpvae.data import check_images, to_float
from pyro_gpvae.elbo import Objective, PerImage, elbo_terms
from pyro_gpvae.randomness import seeded

__all__ = ["Block", "History", "NonFiniteError", "fit"]

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


class NonFiniteError(ArithmeticError):
    """The loss became NaN or infinite; the message names the step and the term."""


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
) -> History:
    r"""Trains model and guide on images by Adam on eq. (2), in place.

    The images are kept as uint8 on the device. Every epoch visits each of them once, in a fresh
    permutation from a generator of the run's own; the last batch may be smaller. The same seed
    gives the same run, and the global random state is left as it was.

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

    Returns:
        One row an epoch: ``epoch``, ``step``, ``loss`` (mean over the epoch's images, nats per
        image), the terms of eq. (2) on up to 512 training images (see
        :func:`pyro_gpvae.elbo_terms`), ``sigma`` where the model has one, the guide's
        diagnostics, ``validation_elbo``, and ``seconds`` since the start.

    Raises:
        ValueError: If images, epochs, batch size or learning rate cannot be used, or model and
            guide have nothing to train.
        NonFiniteError: If the loss becomes NaN or infinite; names the step and the term.
    """
    check_images(images)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
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
    images = images.to(device)
    num_images = len(images)

    with seeded(seed, device):
        permutations = torch.Generator().manual_seed(seed)
        parameters = _parameters(model, guide, _prepare(images[:batch_size], modules))
        if hasattr(guide, "blocks") and elbo is None:
            blocks: Sequence[Block] = guide.blocks(model)
        else:
            objective = elbo or (guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO())
            blocks = [Block(objective, parameters)]
        programs = [
            (PerImage(b.model or model, num_images), PerImage(b.guide or guide, num_images))
            for b in blocks
        ]
        optimizers = [torch.optim.Adam(b.parameters, learning_rate, fused=True) for b in blocks]

        history = History()
        start, step = time.monotonic(), 0
        steps = -(-num_images // batch_size)
        label = progress if isinstance(progress, str) else "training"
        with tqdm(total=epochs * steps, desc=label, disable=not progress, leave=True) as bar:
            for epoch in range(1, epochs + 1):
                order = torch.randperm(num_images, generator=permutations).to(device)
                total = torch.zeros((), device=device, dtype=torch.float64)
                for module in modules:
                    module.train()
                for index in order.split(batch_size):
                    step += 1
                    x = _prepare(images[index], modules)
                    for block, pair, optimizer in zip(blocks, programs, optimizers, strict=True):
                        optimizer.zero_grad()
                        loss = _finite_loss(block.elbo, pair, x, step, parameters)
                        loss.backward(inputs=list(block.parameters))
                        optimizer.step()
                    total += loss.detach() * len(index)
                    bar.update()
                loss_per_image = float(total / num_images)
                bar.set_postfix(epoch=epoch, loss=f"{loss_per_image:.1f}")
                for module in modules:
                    module.eval()  # what is only looked at must not change running statistics
                row = {"epoch": epoch, "step": step, "loss": loss_per_image}
                # noise of its own: looking at a run does not change it either
                with seeded(seed, device), _explaining(step, parameters):
                    row |= _monitor(model, guide, _prepare(images[:512], modules), num_images)
                    if validation is not None:
                        x = _prepare(validation.to(device), modules)
                        terms = elbo_terms(model, guide, x, num_images)
                        row["validation_elbo"] = terms["log_likelihood"] - terms["kl_z"]
                row["seconds"] = time.monotonic() - start
                history.rows.append(row)
    return history


def _prepare(images: Tensor, modules: Sequence[torch.nn.Module]) -> Tensor:
    """Images as floats in [0, 1], in the dtype of the parameters."""
    first = next((p for module in modules for p in module.parameters()), None)
    return to_float(images, torch.get_default_dtype() if first is None else first.dtype)


def _parameters(model: Program, guide: Program, x: Tensor) -> list[Tensor]:
    """All that model and guide can train: of modules, and of ``pyro.param`` statements.

    The guide is run once, since Pyro's autoguides create their parameters then.
    """
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        guide_trace = poutine.trace(guide).get_trace(x)
        poutine.replay(model, trace=guide_trace)(x)
    found: dict[int, Tensor] = {}
    for site in capture.trace.nodes.values():
        value: Any = site["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        found[id(leaf)] = leaf
    for program in (model, guide):
        if isinstance(program, torch.nn.Module):
            found |= {id(p): p for p in program.parameters()}
    trainable = [p for p in found.values() if p.requires_grad]
    if not trainable:
        raise ValueError("model and guide have no parameter to train: are they nn.Modules?")
    return trainable


def _monitor(model: Program, guide: Program, x: Tensor, num_images: int) -> dict[str, float]:
    """The terms of eq. (2), σ, and the guide's diagnostics, on some training images."""
    row = elbo_terms(model, guide, x, num_images)
    log_sigma = getattr(model, "log_sigma", None)
    if log_sigma is not None:
        row["sigma"] = float(log_sigma.detach().exp())
    if hasattr(guide, "diagnostics"):
        with torch.no_grad():
            row |= {name: float(value) for name, value in guide.diagnostics(x).items()}
    return row


def _finite_loss(
    elbo: Objective,
    pair: tuple[PerImage, PerImage],
    x: Tensor,
    step: int,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The loss of a batch, or an error that names what is not finite in it."""
    with _explaining(step, parameters):
        loss = elbo.differentiable_loss(*pair, x)
        if not torch.isfinite(loss):
            raise _not_finite(step, parameters, ", ".join(_non_finite_sites(pair, x)))
    return loss


@contextmanager
def _explaining(step: int, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Turns torch's complaint about a distribution's parameters into a NonFiniteError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")  # the error says more
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Expected parameter"):
                raise
            reason = str(error).partition(", but found")[0]
            raise _not_finite(step, parameters, reason) from error


def _not_finite(step: int, parameters: Sequence[Tensor], reason: str) -> NonFiniteError:
    broken = sum(not bool(torch.isfinite(p).all()) for p in parameters)
    if broken:
        reason = f"{broken} of {len(parameters)} parameter tensors are not finite"
    return NonFiniteError(
        f"the loss is not finite at step {step}: "
        f"{reason or 'no single term, but their sum or one random draw'}. "
        "A smaller learning rate, or float64, often helps."
    )


@torch.no_grad()
def _non_finite_sites(pair: tuple[PerImage, PerImage], x: Tensor) -> list[str]:
    guide_trace = poutine.trace(pair[1]).get_trace(x)
    model_trace = poutine.trace(poutine.replay(pair[0], trace=guide_trace)).get_trace(x)
    sites = []
    for program, trace in (("model", model_trace), ("guide", guide_trace)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["log_prob_sum"].isfinite():
                sites.append(f"log density of site {name!r} in the {program}")
    return sites
