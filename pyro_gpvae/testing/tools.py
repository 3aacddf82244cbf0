r"""Traces, noise, losses and figures, for the checks of promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, PerImage

__all__ = [
    "FAILURE_RATE",
    "MAX_BATCH",
    "MAX_Z",
    "NUM_DRAWS",
    "ConstantNoise",
    "Finding",
    "Guide",
    "Make",
    "disturb",
    "guide_losses",
    "guide_traces",
    "largest_gap",
    "raises_error",
    "sample_moments",
    "uses_cuda",
    "within",
    "z_site",
]

Guide = Callable[[Tensor], Any]


Make = Callable[[Any], Guide]


#: Statistical checks fail a correct guide with at most this probability, each.
FAILURE_RATE = 2e-5


#: The same for an estimate with a standard error: |z| < 4 fails with probability 6e-5.
MAX_Z = 4.0


MAX_BATCH = 8  # images used, of those given


NUM_DRAWS = 4000  # latent vectors per image in statistical checks


class Finding(NamedTuple):
    """What a check saw. ``kept`` is None where the check does not apply."""

    figure: str
    threshold: str
    kept: bool | None
    account: str = ""


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
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if uses_cuda() else [])]


def uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def z_site(guide: Any, x: Tensor, num_particles: int | None = None) -> Any:
    """The site "z" of one trace, or under a plate of particles."""
    if num_particles is None:
        return poutine.trace(guide).get_trace(x).nodes["z"]
    with pyro.plate("num_particles_vectorized", num_particles, dim=-2):
        return poutine.trace(guide).get_trace(x).nodes["z"]


def guide_traces(guide: Any, x: Tensor, count: int) -> Iterator[Any]:
    """The sites "z" of many traces, some at once: global weights may be large."""
    for start in range(0, count, 20):
        yield z_site(guide, x, min(20, count - start))


def guide_losses(model: Any, guide: Any, x: Tensor, num_images: int) -> tuple[Tensor, list[Block]]:
    """The loss of each of the guide's objectives, as :func:`pyro_gpvae.fit` would minimise it.

    A block without parameters trains all of them."""
    if hasattr(guide, "blocks"):
        blocks = list(guide.blocks(model))
    else:
        blocks = [Block(guide.elbo() if hasattr(guide, "elbo") else Trace_ELBO(), ())]
    losses = []
    for block in blocks:
        program, q = block.model or model, block.guide or guide
        programs = PerImage(pair(program, q), num_images), PerImage(q, num_images)
        losses.append(torch.as_tensor(block.elbo.differentiable_loss(*programs, x)))
    return torch.stack(losses), blocks


def raises_error(guide: Guide, x: Tensor) -> bool:
    try:
        guide(x)
    except Exception:
        return True
    return False


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
    """Mean (B, p) and Cholesky factor of the covariance (B, p, p) of samples (K, B, p)."""
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -1)
    covariance = centred @ centred.mT / z.shape[0]
    return loc, torch.linalg.cholesky(covariance)


def largest_gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap


def within(gap: float, bound: float, account: str = "") -> Finding:
    return Finding(f"{gap:.1e}", f"≤ {bound:.0e}", gap <= bound, account)
