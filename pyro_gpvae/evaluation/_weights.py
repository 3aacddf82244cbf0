r"""Log weights log p(x, z) - log q(z|x) from the traces of any model and guide."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import biject_to
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error, unvalidated
from pyro_gpvae.core._plates import (
    check_guide_sites,
    check_observes,
    hide_observations,
    in_plate,
    is_observation,
    is_sampled,
)
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Batch
from pyro_gpvae.model._local import (
    PARTICLES,
    Structure,
    agree,
    check_kinds,
    is_point,
    is_real,
    name_of,
    support_of,
    warn_of_loop,
)
from pyro_gpvae.model._points import FixedDraws, check_points
from pyro_gpvae.model.density import LatentPosterior, sample_posterior
from pyro_gpvae.model.guide import HasPosterior, posterior_of

_ENUMERATED = "_enumerate_dim"


class Weights:
    r"""Draws log weights of a model and a guide, :math:`\log p(x, z_i) - \log q(z_i|x)`, (K, B).

    Local latent sites that the guide samples are weighed. A site that it does not sample is summed
    out if the model marks it ``infer={"enumerate": "parallel"}``; otherwise it is drawn from its
    prior, which cancels. Global sites never enter the weights.

    If latent sites of the guide are points (``Delta``), functions of its auxiliary sites as in
    Pyro's autoguides, the density of these auxiliary sites enters, and the log_density of the
    points must be minus the log-Jacobian, see ``check_points`` of :mod:`pyro_gpvae.model._points`.
    Other auxiliary sites do not enter: p(x, z) / q(z|x, auxiliary) is unbiased.
    """

    def __init__(
        self, model: PyroProgram, guide: PyroProgram, batch: Batch, vectorized: bool | None = None
    ) -> None:
        self.model, self.guide, self.vectorized = model, guide, vectorized
        self.structure, sites = Structure.of(model, batch)
        check_observes(sites)
        self.latent = [name for name, site in sites.items() if not site["is_observed"]]
        marks = [sites[name]["infer"].get("enumerate") for name in self.latent]
        self.enumerates = "parallel" in marks
        self.guide_structure = self.structure
        if not isinstance(guide, HasPosterior):
            (plate, nesting), own = Structure.of(guide, batch)
            nesting = max(nesting, self.structure.nesting)
            self.structure = self.structure._replace(nesting=nesting)
            self.guide_structure = Structure(plate, nesting)
            if any(is_point(site["fn"]) for site in own.values()):
                # what is not finite is reported by the weights, with its images
                with seeded(0, batch[0].device), suppress(NonFiniteError):
                    p, q = self._traces(hide_observations(guide), batch)
                    check_points(guide, batch, q, p, plate)

    def draw(
        self,
        batch: Batch,
        num_samples: int,
        chunk_size: int,
        done: Callable[[int], object] = lambda count: None,
    ) -> Tensor:
        """Returns log weights (K, B) of a batch, at most so many latent vectors at once.

        ``done`` is called with the number of weights after each chunk.
        """
        with nonfinite_as_error():
            guide = self._proposal(batch)
        size = max(1, chunk_size // len(batch[0]))
        counts = [min(size, num_samples - k) for k in range(0, num_samples, size)]
        parts = [self._first(guide, batch, counts[0])]
        done(parts[0].numel())
        with unvalidated():  # the programs have been checked; log weights are checked at the end
            for count in counts[1:]:
                parts.append(self._weights(guide, batch, count))
                done(parts[-1].numel())
        return torch.cat(parts)

    def _proposal(self, batch: Batch) -> PyroProgram:
        """The guide, or a program that samples from its q(z|x), which is computed once."""
        q = posterior_of(self.guide, *batch)
        if q is None:
            return hide_observations(self.guide)
        if not isinstance(q, LatentPosterior) and len({*self.latent} - {"z"}) > 1:
            raise ValueError(
                f"posterior(x) of the guide {name_of(self.guide)} is the distribution of one site, "
                f"and the model has {self.latent}: write a guide that samples them all"
            )
        name = "z" if "z" in self.latent else self.latent[0]
        return lambda *batch: sample_posterior(q, len(batch[0]), self.structure.plate, name)

    def _first(self, guide: PyroProgram, batch: Batch, count: int) -> Tensor:
        """Weights that are compared with the weight of a single draw at the first call."""
        if self.vectorized is not None:
            return self._weights(guide, batch, count)
        self.vectorized = True
        try:
            traces = self._traces(guide, batch, count)
            weights = self._weigh(*traces, (count, len(batch[0])))
            p, q = map(_last_draws, traces)
            with unvalidated():
                single = self._weigh(*self._traces(guide, batch, None, (p, q)), (len(batch[0]),))
            if agree(single, weights[-1]):
                return weights
        except (LinAlgError, torch.cuda.OutOfMemoryError, _SupportError):
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            pass  # what is wrong in a loop as well is reported by the loop
        self.vectorized = False
        looped = self._weights(guide, batch, count)
        warn_of_loop(self.model, self.guide)
        return looped

    def _weights(self, guide: PyroProgram, batch: Batch, count: int) -> Tensor:
        if self.vectorized:
            return self._weigh(*self._traces(guide, batch, count), (count, len(batch[0])))
        shape = (len(batch[0]),)
        return torch.stack([self._weigh(*self._traces(guide, batch), shape) for _ in range(count)])

    def _traces(
        self,
        guide: PyroProgram,
        batch: Batch,
        count: int | None = None,
        fixed: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {}),
    ) -> tuple[Any, Any]:
        """Runs the guide, and the model with its local draws; ``fixed`` replaces draws of both."""

        def vectorized(program: PyroProgram) -> PyroProgram:
            def run(*batch: Tensor) -> None:
                with self.structure.particles(count):
                    program(*batch)

            return run

        with nonfinite_as_error(), FixedDraws(fixed[1]):
            q = poutine.trace(vectorized(guide)).get_trace(*batch)
        local = _local_part(q, self.guide_structure)
        check_guide_sites(local.nodes)
        model = vectorized(self.model)
        if self.enumerates:
            # replayed sites need their enumerated dimensions, so the replay comes after them
            unmarked: Any = {"enumerate": None}
            model = poutine.infer_config(model, lambda s: unmarked if s["name"] in local else {})
            dim = -1 - self.structure.nesting - (count is not None)
            model = poutine.enum(model, first_available_dim=dim)
        model = poutine.replay(model, trace=local)
        with nonfinite_as_error(), FixedDraws(fixed[0]):
            p = poutine.trace(model).get_trace(*batch)
        return p, q

    def _weigh(self, p: Any, q: Any, shape: tuple[int, ...]) -> Tensor:
        """Returns log p(x, z) - log q(z|x) of the traces of a model and a guide."""
        local_p = _local_part(p, self.structure)
        local_q = _local_part(q, self.guide_structure)
        depth = self.structure.nesting + len(shape) - 1
        if is_validation_enabled():
            check_model_guide_match(local_p, local_q, depth)
        _check_support(local_p, local_q)
        local_p.compute_log_prob()
        local_q.compute_log_prob()
        if is_validation_enabled() and not self.enumerates:
            for site in (*local_p.nodes.values(), *local_q.nodes.values()):
                check_site_shape(site, depth)
        sites = local_p.nodes
        latent = [name for name, site in sites.items() if not site["is_observed"]]
        proposed = [name for name in latent if name in local_q]
        unscored = {n for n in latent if n not in proposed and _ENUMERATED not in sites[n]["infer"]}
        scored = [site for name, site in sites.items() if name not in unscored]
        factors = [site for site in local_q.nodes.values() if is_observation(site)]
        proposals = [local_q.nodes[name] for name in proposed]
        log_q = self.structure.log_prob(proposals + factors, shape)
        points = [name for name in proposed if is_point(local_q.nodes[name]["fn"])]
        if points:
            log_q = log_q + self._log_auxiliary(p, q, points, shape)
        if any(_ENUMERATED in site["infer"] for site in scored):
            return self._sum_out(local_p, scored, shape) - log_q
        return self.structure.log_prob(scored, shape) - log_q

    def _log_auxiliary(self, p: Any, q: Any, points: list[str], shape: tuple[int, ...]) -> Tensor:
        """The log density of auxiliary sites, of which the sites ``points`` are functions."""
        auxiliary = {
            name: site
            for name, site in q.nodes.items()
            if is_sampled(site) and not site["is_observed"] and name not in p
            if site["mask"] is not False
        }
        numbers = {name: self._size(site, shape) for name, site in auxiliary.items()}
        needed = sum(self._size(p.nodes[name], shape) for name in points)
        what = f"the sites {points} of the guide {name_of(self.guide)} are points"
        if not numbers:
            raise ValueError(
                f"{what}, which have no density: log p(x) needs a guide with a density"
            )
        outside = [n for n, site in auxiliary.items() if not self.guide_structure.is_local(site)]
        if outside and shape[-1] > 1:
            raise ValueError(
                f"the guide {name_of(self.guide)} draws all {shape[-1]} members of the batch at "
                f"once, from its sites {outside}, so that they have no weights of their own: "
                "evaluate a batch of one member, or use make_guide("
                f'"instance:autoguide={name_of(self.guide)}", model), which fits it to each one'
            )
        if sum(numbers.values()) != needed:
            raise ValueError(
                f"{what} with {needed} numbers, and its auxiliary sites hold {numbers}: log q(z|x) "
                "is known only if one is a function of the other. Sample auxiliary sites that are "
                "none under poutine.mask(mask=False)"
            )
        q.compute_log_prob(lambda name, _: name in auxiliary)
        local = [site for site in auxiliary.values() if self.guide_structure.is_local(site)]
        log_q = self.structure.log_prob(local, shape)
        for site in map(auxiliary.__getitem__, outside):
            value = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            log_q = log_q + value.reshape(shape)
        return log_q

    def _size(self, site: Any, shape: tuple[int, ...]) -> int:
        """The number of unconstrained values of a site for one particle and member."""
        support, size = support_of(site["fn"]), site["value"].shape
        if not support.is_discrete:
            size = biject_to(support).inverse_shape(size)
        local = in_plate(site, self.structure.plate) or in_plate(site, self.guide_structure.plate)
        return size.numel() // math.prod(shape if local else shape[:-1])

    def _sum_out(self, trace: Any, sites: list[Any], shape: tuple[int, ...]) -> Tensor:
        """Sums p(x, z) over enumerated sites, by Pyro's message passing."""
        trace.pack_tensors()
        symbols = trace.plate_to_symbol
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site in sites:
            ordinal = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            parts = site["packed"]
            value = packed.scale_and_mask(parts["unscaled_log_prob"], mask=parts["mask"])
            factors.setdefault(ordinal, []).append(value)
        found = (site["infer"].get("_enumerate_symbol") for site in sites)
        axes = [symbols[name] for name in (PARTICLES, self.structure.plate) if name in symbols]
        ring = LogRing({}, dict(zip(axes, shape, strict=True)))
        total = contract_to_tensor(factors, {*found} - {None}, frozenset(axes), ring=ring)
        return total.permute(*map(total._pyro_dims.index, axes)).reshape(shape)


