r"""What the promises are checked with: disturbed copies, traces, constant noise and figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.elbo import Block, PerImage
from pyro_gpvae.model.guide import HasBlocks, HasElbo, posterior_of
from pyro_gpvae.model.networks import ImageShape

if TYPE_CHECKING:
    from pyro_gpvae.testing._densities import Quadrature

#: Builds a guide for another model.
Make = Callable[[Any], PyroProgram]

#: The probability with which a statistical check fails a correct guide.
FAILURE_RATE = 2e-5
#: The bound of an estimate in standard errors: |z| > 4 has probability 6e-5.
MAX_Z = 4.0
MAX_BATCH = 8  # images used, of those given
NUM_DRAWS = 4000  # latent vectors per image in statistical checks


class Finding(NamedTuple):
    """What a check found. ``kept`` is None if the check does not apply."""

    figure: str
    threshold: str
    kept: bool | None
    account: str = ""


def not_checked(reason: str) -> Finding:
    return Finding("-", "-", None, reason)


def within(gap: float, bound: float, account: str = "") -> Finding:
    return Finding(f"{gap:.1e}", f"≤ {bound:.0e}", gap <= bound, account)


class Kit:
    """The guide and the model under test as disturbed copies, and the images."""

    def __init__(
        self, guide: PyroProgram, model: PyroProgram, x: Tensor, make: Make | None, seed: int
    ) -> None:
        self.given = model, guide
        self.given_x = x
        self.build = make
        self.seed = seed
        self.quadrature: Quadrature | None = None

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

    def make(self, model: PyroProgram, seed: int = 1) -> Any:
        """Returns a new guide for a model, in evaluation mode and in the precision of x."""
        assert self.build is not None
        torch.manual_seed(self.seed + seed)
        guide = self.build(model)
        return guide.to(self.x.dtype).eval() if isinstance(guide, nn.Module) else guide

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @torch.no_grad()
    def rows(self, guide: PyroProgram, x: Tensor) -> dict[str, Tensor]:
        """Returns what a guide gives for images under the seed: tensors with a row per image."""
        torch.manual_seed(self.seed)
        site = z_site(guide, x)
        z = site["value"]
        rows = {"z": z, "its log density": site["fn"].log_prob(z).unsqueeze(-1)}
        torch.manual_seed(self.seed)
        if (q := posterior_of(guide, x)) is not None:
            rows["1 sample"] = q.sample()
        draws, log_q = self.draws(guide, x, 3, q)
        return rows | {"3 samples": draws.transpose(0, 1), "their log density": log_q.mT}

    @torch.no_grad()
    def draws(
        self, guide: Any, x: Tensor, count: int, q: TorchDistribution | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns samples (K, B, p) as evaluation draws them, and their log density (K, B)."""
        q = posterior_of(guide, x) if q is None else q
        if q is None:
            site = z_site(guide, x, count)
            return site["value"], site["fn"].log_prob(site["value"])
        z = q.sample((count,))
        return z, q.log_prob(z)

    def all_equal(self, a: dict[str, Tensor], b: dict[str, Tensor], account: str) -> Finding:
        gaps = {what: largest_gap(a[what], b[what]) for what in a}
        what, gap = max(gaps.items(), key=lambda item: item[1])
        return within(gap, self.tolerance, account.format(what=what, gap=gap))


def z_site(guide: Any, x: Tensor, num_particles: int | None = None) -> Any:
    """Returns the site "z" of one trace, or under a plate of particles."""
    if num_particles is None:
        return poutine.trace(guide).get_trace(x).nodes["z"]
    with pyro.plate("num_particles_vectorized", num_particles, dim=-2):
        return poutine.trace(guide).get_trace(x).nodes["z"]


def guide_traces(guide: PyroProgram, x: Tensor, count: int) -> Iterator[Any]:
    """The sites "z" of many traces, 20 at a time, because global weights may be large."""
    for start in range(0, count, 20):
        yield z_site(guide, x, min(20, count - start))


@torch.no_grad()
def fixed_noise(guide: Any, x: Tensor) -> Any:
    """Returns a guide whose posterior is computed once, or the guide itself if it has none."""
    q = posterior_of(guide, x)
    return guide if q is None else PrecomputedPosterior(q)


def guide_losses(model: Any, guide: Any, x: Tensor, num_images: int) -> tuple[Tensor, list[Block]]:
    """Returns the loss of each objective of the guide, as :func:`pyro_gpvae.fit` minimises it.

    A block without parameters trains all of them.
    """
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


@torch.no_grad()
def disturb(module: Any, seed: int) -> None:
    """Adds noise of about a tenth of the usual initial values to trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 / math.sqrt(fan_in) * noise.to(parameter))


def sample_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (B, p) and the Cholesky factor of the covariance of samples (K, B, p)."""
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -1)
    return loc, torch.linalg.cholesky(centred @ centred.mT / z.shape[0])


def largest_gap(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap


class ConstantNoise(TorchFunctionMode):
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
            case "multinomial":
                mass, count, _ = _arguments(args, options, input=None, num_samples=1, replacement=0)
                # the last category is not counted: rounding may keep the sum below one
                below = mass.cumsum(-1)[..., :-1] < self.UNIFORM * mass.sum(-1, keepdim=True)
                return below.sum(-1, keepdim=True).repeat(*[1] * (mass.dim() - 1), count)
        return func(*args, **kwargs)


def _arguments(args: Any, kwargs: dict[str, Any], **defaults: Any) -> Iterator[Any]:
    """Values of arguments given by position or by name."""
    for place, (name, default) in enumerate(defaults.items()):
        yield args[place] if place < len(args) else kwargs.get(name, default)


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if uses_cuda() else [])]


def uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
