r"""``check_guide``: whether a guide keeps what training and evaluation rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.testing import _batches, _densities, _structure
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
    """A guide breaks a promise; ``promise`` is the first, ``report`` has all of them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.promise = report.broken[0]
        super().__init__(
            f"the guide breaks the promise {self.promise.name!r}: {self.promise.statement}.\n"
            f"{self.promise.account}\n\n{report}"
        )


def check_guide(
    guide: PyroProgram, model: PyroProgram, x: Tensor, *, make: Make | None = None, seed: int = 0
) -> Report:
    r"""Checks that a guide keeps the promises that training and evaluation rely on.

    Everything happens on copies whose parameters are slightly disturbed (what starts at zero
    has no gradient yet) and, if the guide is a module, in float64: the guide may be untrained
    or trained, and stays as it was, as does the global random state. All promises are checked,
    then an error is raised if one is broken. The table of the report and
    :doc:`/reference/testing` list them.

    Thresholds: 1e-6 relative for equalities (1e-3 in float32), a p-value of 2e-5 for
    goodness-of-fit tests, ``|z| < 4`` for estimates; several images share one threshold. The seed
    is fixed, so that a guide passes always or never. Guides with a random number of draws
    (rejection samplers) or with parameters for each image are beyond the kit.

    Arguments:
        guide: The guide. See :mod:`pyro_gpvae.model.guide` for the contract.
        model: The model it was built for.
        x: At least two different images (B, C, H, W), of which up to eight are used.
        make: Builds such a guide for another model, like its class. The guide is then also
            checked over a linear-Gaussian model with p = 2, which adds quadrature where the
            model's own p is larger, and reloaded into a guide that was built anew.
        seed: Of all random numbers.

    Raises:
        GuideError: If a promise is broken. The message names the first and its likely cause.
        ValueError: If x is not at least two different images.

    Example:
        >>> from guides import GaussianGuide
        >>> from pyro_gpvae import ImageModel
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> report = check_guide(GaussianGuide(model), model, torch.rand(4, 1, 28, 28))
        >>> report["normalised"].verdict
        'ok'
    """
    x = to_batch(x[:MAX_BATCH], model, guide)[0]
    if len(x) < 2 or len(x.unique(dim=0)) < 2:
        raise ValueError(f"x must have at least two different images, got {tuple(x.shape)}")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    promises: list[Promise] = []
    kit = Kit((model, guide), x, make, seed)
    with torch.random.fork_rng(list(devices), device_type="cuda"):
        for name, (statement, check, cause) in _PROMISES.items():
            try:
                found = check(kit)
            except Exception as error:
                kind = type(error).__name__
                found = Finding(kind, "no error", False, f"It raised {kind}: {error}")
                cause = cause if name == "finite" else ""
            account = "" if found.kept else found.seen
            if found.kept is False and (cause := found.cause or cause):
                account += f"\nLikely cause: {cause}."
            promises.append(Promise(name, statement, *found[:3], account))
            if name in ("copy", "sites") and not found.kept:
                break  # nothing else could run
    report = Report(tuple(promises))
    if report.broken:
        raise GuideError(report)
    return report


# fmt: off
#: The name of a promise: its statement, its check and the likely cause if it is broken.
_PROMISES: dict[str, tuple[str, Callable[[Kit], Finding], str]] = {
    "copy": ("it can be copied, and runs in float64", _structure.check_copy,
        "a tensor of an earlier call in an attribute, or one made without dtype="),
    "sites": ("one z per image in the data plate", _structure.check_sites, ""),
    "finite": ("log weights are finite", _structure.check_finite,
        "a scale that over- or underflows, or a density of zero where it samples"),
    "seed": ("the same seed gives the same numbers", _structure.check_seeded,
        "noise from numpy, random or a generator of its own, or state that a call leaves behind"),
    "memory": ("a call leaves nothing behind", _structure.check_memory,
        "a stale cache, of features or of a flow's last sample"),
    "image": ("the posterior depends on the image", _structure.check_image,
        "the context does not reach the distribution, or a cache of earlier images"),
    "noise": ("every image and sample has noise of its own", _batches.check_noise,
        "noise shared over the batch or over particles, or drawn outside the plate"),
    "batch": ("a result does not depend on the other images", _batches.check_batch,
        "a mean over the batch, images in another order, or tile and interleave swapped"),
    "chunks": ("batched = chunked = single", _batches.check_chunks,
        "a batch mean where the sum is due, or a density of all samples drawn at once"),
    "gradient": ("every parameter gets a finite gradient", _batches.check_gradient,
        "a context that does not reach the flow, a detached tensor, or a block that leaves it out "
        "(parameters to be left alone need requires_grad_(False))"),
    "pathwise": ("parameters of the density move z", _batches.check_pathwise,
        "a detached sample (sample for rsample, detach, no_grad)"),
    "normalised": ("∫ q(z|x) dz = 1", _densities.check_normalised, ""),
    "density": ("samples fit the density", _densities.check_fits,
        "the sign of the log-determinant, other mixture weights than in the density, or a cache"),
    "evidence": ("E[weight] = p(x)", _densities.check_evidence,
        "samples do not fit the density, it is not normalised, or images are in another order"),
    "linear": ("E[weight] = p(x), linear-Gaussian model", _densities.check_linear,
        "samples do not fit the density, it is not normalised, or images are in another order"),
    "monotone": ("evidence does not fall with K", _densities.check_monotone,
        "samples or their density depend on how many are drawn"),
    "trace": ("the posterior is what the guide samples", _batches.check_traced,
        "a variance taken for a standard deviation, or a step that only one of them makes"),
    "scale": ("a mean over images, global sites weigh 1/N", _batches.check_scale,
        "a missing 1/N: global sites inside the plate, or a divergence in the terms of each image"),
    "save": ("saved and reloaded, it gives the same numbers", _structure.check_save,
        "a tensor that is neither parameter nor buffer, or make= builds other options"),
}
