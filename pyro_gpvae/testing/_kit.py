r"""What the promises are checked with: disturbed copies, draws, gradients and figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_gpvae.core._plates import data_plate, in_plate, is_sampled
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.data.batch import Batch, take
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.elbo import Block, PerImage
from pyro_gpvae.model.guide import HasBlocks, HasElbo, HasPosterior

#: Builds a guide for another model.
Make = Callable[[Any], PyroProgram]

#: The probability with which a statistical check fails a correct guide.
FAILURE_RATE = 2e-5
#: The bound of an estimate in standard errors: |z| > 4 has probability 6e-5.
MAX_Z = 4.0
MAX_BATCH = 8  # members of the batch used, of those given
NUM_DRAWS = 4000  # draws for each member in statistical checks


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


class Draws(NamedTuple):
    """Draws of the latent sites of K particles.

    ``values`` are those of the sites, (K, ..., B, event); ``z`` holds all of them as real numbers,
    (K, B, n), by ``biject_to`` of their supports; ``log_q`` is the log density of z, (K, B).
    """

    values: dict[str, Tensor]
    z: Tensor
    log_q: Tensor


@dataclass
class Kit:
    """The guide and the model under test as disturbed copies, and the batch."""

    given: tuple[PyroProgram, PyroProgram]  # model and guide
    given_batch: Batch
    build: Make | None
    seed: int

    def copy_given(self) -> None:
        """Sets ``model``, ``guide`` and ``batch``, and ``pristine``, which is only ever copied."""
        exact = module_of(self.given[1]) is not None
        self.pristine = copy.deepcopy(self.given)
        for number, program in enumerate(self.pristine):
            if (module := module_of(program)) is not None:
                disturb(module.double() if exact else module, self.seed + number)
                module.eval()
        self.batch = in_float64(self.given_batch) if exact else self.given_batch
        floats = [tensor for tensor in self.batch if tensor.is_floating_point()]
        exact = exact or any(tensor.dtype == torch.float64 for tensor in floats)
        self.dtype = torch.float64 if exact else torch.float32
        self.tolerance = 1e-6 if exact else 1e-3
        self.other = take(self.batch, _others(self.batch))
        self.model, self.guide = self.fresh()
        nodes: Any = poutine.trace(self.model).get_trace(*self.batch).nodes
        self.plate = data_plate(nodes, len(self.batch[0]))
        names = latent_sites(nodes, self.plate)
        self.sites: dict[str, Any] = {name: nodes[name]["fn"] for name in names}
        # dimensions of plates, before which particles are drawn
        stacks = [site["cond_indep_stack"] for site in nodes.values() if is_sampled(site)]
        self.nesting = max(-frame.dim for stack in stacks for frame in stack)

    def fresh(self) -> tuple[PyroProgram, PyroProgram]:
        """Returns model and guide as they were before any call."""
        return copy.deepcopy(self.pristine)

    def make(self, model: PyroProgram) -> Any:
        """Returns a new guide for a model, disturbed and in the precision of the kit."""
        assert self.build is not None
        torch.manual_seed(self.seed + 1)
        guide = self.build(model)
        if (module := module_of(guide)) is not None:
            disturb(module.to(self.dtype).eval(), self.seed)
        return guide

    def trace(self, program: Any, batch: Batch, count: int | None = None) -> Any:
        """Returns a trace of a program, or under a plate of particles."""
        name, dim = "num_particles_vectorized", -1 - self.nesting
        with pyro.plate(name, count, dim=dim) if count else nullcontext():
            return poutine.trace(program).get_trace(*batch)

    def draw(self, guide: Any, batch: Batch, count: int | None = None) -> Draws:
        """Returns the draws of a guide's trace, or under a plate of particles."""
        nodes = self.trace(guide, batch, count).nodes
        values = {name: nodes[name]["value"] for name in self.sites}
        log_q = self.log_q_of(nodes, (count or 1, len(batch[0])))
        return self.unconstrained(values if count else _unsqueezed(values), log_q)

    def log_q_of(self, nodes: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
        """Returns the log density (K, B) of the latent sites in the nodes of a guide's trace.

        Auxiliary sites count where the latent sites are a function of them.
        """
        points = any(_is_point(nodes[name]["fn"]) for name in self.sites)
        count, size = shape
        total = torch.zeros(shape).to(self.batch[0].device, self.dtype)
        for name, site in nodes.items():
            counts = name in self.sites or (points and is_sampled(site))
            if counts and in_plate(site, self.plate):
                log_q = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
                total = total + log_q.reshape(count, -1, size).sum(1)
        return total

    def unconstrained(self, values: dict[str, Tensor], log_q: Tensor) -> Draws:
        """Returns draws from the values of the latent sites, and their log density (K, B)."""
        (count, size), parts = log_q.shape, []
        for name, fn in self.sites.items():
            value, transform = values[name], _transform(fn)
            batch_dim = value.dim() - fn.event_dim
            u = transform.inv(value)
            log_det = transform.log_abs_det_jacobian(u, value)
            log_det = sum_rightmost(log_det, log_det.dim() - batch_dim)
            log_q = log_q + log_det.reshape(count, -1, size).sum(1)
            parts.append(u.movedim(batch_dim - 1, 1).reshape(count, size, -1).to(log_q.dtype))
        return Draws(values, torch.cat(parts, -1), log_q)

    def at(self, z: Tensor, like: Draws) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the values of the sites at z (K, B, n), and the log-Jacobian of z there (K, B).

        The shapes are those of other draws of the same batch.
        """
        values, start = {}, 0
        for name, fn in self.sites.items():
            transform = _transform(fn)
            u = transform.inv(like.values[name])
            batch_dim = u.dim() - fn.event_dim
            shape = u.movedim(batch_dim - 1, 1).shape[2:]
            part = z[..., start : (start := start + shape.numel())]
            part = part.reshape(*part.shape[:2], *shape).movedim(1, batch_dim - 1)
            values[name] = transform(part)
        return values, self.unconstrained(values, torch.zeros_like(z[..., 0])).log_q

    def log_density(
        self, guide: Any, batch: Batch, values: dict[str, Tensor], q: Any = None
    ) -> Tensor:
        """Returns log q (K, B) at given values, by q(z|x) or by traces given these values."""
        if q is not None:
            log_q: Tensor = q.log_prob(*values.values())
            return log_q
        count = len(next(iter(values.values())))
        nodes = self.trace(poutine.condition(guide, data=values), batch, count).nodes
        return self.log_q_of(nodes, (count, len(batch[0])))

    def unscored(self, guide: Any) -> str:
        """Returns why a guide has no density at given values; an empty text if it has one."""
        if isinstance(guide, HasPosterior):
            return ""
        nodes = self.trace(guide, self.batch).nodes
        if any(_is_point(nodes[name]["fn"]) for name in self.sites):
            return "latent sites are functions of auxiliary ones, which have the density"
        discrete = [name for name, fn in self.sites.items() if fn.support.is_discrete]
        return f"the sites {discrete} are discrete" if discrete else ""

    @torch.no_grad()
    def sample(self, guide: Any, batch: Batch, count: int, q: Any = None) -> Draws:
        """Returns draws as evaluation makes them: from q(z|x) if there is one."""
        q = posterior(guide, batch) if q is None else q
        if q is None:
            return self.draw(guide, batch, count)
        value = q.sample((count,))
        return self.unconstrained({next(iter(self.sites)): value}, q.log_prob(value))

    @torch.no_grad()
    def rows(self, guide: Any, batch: Batch) -> dict[str, Tensor]:
        """Returns what a guide gives under the seed: tensors with a row for each member."""
        torch.manual_seed(self.seed)
        single = self.draw(guide, batch)
        rows = {"z": single.z[0], "its log density": single.log_q.mT}
        torch.manual_seed(self.seed)
        if (q := posterior(guide, batch)) is not None:
            rows["1 sample"] = q.sample()
        draws = self.sample(guide, batch, 3, q)
        return rows | {"3 samples": draws.z.transpose(0, 1), "their log density": draws.log_q.mT}

    def all_equal(self, a: dict[str, Tensor], b: dict[str, Tensor], seen: str) -> Finding:
        gaps = {what: largest_gap(a[what], b[what]) for what in a}
        what, gap = max(gaps.items(), key=lambda item: item[1])
        return within(gap, self.tolerance, seen.replace("{what}", what))


def module_of(program: Any) -> nn.Module | None:
    """Returns the module that a program is, or whose method it is, if any."""
    owner = getattr(program, "__self__", program)
    return owner if isinstance(owner, nn.Module) else None


def posterior(guide: Any, batch: Batch) -> Any:
    """Returns q(z|x) of a guide, or None if the guide has no ``posterior``."""
    return guide.posterior(*batch) if isinstance(guide, HasPosterior) else None


def latent_sites(nodes: Mapping[str, Any], plate: str) -> list[str]:
    """Returns the names of the latent sites in the data plate, without auxiliary ones."""
    return [
        name
        for name, site in nodes.items()
        if is_sampled(site) and not site["is_observed"] and in_plate(site, plate)
        if not site["infer"].get("is_auxiliary")
    ]


def in_float64(batch: Batch) -> Batch:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)


def data_of(batch: Batch) -> Any:
    """Returns a batch as users pass it: the tensor itself if there is one."""
    return batch if len(batch) > 1 else batch[0]


def doubled(batch: Batch) -> Batch:
    """Returns a batch in which every member is twice."""
    return tuple(torch.cat([tensor, tensor]) for tensor in batch)


def _others(batch: Batch) -> Tensor:
    """Returns for each member the index of another one that differs from it."""
    size = len(batch[0])
    others = []
    for i in range(size):
        cyclic = ((i + step) % size for step in range(1, size))
        differ = (j for j in cyclic if any(not torch.equal(t[i], t[j]) for t in batch))
        others.append(next(differ))
    return torch.tensor(others, device=batch[0].device)


def _is_point(fn: Any) -> bool:
    return isinstance(getattr(fn, "base_dist", fn), Delta)


def _unsqueezed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.unsqueeze(0) for name, value in values.items()}


def _transform(fn: Any) -> Any:
    return biject_to(constraints.real if fn.support.is_discrete else fn.support)


def guide_losses(
    model: Any, guide: Any, batch: Batch, num_images: int
) -> tuple[Tensor, list[Block]]:
    """Returns the loss of each objective; a block without parameters trains all of them."""
    if isinstance(guide, HasBlocks):
        blocks = list(guide.blocks(model))
    else:
        blocks = [Block(guide.elbo() if isinstance(guide, HasElbo) else Trace_ELBO(), ())]
    losses = []
    for block in blocks:
        program, q = block.model or model, block.guide or guide
        programs = PerImage(pair(program, q), num_images), PerImage(q, num_images)
        losses.append(torch.as_tensor(block.elbo.differentiable_loss(*programs, *batch)))
    return torch.stack(losses), blocks


def trainable(program: Any) -> dict[str, Tensor]:
    module = module_of(program)
    named = module.named_parameters() if module is not None else ()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def disturb(program: Any, seed: int) -> None:
    """Adds noise of about a tenth of the usual initial values to trainable parameters."""
    torch.manual_seed(seed)
    for parameter in trainable(program).values():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.add_(torch.randn_like(parameter), alpha=0.05 / math.sqrt(fan_in))


def largest_gap(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap
