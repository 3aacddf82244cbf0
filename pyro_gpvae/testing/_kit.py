r"""What the promises are checked with: disturbed copies, draws and findings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_gpvae.core._programs import PyroProgram, modules_of
from pyro_gpvae.data.batch import Batch, take
from pyro_gpvae.evaluation import importance
from pyro_gpvae.model._local import is_point
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.elbo import Block, PerImage
from pyro_gpvae.model.guide import HasBlocks, HasElbo, posterior_of

#: Builds a guide for another model.
Make = Callable[[Any], PyroProgram]

#: The probability with which a statistical check fails a correct guide.
FAILURE_RATE = 2e-5
#: The bound of an estimate in standard errors: |z| > 4 has probability 6e-5.
MAX_Z = 4.0
MAX_BATCH = 8  # members of the batch used, of those given
NUM_DRAWS = 4000  # draws for each member in statistical checks

#: A bug in a vectorised guide must show, so nothing falls back to a loop.
log_weights = partial(importance.log_weights, vectorized=True)


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


class Draws(NamedTuple):
    """Draws of the latent sites, of K particles or, without the dimension K, of a plain run.

    ``values`` are those of the sites, (K, ..., B, event); ``u`` are all of them as real numbers,
    (K, B, n), see :class:`JointDensity`; ``log_q`` is the log density of u, (K, B).
    """

    values: dict[str, Tensor]
    u: Tensor
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
        exact = self._is_exact()
        self.pristine = copied(self.given)
        for number, program in enumerate(self.pristine):
            if (module := module_of(program)) is not None:
                disturb(module.double() if exact else module, self.seed + number)
                module.eval()
        self.batch = in_float64(self.given_batch) if exact else self.given_batch
        self.model, self.guide = self.fresh()
        density = self.density(self.batch)
        self.structure, self.sites = density.structure, density.sites
        self.dtype = torch.float64 if exact else density.dtype
        self.tolerance = 1e-6 if self.dtype == torch.float64 else 1e-3
        self.other = take(self.batch, _others(self.batch))

    def _is_exact(self) -> bool:
        """Whether the guide is a module, which runs in float64, and the model can follow it."""
        if (guide := module_of(copied(self.given[1]))) is None:
            return False
        model = self.given[0]
        if module_of(model) is None:  # a function may use tensors of float32
            batch = in_float64(self.given_batch)
            trace = poutine.trace(guide.double()).get_trace(*batch)
            try:
                poutine.replay(copied(model), trace=trace)(*batch)
            except RuntimeError:
                return False
        return True

    def fresh(self) -> tuple[PyroProgram, PyroProgram]:
        """Returns model and guide as they were before any call."""
        return copied(self.pristine)

    def density(self, batch: Batch) -> JointDensity:
        return JointDensity(self.model, batch, vectorized=True)

    def trace(self, program: Any, batch: Batch, count: int | None = None) -> Any:
        """Returns a trace of a program, or under a plate of particles."""
        with self.structure.particles(count):
            return poutine.trace(program).get_trace(*batch)

    def draw(self, guide: Any, batch: Batch, count: int | None = None) -> Draws:
        """Returns the draws of a guide's trace, or under a plate of particles."""
        trace = self.trace(guide, batch, count)
        values = {name: trace.nodes[name]["value"] for name in self.sites}
        shape = (len(batch[0]),) if count is None else (count, len(batch[0]))
        return self.draws_of(batch, values, self.log_q_of(trace, shape))

    def sample(self, guide: Any, batch: Batch, count: int, q: Any = None) -> Draws:
        """Returns draws as evaluation makes them: from q(z|x) if there is one."""
        q = posterior_of(guide, *batch) if q is None else q
        if q is None:
            return self.draw(guide, batch, count)
        value = q.sample((count,))
        return self.draws_of(batch, {next(iter(self.sites)): value}, q.log_prob(value))

    def draws_of(self, batch: Batch, values: dict[str, Tensor], log_q: Tensor) -> Draws:
        """Returns draws from the values of the latent sites, and their log density."""
        count = len(log_q) if log_q.dim() == 2 else None
        latents = self.density(batch).unconstrain(values, count)
        return Draws(values, latents.u, log_q + latents.log_jacobian)

    def log_q_of(self, trace: Any, shape: tuple[int, ...]) -> Tensor:
        """Returns the log density of the latent sites in a guide's trace.

        Auxiliary sites count where the latent sites are a function of them.
        """
        points = any(is_point(trace.nodes[name]["fn"]) for name in self.sites)
        local = {n: s for n, s in trace.nodes.items() if self.structure.is_local(s)}
        counted = [name for name in local if name in self.sites or points]
        trace.compute_log_prob(lambda name, _: name in counted)
        return self.structure.log_prob([local[name] for name in counted], shape)

    def log_density(self, guide: Any, batch: Batch, u: Tensor, q: Any = None) -> Tensor:
        """Returns the log density (K, B) at u, by q(z|x) or by traces given these values."""
        latents = self.density(batch).constrain(u)
        values = {name: site["value"] for name, site in latents.sites.items()}
        if q is not None:
            log_q = q.log_prob(*values.values())
        else:
            trace = self.trace(poutine.condition(guide, data=values), batch, len(u))
            log_q = self.log_q_of(trace, u.shape[:2])
        return log_q + latents.log_jacobian

    @torch.no_grad()
    def rows(self, guide: Any, batch: Batch) -> dict[str, Tensor]:
        """Returns what a guide gives under the seed: tensors with a row for each member."""
        torch.manual_seed(self.seed)
        one = self.draw(guide, batch)
        rows = {"z": one.u, "its log density": one.log_q.unsqueeze(-1)}
        torch.manual_seed(self.seed)
        if (q := posterior_of(guide, *batch)) is not None:
            rows["1 sample"] = q.sample()
        draws = self.sample(guide, batch, 3, q)
        return rows | {"3 samples": draws.u.transpose(0, 1), "their log density": draws.log_q.mT}

    def all_equal(self, a: dict[str, Tensor], b: dict[str, Tensor], seen: str) -> Finding:
        gaps = {what: largest_gap(a[what], b[what]) for what in a}
        what, gap = max(gaps.items(), key=lambda item: item[1])
        return within(gap, self.tolerance, seen.replace("{what}", what))


