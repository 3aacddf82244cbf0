r"""The local sites of a Pyro program: those of each member of a batch, in the data plate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import (
    Delta,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    MixtureSameFamily,
    SineBivariateVonMises,
    VonMises,
)
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints

from pyro_gpvae.core._plates import (
    DATA_PLATE,
    data_plate,
    in_plate,
    is_sampled,
    nodes_of,
)
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import Batch

#: The name of the plate of K particles.
PARTICLES = "_particles"


class Structure(NamedTuple):
    """The data plate of a program, and the number of dimensions that all its plates take."""

    plate: str
    nesting: int

    @staticmethod
    def of(program: PyroProgram, batch: Batch) -> tuple[Structure, dict[str, Any]]:
        """Runs a program once, and returns its structure and its local sites by name.

        Raises:
            ValueError: If it has sample statements, but no data plate.
        """
        with seeded(0, batch[0].device):
            nodes = nodes_of(program, batch)
        sampled = [site for site in nodes.values() if is_sampled(site)]
        plate = data_plate(nodes, len(batch[0])) if sampled else DATA_PLATE
        frames = [frame for site in sampled for frame in site["cond_indep_stack"]]
        depth = max([1, *(-frame.dim for frame in frames if frame.vectorized)])
        structure = Structure(plate, depth)
        return structure, {name: s for name, s in nodes.items() if structure.is_local(s)}

    def is_local(self, site: Any) -> bool:
        """Returns whether a node of a trace is a sample statement in the data plate."""
        return is_sampled(site) and in_plate(site, self.plate)

    def is_global(self, site: Any) -> bool:
        """Returns whether a node of a trace is a sample statement outside the data plate."""
        return is_sampled(site) and not in_plate(site, self.plate)

    def particles(self, count: int | None) -> AbstractContextManager[Any]:
        """Returns a plate of K particles around all other plates; no plate for None."""
        if count is None:
            return nullcontext()
        return pyro.plate(PARTICLES, count, dim=-1 - self.nesting)

    def per_member(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Sums over the plates inside the data plate: (K, ..., B) to (K, B), or (B,)."""
        inner = [dim for dim in range(-self.nesting, -1) if -dim <= value.dim()]
        return (value.sum(inner) if inner else value).expand(shape)

    def log_prob(self, sites: Iterable[Any], shape: tuple[int, ...]) -> Tensor:
        """Sums log densities of local sites per member, with masks, without scales."""
        terms = [
            self.per_member(scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]), shape)
            for site in sites
        ]
        return torch.stack(terms).sum(0) if terms else torch.zeros(shape)


class _ZukoFlow(ZukoToPyro):
    """Zuko's distributions in Pyro, with draws and a support: the densities of real vectors."""

    support = constraints.independent(constraints.real, 1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        draws: Tensor = self.dist.rsample(torch.Size(sample_shape))
        return draws

    def expand(self, *args: Any, **kwargs: Any) -> Any:
        return _ZukoFlow(self.dist.expand(*args, **kwargs))


def complete(fn: Any) -> Any:
    """Returns a distribution of ``pyro.contrib.zuko`` with draws and a support, others as is."""
    return _ZukoFlow(fn.dist) if type(fn) is ZukoToPyro else fn


def support_of(fn: Any) -> Any:
    """Returns the support of a distribution, with a bijection to the real numbers where one exists.

    The densities of angles are periodic, and are densities of one turn, although their support is
    called real. A mixture has the support of its components.
    """
    if isinstance(fn, VonMises):
        return constraints.interval(-math.pi, math.pi)
    if isinstance(fn, SineBivariateVonMises):
        return constraints.independent(constraints.interval(-math.pi, math.pi), 1)
    if isinstance(fn, MixtureSameFamily):
        return support_of(fn.component_distribution)
    if isinstance(fn, Independent):
        return constraints.independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution | ExpandedDistribution):
        return support_of(fn.base_dist)
    return complete(fn).support


def is_real(support: Any) -> bool:
    """Returns whether a support is the real numbers, or real vectors."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def is_point(fn: Any) -> bool:
    """Returns whether a distribution is a point, also inside others."""
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def check_kinds(guide_nodes: Mapping[str, Any], model_nodes: Mapping[str, Any]) -> None:
    """Raises ValueError if a site is discrete in one of two traces and continuous in the other."""
    for name, site in guide_nodes.items():
        other = model_nodes.get(name)
        if not is_sampled(site) or other is None or is_point(site["fn"]):
            continue
        try:
            drawn, prior = (support_of(s["fn"]) for s in (site, other))
        except NotImplementedError:  # a distribution of the user, without a support
            continue
        if drawn.is_discrete != prior.is_discrete:
            kinds = ["discrete" if s.is_discrete else "continuous" for s in (drawn, prior)]
            raise ValueError(
                f"the guide draws {name!r} from a {kinds[0]} distribution, and the model from a "
                f"{kinds[1]} one, so that p(x, z) / q(z|x) is no ratio of densities: give both "
                "the same support"
            )


def agree(a: Tensor, b: Tensor) -> bool:
    """Returns whether log densities are equal up to rounding errors."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    size = b.abs().masked_fill(~b.isfinite(), 0).max()
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(size), equal_nan=True)


def name_of(program: Any) -> str:
    """Returns the name of a function, or of the class of an object."""
    return str(getattr(program, "__name__", type(program).__name__))


def warn_of_loop(*programs: PyroProgram) -> None:
    """Warns that particles are evaluated one by one."""
    names = " or ".join(map(name_of, programs))
    warnings.warn(
        f"{names} gives other numbers, or fails, where several samples are evaluated at once, so "
        "they are evaluated one after the other, which is slow. Count dimensions from the right, "
        "as in softmax(dim=-1), to avoid this",
        stacklevel=2,
    )
