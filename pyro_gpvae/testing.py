r"""A conformance kit: check in seconds that a guide keeps what training and evaluation rely on."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, kl_divergence
from torch.overrides import TorchFunctionMode

from pyro_gpvae.data import to_float
from pyro_gpvae.elbo import PerImage
from pyro_gpvae.importance import log_weights
from pyro_gpvae.model import DATA_PLATE, ImageModel
from pyro_gpvae.networks import ImageShape
from pyro_gpvae.training import Block

__all__ = ["GuideError", "LinearGaussian", "Promise", "Report", "check_guide", "linear_gaussian"]

Guide = Callable[[Tensor], Any]
Make = Callable[[Any], Guide]

#: Statistical checks fail a correct guide with at most this probability, each.
FAILURE_RATE = 2e-5
#: The same for an estimate with a standard error: |z| < 4 fails with probability 6e-5.
MAX_Z = 4.0

_MAX_BATCH = 8  # images used, of those given
_NUM_DRAWS = 4000  # latent vectors per image in statistical checks


class LinearGaussian(ImageModel):
    r"""A model about which everything is known: :math:`x = A z + b + \sigma \varepsilon`.

    .. math::
        p(x) = N(b, A A^\top + \sigma^2 I), \qquad
        p(z|x) = N(\Lambda^{-1} A^\top (x - b) / \sigma^2, \Lambda^{-1}), \quad
        \Lambda = I + A^\top A / \sigma^2

    See :func:`linear_gaussian`, which builds one.
    """

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact p(z|x): batch shape (B,), event shape (p,)."""
        loadings, bias, sigma = self._linear()
        eye = torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        precision = eye + loadings.mT @ loadings / sigma.square()
        right = (x.flatten(1) - bias) @ loadings / sigma.square()
        loc = torch.linalg.solve(precision, right.mT).mT
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats: (B,)."""
        loadings, bias, sigma = self._linear()
        marginal = LowRankMultivariateNormal(bias, loadings, sigma.square().expand_as(bias))
        log_p: Tensor = marginal.log_prob(x.flatten(1))
        return log_p

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Draws from the model, clipped to [0, 1]: (count, C, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        loadings, bias, sigma = self._linear()
        z = torch.randn(count, self.latent_dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, len(bias), generator=generator, dtype=torch.float64)
        x = z.to(bias) @ loadings.mT + bias + sigma * noise.to(bias)
        return x.clamp(0, 1).detach().reshape(-1, *self.image_shape)

    def _linear(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.log_sigma is not None
        layer: Any = next(self.decoder.children())
        return layer.weight, layer.bias, self.log_sigma.exp()


def linear_gaussian(
    image_shape: ImageShape,
    latent_dim: int,
    seed: int = 0,
    *,
    signal: float = 3.0,
    sigma: float = 0.1,
) -> LinearGaussian:
    r"""Builds a linear-Gaussian model, whose posterior and evidence are known in closed form.

    Arguments:
        image_shape: The shape (C, H, W) of an image, of any size.
        latent_dim: The dimension p of z.
        seed: Of the loadings A; the global random state is left as it was.
        signal: The expected diagonal of :math:`A^\top A / \sigma^2`; the posterior variance of
            each dimension is about 1 / (1 + signal).
        sigma: The standard deviation of the pixels' noise.

    Example:
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> x = model.images(5)
        >>> z = torch.zeros(5, 2, dtype=torch.float64)
        >>> bayes = model.log_joint(x, z) - model.posterior(x).log_prob(z)
        >>> torch.allclose(model.log_evidence(x), bayes)
        True
    """
    pixels = math.prod(image_shape)
    layer = nn.utils.skip_init(nn.Linear, latent_dim, pixels)
    generator = torch.Generator().manual_seed(seed)
    scale = sigma * math.sqrt(signal / pixels)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(pixels, latent_dim, generator=generator))
        layer.bias.fill_(0.5)
    decoder = nn.Sequential(layer, nn.Unflatten(1, tuple(image_shape)))
    return LinearGaussian(image_shape, latent_dim, decoder, sigma=sigma)


class _Finding(NamedTuple):
    """What a check saw. ``kept`` is None where the check does not apply."""

    figure: str
    threshold: str
    kept: bool | None
    account: str = ""


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
    guide: Guide, model: Guide, x: Tensor, *, make: Make | None = None, seed: int = 0
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
    goodness-of-fit tests, |z| < 4 for estimates; several images share one threshold
    (Bonferroni, or a χ² of all their z). A correct guide fails by chance in ``density``,
    ``noise`` or ``trace`` with probability 2e-5 each, in ``evidence`` or ``linear`` with 6e-5,
    in ``monotone`` with about 1e-4. The seed is fixed, so that it passes always or never.

    Where noise is part of inference (a refinement that draws its own ε), results are compared
    under equal seeds; in ``chunks`` and ``scale`` with all noise replaced by a constant. Guides
    whose number of random numbers depends on parameters (rejection samplers) are beyond
    ``batch``. Guides with parameters for each image instead of an encoder are not for this kit.

    Arguments:
        guide: The guide. See :mod:`pyro_gpvae.guide` for the contract.
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
        >>> model = ImageModel((1, 28, 28), latent_dim=2)
        >>> report = check_guide(GaussianGuide(model), model, torch.rand(4, 1, 28, 28))
        >>> report["normalised"].verdict
        'ok'
    """
    x = to_float(x[:_MAX_BATCH], x.dtype if x.dtype.is_floating_point else torch.float32)
    if len(x) < 2 or len(x.unique(dim=0)) < 2:
        raise ValueError(f"x must have at least two different images, got {tuple(x.shape)}")
    devices = range(torch.cuda.device_count()) if _uses_cuda() else ()
    found: list[Promise] = []
    kit = _Kit(guide, model, x, make, seed)
    with torch.random.fork_rng(list(devices)):
        for name, (statement, check) in _PROMISES.items():
            try:
                finding = check(kit)
            except Exception as error:
                reason = f"It raised {type(error).__name__}: {error}"
                finding = _Finding(type(error).__name__, "no error", False, reason)
            found.append(Promise(name, statement, *finding))
            if name in ("copy", "sites") and not finding.kept:
                break  # nothing else could run
    report = Report(tuple(found))
    if report.broken:
        raise GuideError(report)
    return report


