r"""``check_guide``: whether a guide keeps what training and evaluation rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch

from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._programs import PyroProgram, with_own_parameters
from pyro_gpvae.data.batch import Data, check_data, take, to_batch
from pyro_gpvae.evaluation._common import check_amortised
from pyro_gpvae.testing import _batches, _densities, _gradients, _structure
from pyro_gpvae.testing._kit import MAX_BATCH, Finding, Kit, Make

__all__ = ["GuideError", "Promise", "Report", "check_guide"]


@dataclass(frozen=True)
class Promise:
    """One promise of the guide contract, and how the guide kept it."""

    name: str
    statement: str
    figure: str  #: What was measured.
    threshold: str  #: What it must be.
    kept: bool | None  #: None if the promise was not checked.
    account: str  #: What was seen and the likely cause; or why the promise was not checked.

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "BROKEN", None: "not checked"}[self.kept]


@dataclass(frozen=True)
class Report:
    """What :func:`check_guide` found; ``print(report)`` shows a table."""

    promises: tuple[Promise, ...]

    @property
    def broken(self) -> tuple[Promise, ...]:
        return tuple(promise for promise in self.promises if promise.kept is False)

    def __getitem__(self, name: str) -> Promise:
        return next(promise for promise in self.promises if promise.name == name)

    def __str__(self) -> str:
        rows = [("promise", "", "figure", "threshold", "verdict")]
        rows += [(p.name, p.statement, p.figure, p.threshold, p.verdict) for p in self.promises]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"{p.name}: {p.account}" for p in self.promises if p.kept is None]
        return "\n".join(lines)


class GuideError(AssertionError):
    """A guide, or its model, breaks a promise: ``promise`` is the first of those in ``report``."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.promise = report.broken[0]
        who = "model" if self.promise.name == "model" else "guide"
        super().__init__(
            f"the {who} breaks the promise {self.promise.name!r}: {self.promise.statement}.\n"
            f"{self.promise.account}\n\n{report}"
        )


@with_own_parameters
def check_guide(
    guide: PyroProgram, model: PyroProgram, data: Data, *, make: Make | None = None, seed: int = 0
) -> Report:
    r"""Checks that a guide keeps the promises that training and evaluation rely on.

    Everything happens on copies whose parameters are slightly disturbed (what starts at zero
    has no gradient yet) and, if the guide is a module, in float64: the guide may be untrained
    or trained, and stays as it was, as does the global random state. All promises are checked,
    then an error is raised if one is broken. The first promise is the model's own, so that a
    broken model is not reported as a broken guide. The table of the report and
    :doc:`/reference/testing` list them.

    Thresholds: 1e-6 relative for equalities (1e-3 in float32), a p-value of 2e-5 for
    goodness-of-fit tests, ``|z| < 4`` for estimates; several members share one threshold. The
    seed is fixed, so that a guide passes always or never. Discrete latents, guides with a random
    number of draws (rejection samplers) or with parameters for each member are beyond the kit.

    Arguments:
        guide: The guide. See :mod:`pyro_gpvae.model.guide` for the contract.
        model: The model it was built for: any Pyro program with latent sites in a data plate.
        data: A batch of at least two different members, of which up to eight are used: images
            (B, C, H, W), another tensor, or a tuple of tensors with the same first dimension.
        make: Builds such a guide for the model, like its class. The state dict is then loaded
            into a guide that was built anew, not into a copy.
        seed: Of all random numbers.

    Raises:
        GuideError: If a promise is broken. The message names the first and its likely cause.
        ValueError: If there are less than two different members, or the guide is an autoguide.

    Example:
        >>> import torch
        >>> from guides import GaussianGuide
        >>> from pyro_gpvae import ImageModel
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> report = check_guide(GaussianGuide(model), model, torch.rand(4, 1, 28, 28))
        >>> report["evidence"].verdict
        'ok'
    """
    check_data(data)
    check_amortised(guide)
    batch = to_batch(take(data, slice(MAX_BATCH)), model, guide)
    if all(tensor.numel() == 0 or len(tensor.unique(dim=0)) < 2 for tensor in batch):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in batch)
        raise ValueError(f"the data must have at least two different members, got {shapes}")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    promises: list[Promise] = []
    kit = Kit((model, guide), batch, make, seed)
    with (
        torch.random.fork_rng(list(devices), device_type="cuda"),
        # copies of a PyroModule have parameters of their own
        pyro.settings.context(module_local_params=True),
    ):
        for name, (statement, check, cause) in _PROMISES.items():
            try:
                found = check(kit)
            except Exception as error:
                kind = type(error).__name__
                found = Finding(kind, "no error", False, f"It raised {kind}: {error}")
                cause = cause if isinstance(error, NonFiniteError) else ""
            account = "" if found.kept else found.seen
            if found.kept is False and (cause := found.cause or cause):
                account += f"\nLikely cause: {cause}."
            promises.append(Promise(name, statement, *found[:3], account))
            if name in ("model", "copy", "sites") and not found.kept:
                break  # nothing else could run
    report = Report(tuple(promises))
    if report.broken:
        raise GuideError(report)
    return report


# fmt: off
#: The name of a promise: its statement, its check and the likely cause if it is broken.
_PROMISES: dict[str, tuple[str, Callable[[Kit], Finding], str]] = {
    "model": ("the model runs, and its parameters get gradients", _structure.check_model, ""),
    "copy": ("it can be copied, and runs in float64", _structure.check_copy,
        "a tensor of an earlier call in an attribute, or float32 by float() or without dtype="),
    "sites": ("the model's latent sites, in its data plate", _structure.check_sites, ""),
    "finite": ("log weights are finite", _structure.check_finite,
        "a scale that over- or underflows, or a density of zero where it samples"),
    "seed": ("the same seed gives the same numbers", _structure.check_seeded,
        "noise from numpy, random or a generator of its own, or state that a call leaves behind"),
    "memory": ("a call leaves nothing behind", _structure.check_memory,
        "a stale cache, of features or of a flow's last sample"),
    "image": ("the posterior depends on x", _structure.check_image,
        "the context does not reach the distribution, or a cache of an earlier batch"),
    "noise": ("every member and sample has noise of its own", _densities.check_noise,
        "noise shared over the batch or over particles, or drawn outside the plate"),
    "batch": ("a result does not depend on the other members", _batches.check_batch,
        "a mean over the batch, members in another order, or tile and interleave swapped"),
    "chunks": ("batched = chunked = single", _batches.check_chunks,
        "a batch mean where the sum is due, or a density of all samples drawn at once"),
    "gradient": ("every parameter gets a finite gradient", _gradients.check_gradient,
        "a context that does not reach the flow, a detached tensor, or a block that leaves it out "
        "(parameters to be left alone need requires_grad_(False))"),
    "pathwise": ("parameters of the density move z", _gradients.check_pathwise,
        "a detached sample (sample for rsample, detach, no_grad)"),
    "evidence": ("E[weight] = p(x)", _densities.check_evidence,
        "samples do not fit the density, it is not normalised, or images are in another order"),
    "trace": ("the posterior is what the guide samples", _densities.check_traced,
        "a variance taken for a standard deviation, or a step that only one of them makes"),
    "scale": ("a mean over the batch, global sites weigh 1/N", _batches.check_scale,
        "a missing 1/N: global sites inside the plate, or a divergence in each member's terms"),
    "save": ("saved and reloaded, it gives the same numbers", _structure.check_save,
        "a tensor that is neither parameter nor buffer, or make= builds other options"),
}