def copied(programs: Any) -> Any:
    """Returns a deep copy of a program, or of several; copies of a PyroModule own their values."""
    found = copy.deepcopy(programs)
    for program in found if isinstance(found, tuple) else (found,):
        for outermost in modules_of(program).values():
            for module in outermost.modules():
                context = getattr(module, "_pyro_context", None)
                # a PyroModule that was built without module_local_params has no place for them
                if context is not None and not hasattr(context, "param_state"):
                    context.param_state = {"params": {}, "constraints": {}}
    return found


def module_of(program: Any) -> nn.Module | None:
    """Returns the module that a program is, or whose method it is, if any."""
    return modules_of(program).get("")


def in_float64(batch: Batch) -> Batch:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)


def _others(batch: Batch) -> Tensor:
    """Returns for each member the index of another one that differs from it."""
    size = len(batch[0])
    others = []
    for i in range(size):
        cyclic = ((i + step) % size for step in range(1, size))
        others.append(next(j for j in cyclic if any(not torch.equal(t[i], t[j]) for t in batch)))
    return torch.tensor(others, device=batch[0].device)


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


def trainable(program: Any, role: str) -> dict[str, Tensor]:
    """Returns the trainable parameters of a program by name, with its role before each name."""
    module = module_of(program)
    named = module.named_parameters() if module is not None else ()
    return {f"{role}.{name}": parameter for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def disturb(program: Any, seed: int) -> None:
    """Adds noise of about a tenth of the usual initial values to trainable parameters."""
    torch.manual_seed(seed)
    for parameter in trainable(program, "").values():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.add_(torch.randn_like(parameter), alpha=0.05 / math.sqrt(fan_in))


def largest_gap(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference, relative where values are larger than one."""
    gap = float(((a - b).abs() / (1 + b.abs())).max())
    return math.inf if math.isnan(gap) else gap
