r"""The joint density of a Pyro program and a batch over its local continuous latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import biject_to, constraints

from pyro_gpvae.core._plates import check_observes
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Batch, take
from pyro_gpvae.model._local import (
    PARTICLES,
    Structure,
    agree,
    is_real,
    name_of,
    support_of,
    warn_of_loop,
)

__all__ = ["JointDensity", "LatentPosterior", "base_of", "sample_posterior"]


class LatentSite(NamedTuple):
    """The unconstrained value of a latent site of one member: its shape, and its place in u."""

    plates: Size
    event: Size
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.plates.numel() * self.event.numel()

    def read(self, u: Tensor, nesting: int) -> Tensor:
        """Returns the part of u (K, B, n) in the shape of the site, (K, ..., B, ...)."""
        lead = u.dim() - 2
        part = u[..., self.begin : self.end].reshape(*u.shape[:-1], *self.plates, *self.event)
        part = part.movedim(lead, lead + len(self.plates))
        missing = (1,) * (lead * (nesting - 1 - len(self.plates)))
        return part.reshape(*part.shape[:lead], *missing, *part.shape[lead:])

    def write(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns a value of the site as its part of u, of the shape (K, B) and its length."""
        lead = len(shape) - 1
        part = part.reshape(*shape[:lead], *self.plates, shape[-1], *self.event)
        return part.movedim(lead + len(self.plates), lead).reshape(*shape, self.end - self.begin)


class JointDensity:
    r"""The log density of a model and a batch for unconstrained latents u.

    .. math::
        \log p(x, u) = \log p(x, z) + \log \left|\det \frac{\partial z}{\partial u}\right|,
        \qquad z = T(u),

    where T is the bijection of each site's support (:func:`torch.distributions.biject_to`), and u
    holds the local latents of a member of the batch, one site after the other: it is z itself for
    a model with one real vector. Global sites are drawn and not scored.

    Arguments:
        model: A Pyro model, called as ``model(*batch)``.
        batch: Tensors with B members each.
        vectorized: Whether K values of u are evaluated at once, under a plate. By default this is
            tried, and a model that gives other numbers then is evaluated in a loop, with a warning.

    Attributes:
        sites: The place of each latent site in u, by name.
        dim: The length n of u.
        is_plain: Whether u is the value of the only latent site.

    Raises:
        ValueError: If the data plate has no latent or no observed site, a latent site is discrete,
            or the density is random.
    """

    def __init__(self, model: PyroProgram, batch: Batch, *, vectorized: bool | None = None) -> None:
        self.model, self.batch = model, batch
        self.structure, found = Structure.of(model, batch)
        check_observes(found)
        self.sites: dict[str, LatentSite] = {}
        self.dim, self.is_plain = 0, False
        for name, site in found.items():
            if site["is_observed"]:
                continue
            support = support_of(site["fn"])
            if support.is_discrete:
                raise ValueError(
                    f"the latent site {name!r} of the model {name_of(model)} is discrete, and this "
                    "needs a gradient: use log_evidence, or sum the site out in the model"
                )
            shape, depth = site["value"].shape, site["value"].dim() - site["fn"].event_dim
            event = Size(biject_to(support).inverse_shape(shape)[depth:])
            self.sites[name] = LatentSite(shape[: depth - 1], event, self.dim)
            self.dim = self.sites[name].end
            self.is_plain = is_real(support) and depth == len(event) == len(self.sites) == 1
            self.dtype = site["value"].dtype
        self.vectorized = self._check() if vectorized is None else vectorized

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitem__(self, index: Any) -> JointDensity:
        """Returns the density of some members of the batch, by a slice or their numbers."""
        return self.of(take(self.batch, index))

    def of(self, batch: Batch) -> JointDensity:
        """Returns the density of another batch, whose members have the same shapes."""
        other = copy.copy(self)
        other.batch = batch
        return other

    @property
    def origin(self) -> Tensor:
        """u = 0 of all members, (B, n)."""
        return self.batch[0].new_zeros((len(self), self.dim), dtype=self.dtype)

    def log_prob(self, u: Tensor) -> Tensor:
        """Returns log p(x, u), (K, B), for u (K, B, n)."""
        return self._each(lambda u: self._score(_Latents(self, u)), u)

    def log_prior(self, u: Tensor) -> Tensor:
        """Returns log p(u), (K, B), for u (K, B, n). It costs no run of the likelihood."""
        return self._each(lambda u: self._score(_Latents(self, u, stop=True)), u)

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p(x, u), (K, B), and its gradient in u, (K, B, n)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.log_prob(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient

    def curvature(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the gradient of log p(x, u), (B, n), and the absolute Hessian, (B, n, n).

        The absolute value of a matrix has the absolute eigenvalues: Newton steps with it climb
        wherever they start. Both are float64.
        """
        with torch.enable_grad():
            # row i of the Hessian is the gradient of entry i of the gradient at the i-th copy
            copies = u.detach().expand(self.dim, *u.shape).clone().requires_grad_()
            value = self.log_prob(copies).sum()
            (gradient,) = torch.autograd.grad(value, copies, create_graph=True)
            entries = gradient.diagonal(dim1=0, dim2=2).sum()
            (rows,) = torch.autograd.grad(entries, copies)
        hessian = rows.movedim(0, 1).double()
        finite = hessian.isfinite().all(-1).all(-1)[:, None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, hessian + hessian.mT, 0) / 2)
        values = values.abs()
        values = values.maximum(1e-8 * values.amax(-1, keepdim=True)).unsqueeze(-2)
        precision = torch.where(finite, (vectors * values) @ vectors.mT, torch.nan)
        return gradient[0].detach().double(), precision

    def sample_prior(self, count: int) -> Tensor:
        """Returns draws of u from the prior, (K, B, n)."""
        if self.vectorized:
            return self._run(_Latents(self, count=count, stop=True)).u
        return torch.stack([self._run(_Latents(self, stop=True)).u for _ in range(count)])

    def constrain(self, u: Tensor) -> _Latents:
        """Returns the sites of u, (B, n) or (K, B, n)."""
        return self._run(_Latents(self, u, stop=True))

    def unconstrain(self, values: Mapping[str, Tensor], count: int | None = None) -> _Latents:
        """Returns the sites of given values, and their u, of a run without or with K particles."""
        return self._run(_Latents(self, values=values, count=count, stop=True))

    def posterior(self, q: TorchDistribution) -> TorchDistribution:
        """Returns a distribution of u as a posterior of the model's latent sites."""
        return q if self.is_plain else LatentPosterior(q, self)

    def _each(self, function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        return function(u) if self.vectorized else torch.stack([function(row) for row in u])

    def _run(self, latents: _Latents) -> _Latents:
        """Runs the model with these latents; the local sites are in ``latents.trace``."""
        local = poutine.block(self.model, hide_fn=self.structure.is_global)
        # only draws need a plate; it would collide where a guide calls this within its particles
        count = latents.count if latents.draws else None
        # validation would refuse the infinities of a step that is about to be rejected
        with (
            poutine.block(), pyro.validation_enabled(False), suppress(_AllDrawn),
            self.structure.particles(count), poutine.trace() as tracer, latents,
        ):  # fmt: skip
            local(*self.batch)
        latents.trace = tracer.trace
        return latents

    def _score(self, latents: _Latents) -> Tensor:
        trace = self._run(latents).trace
        with pyro.validation_enabled(False):
            trace.compute_log_prob()
        local = filter(self.structure.is_local, trace.nodes.values())
        if latents.stops:  # observations before the last latent site have been run as well
            local = filter(lambda site: site["name"] in self.sites, local)
        return self.structure.log_prob(local, latents.shape) + latents.log_jacobian

    def _check(self) -> bool:
        """Whether K values at once give the numbers of single ones; refuses random densities."""
        with seeded(0, self.batch[0].device), torch.no_grad():
            u = torch.stack([self._run(_Latents(self, stop=True)).u for _ in range(2)])
            first, second, again = (self._score(_Latents(self, u[k])) for k in (0, 1, 1))
            if not agree(second, again):
                raise ValueError(
                    f"log p(x, z) of the model {name_of(self.model)} is random: its local sites "
                    "depend on a global latent site, or on numbers that are not drawn by "
                    "pyro.sample. Fix these values, for example by poutine.condition"
                )
            try:
                is_vectorized = agree(self._score(_Latents(self, u)), torch.stack([first, second]))
            except (RuntimeError, ValueError, IndexError, AssertionError):
                is_vectorized = False
        if not is_vectorized:
            warn_of_loop(self.model)
        return is_vectorized


class _Latents(Messenger):
    """Gives latent sites their values from u, or reads u off their values, given or drawn.

    Attributes:
        shape: (K, B), or (B,) without particles.
        u: The unconstrained values of all sites, (K, B, n) or (B, n).
        log_jacobian: log |det ∂z/∂u|, of the same shape without n.
        sites: The messages of the latent sites, with "log_jacobian".
    """

    def __init__(
        self,
        density: JointDensity,
        u: Tensor | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
        count: int | None = None,
        stop: bool = False,
    ) -> None:
        super().__init__()
        self.density, self._given, self._values, self.stops = density, u, values, stop
        self.count = len(u) if u is not None and u.dim() == 3 else count
        self.shape = (len(density),) if self.count is None else (self.count, len(density))
        self.draws = u is None and values is None
        self.log_jacobian: Tensor | float = 0.0
        self.sites: dict[str, Any] = {}
        self._parts: dict[str, Tensor] = {}
        self.trace: Any = None

    @property
    def u(self) -> Tensor:
        if self._given is not None:
            return self._given
        parts = [place.write(self._parts[n], self.shape) for n, place in self.density.sites.items()]
        return torch.cat(parts, dim=-1)

    def _pyro_sample(self, msg: Any) -> None:
        place = self.density.sites.get(msg["name"])
        if place is None:
            return
        if self._given is not None:
            part = place.read(self._given, self.density.structure.nesting)
            msg["value"] = biject_to(support_of(msg["fn"]))(part)
            self._parts[msg["name"]] = part
        elif self._values is not None:
            msg["value"] = self._values[msg["name"]]
        msg["done"] = msg["value"] is not None

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.density.sites:
            return
        name, transform = msg["name"], biject_to(support_of(msg["fn"]))
        if name not in self._parts:
            self._parts[name] = transform.inv(msg["value"])
        msg["log_jacobian"] = None
        if not is_real(support_of(msg["fn"])):
            msg["log_jacobian"] = transform.log_abs_det_jacobian(self._parts[name], msg["value"])
            self.log_jacobian = self.log_jacobian + self.density.structure.per_member(
                msg["log_jacobian"], self.shape
            )
        self.sites[name] = msg
        if self.stops and len(self.sites) == len(self.density.sites):
            raise _AllDrawn


class _AllDrawn(BaseException):
    """Ends a run of a model after its last latent site."""


class LatentPosterior(TorchDistribution):
    """A distribution of u, (B, n), as the joint posterior of the latent sites of a model."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: TorchDistribution, density: JointDensity) -> None:
        self.base, self.density = base, density
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.base.mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentPosterior:
        return LatentPosterior(self.base.expand(batch_shape), self.density)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.rsample(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


def base_of(q: Any) -> Any:
    """Returns the distribution of u in a :class:`LatentPosterior`, and any other as it is."""
    return q.base if isinstance(q, LatentPosterior) else q


def sample_posterior(q: Any, size: int, plate: str = "data", name: str = "z") -> None:
    """Samples the latent site, or all sites of a :class:`LatentPosterior`, in the data plate."""
    plates = {plate: pyro.plate(plate, size, dim=-1)}
    with plates[plate]:
        if not isinstance(q, LatentPosterior):
            pyro.sample(name, q)
            return
        u = pyro.sample("_latents", q, infer={"is_auxiliary": True})
    # under a plate of particles there are dimensions of size 1 in the place of further plates
    found = q.density.constrain(u if u.dim() == 2 else u.reshape(len(u), *u.shape[-2:]))
    for site_name, site in found.sites.items():
        log_density = 0.0 if site["log_jacobian"] is None else -site["log_jacobian"]
        value = dist.Delta(site["value"], log_density, event_dim=site["fn"].event_dim)
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                if frame.name == PARTICLES or not frame.vectorized:
                    continue
                if frame.name not in plates:
                    plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                stack.enter_context(plates[frame.name])
            pyro.sample(site_name, value)
