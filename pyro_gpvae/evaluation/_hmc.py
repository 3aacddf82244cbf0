"""Hamiltonian Monte Carlo chains between a start and the posterior, with one stream per image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._progress import tqdm
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.evaluation._common import find_posterior
from pyro_gpvae.model._local import name_of
from pyro_gpvae.model.density import JointDensity, LatentPosterior, base_of

# log step += accepted - target after each move, so that short schedules reach the target, too
_TARGET_ACCEPTANCE = 0.65
# each pilot chain adapts the step size of so many chains, and is then discarded
_CHAINS_PER_PILOT = 4
# draws of the start, for each latent dimension, to estimate its covariance
_DRAWS_PER_DIMENSION = 100


class _State(NamedTuple):
    """Chains at u (C, B, n), both log densities there (C, B), and their gradients."""

    u: Tensor
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
    """The densities between q0(u) and p(x, u) for B images, with the start of the chains.

    ``log_q`` and ``log_p`` map u (C, B, n) to (C, B); ``u`` (P + C, B, n) is the start of P pilots
    and C chains; momenta are N(0, (S Sᵀ)⁻¹) with S = ``scale`` (B, n, n), S Sᵀ the covariance of
    the start.
    """

    log_q: Callable[[Tensor], Tensor]
    log_p: Callable[[Tensor], Tensor]
    u: Tensor
    scale: Tensor
    generators: list[torch.Generator]
    num_pilots: int

    @staticmethod
    def of(start: Start, seed: int, indices: Sequence[int], num_chains: int) -> AnnealingPath:
        """Draws the start of the chains of each image, each with its own stream."""
        density, num_draws = start.density, chains_with_pilots(num_chains)
        chains, scales = [], []
        for n, index in enumerate(indices):
            with seeded(image_seed(seed, index, "start"), density.batch[0].device):
                u = start.sample(n, num_draws)
                draws = start.sample(n, _DRAWS_PER_DIMENSION * density.dim)[:, 0]
            if not bool(u.isfinite().all()):
                raise ValueError(
                    f"the start of annealing of image {index} lies outside the support of "
                    f"{' or '.join(map(repr, density.sites))}: give guide and model the same one"
                )
            chains.append(u)
            covariance = torch.atleast_2d(draws.double().mT.cov())
            scale, failed = torch.linalg.cholesky_ex(covariance)
            if failed:
                raise ValueError(
                    f"annealing cannot start from q(z|x) of image {index}, which has no density: "
                    "its draws do not fill the latent space"
                )
            scales.append(scale.to(u.dtype))
        return AnnealingPath(
            start.log_prob,
            density.log_prob,
            torch.cat(chains, dim=1),
            torch.stack(scales),
            [torch.Generator("cpu").manual_seed(image_seed(seed, n, "moves")) for n in indices],
            num_draws - num_chains,
        )

    def forward(self, schedule: Sequence[float], num_leapfrog: int, bar: tqdm) -> Forward:
        """Anneals chains from the start to the posterior."""
        state, pilots = self.at(self.u), self.num_pilots
        leader = torch.arange(len(self.u) - pilots) % pilots
        # with this step a standard normal has about the target acceptance, in any dimension
        log_step = torch.full_like(state.log_p[:pilots], -math.log(self.u.shape[-1]) / 4)
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
            log_step = log_step + accepted[:pilots] - _TARGET_ACCEPTANCE
        acceptance = acceptance / len(steps) if steps else torch.full_like(acceptance, torch.nan)
        return Forward(log_weights[pilots:], acceptance[pilots:], steps)

    def back(
        self,
        u: Tensor,
        steps: Sequence[Tensor],
        schedule: Sequence[float],
        num_leapfrog: int,
        bar: tqdm,
    ) -> Tensor:
        """Anneals chains back from u (B, n), drawn from the posterior; log weights (C, B)."""
        num_chains = len(self.u) - self.num_pilots
        leader = torch.arange(num_chains) % self.num_pilots
        state = self.at(u.expand(num_chains, *u.shape))
        log_weights = torch.zeros_like(state.log_p)
        for t in reversed(range(1, len(schedule))):
            bar.update()
            log_weights += (schedule[t] - schedule[t - 1]) * (state.log_p - state.log_q)
            if t > 1:
                step = steps[t - 2][leader]
                state, _ = self.move(state, schedule[t - 1], step, num_leapfrog)
        return log_weights

    def at(self, u: Tensor) -> _State:
        """Evaluates both densities at u (C, B, n)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_q, log_p = self.log_q(u), self.log_p(u)
            (grad_q,) = torch.autograd.grad(log_q.sum(), u)
            (grad_p,) = torch.autograd.grad(log_p.sum(), u)
        return _State(u.detach(), log_q.detach(), log_p.detach(), grad_q, grad_p)

    def move(
        self, state: _State, beta: float, step: Tensor, num_leapfrog: int
    ) -> tuple[_State, Tensor]:
        """Makes one HMC move of each chain with its step size (C, B), where u = S v.

        Returns the new state and the acceptance probabilities (C, B).
        """
        momentum, log_uniform = self._noise(len(state.u))
        step = step.unsqueeze(-1)
        first = momentum
        new, alive = state, torch.ones_like(state.log_p, dtype=torch.bool)
        for _ in range(num_leapfrog):
            momentum = momentum + step / 2 * self._transformed(new.gradient(beta), self.scale)
            u = new.u + step * self._transformed(momentum, self.scale.mT)
            # where a step is so long that u overflows, the chain stays, and is rejected below
            alive = alive & u.isfinite().all(-1)
            new = self.at(torch.where(alive.unsqueeze(-1), u, state.u))
            momentum = momentum + step / 2 * self._transformed(new.gradient(beta), self.scale)
        kinetic = (momentum.square() - first.square()).sum(-1) / 2
        log_ratio = new.log_density(beta) - state.log_density(beta) - kinetic
        log_ratio = log_ratio.masked_fill(~alive | log_ratio.isnan(), -torch.inf)
        return new.where(log_uniform < log_ratio, state), log_ratio.exp().clamp(max=1)

    def _noise(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Standard normal momenta (C, B, p) and log uniform numbers (C, B)."""
        shape = num_chains, self.u.shape[-1] + 1
        noise = [torch.randn(shape, generator=g, dtype=torch.float64) for g in self.generators]
        both = torch.stack(noise, dim=1).to(self.u.device)
        return both[..., :-1].to(self.u.dtype), torch.special.log_ndtr(both[..., -1])

    @staticmethod
    def _transformed(vectors: Tensor, matrix: Tensor) -> Tensor:
        """Row vectors (C, B, p) times the matrix (B, p, p) of their image."""
        return torch.einsum("cbi,bij->cbj", vectors, matrix)


class Start:
    """The start q0(u) of annealing: the prior of a density, or one distribution for each image.

    Arguments:
        density: The joint density of the images.
        parts: Distributions of batch shape (1,); by default, the start is the prior.
        is_latent: Whether they are distributions of u, and not of the value of the only site.
    """

    def __init__(
        self, density: JointDensity, parts: Sequence[Distribution] = (), is_latent: bool = True
    ) -> None:
        self.density, self.parts, self.is_latent = density, parts, is_latent
        self._log_prob = _joined(parts) if parts else density.log_prior

    @staticmethod
    def of(density: JointDensity, guide: Any, seed: int, indices: Sequence[int]) -> Start:
        """Returns the start from q(z|x) of a guide, or from the prior without a guide."""
        if guide is None:
            return Start(density)
        device, name = density.batch[0].device, name_of(guide)
        try:
            with seeded(image_seed(seed, indices[0], "posterior"), device), nonfinite_as_error():
                q: Any = find_posterior(guide, density.batch)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"posterior(x) of the guide {name}, for images {indices[0]} to {indices[-1]}: "
                f"{error}", images=indices,
            ) from error  # fmt: skip
        if q is None or (len(density.sites) > 1 and not isinstance(q, LatentPosterior)):
            raise ValueError(
                f"the guide {name} has no posterior(x) of the sites {list(density.sites)}: "
                "annealing needs its density q(z|x), or starts from the prior"
            )
        if q.batch_shape != (len(density),):
            raise ValueError(
                f"posterior(x) of the guide {name} has batch shape {tuple(q.batch_shape)}, "
                f"expected ({len(density)},), one distribution per image"
            )
        parts = split_gaussian(base_of(q))
        if not parts:
            for n, index in enumerate(indices):
                with seeded(image_seed(seed, index, "posterior"), device):
                    parts.append(find_posterior(guide, density[n : n + 1].batch))
        try:
            with seeded(0, device):
                parts[0].log_prob(parts[0].sample())
        except NotImplementedError:
            raise ValueError(
                f"the guide {name} has no density: its {type(q).__name__} has no log_prob"
            ) from None
        return Start(density, parts, density.is_plain or isinstance(q, LatentPosterior))

    def __getitem__(self, part: slice) -> Start:
        return Start(self.density[part], self.parts[part], self.is_latent)

    def sample(self, n: int, count: int) -> Tensor:
        """Returns draws of u of the n-th image, (count, 1, n)."""
        if not self.parts:
            return self.density[n : n + 1].sample_prior(count)
        z = self.parts[n].sample(torch.Size((count,)))
        if self.is_latent:
            return z
        (name,) = self.density.sites
        # further plates of the model have dimensions of size 1 here
        z = z.reshape(count, *[1] * self.density.structure.nesting, *z.shape[2:])
        return self.density[n : n + 1].unconstrain({name: z}, count).u

    def log_prob(self, u: Tensor) -> Tensor:
        """Returns log q0(u), (K, B)."""
        if self.is_latent:
            return self._log_prob(u)
        latents = self.density.constrain(u)
        ((_, site),) = latents.sites.items()
        event = site["value"].shape[site["value"].dim() - site["fn"].event_dim :]
        return self._log_prob(site["value"].reshape(*u.shape[:2], *event)) + latents.log_jacobian


def _gaussian_parts(q: Any) -> tuple[type[Distribution], str, Any] | None:
    """The class, the name of its scale, and the parameters of a Gaussian; None for others."""
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        return type(q.base_dist), "scale", q.base_dist
    return (type(q), "scale_tril", q) if isinstance(q, MultivariateNormal) else None


def _gaussian(kind: type[Distribution], name: str, loc: Tensor, scale: Tensor) -> Distribution:
    """A Gaussian with event shape (p,), without validation, which would refuse infinite z."""
    q: Any = cast(Any, kind)(loc, **{name: scale}, validate_args=False)
    return dist.Independent(q, 1, validate_args=False) if isinstance(q, Normal) else q


def split_gaussian(q: Distribution) -> list[Distribution]:
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
    starts = [_unvalidated(q) for q in starts]
    return lambda z: torch.cat(
        [q.log_prob(column) for q, column in zip(starts, z.split(1, dim=1), strict=True)], dim=1
    )


def _unvalidated(q: Any) -> Any:
    """A copy of a distribution without validation, which would refuse a step that is too long."""
    q = copy.copy(q)
    q._validate_args = False
    for name, part in vars(q).items():
        if isinstance(part, Distribution):
            setattr(q, name, _unvalidated(part))
    return q


def chains_with_pilots(num_chains: int) -> int:
    """Returns the number of chains including their pilots."""
    return num_chains + -(-num_chains // _CHAINS_PER_PILOT)
