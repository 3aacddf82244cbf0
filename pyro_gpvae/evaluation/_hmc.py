"""Hamiltonian Monte Carlo chains between a start and the posterior, with one stream per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from tqdm.auto import tqdm

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation._common import check_posterior, local_sites, log_joint_of, name_of
from pyro_gpvae.model.guide import posterior_of

# the target acceptance, and the rate of log step += rate * (accepted - target)
_TARGET_ACCEPTANCE = 0.65
_RATE = 0.2
# each pilot chain adapts the step size of so many chains, and is then discarded
_CHAINS_PER_PILOT = 4
# draws of the start, for each latent dimension, to estimate its covariance
_DRAWS_PER_DIMENSION = 100


class _State(NamedTuple):
    """Chains at z (C, B, p), both log densities there (C, B), and their gradients."""

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    grad_q: Tensor
    grad_p: Tensor

    def log_density(self, beta: float) -> Tensor:
        return torch.lerp(self.log_q, self.log_p, beta)

    def gradient(self, beta: float) -> Tensor:
        return torch.lerp(self.grad_q, self.grad_p, beta)

    def where(self, condition: Tensor, other: _State) -> _State:
        """Returns this state where the condition (C, B) holds, and the other one elsewhere."""
        pairs = zip(self, other, strict=True)
        masks = [condition if a.dim() == 2 else condition.unsqueeze(-1) for a in self]
        return _State(*(torch.where(m, *p) for m, p in zip(masks, pairs, strict=True)))


@dataclass
class Forward:
    """Log weights (C, B), mean acceptance (C, B), and step sizes (P, B) of every move."""

    log_weights: Tensor
    acceptance: Tensor
    steps: list[Tensor]


@dataclass
class AnnealingPath:
    """The densities between q0(z|x) and p(x, z) for B images, with the start of the chains.

    ``log_q`` and ``log_p`` map z (C, B, p) to (C, B); ``z`` (P + C, B, p) is the start of P pilots
    and C chains; momenta are N(0, (S Sᵀ)⁻¹) with S = ``scale`` (B, p, p), S Sᵀ the covariance of
    the start.
    """

    log_q: Callable[[Tensor], Tensor]
    log_p: Callable[[Tensor], Tensor]
    z: Tensor
    scale: Tensor
    generators: list[torch.Generator]
    num_pilots: int

    @staticmethod
    def start(
        model: PyroProgram,
        x: Tensor,
        starts: Sequence[Distribution],
        seed: int,
        indices: Sequence[int],
        num_chains: int,
    ) -> AnnealingPath:
        """Draws the start of images x from their distributions, each with its own stream."""
        num_draws = chains_with_pilots(num_chains)
        chains, scales = [], []
        for q, index in zip(starts, indices, strict=True):
            with seeded(image_seed(seed, index, "start"), x.device):
                z = q.sample(torch.Size((num_draws,)))
                draws = q.sample(torch.Size((_DRAWS_PER_DIMENSION * z.shape[-1],)))[:, 0]
            chains.append(z)
            covariance = torch.atleast_2d(draws.double().mT.cov())
            scale, failed = torch.linalg.cholesky_ex(covariance)
            if failed:
                raise ValueError(
                    f"annealing cannot start from q(z|x) of image {index}, which has no density: "
                    "its draws do not fill the latent space"
                )
            scales.append(scale.to(z.dtype))
        return AnnealingPath(
            _joined(starts),
            log_joint_of(model, x),
            torch.cat(chains, dim=1),
            torch.stack(scales),
            [torch.Generator().manual_seed(image_seed(seed, n, "moves")) for n in indices],
            num_draws - num_chains,
        )

    def forward(self, schedule: Sequence[float], num_leapfrog: int, bar: tqdm) -> Forward:
        """Anneals chains from the start to the posterior."""
        state, pilots = self.at(self.z), self.num_pilots
        leader = torch.arange(len(self.z) - pilots) % pilots
        # with this step a standard normal has about the target acceptance, in any dimension
        log_step = torch.full_like(state.log_p[:pilots], -math.log(self.z.shape[-1]) / 4)
        log_weights = torch.zeros_like(state.log_p)
        acceptance = torch.zeros_like(state.log_p)
        steps = []
        for t in range(1, len(schedule)):
            bar.update()
            log_weights += (schedule[t] - schedule[t - 1]) * (state.log_p - state.log_q)
            if t + 1 == len(schedule):
                break  # a move after the last weight would change nothing
            step = log_step.exp()
            steps.append(step)
            state, accepted = self.move(
                state, schedule[t], torch.cat([step, step[leader]]), num_leapfrog
            )
            acceptance += accepted
            log_step = log_step + _RATE * (accepted[:pilots] - _TARGET_ACCEPTANCE)
        acceptance = acceptance / len(steps) if steps else torch.full_like(acceptance, torch.nan)
        return Forward(log_weights[pilots:], acceptance[pilots:], steps)

    def back(
        self,
        z: Tensor,
        steps: Sequence[Tensor],
        schedule: Sequence[float],
        num_leapfrog: int,
        bar: tqdm,
    ) -> Tensor:
        """Anneals chains back from z (B, p), drawn from the posterior; log weights (C, B)."""
        num_chains = len(self.z) - self.num_pilots
        leader = torch.arange(num_chains) % self.num_pilots
        state = self.at(z.expand(num_chains, *z.shape))
        log_weights = torch.zeros_like(state.log_p)
        for t in reversed(range(1, len(schedule))):
            bar.update()
            log_weights += (schedule[t] - schedule[t - 1]) * (state.log_p - state.log_q)
            if t > 1:
                step = steps[t - 2][leader]
                state, _ = self.move(state, schedule[t - 1], step, num_leapfrog)
        return log_weights

    def at(self, z: Tensor) -> _State:
        """Evaluates both densities at z (C, B, p)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_q, log_p = self.log_q(z), self.log_p(z)
            (grad_q,) = torch.autograd.grad(log_q.sum(), z)
            (grad_p,) = torch.autograd.grad(log_p.sum(), z)
        return _State(z.detach(), log_q.detach(), log_p.detach(), grad_q, grad_p)

    def move(
        self, state: _State, beta: float, step: Tensor, num_leapfrog: int
    ) -> tuple[_State, Tensor]:
        """Makes one HMC move of each chain with its step size (C, B), where z = S u.

        Returns the new state and the acceptance probabilities (C, B).
        """
        momentum, log_uniform = self._noise(len(state.z))
        step = step.unsqueeze(-1)
        first = momentum
        new, alive = state, torch.ones_like(state.log_p, dtype=torch.bool)
        for _ in range(num_leapfrog):
            momentum = momentum + step / 2 * self._transformed(new.gradient(beta), self.scale)
            z = new.z + step * self._transformed(momentum, self.scale.mT)
            # where a step is so long that z overflows, the chain stays, and is rejected below
            alive = alive & z.isfinite().all(-1)
            new = self.at(torch.where(alive.unsqueeze(-1), z, state.z))
            momentum = momentum + step / 2 * self._transformed(new.gradient(beta), self.scale)
        kinetic = (momentum.square() - first.square()).sum(-1) / 2
        log_ratio = new.log_density(beta) - state.log_density(beta) - kinetic
        log_ratio = log_ratio.masked_fill(~alive | log_ratio.isnan(), -torch.inf)
        return new.where(log_uniform < log_ratio, state), log_ratio.exp().clamp(max=1)

    def _noise(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Standard normal momenta (C, B, p) and log uniform numbers (C, B)."""
        shape = num_chains, self.z.shape[-1] + 1
        noise = [torch.randn(shape, generator=g, dtype=torch.float64) for g in self.generators]
        both = torch.stack(noise, dim=1).to(self.z.device)
        return both[..., :-1].to(self.z.dtype), torch.special.log_ndtr(both[..., -1])

    @staticmethod
    def _transformed(vectors: Tensor, matrix: Tensor) -> Tensor:
        """Row vectors (C, B, p) times the matrix (B, p, p) of their image."""
        return torch.einsum("cbi,bij->cbj", vectors, matrix)


def start_distributions(
    model: PyroProgram, x: Tensor, guide: Any, seed: int, indices: Sequence[int]
) -> list[Distribution]:
    """Returns q(z|x) of each image, or the prior without a guide: batch shape (1,) each."""
    if guide is None:
        return [_prior(model, image) for image in x.split(1)]
    _prior(model, x[:1])
    check_posterior(guide, "annealing needs its density q(z|x), or starts from the prior")
    try:
        with seeded(image_seed(seed, indices[0], "posterior"), x.device), nonfinite_as_error():
            q: Any = posterior_of(guide, x)
    except NonFiniteError as error:
        where = f"{name_of(guide)}, for images {indices[0]} to {indices[-1]}"
        raise NonFiniteError(
            f"posterior(x) of the guide {where}: {error}", images=indices
        ) from error
    if q.batch_shape != (len(x),):
        raise ValueError(
            f"posterior(x) of the guide {name_of(guide)} has batch shape {tuple(q.batch_shape)}, "
            f"expected ({len(x)},), one distribution per image"
        )
    starts = _split(q)
    if not starts:
        for image, index in zip(x.split(1), indices, strict=True):
            with seeded(image_seed(seed, index, "posterior"), x.device):
                starts.append(cast(Distribution, posterior_of(guide, image)))
    try:
        with seeded(0, x.device):
            starts[0].log_prob(starts[0].sample())
    except NotImplementedError:
        raise ValueError(
            f"the guide {name_of(guide)} has no density: its {type(q).__name__} has no log_prob"
        ) from None
    return starts


def _prior(model: PyroProgram, image: Tensor) -> Distribution:
    """The model's distribution of z for one image; refuses models with other latent sites."""
    # only the sites of this draw matter, not whether the decoder is finite there
    with pyro.validation_enabled(False):
        latent = local_sites(model, image).latent
    if list(latent) != ["z"]:
        raise ValueError(
            "annealing needs a model whose only latent site in plate('data') is 'z', "
            f"found {', '.join(map(repr, latent)) or 'none'}"
        )
    return cast(Distribution, latent["z"]["fn"])


def _gaussian_parts(q: Any) -> tuple[type[Distribution], str, Any] | None:
    """The class, the name of its scale, and the parameters of a Gaussian; None for others."""
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        return Normal, "scale", q.base_dist
    return (MultivariateNormal, "scale_tril", q) if isinstance(q, MultivariateNormal) else None


def _gaussian(kind: type[Distribution], name: str, loc: Tensor, scale: Tensor) -> Distribution:
    """A Gaussian with event shape (p,), without validation, which would refuse infinite z."""
    q = cast(Any, kind)(loc, **{name: scale}, validate_args=False)
    return Independent(q, 1, validate_args=False) if kind is Normal else cast(Distribution, q)


def _split(q: Distribution) -> list[Distribution]:
    """The distribution of each image of a Gaussian, batch shape (1,); [] for another family."""
    parts = _gaussian_parts(q)
    if parts is None:
        return []
    kind, name, base = parts
    pairs = zip(base.loc.split(1), getattr(base, name).split(1), strict=True)
    return [_gaussian(kind, name, loc, scale) for loc, scale in pairs]


def _joined(starts: Sequence[Distribution]) -> Callable[[Tensor], Tensor]:
    """log q of z (C, B, p), (C, B), under a distribution of batch shape (1,) for each image."""
    parts = [_gaussian_parts(q) for q in starts]
    if parts[0] is not None and len({part and part[:2] for part in parts}) == 1:
        kind, name, _ = parts[0]
        bases = [cast(Any, part)[2] for part in parts]
        loc, scale = (torch.cat([getattr(q, n) for q in bases]) for n in ("loc", name))
        return _gaussian(kind, name, loc, scale).log_prob
    return lambda z: torch.cat(
        [q.log_prob(column) for q, column in zip(starts, z.split(1, dim=1), strict=True)], dim=1
    )


def chains_with_pilots(num_chains: int) -> int:
    """Returns the number of chains including their pilots."""
    return num_chains + -(-num_chains // _CHAINS_PER_PILOT)