class _Kit:
    """The guide and model under test, as disturbed copies, and the images."""

    def __init__(self, guide: Guide, model: Guide, x: Tensor, make: Make | None, seed: int) -> None:
        self.given = model, guide
        self.given_x = x
        self.build = make
        self.seed = seed
        self._quadrature: _Quadrature | None = None

    def copy_given(self) -> None:
        """Sets ``model``, ``guide`` and ``x``; ``pristine``, which is only ever copied."""
        exact = isinstance(self.given[1], nn.Module)
        modules = [program for program in self.given if isinstance(program, nn.Module)]
        first = next((p for module in modules for p in module.parameters()), self.given_x)
        self.given_x = self.given_x.to(first)
        self.pristine = copy.deepcopy(self.given)
        for number, program in enumerate(self.pristine):
            if isinstance(program, nn.Module):
                _disturb(program.double() if exact else program, self.seed + number)
                program.eval()
        self.x = self.given_x.double() if exact else self.given_x
        self.tolerance = 1e-6 if self.x.dtype == torch.float64 else 1e-3
        #: other images, different from those at the same positions
        self.other = 1 - self.x.roll(1, 0)
        self.model, self.guide = self.fresh()

    def fresh(self) -> tuple[Any, Any]:
        """Model and guide as they were before any call."""
        model, guide = copy.deepcopy(self.pristine)
        return _paired(model, guide), guide

    def make(self, model: Any, seed: int = 1) -> Any:
        """A new guide for another model, in evaluation mode and in the precision of x."""
        assert self.build is not None
        torch.manual_seed(self.seed + seed)
        guide: Any = self.build(model)
        return guide.to(self.x.dtype).eval() if isinstance(guide, nn.Module) else guide

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def latent_dim(self) -> int:
        return _site(self.guide, self.x[:1])["value"].shape[-1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def rows(self, guide: Any, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """What a guide gives for images under a seed: tensors with one row an image."""
        torch.manual_seed(self.seed + seed)
        site = _site(guide, x)
        z = site["value"]
        rows = {"z": z, "its log density": site["fn"].log_prob(z).unsqueeze(-1)}
        torch.manual_seed(self.seed + seed)
        q = None
        if hasattr(guide, "posterior"):
            q = guide.posterior(x)
            rows["1 sample"] = q.sample()
        draws, log_q = self.draws(guide, x, 3, q)
        return rows | {"3 samples": draws.transpose(0, 1), "their log density": log_q.mT}

    @torch.no_grad()
    def draws(self, guide: Any, x: Tensor, count: int, q: Any = None) -> tuple[Tensor, Tensor]:
        """Samples (K, B, p) as evaluation draws them, and their log density (K, B)."""
        if not hasattr(guide, "posterior"):
            site = _site(guide, x, count)
            return site["value"], site["fn"].log_prob(site["value"])
        q = guide.posterior(x) if q is None else q
        z = q.sample((count,))
        return z, q.log_prob(z)

    def quadrature(self) -> _Quadrature:
        if self._quadrature is None:
            self._quadrature = _Quadrature(self)
        return self._quadrature


class _Fixed:
    """A guide with one posterior, for the images it was computed for."""

    def __init__(self, q: Any) -> None:
        self.q = q

    def posterior(self, x: Tensor) -> Any:
        return self.q

    def __call__(self, x: Tensor) -> None:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", self.q)


@torch.no_grad()
def _fixed(guide: Any, x: Tensor) -> Any:
    return _Fixed(guide.posterior(x)) if hasattr(guide, "posterior") else guide


# -- the promises, each a function from the kit to a finding ----------------------------------


@torch.no_grad()
def _copy(kit: _Kit) -> _Finding:
    cause = (
        "A tensor of an earlier call that is kept in an attribute cannot be copied; a tensor "
        "made without dtype= does not follow module.double()."
    )
    guide = None
    try:
        kit.copy_given()
        guide = copy.deepcopy(kit.given[1])
        kit.guide(kit.x)
    except Exception as error:
        if guide is None or not _raises(guide, kit.given_x):
            account = f"It raised {type(error).__name__}: {error}\nLikely cause: {cause}"
            return _Finding(type(error).__name__, "no error", False, account)
    return _Finding(str(kit.x.dtype).removeprefix("torch."), "runs", True)


@torch.no_grad()
def _sites(kit: _Kit) -> _Finding:
    problems: list[str] = []
    model, guide = copy.deepcopy(kit.given)
    model = _paired(model, guide)
    for x in (kit.given_x, kit.given_x[:1]):
        with pyro.validation_enabled(False):  # which would say less
            problems += _site_problems(model, guide, x) or _posterior_problems(guide, x)
        if problems:
            return _Finding("wrong", "z: (B, p)", False, f"For {len(x)} images, {problems[0]}.")
    return _Finding(f"z: {tuple(_site(guide, kit.given_x)['value'].shape)}", "z: (B, p)", True)


def _site_problems(model: Any, guide: Any, x: Tensor) -> list[str]:
    trace = poutine.trace(guide).get_trace(x)
    latents = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    if "z" not in latents:
        return [f'the guide has no sample site "z"; its sites are {sorted(latents)}']
    site = latents["z"]
    plates = {frame.name: frame for frame in site["cond_indep_stack"]}
    if set(plates) != {DATA_PLATE}:
        return [f'site "z" is in the plates {sorted(plates)}, expected {DATA_PLATE!r} alone']
    if (size := plates[DATA_PLATE].size) != len(x):
        return [f"the plate has size {size}; it must be the batch size, whatever N is"]
    expected = (len(x), getattr(model, "latent_dim", site["value"].shape[-1]))
    if site["value"].shape != expected:
        return [f"z has shape {tuple(site['value'].shape)}, expected {expected}"]
    if (shape := site["fn"].log_prob(site["value"]).shape) != expected[:1]:
        return [f"the log density of z has shape {tuple(shape)}, expected {expected[:1]}"]
    model_trace = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    wanted = {
        name
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    if missing := wanted - set(latents):
        return [f"the model's sites {sorted(missing)} are not sampled by the guide"]
    extra = {
        name
        for name, node in latents.items()
        if name not in wanted and not node["infer"].get("is_auxiliary")
    }
    if extra:
        return [
            f"the model has no sites {sorted(extra)}, and Pyro would only warn: declare their "
            'priors in global_prior(), or mark them infer={"is_auxiliary": True}'
        ]
    shape = _site(guide, x, 3)["value"].shape
    if shape != (3, *expected):
        return [f"under a plate of 3 particles z has shape {tuple(shape)}"]
    return []


def _posterior_problems(guide: Any, x: Tensor) -> list[str]:
    if not hasattr(guide, "posterior"):
        return []
    p = _site(guide, x)["value"].shape[-1]
    q = guide.posterior(x)
    z = q.sample((3,))
    for what, shape, expected in (
        ("batch shape", q.batch_shape, (len(x),)),
        ("event shape", q.event_shape, (p,)),
        ("sample((3,)) of shape", z.shape, (3, len(x), p)),
        ("log_prob of shape", q.log_prob(z).shape, (3, len(x))),
    ):
        if shape != expected:
            return [f"the posterior has {what} {tuple(shape)}, expected {expected}"]
    return []


def _finite(kit: _Kit) -> _Finding:
    model, guide = copy.deepcopy(kit.given)
    torch.manual_seed(kit.seed)
    with pyro.validation_enabled(False):  # which stops at the first
        weights = log_weights(_paired(model, guide), guide, kit.given_x, 4)
    count = int((~weights.isfinite()).sum())
    account = (
        f"{count} of {weights.numel()} log weights are NaN or infinite.\nLikely cause: a scale "
        "that over- or underflows, or a density of zero where it samples."
    )
    return _Finding(f"{count} not finite", "0", count == 0, account)


def _seeded(kit: _Kit) -> _Finding:
    first, again = kit.rows(kit.guide, kit.x), kit.rows(kit.guide, kit.x)
    return _equal(
        kit,
        first,
        again,
        "Two calls under one seed differ in {what}, by {gap:.1e}.\nLikely cause: noise from "
        "numpy, random or a generator of its own (use pyro.sample or torch), or state that a "
        "call leaves behind.",
    )


def _memory(kit: _Kit) -> _Finding:
    model, used = kit.fresh()
    images = kit.other.clone()
    kit.rows(used, images)
    loss = _losses(model, used, images, 100)[0].sum()
    if loss.requires_grad:
        loss.backward()
    images.copy_(kit.x)  # the same tensor, other images
    image = kit.rows(used, images), kit.rows(kit.fresh()[1], kit.x)
    account = (
        "After a call with other images the same guide gives another {what}, by {gap:.1e}.\n"
        "Likely cause: a stale cache, of features or of a flow's last sample."
    )
    finding = _equal(kit, *image, account)
    if not finding.kept or not isinstance(used, nn.Module):
        return finding
    new = kit.fresh()[1]
    for guide in (used, new):
        _disturb(guide, kit.seed + 7)
    finding = _equal(
        kit,
        kit.rows(used, kit.x),
        kit.rows(new, kit.x),
        "After a change of parameters it gives another {what} than a new guide with these "
        "parameters, by {gap:.1e}.\nLikely cause: a stale cache.",
    )
    if not finding.kept or not hasattr(used, "posterior"):
        return finding
    with torch.no_grad():
        torch.manual_seed(kit.seed)
        q = new.posterior(kit.x)
        first, _ = q.sample((3,)), q.sample((3,))
        torch.manual_seed(kit.seed)
        # another distribution and another tensor: nothing can be remembered about them
        expected = new.posterior(kit.x).log_prob(first.clone())
    return _equal(
        kit,
        {"log density": q.log_prob(first).detach().mT},
        {"log density": expected.mT},
        "Scored after another sample was drawn, a sample has another log density, by "
        "{gap:.1e}.\nLikely cause: a stale cache of a flow's last sample.",
    )


@torch.no_grad()
def _image(kit: _Kit) -> _Finding:
    torch.manual_seed(kit.seed)
    z, _ = kit.draws(kit.guide, kit.x, 3)
    difference = (_density(kit, kit.x, z) - _density(kit, kit.other, z)).abs()
    gap = float(difference.amax(0).min())
    account = (
        "Another image gives the same posterior.\nLikely cause: the context does not reach the "
        "distribution, or a cache of earlier images."
    )
    return _Finding(f"{gap:.1e}", "> 1e-09", gap > 1e-9, account)


@torch.no_grad()
def _noise(kit: _Kit) -> _Finding:
    same = kit.x[:1].expand_as(kit.x).clone()
    torch.manual_seed(kit.seed)
    traces = torch.cat([site["value"] for site in _traces(kit.guide, same, 60)])
    draws, _ = kit.draws(kit.guide, same, 1000)
    torch.manual_seed(kit.seed)
    z = _site(kit.guide, same)["value"].unsqueeze(0)
    for what, sample in (("guide's trace", traces), ("posterior", draws), ("guide's trace", z)):
        vectors = sample.flatten(0, 1)
        repeated = len(vectors) - len(vectors.unique(dim=0))
        if repeated:
            account = (
                f"The same image given {len(same)} times has {repeated} equal z among "
                f"{len(vectors)} of the {what}.\nLikely cause: noise shared over the batch or "
                "over particles (noise of shape (p,), or drawn outside the plate)."
            )
            return _Finding(f"{repeated} equal z", "0", False, account)
    exact = hasattr(kit.guide, "posterior")  # given global weights, images are dependent
    count, size, p = (draws if exact else traces).shape
    centred = (draws if exact else traces) - (draws if exact else traces).mean(0)
    centred = centred / centred.norm(dim=0)
    correlation = torch.einsum("kbp,kcp->pbc", centred, centred)
    off = correlation[:, *torch.triu_indices(size, size, 1)].abs().max()
    largest = float(off.nan_to_num(1.0))
    num_tests = p * size * (size - 1) / 2
    bound = stats.norm.isf(FAILURE_RATE / 2 / num_tests) / math.sqrt(count) if exact else 0.99
    account = (
        f"Samples of different rows have a correlation of {largest:.3f}.\nLikely cause: noise "
        "shared over the batch."
    )
    return _Finding(f"|r| = {largest:.3f}", f"< {bound:.3f}", largest < bound, account)


def _batch(kit: _Kit) -> _Finding:
    rows = kit.rows(kit.guide, kit.x)
    worst, changed, at = 0.0, set[str](), 0
    for i in {0, len(kit.x) // 2, len(kit.x) - 1}:
        others = kit.other.clone()
        others[i] = kit.x[i]
        new = kit.rows(kit.guide, others)
        for what in rows:
            gap = _gap(new[what][i], rows[what][i])
            if not gap <= kit.tolerance:
                changed.add(what)
            if not gap <= worst:
                worst, at = gap, i
    if not changed:
        return _bound(worst, kit.tolerance)
    cause = (
        "a mean, norm, sort or normalisation over the batch, such as the batch mean of a gradient "
        "or batch statistics in evaluation"
    )
    if changed <= {"3 samples", "their log density"} and "1 sample" in rows:
        cause = "tile and interleave swapped in sample((K,)): a single sample is right"
    elif changed <= {"their log density", "its log density"}:
        cause = "a density that sees the other rows, such as tile and interleave swapped"
    elif (order := _order(kit)) is not None:
        cause = f"images in another order: row {order[0]} is what image {order[1]} gives"
    account = (
        f"With other images around it, image {at} has another {', another '.join(sorted(changed))},"
        f" by up to {worst:.1e}.\nLikely cause: {cause}."
    )
    return _bound(worst, kit.tolerance, account)


def _order(kit: _Kit) -> tuple[int, int] | None:
    """A row of a batch that is what another image gives, if there is one."""
    with _ConstantNoise():
        rows = kit.rows(kit.guide, kit.x)["z"]
        for j in range(len(kit.x)):
            alone = kit.rows(kit.guide, kit.x[j : j + 1])["z"][0]
            for i in range(len(kit.x)):
                if i != j and _gap(rows[i], alone) <= kit.tolerance:
                    return i, j
    return None


def _chunks(kit: _Kit) -> _Finding:
    def weights(x: Tensor, chunk_size: int | None = None) -> Tensor:
        return log_weights(kit.model, kit.guide, x, 4, chunk_size=chunk_size)

    with _ConstantNoise() as noise:
        whole = weights(kit.x)
        others = {
            "in chunks": weights(kit.x, 3),
            "one at a time": torch.cat([weights(image) for image in kit.x.split(1)], dim=1),
            "in reverse order": weights(kit.x.flip(0)).flip(1),
        }
    if not noise.complete:
        return _Finding("-", "-", None, "the guide draws noise that no constant can replace")
    gaps = {how: _gap(other, whole) for how, other in others.items()}
    how, worst = max(gaps.items(), key=lambda item: item[1])
    if gaps["one at a time"] <= kit.tolerance and gaps["in reverse order"] <= kit.tolerance:
        cause = "samples, or their density, depend on how many are drawn at once"
    else:
        cause = (
            "the size of the batch enters, as by the batch mean of a gradient where its sum is "
            "due; or images in another order; or tile and interleave swapped"
        )
    account = (
        f"Evaluated {how}, log weights differ by {worst:.1e} (relative).\nLikely cause: {cause}."
    )
    return _bound(worst, kit.tolerance, account)


def _gradient(kit: _Kit) -> _Finding:
    model, guide = kit.fresh()
    named = {
        f"{owner}.{name}": parameter
        for owner, program in (("guide", guide), ("model", model))
        if isinstance(program, nn.Module)
        for name, parameter in program.train().named_parameters()
        if parameter.requires_grad
    }
    if not named:
        return _Finding("-", "-", None, "neither guide nor model has parameters in a module")
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for round_ in range(2):  # a draw may, by bad luck, leave one out
        torch.manual_seed(kit.seed + round_)
        losses, blocks = _losses(model, guide, kit.x, 100)
        for loss, block in zip(losses, blocks, strict=True):
            trained = {id(p) for p in block.parameters} if block.parameters else None
            names = [n for n, p in named.items() if trained is None or id(p) in trained]
            gradients = (
                torch.autograd.grad(
                    loss, [named[n] for n in names], allow_unused=True, retain_graph=True
                )
                if names and loss.requires_grad
                else ()
            )
            for name, gradient in zip(names, gradients, strict=False):
                if gradient is not None:
                    total[name] += gradient.abs()
    infinite = [name for name, value in total.items() if not bool(value.isfinite().all())]
    missing = [name for name, value in total.items() if not bool(value.any())]
    figure = f"{len(named) - len(infinite + missing)} of {len(named)}"
    account = (
        f"NaN or infinite gradient: {', '.join(infinite)}.\nLikely cause: a square root or norm "
        "at zero, or an overflow."
        if infinite
        else f"No gradient, or exactly zero: {', '.join(missing)}.\nLikely cause: the context "
        "does not reach the flow, a detached tensor, a layer that is never used, or a block that "
        "leaves it out. Parameters to be left alone need requires_grad_(False)."
    )
    return _Finding(figure, "all", not infinite and not missing, account)


def _pathwise(kit: _Kit) -> _Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    site = _site(guide, kit.x)
    z, q = site["value"], site["fn"]
    if not getattr(q, "has_rsample", False):
        return _Finding("-", "-", None, "z has no reparametrised samples (has_rsample)")
    named = dict(guide.named_parameters()) if isinstance(guide, nn.Module) else {}
    named = {name: p for name, p in named.items() if p.requires_grad}
    log_q = q.log_prob(z.detach()).sum()
    if not named or not log_q.requires_grad:
        return _Finding("-", "-", None, "the density of z depends on no trainable parameter")
    density = torch.autograd.grad(log_q, list(named.values()), allow_unused=True, retain_graph=True)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    moved: Sequence[Tensor | None] = [None] * len(named)
    if z.requires_grad:
        direction = torch.randn_like(z)
        moved = torch.autograd.grad((direction * z).sum(), list(named.values()), allow_unused=True)
    lost = []
    for name, by_density, by_sample in zip(named, density, moved, strict=True):
        shaping = by_density is not None and by_density != 0
        still = shaping if by_sample is None else shaping & (by_sample == 0)
        if torch.is_tensor(still) and bool(still.any()):
            lost.append(f"guide.{name}")
    account = (
        f"Elements of {', '.join(lost)} shape the density, but z has no gradient with respect to "
        "them, although it claims reparametrised samples.\nLikely cause: the sample is detached "
        "(sample for rsample, detach, no_grad)."
    )
    return _Finding(f"{len(lost)} detached", "0", not lost, account)


class _Quadrature:
    r"""Mass of q on a grid, for the first two images, and cells of about equal mass.

    The grid is uniform in asinh of the whitened z, so that its nodes are dense in the middle and
    reach far; the trapezoid rule then converges faster than any power of the spacing. It is
    refined until the integral stands.
    """

    def __init__(self, kit: _Kit) -> None:
        self.note = ""
        guide, p = kit.guide, kit.latent_dim
        if not hasattr(guide, "posterior"):
            self.note = "the guide has no posterior"
            return
        x = kit.x[:2]
        if p > 2:
            if kit.build is None:
                self.note = f"p = {p}: pass make= to check by quadrature at p = 2"
                return
            p = 2
            guide = kit.make(linear_gaussian(kit.image_shape, p).to(x))
            _disturb(guide, kit.seed)
        torch.manual_seed(kit.seed)
        with torch.no_grad():
            q = guide.posterior(x)
            z = q.sample((_NUM_DRAWS,))
            loc, tril = _moments(z)
            white = torch.linalg.solve_triangular(tril, (z - loc).movedim(0, -1), upper=False)
            self.radius = max(8.0, 1.5 * float(white.abs().max()))
            previous = None
            for num_nodes in (1001, 2001, 4001, 8001) if p == 1 else (81, 161, 321, 641):
                self.mass = self._masses(q, loc, tril, p, num_nodes)
                self.integral = self.mass.flatten(1).sum(1)
                # good enough where it is far from 1
                enough = (0.1 * (self.integral - 1).abs()).clamp(min=2e-4)
                if previous is not None and bool(((self.integral - previous).abs() < enough).all()):
                    break
                previous = self.integral
            else:
                self.note = "the quadrature does not converge: q is too rough, or too narrow"
        self.p_values = [
            _fit(mass.numpy(), w.mT.numpy(), self.radius)
            for mass, w in zip(self.mass.cpu(), white.cpu(), strict=True)
        ]
        self.fits = min(self.p_values) * len(x) > FAILURE_RATE

    def _masses(self, q: Any, loc: Tensor, tril: Tensor, p: int, num_nodes: int) -> Tensor:
        end = math.asinh(self.radius)
        axis = torch.linspace(-end, end, num_nodes, dtype=loc.dtype).to(loc)
        nodes = torch.cartesian_prod(*[axis] * p).reshape(-1, 1, p)
        white, stretch = nodes.sinh(), nodes.cosh().prod(-1)
        area = (axis[1] - axis[0]).pow(p) * tril.diagonal(dim1=-2, dim2=-1).prod(-1)
        log_q = [
            q.log_prob(loc + (tril @ part.unsqueeze(-1)).squeeze(-1)) for part in white.split(16384)
        ]
        return (torch.cat(log_q).exp() * stretch * area).mT.reshape(-1, *[num_nodes] * p)


def _fit(mass: np.ndarray, white: np.ndarray, radius: float) -> float:
    """The p-value of Pearson's χ² of samples (K, p) in groups of grid cells."""
    num_nodes, p = mass.shape[0], mass.ndim
    mass = mass / mass.sum()
    place = (np.arcsinh(white) / math.asinh(radius) + 1) / 2
    index = np.rint(place * (num_nodes - 1)).astype(int)
    expected, observed, num_bins = mass, tuple(index.T), 32 if p == 1 else 8
    cells = []
    for axis in range(p):
        marginal = mass.sum(axis=tuple(a for a in range(p) if a != axis))
        cells.append(np.minimum(marginal.cumsum() * num_bins, num_bins - 1).astype(int))
    count = np.zeros([num_bins] * p)
    np.add.at(count, tuple(c[i] for c, i in zip(cells, observed, strict=True)), 1)
    total = np.zeros([num_bins] * p)
    np.add.at(total, np.ix_(*cells), expected * len(white))
    few = total < 5  # too few for χ²: pooled
    count = np.append(count[~few], count[few].sum())
    total = np.append(total[~few], total[few].sum())
    count, total = count[total > 1], total[total > 1]
    return float(stats.chi2.sf(((count - total) ** 2 / total).sum(), len(total) - 1))


def _normalised(kit: _Kit) -> _Finding:
    quadrature = kit.quadrature()
    if quadrature.note:
        return _Finding("-", "-", None, quadrature.note)
    error = float((quadrature.integral - 1).abs().max())
    cause = (
        "a constant factor, such as mixture weights that do not sum to one, a missing "
        "normaliser, or a log-determinant that does not depend on z: samples do fit the density "
        "up to a factor"
        if quadrature.fits
        else "the sign of the log-determinant, or another error in the change of variables: "
        "samples do not fit the density up to a factor either"
    )
    integrals = ", ".join(f"{value:.4f}" for value in quadrature.integral.tolist())
    account = f"∫ q(z|x) dz = {integrals} for the first images.\nLikely cause: {cause}."
    return _bound(error, 1e-3, account)


def _fits(kit: _Kit) -> _Finding:
    quadrature = kit.quadrature()
    if quadrature.note:
        return _Finding("-", "-", None, quadrature.note)
    p_value = min(1.0, min(quadrature.p_values) * len(quadrature.p_values))
    account = (
        f"{_NUM_DRAWS} samples of the posterior do not fit its log_prob: p = {p_value:.1e}.\n"
        "Likely cause: a variance taken for a standard deviation, the sign of the "
        "log-determinant, other mixture weights in one than in the other, or a stale cache."
    )
    return _Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", quadrature.fits, account)


class _Target(nn.Module):
    r"""A model whose posteriors are given Gaussians, and whose log p(x) is given."""

    def __init__(self, loc: Tensor, tril: Tensor, log_evidence: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc, requires_grad=False)
        self.tril, self.log_p = tril, log_evidence

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.tril)

    def log_evidence(self, x: Tensor) -> Tensor:
        return self.log_p

    def forward(self, x: Tensor) -> None:
        with pyro.plate(DATA_PLATE, len(x), dim=-1):
            pyro.sample("z", self.posterior(x))
            pyro.factor("x", self.log_p)


@torch.no_grad()
def _evidence(kit: _Kit) -> _Finding:
    # E[weight] = p(x) whatever the model; with this one the weights have a finite variance
    # though the guide be untrained: its posterior is a Gaussian where q has mass
    x = kit.x[:4]
    torch.manual_seed(kit.seed)
    proposal = _fixed(kit.guide, x)
    return _mean_weight(kit, proposal, _fitted_target(kit, proposal, x), x, "a Gaussian target")


@torch.no_grad()
def _linear(kit: _Kit) -> _Finding:
    if kit.build is None:
        return _Finding("-", "-", None, "pass make= to check over a linear-Gaussian model")
    model = linear_gaussian(kit.image_shape, 2).to(kit.x)
    guide = kit.make(model)
    _disturb(guide, kit.seed)
    # halfway to the mean image: an untrained guide has its mass around zero, and weights have a
    # finite variance where the posterior is narrower
    x = (model.images(4, kit.seed) + 0.5) / 2
    torch.manual_seed(kit.seed)
    proposal = _fixed(guide, x)
    return _mean_weight(kit, proposal, _paired(model, guide), x, "a linear-Gaussian model")


def _fitted_target(kit: _Kit, proposal: Any, x: Tensor) -> _Target:
    """Gaussians where q has mass: fitted to all samples, or to those nearest to a mode."""
    z, log_q = kit.draws(proposal, x, _NUM_DRAWS)
    _, size, p = z.shape
    # narrower by δ: weights have the second moment (1 - δ²)^(-p/2), here 2 at most
    shrink = 1 - min(0.5, math.sqrt(1 - 4 ** (-1 / p)))
    candidates = [(1.0, shrink), (1.0, shrink / 2), (1.0, shrink / 4)]
    # the covariance of the nearest alone is too narrow
    candidates += itertools.product((0.5, 0.25), (1.0, 2.0, 3.0))
    mode = z[log_q.argmax(0), torch.arange(size, device=z.device)]
    order = ((z - mode) / z.std(0)).square().sum(-1).argsort(0)
    # another p(x) for every image, so that exchanged images would show
    log_evidence = torch.arange(size).to(z)
    targets, efficiencies = [], []
    for share, width in candidates:
        near = order[: max(int(share * len(z)), 4 * p)].unsqueeze(-1).expand(-1, -1, p)
        loc, tril = _moments(z.gather(0, near))
        targets.append(_Target(loc, tril * math.sqrt(width), log_evidence))
        efficiencies.append(_efficiency(kit, proposal, targets[-1], x))
    best = torch.stack(efficiencies).argmax(0)
    loc, tril = (
        torch.stack([getattr(targets[k], name)[i] for i, k in enumerate(best.tolist())])
        for name in ("loc", "tril")
    )
    return _Target(loc, tril, log_evidence)


def _efficiency(kit: _Kit, proposal: Any, model: Any, x: Tensor) -> Tensor:
    r"""The effective sample size (B,) of weights, as a share of K, for a known posterior p.

    :math:`1 / E_p[p(z|x) / q(z|x)]`, by draws of p, which see where q is missing. Without a
    density of q it is estimated by its own draws.
    """
    p = model.posterior(x)
    if isinstance(proposal, _Fixed):
        z = p.sample((500,))
        moment: Tensor = (p.log_prob(z) - proposal.q.log_prob(z)).exp().mean(0)
    else:
        z, log_q = kit.draws(proposal, x, _NUM_DRAWS // 4)
        moment = (p.log_prob(z) - log_q).softmax(0).square().sum(0) * len(z)
    return 1 / moment


def _mean_weight(kit: _Kit, proposal: Any, model: Any, x: Tensor, where: str) -> _Finding:
    """Whether weights have the mean p(x), all images in one χ² test."""
    # an estimate by draws of q alone tends to be too good
    enough = 0.1 if isinstance(proposal, _Fixed) else 0.2
    reliable = _efficiency(kit, proposal, model, x) > enough
    weights = log_weights(model, proposal, x, _NUM_DRAWS // 2)
    relative = (weights - model.log_evidence(x)).exp()
    if not bool(reliable.any()) and bool(relative.isfinite().all()):
        return _Finding("-", "-", None, "the weights vary too much for a test: q is too narrow")
    mean = relative.mean(0)
    error = relative.std(0) / math.sqrt(len(weights))
    z = torch.where((mean - 1).abs() < 1e-9, torch.zeros_like(mean), (mean - 1) / error)
    z = z[reliable | ~mean.isfinite()]
    p_value = max(float(stats.chi2.sf(float(z.square().sum()), len(z))), 1e-300)
    score = float(stats.norm.isf(p_value / 2)) if math.isfinite(p_value) else math.nan
    means = ", ".join(f"{value:.3f}" for value in mean.tolist())
    account = (
        f"On {where}, the mean of weight / p(x) is {means} (expected 1), {score:.1f} standard "
        "errors away.\nLikely cause: samples do not fit the density, as by the sign of the "
        "log-determinant, a density that is not normalised, images in another order, or tile "
        "and interleave swapped."
    )
    return _Finding(f"|z| = {score:.2f}", f"< {MAX_Z:.0f}", score < MAX_Z, account)


@torch.no_grad()
def _monotone(kit: _Kit) -> _Finding:
    x, repeats, counts = kit.x[:2], 16, (1, 16)
    torch.manual_seed(kit.seed)
    proposal = _fixed(kit.guide, x)
    means, errors = [], []
    for count in counts:  # independent draws: within one set, a larger K is never lower
        estimates = torch.stack(
            [
                log_weights(kit.model, proposal, x, count).logsumexp(0) - math.log(count)
                for _ in range(repeats)
            ]
        ).mean(1)
        means.append(float(estimates.mean()))
        errors.append(float(estimates.std()) / math.sqrt(repeats))
    gain, error = means[1] - means[0], math.hypot(*errors)
    score = 0.0 if abs(gain) < 1e-9 * (1 + abs(means[0])) else gain / error
    account = (
        f"log p(x) by K = {counts} samples: {', '.join(f'{mean:.2f}' for mean in means)}.\n"
        "Likely cause: samples or their density depend on how many are drawn."
    )
    return _Finding(f"z = {score:.1f}", f"> {-MAX_Z:.0f}", score > -MAX_Z, account)


@torch.no_grad()
def _traced(kit: _Kit) -> _Finding:
    r"""q(z|x) = E[q(z|x, auxiliary)] at samples of the posterior, over K traces of the guide."""
    if not hasattr(kit.guide, "posterior"):
        return _Finding("-", "-", None, "the guide has no posterior")
    x = kit.x[:4]
    account = (
        "The guide's own trace draws z from another density than posterior(x): {figure}.\n"
        "Likely cause: a variance taken for a standard deviation in one of them, or a step that "
        "only one of them makes."
    )

    def densities(seed: int, num_traces: int) -> tuple[Tensor, Tensor, Tensor]:
        """log q(z|x) (4, B), that in each trace (K, 4, B), and the traces' z (K, B, p)."""
        torch.manual_seed(kit.seed + seed)
        log_q = kit.guide.posterior(x).log_prob(points.clone())
        torch.manual_seed(kit.seed + seed)
        log_traced, z = [], []
        for site in _traces(kit.guide, x, num_traces):
            z.append(site["value"])
            shape = site["value"].shape
            log_traced.append(
                torch.stack([site["fn"].log_prob(point.expand(shape)) for point in points], 1)
            )
        return log_q, torch.cat(log_traced), torch.cat(z)

    torch.manual_seed(kit.seed)
    q = kit.guide.posterior(x)
    points = q.sample((64,))
    # in the middle of q, where densities given auxiliary sites vary least
    central = q.log_prob(points).topk(4, dim=0).indices.unsqueeze(-1)
    points = points.gather(0, central.expand(-1, -1, points.shape[-1]))
    log_q, log_traced, _ = densities(0, 2)
    if (gap := _gap(log_traced, log_q.unsqueeze(0).expand_as(log_traced))) <= kit.tolerance:
        return _bound(gap, kit.tolerance)  # the trace samples this very density
    if _gap(densities(1, 1)[0], log_q) <= kit.tolerance:
        # global weights or auxiliary sites, over which the density is to be averaged
        log_q, log_traced, traced = densities(2, 120)
        left, right = torch.ones_like(log_q).unsqueeze(0), (log_traced - log_q).exp()
    else:
        # the posterior itself is random: average both, over seeds
        pairs = [densities(seed, 1)[:2] for seed in range(64)]
        left = torch.stack([pair[0] for pair in pairs]).exp()
        right = torch.cat([pair[1] for pair in pairs]).exp()
        left, right, traced = left / left.mean(0), right / left.mean(0), None
    gaps = right.mean(0) - left.mean(0)
    variance = right.var(0) + left.var(0, correction=0)
    scores = gaps / (variance / len(right)).sqrt()
    # of densities that vary much, the mean is no normal variable
    scores[(gaps.abs() < kit.tolerance) | (variance > 0.1)] = 0
    tests = 2 * stats.norm.sf(scores.abs().flatten().cpu().numpy())
    if traced is not None:
        drawn = kit.guide.posterior(x).sample((_NUM_DRAWS,)).cpu().flatten(1)
        both = zip(traced.cpu().flatten(1).mT.numpy(), drawn.mT.numpy(), strict=True)
        samples = [stats.ks_2samp(a, b, method="asymp").pvalue for a, b in both]
        tests = np.append(tests, samples)
    p_value = min(1.0, float(tests.min()) * len(tests))
    finding = _Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", p_value > FAILURE_RATE)
    return finding._replace(account=account.format(figure=finding.figure))


@torch.no_grad()
def _scale(kit: _Kit) -> _Finding:
    model, guide = kit.fresh()
    with _ConstantNoise() as noise:
        few, _ = _losses(model, guide, kit.x, 1000)
        many, _ = _losses(model, guide, kit.x, 2000)
        twice, _ = _losses(model, guide, torch.cat([kit.x, kit.x]), 1000)
        expected = _global_divergences(guide, kit.x)
    if not noise.complete:
        return _Finding("-", "-", None, "the guide draws noise that no constant can replace")
    if not (gap := _gap(twice, few)) <= kit.tolerance:
        account = (
            f"With every image twice in the batch the loss changes by {gap:.1e} (relative).\n"
            "Likely cause: a sum over the batch where its mean is due, 1/B where 1/N is due (N is "
            "the number of training images), or a plate that scales its sites by N/B."
        )
        return _bound(gap, kit.tolerance, account)
    # the loss is local + KL / N: what does its dependence on N say about KL?
    found = float((few - many).max()) * 2000
    gap, nearest = min(((abs(found - kl) / (1 + abs(kl))), kl) for kl in expected)
    account = (
        f"loss(N = 1000) − loss(N = 2000) belongs to a global divergence of {found:.4g} nats, but "
        f"KL(q(W) ‖ p(W)) = {nearest:.4g}.\nLikely cause: a missing 1/N: global sites inside the "
        "plate, a divergence added to the terms of every image, or an objective that ignores "
        "the scale of the sites."
        if nearest
        else f"The guide has no global sites, but its loss depends on N, as by a divergence of "
        f"{found:.4g} nats.\nLikely cause: a term of each image outside the plate."
    )
    # KL / N is what is left of a loss of thousands of nats
    return _bound(gap, kit.tolerance, account)


def _global_divergences(guide: Any, x: Tensor) -> list[float]:
    """KL(q(W) ‖ p(W)) of the guide's global sites: the value, or its estimate by one draw."""
    priors = guide.global_prior() if hasattr(guide, "global_prior") else {}
    trace = poutine.trace(guide).get_trace(x)
    analytic, sampled = 0.0, 0.0
    for name, prior in priors.items():
        site = trace.nodes[name]
        sampled += float((site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])).sum())
        try:
            analytic += float(kl_divergence(site["fn"], prior).sum())
        except NotImplementedError:
            analytic = math.nan
    return [value for value in (analytic, sampled) if not math.isnan(value)]


def _save(kit: _Kit) -> _Finding:
    if not isinstance(kit.guide, nn.Module):
        return _Finding("-", "-", None, "the guide is not a module")
    buffer = io.BytesIO()
    torch.save(kit.guide.state_dict(), buffer)
    buffer.seek(0)
    other = kit.fresh()[1] if kit.build is None else kit.make(kit.model, seed=2)
    _disturb(other, kit.seed + 3)
    other.load_state_dict(torch.load(buffer, weights_only=True, map_location=kit.x.device))
    return _equal(
        kit,
        kit.rows(other, kit.x),
        kit.rows(kit.guide, kit.x),
        "A guide that loads the state dict gives another {what}, by {gap:.1e}.\nLikely cause: a "
        "tensor, such as a random permutation, that is neither parameter nor buffer; or make= "
        "builds a guide with other options.",
    )


_PROMISES: dict[str, tuple[str, Callable[[_Kit], _Finding]]] = {
    "copy": ("it can be copied, and runs in float64", _copy),
    "sites": ("one z per image in the data plate", _sites),
    "finite": ("log weights are finite", _finite),
    "seed": ("the same seed gives the same numbers", _seeded),
    "memory": ("a call leaves nothing behind", _memory),
    "image": ("the posterior depends on the image", _image),
    "noise": ("every image and sample has noise of its own", _noise),
    "batch": ("a result does not depend on the other images", _batch),
    "chunks": ("batched = chunked = single", _chunks),
    "gradient": ("every parameter gets a finite gradient", _gradient),
    "pathwise": ("parameters of the density move z", _pathwise),
    "normalised": ("∫ q(z|x) dz = 1", _normalised),
    "density": ("samples fit the density", _fits),
    "evidence": ("E[weight] = p(x)", _evidence),
    "linear": ("E[weight] = p(x), linear-Gaussian model", _linear),
    "monotone": ("evidence does not fall with K", _monotone),
    "trace": ("the posterior is what the guide samples", _traced),
    "scale": ("a mean over images, global sites weigh 1/N", _scale),
    "save": ("saved and reloaded, it gives the same numbers", _save),
}


# -- tools ------------------------------------------------------------------------------------


class _ConstantNoise(TorchFunctionMode):
    """Replaces every random number by a constant, so that results do not depend on its order.

    Attributes:
        complete: Whether no other random numbers were drawn; known on leaving the context.
    """

    NORMAL, UNIFORM = 0.6, 0.3

    def __enter__(self) -> Any:
        self._states = _random_states()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.complete = all(map(torch.equal, self._states, _random_states()))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)  # a stream of its own
        options = {key: value for key, value in kwargs.items() if key != "generator"}
        match func.__name__:
            case "randn":
                return torch.zeros(*args, **options) + self.NORMAL
            case "rand":
                return torch.zeros(*args, **options) + self.UNIFORM
            case "randn_like":
                return torch.full_like(args[0], self.NORMAL, **options)
            case "rand_like":
                return torch.full_like(args[0], self.UNIFORM, **options)
            case "normal" if "size" not in kwargs and len(args) <= 2:
                return torch.add(*_arguments(args, options, mean=0.0, std=1.0), alpha=self.NORMAL)
            case "normal_":
                mean, std = _arguments(args[1:], options, mean=0.0, std=1.0)
                return args[0].fill_(mean + self.NORMAL * std)
            case "uniform_":
                low, high = _arguments(args[1:], options, **{"from": 0.0, "to": 1.0})
                return args[0].fill_(low + self.UNIFORM * (high - low))
            case "exponential_":
                (rate,) = _arguments(args[1:], options, lambd=1.0)
                return args[0].fill_(-math.log(self.UNIFORM) / rate)
            case "bernoulli" if len(args) == 1 and not options:
                return (args[0] > self.UNIFORM).to(args[0].dtype)
            case "multinomial":
                mass, count, _ = _arguments(args, options, input=None, num_samples=1, replacement=0)
                # the last place is left out of the count: rounding may keep the sum below one
                below = mass.cumsum(-1)[..., :-1] < self.UNIFORM * mass.sum(-1, keepdim=True)
                return below.sum(-1, keepdim=True).repeat(*[1] * (mass.dim() - 1), count)
        return func(*args, **kwargs)


def _arguments(args: Any, kwargs: dict[str, Any], **defaults: Any) -> Iterator[Any]:
    """Values of arguments given by place or by name."""
    for place, (name, default) in enumerate(defaults.items()):
        yield args[place] if place < len(args) else kwargs.get(name, default)


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _uses_cuda() else [])]


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _site(guide: Any, x: Tensor, num_particles: int | None = None) -> Any:
    """The site "z" of one trace, or under a plate of particles."""
    if num_particles is None:
        return poutine.trace(guide).get_trace(x).nodes["z"]
    with pyro.plate("num_particles_vectorized", num_particles, dim=-2):
        return poutine.trace(guide).get_trace(x).nodes["z"]


