r"""What the promises are checked with: disturbed copies, traces, constant noise and figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.elbo import Block, PerImage
from pyro_gpvae.model.guide import HasBlocks, HasElbo, posterior_of

#: Builds a guide for another model.
Make = Callable[[Any], PyroProgram]

#: The probability with which a statistical check fails a correct guide.
FAILURE_RATE = 2e-5
#: The bound of an estimate in standard errors: |z| > 4 has probability 6e-5.
MAX_Z = 4.0
MAX_BATCH = 8  # images used, of those given
NUM_DRAWS = 4000  # latent vectors per image in statistical checks


class Finding(NamedTuple):
    """What a check found: ``kept`` is None, and ``seen`` the reason, if it does not apply."""

    figure: str
    threshold: str
    kept: bool | None
    seen: str = ""
    cause: str = ""  # if it is more specific than that of the promise


def not_checked(reason: str) -> Finding:
    return Finding("-", "-", None, reason)


def within(gap: float, bound: float, seen: str, cause: str = "") -> Finding:
    return Finding(f"{gap:.1e}", f"≤ {bound:.0e}", gap <= bound, seen.format(gap=gap), cause)


def likely(p_value: float, seen: str) -> Finding:
    kept = p_value > FAILURE_RATE
    return Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", kept, seen.format(p=p_value))


@dataclass
class Kit:
    """The guide and the model under test as disturbed copies, and the images."""

    given: tuple[PyroProgram, PyroProgram]  # model and guide
    given_x: Tensor
    build: Make | None
    seed: int
    quadrature: tuple[Tensor, float] | Finding | None = None

    def copy_given(self) -> None:
        """Sets ``model``, ``guide`` and ``x``, and ``pristine``, which is only ever copied."""
        exact = isinstance(self.given[1], nn.Module)
        self.pristine = copy.deepcopy(self.given)
        for number, program in enumerate(self.pristine):
            if isinstance(program, nn.Module):
                disturb(program.double() if exact else program, self.seed + number)
                program.eval()
        self.x = self.given_x.double() if exact else self.given_x
        self.tolerance = 1e-6 if self.x.dtype == torch.float64 else 1e-3
        # images that differ from those at the same positions
        self.other = 1 - self.x.roll(1, 0)
        self.model, self.guide = self.fresh()

    def fresh(self) -> tuple[PyroProgram, PyroProgram]:
        """Returns model and guide as they were before any call."""
        return copy.deepcopy(self.pristine)

    def make(self, model: PyroProgram) -> Any:
        """Returns a new guide for a model, disturbed and in the precision of x."""
        assert self.build is not None
        torch.manual_seed(self.seed + 1)
        guide = self.build(model)
        if isinstance(guide, nn.Module):
            disturb(guide.to(self.x.dtype).eval(), self.seed)
        return guide

    @torch.no_grad()
    def rows(self, guide: PyroProgram, x: Tensor) -> dict[str, Tensor]:
        """Returns what a guide gives for images under the seed: tensors with a row per image."""
        torch.manual_seed(self.seed)
        site = z_site(guide, x)
        log_q = site["fn"].log_prob(site["value"])
        rows = {"z": site["value"], "its log density": log_q.unsqueeze(-1)}
        torch.manual_seed(self.seed)
        if (q := posterior_of(guide, x)) is not None:
            rows["1 sample"] = q.sample()
        draws, log_q = sample(guide, x, 3, q)
        return rows | {"3 samples": draws.transpose(0, 1), "their log density": log_q.mT}

    @torch.no_grad()
    def log_density(self, guide: PyroProgram, x: Tensor, z: Tensor) -> Tensor:
        """Returns log q(z|x) (K, B) at given z (K, B, p), always under the same seed."""
        torch.manual_seed(self.seed)
        q = posterior_of(guide, x)
        log_q: Tensor = (z_site(guide, x)["fn"] if q is None else q).log_prob(z)
        return log_q

    def all_equal(self, a: dict[str, Tensor], b: dict[str, Tensor], seen: str) -> Finding:
        gaps = {what: largest_gap(a[what], b[what]) for what in a}
        what, gap = max(gaps.items(), key=lambda item: item[1])
        return within(gap, self.tolerance, seen.replace("{what}", what))


@torch.no_grad()
def sample(guide: Any, x: Tensor, count: int, q: Any = None) -> tuple[Tensor, Tensor]:
    """Returns samples (K, B, p) as evaluation draws them, and their log density (K, B)."""
    q = posterior_of(guide, x) if q is None else q
    if q is None:
        site = z_site(guide, x, count)
        return site["value"], site["fn"].log_prob(site["value"])
    z = q.sample((count,))
    return z, q.log_prob(z)


def z_site(guide: Any, x: Tensor, count: int | None = None) -> Any:
    """Returns the site "z" of one trace, or under a plate of particles."""
    with pyro.plate("num_particles_vectorized", count, dim=-2) if count else nullcontext():
        return poutine.trace(guide).get_trace(x).nodes["z"]


@torch.no_grad()
def fixed_noise(guide: Any, x: Tensor) -> Any:
    """Returns a guide whose posterior is computed once, or the guide itself if it has none."""
    q = posterior_of(guide, x)
    return guide if q is None else PrecomputedPosterior(q)


def guide_losses(model: Any, guide: Any, x: Tensor, num_images: int) -> tuple[Tensor, list[Block]]:
    """Returns the loss of each objective; a block without parameters trains all of them."""
    if isinstance(guide, HasBlocks):
        blocks = list(guide.blocks(model))
    else:
        blocks = [Block(guide.elbo() if isinstance(guide, HasElbo) else Trace_ELBO(), ())]
    losses = []
    for block in blocks:
        program, q = block.model or model, block.guide or guide
        programs = PerImage(pair(program, q), num_images), PerImage(q, num_images)
        losses.append(torch.as_tensor(block.elbo.differentiable_loss(*programs, x)))
    return torch.stack(losses), blocks


def trainable(program: Any) -> dict[str, Tensor]:
    named = program.named_parameters() if isinstance(program, nn.Module) else ()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def disturb(module: Any, seed: int) -> None:
    """Adds noise of about a tenth of the usual initial values to trainable parameters."""
    torch.manual_seed(seed)
    for parameter in trainable(module).values():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.add_(torch.randn_like(parameter), alpha=0.05 / math.sqrt(fan_in))


def sample_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (B, p) and the Cholesky factor of the covariance of samples (K, B, p)."""
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -1)
    return loc, torch.linalg.cholesky(centred @ centred.mT / z.shape[0])


def largest_gap(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap


class ConstantNoise(TorchDispatchMode):
    """Replaces every random number by a constant, so that results do not depend on its order."""

    NORMAL, UNIFORM = 0.6, 0.3

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.complete = True  # whether a constant could replace all of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
            return out  # no noise, or a stream of its own
        name = func.overloadpacket.__name__
        # arguments of normal(mean, std), z.normal_(mean, std) and z.uniform_(low, high)
        values = [0.0, 1.0]  # mean and standard deviation, or the ends of an interval
        if name in ("normal", "normal_", "uniform_"):
            given = args[name.endswith("_") :][:2]  # without defaults
            values[: len(given)] = given
        a, b = values
        if name in ("randn", "randn_like", "normal", "normal_"):
            return out.copy_(torch.as_tensor(a + self.NORMAL * b))
        if name in ("rand", "rand_like", "uniform_"):
            return out.fill_(a + self.UNIFORM * (b - a))
        if name == "multinomial":
            mass = args[0]
            # the last category is not counted: rounding may keep the sum below one
            below = mass.cumsum(-1)[..., :-1] < self.UNIFORM * mass.sum(-1, keepdim=True)
            return out.copy_(below.sum(-1, keepdim=True))
        self.complete = False
        return out
