r"""Chains of Hamiltonian moves from a start to the posterior, with a random stream per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from tqdm.auto import tqdm

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._plates import in_data_plate, is_global
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation.importance import observed_sites, site_sum

__all__ = ["AnnealingPath", "Forward", "num_pilots_for", "start_distributions"]


# acceptance that the step sizes aim at, and how fast: log step += rate * (accepted - target)
_TARGET_ACCEPTANCE = 0.65
_RATE = 0.2
# one chain in so many is run besides, only to adapt the step size of those that it leads
_CHAINS_PER_PILOT = 4
# draws of the start, for each latent dimension, that tell its covariance
_DRAWS_PER_DIMENSION = 100


@dataclass
class _State:
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
        """This state for the chains of the condition (C, B), the other one elsewhere."""
        return _State(
            torch.where(condition.unsqueeze(-1), self.z, other.z),
            torch.where(condition, self.log_q, other.log_q),
            torch.where(condition, self.log_p, other.log_p),
            torch.where(condition.unsqueeze(-1), self.grad_q, other.grad_q),
            torch.where(condition.unsqueeze(-1), self.grad_p, other.grad_p),
        )


@dataclass
class Forward:
    """Log weights (C, B), mean acceptance (C, B), and step sizes (P, B) of every move."""

    log_weights: Tensor
    acceptance: Tensor
    steps: list[Tensor]


@dataclass
class AnnealingPath:
    """The densities between q0(z|x) and p(x, z) for B images, with the chains' start and noise.

    Attributes:
        log_q: The density of the start, from z (C, B, p) to (C, B).
        log_p: The log joint, likewise.
        z: The start of pilots and chains, (P + C, B, p).
        scale: S (B, p, p) with S Sᵀ the covariance of the start: momenta are N(0, (S Sᵀ)⁻¹).
        generators: One for each image.
        num_pilots: P.
    """

    log_q: Callable[[Tensor], Tensor]
    log_p: Callable[[Tensor], Tensor]
    z: Tensor
    scale: Tensor
    generators: list[torch.Generator]
    num_pilots: int

    @staticmethod
    @torch.no_grad()
    def start(
        model: PyroProgram,
        x: Tensor,
        starts: Sequence[Distribution],
        seed: int,
        indices: Sequence[int],
        num_chains: int,
    ) -> AnnealingPath:
        """Draws the start of images x from their distributions, each with its own stream."""
        num_pilots = num_pilots_for(num_chains)
        chains, scales = [], []
        for q, index in zip(starts, indices, strict=True):
            with seeded(image_seed(seed, index, "start"), x.device):
                z = q.sample(torch.Size((num_pilots + num_chains,)))
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
            num_pilots,
        )

    def forward(self, schedule: Sequence[float], num_leapfrog: int, bar: tqdm) -> Forward:
        """Anneals chains from the start to the posterior."""
        state, pilots = self.at(self.z), self.num_pilots
        leader = torch.arange(len(self.z) - pilots) % pilots
        # where a standard normal accepts about as many as is aimed at, in any dimension
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
        """Anneals chains from z (B, p), drawn from the posterior, back; log weights (C, B)."""
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
        """One HMC move of each chain, with its step size (C, B); and how likely it was accepted.

        In the coordinates u with z = S u, momenta are standard normal.
        """
        momentum, log_uniform = self._noise(len(state.z))
        step = step.unsqueeze(-1)
        first = momentum
        new, alive = state, torch.ones_like(state.log_p, dtype=torch.bool)
        for _ in range(num_leapfrog):
            momentum = momentum + step / 2 * self._transformed(new.gradient(beta), self.scale)
            z = new.z + step * self._transformed(momentum, self.scale.mT)
            # a step that was far too long leaves the numbers: it stays, and is rejected
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


@torch.no_grad()
def start_distributions(
    model: PyroProgram, x: Tensor, guide: Any, seed: int, indices: Sequence[int]
) -> list[Distribution]:
    """Returns q(z|x) of each image, or the prior if there is no guide: batch shape (1,) each.

    Raises:
        ValueError: If the guide has no density, or the model has latent sites besides z.
    """
    if guide is None:
        return [_prior(model, image) for image in x.split(1)]
    _prior(model, x[:1])
    name = getattr(guide, "__name__", type(guide).__name__)
    if not hasattr(guide, "posterior"):
        raise ValueError(
            f"the guide {name} has no posterior(x): annealing needs its density q(z|x). "
            "Give it one, or start from the prior (guide=None)"
        )
    try:
        with seeded(image_seed(seed, indices[0], "posterior"), x.device), nonfinite_as_error():
            q = guide.posterior(x)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"posterior(x) of the guide {name}, for images {indices[0]} to {indices[-1]}: {error}",
            images=indices,
        ) from error
    if q.batch_shape != (len(x),):
        raise ValueError(
            f"posterior(x) of the guide {name} has batch shape {tuple(q.batch_shape)}, expected "
            f"({len(x)},), one distribution an image"
        )
    starts = _slices(q)
    if starts is None:
        starts = []
        for image, index in zip(x.split(1), indices, strict=True):
            with seeded(image_seed(seed, index, "posterior"), x.device):
                starts.append(guide.posterior(image))
    try:
        with seeded(0, x.device):
            starts[0].log_prob(starts[0].sample())
    except NotImplementedError:
        raise ValueError(
            f"the guide {name} has no density: its {type(q).__name__} has no log_prob, which "
            "annealing needs. Start from the prior (guide=None)"
        ) from None
    return starts


def _is_diagonal(q: Distribution) -> bool:
    return isinstance(q, Independent) and isinstance(q.base_dist, Normal)


def _slices(q: Distribution) -> list[Distribution] | None:
    """The distribution of each image, batch shape (1,), of a Gaussian; None for another family."""
    if _is_diagonal(q):
        base = cast(Any, q).base_dist
        pairs = zip(base.loc.split(1), base.scale.split(1), strict=True)
        return [Independent(Normal(loc, scale), 1) for loc, scale in pairs]
    if isinstance(q, MultivariateNormal):
        pairs = zip(q.loc.split(1), q.scale_tril.split(1), strict=True)
        return [MultivariateNormal(loc, scale_tril=scale) for loc, scale in pairs]
    return None


def _prior(model: PyroProgram, image: Tensor) -> Any:
    """The model's distribution of z for one image; refuses models with other latent sites."""
    local = poutine.block(model, hide_fn=is_global)
    # of this draw only the sites matter, not whether the decoder is finite there
    with pyro.validation_enabled(False):
        trace = poutine.trace(local).get_trace(image)
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and in_data_plate(site) and not site["is_observed"]
    }
    if list(sites) != ["z"]:
        raise ValueError(
            "annealing needs a model whose only latent site in plate('data') is 'z', "
            f"found {', '.join(map(repr, sites)) or 'none'}"
        )
    return sites["z"]["fn"]


def log_joint_of(model: PyroProgram, x: Tensor) -> Callable[[Tensor], Tensor]:
    """log p(x, z) in nats, (C, B), as a function of z (C, B, p); global sites do not enter."""
    local = poutine.block(model, hide_fn=is_global)

    def log_joint(z: Tensor) -> Tensor:
        # checks would refuse the infinities of a step that is about to be rejected
        with pyro.validation_enabled(False), pyro.plate("chains", len(z), dim=-2):
            trace = poutine.trace(poutine.condition(local, data={"z": z})).get_trace(x)
            trace.compute_log_prob()
        return site_sum(trace, {"z", *observed_sites(trace)}, (len(z), len(x)))

    return log_joint


def _joined(parts: Sequence[Distribution]) -> Callable[[Tensor], Tensor]:
    """log q of z (C, B, p), (C, B), under a distribution of batch shape (1,) for each image."""
    joint: Distribution
    if all(_is_diagonal(q) for q in parts):
        bases = [cast(Any, q).base_dist for q in parts]
        loc, scale = (torch.cat([getattr(q, n) for q in bases]) for n in ("loc", "scale"))
        joint = Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
        return joint.log_prob
    if all(isinstance(q, MultivariateNormal) for q in parts):
        loc, scale = (torch.cat([getattr(q, n) for q in parts]) for n in ("loc", "scale_tril"))
        joint = MultivariateNormal(loc, scale_tril=scale, validate_args=False)
        return joint.log_prob
    return lambda z: torch.cat(
        [q.log_prob(column) for q, column in zip(parts, z.split(1, dim=1), strict=True)], dim=1
    )


def num_pilots_for(num_chains: int) -> int:
    """How many pilots run beside so many chains."""
    return -(-num_chains // _CHAINS_PER_PILOT)