class _SupportError(ValueError):
    """The guide has drawn what the prior cannot."""


def _local_part(trace: Any, structure: Structure) -> Any:
    """A copy of a trace with its local sites only."""
    part = trace.copy()
    for name, site in trace.nodes.items():
        if not structure.is_local(site):
            part.remove_node(name)
    return part


def _last_draws(trace: Any) -> dict[str, Tensor]:
    """The values of the last particle, in the shapes of a run without particles.

    Points are left out, because rounding would give other values, and enumerated sites.
    """
    values = {}
    for name, site in trace.nodes.items():
        if not is_sampled(site) or site["is_observed"] or _ENUMERATED in site["infer"]:
            continue
        fn, value = site["fn"], site["value"]
        if is_point(fn):
            continue
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        if any(frame.name == PARTICLES for frame in frames):
            depth = max([0, *(-frame.dim for frame in frames if frame.name != PARTICLES)])
            value = value[-1]
            value = value.reshape(value.shape[value.dim() - fn.event_dim - depth :])
        values[name] = value
    return values


def _check_support(p: Any, q: Any) -> None:
    """Refuses draws that the prior cannot make, also where Pyro's validation is off."""
    check_kinds(q.nodes, p.nodes)
    for name, site in p.nodes.items():
        support = support_of(site["fn"])
        if site["is_observed"] or is_real(support):
            continue
        if not bool(support.check(site["value"]).all()):
            raise _SupportError(
                f"the guide's draws of {name!r} lie outside the support {support} of "
                f"the model's {type(site['fn']).__name__}: give both the same support"
            )
