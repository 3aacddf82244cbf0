r"""``check_guide``: whether a guide keeps what training and evaluation rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.images import to_batch
from pyro_gpvae.testing import _batches, _densities, _gradients, _structure
from pyro_gpvae.testing._kit import MAX_BATCH, Finding, Kit, Make, uses_cuda

__all__ = ["GuideError", "Promise", "Report", "check_guide"]


@dataclass(frozen=True)
class Promise:
    """One promise of the guide contract, and how the guide kept it.

    Attributes:
        name: One word.
        statement: What is promised.
        figure: What was measured.
        threshold: What it must be.
        kept: Whether it is; None if the promise was not checked.
        account: If it is not: what was seen, and the likely cause. If it was not checked: why.
    """

    name: str
    statement: str
    figure: str
    threshold: str
    kept: bool | None
    account: str

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
    then an error is raised if one is broken. They are, in this order:

    ============= ==============================================================================
    copy          It can be copied, and runs in float64.
    sites         One site ``"z"`` in ``plate("data")``, shape (B, p), (K, B, p) under a plate
                  of K particles; the model's sites, otherwise only auxiliary ones. The
                  posterior's shapes.
    finite        Log weights are finite, in the precision given.
    seed          The same seed of torch gives the same numbers.
    memory        A call leaves nothing behind: not for other images in the same tensor, not for
                  other parameters, not for another sample.
    image         The posterior depends on the image.
    noise         Every image and every sample has noise of its own.
    batch         The result for an image does not depend on the other images.
    chunks        Log weights of a batch = in chunks = one at a time = in any order.
    gradient      Every parameter of guide and model, unless it requires no gradient, gets a
                  finite one from some objective of the guide.
    pathwise      Where samples are reparametrised, parameters that shape the density move z.
    normalised    ∫ q(z|x) dz = 1, by quadrature (p = 1 or 2).
    density       Samples fit the density: χ² over cells (p = 1 or 2).
    evidence      E[weight] = p(x), for a Gaussian target of known p(x), at any p.
    linear        E[weight] = p(x), on a linear-Gaussian model (with ``make``).
    monotone      The evidence does not fall with K.
    trace         The posterior is the distribution of z in the guide's own trace; where that
                  has global or auxiliary sites, its density is averaged over them.
    scale         The loss is a mean over images, in which global sites weigh 1/N.
    save          The state dict, through bytes and into another guide, gives the same numbers.
    ============= ==============================================================================

    Thresholds: 1e-6 relative for equalities (1e-3 in float32), a p-value of 2e-5 for
    goodness-of-fit tests, ``|z| < 4`` for estimates; several images share one threshold
    (Bonferroni, or a χ² of all their z). A correct guide fails by chance in ``density``,
    ``noise`` or ``trace`` with probability 2e-5 each, in ``evidence`` or ``linear`` with 6e-5,
    in ``monotone`` with about 1e-4. The seed is fixed, so that it passes always or never.

    Where noise is part of inference (a refinement that draws its own ε), results are compared
    under equal seeds; in ``chunks`` and ``scale`` with all noise replaced by a constant. Guides
    whose number of random numbers depends on parameters (rejection samplers) are beyond
    ``batch``. Guides with parameters for each image instead of an encoder are not for this kit.

    Arguments:
        guide: The guide. See :mod:`pyro_gpvae.model.guide` for the contract.
        model: The model it was built for, such as :class:`pyro_gpvae.ImageModel`.
        x: At least two different images (B, C, H, W), uint8 or floats in [0, 1]. Up to eight
            are used.
        make: Builds such a guide for another model, like its class; ``lambda model:
            MyGuide(model, 3)`` if it has options. The guide is then also checked over a
            linear-Gaussian model with p = 2, which adds quadrature where the model's own p is
            larger, and reloaded into a guide that was built anew.
        seed: Of all random numbers.

    Raises:
        GuideError: If a promise is broken. The message names the first, with what was seen and
            the likely cause, and shows the table.
        ValueError: If x is not at least two different images.

    Example:
        >>> from guides import GaussianGuide
        >>> from pyro_gpvae import ImageModel
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> report = check_guide(GaussianGuide(model), model, torch.rand(4, 1, 28, 28))
        >>> report["normalised"].verdict
        'ok'
    """
    x = to_batch(x[:MAX_BATCH], model, guide)
    if len(x) < 2 or len(x.unique(dim=0)) < 2:
        raise ValueError(f"x must have at least two different images, got {tuple(x.shape)}")
    devices = range(torch.cuda.device_count()) if uses_cuda() else ()
    found: list[Promise] = []
    kit = Kit(guide, model, x, make, seed)
    with torch.random.fork_rng(list(devices), device_type="cuda"):
        for name, (statement, check) in _PROMISES.items():
            try:
                finding = check(kit)
            except Exception as error:
                reason = f"It raised {type(error).__name__}: {error}"
                finding = Finding(type(error).__name__, "no error", False, reason)
            found.append(Promise(name, statement, *finding))
            if name in ("copy", "sites") and not finding.kept:
                break  # nothing else could run
    report = Report(tuple(found))
    if report.broken:
        raise GuideError(report)
    return report


_PROMISES: dict[str, tuple[str, Callable[[Kit], Finding]]] = {
    "copy": ("it can be copied, and runs in float64", _structure.check_copy),
    "sites": ("one z per image in the data plate", _structure.check_sites),
    "finite": ("log weights are finite", _structure.check_finite),
    "seed": ("the same seed gives the same numbers", _structure.check_seeded),
    "memory": ("a call leaves nothing behind", _structure.check_memory),
    "image": ("the posterior depends on the image", _structure.check_image),
    "noise": ("every image and sample has noise of its own", _batches.check_noise),
    "batch": ("a result does not depend on the other images", _batches.check_batch),
    "chunks": ("batched = chunked = single", _batches.check_chunks),
    "gradient": ("every parameter gets a finite gradient", _gradients.check_gradient),
    "pathwise": ("parameters of the density move z", _gradients.check_pathwise),
    "normalised": ("∫ q(z|x) dz = 1", _densities.check_normalised),
    "density": ("samples fit the density", _densities.check_fits),
    "evidence": ("E[weight] = p(x)", _densities.check_evidence),
    "linear": ("E[weight] = p(x), linear-Gaussian model", _densities.check_linear),
    "monotone": ("evidence does not fall with K", _densities.check_monotone),
    "trace": ("the posterior is what the guide samples", _batches.check_traced),
    "scale": ("a mean over images, global sites weigh 1/N", _gradients.check_scale),
    "save": ("saved and reloaded, it gives the same numbers", _structure.check_save),
}