def _traces(guide: Any, x: Tensor, count: int) -> Iterator[Any]:
    """The sites "z" of many traces, some at once: global weights may be large."""
    for start in range(0, count, 20):
        yield _site(guide, x, min(20, count - start))


def _density(kit: _Kit, x: Tensor, z: Tensor) -> Tensor:
    """log q(z|x) (K, B) at given z (K, B, p), always under the same seed."""
    torch.manual_seed(kit.seed)
    q = kit.guide.posterior(x) if hasattr(kit.guide, "posterior") else _site(kit.guide, x)["fn"]
    log_q: Tensor = q.log_prob(z)
    return log_q


def _losses(model: Any, guide: Any, x: Tensor, num_images: int) -> tuple[Tensor, list[Block]]:
    """The loss of each of the guide's objectives, as :func:`pyro_gpvae.fit` would minimise it.

    A block without parameters trains all of them."""
    if hasattr(guide, "blocks"):
        blocks = list(guide.blocks(model))
    else:
        blocks = [Block(guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO(), ())]
    losses = [
        torch.as_tensor(
            block.elbo.differentiable_loss(
                PerImage(block.model or model, num_images),
                PerImage(block.guide or guide, num_images),
                x,
            )
        )
        for block in blocks
    ]
    return torch.stack(losses), blocks


def _raises(guide: Guide, x: Tensor) -> bool:
    try:
        guide(x)
    except Exception:
        return True
    return False


def _paired(model: Any, guide: Any) -> Any:
    """The model, with the priors of the guide's global sites if it can declare them."""
    return model.pair(guide) if hasattr(model, "pair") else model


@torch.no_grad()
def _disturb(module: Any, seed: int) -> None:
    """Adds noise of about a tenth of the usual initial values to trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 / math.sqrt(fan_in) * noise.to(parameter))


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, p) and Cholesky factor of the covariance (B, p, p) of samples (K, B, p)."""
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -1)
    covariance = centred @ centred.mT / z.shape[0]
    return loc, torch.linalg.cholesky(covariance)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap


def _bound(gap: float, bound: float, account: str = "") -> _Finding:
    return _Finding(f"{gap:.1e}", f"≤ {bound:.0e}", gap <= bound, account)


def _equal(kit: _Kit, a: dict[str, Tensor], b: dict[str, Tensor], account: str) -> _Finding:
    gaps = {what: _gap(a[what], b[what]) for what in a}
    what, gap = max(gaps.items(), key=lambda item: item[1])
    return _bound(gap, kit.tolerance, account.format(what=what, gap=gap))
