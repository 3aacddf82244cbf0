r"""The data plate, which separates the sites of each member of a batch from global ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gpvae.core._errors import nonfinite_as_error
from pyro_gpvae.core._programs import HALF, autoguides_of

#: The name of the data plate in the programs of this library. Other programs may use another name.
DATA_PLATE = "data"


def is_sampled(site: Any) -> bool:
    """Returns whether a node of a trace is a sample statement, not the subsample of a plate."""
    return site["type"] == "sample" and not site_is_subsample(site)


def is_observation(site: Any) -> bool:
    """Returns whether a node of a trace is an observed sample statement, such as a factor."""
    # Pyro records deterministic values as observed
    is_deterministic = site["infer"].get("_deterministic") if is_sampled(site) else True
    return not is_deterministic and bool(site["is_observed"])


def in_plate(site: Any, plate: str) -> bool:
    """Returns whether a site of a trace lies in a plate of this name."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def check_observes(nodes: Mapping[str, Any]) -> None:
    """Raises ValueError unless a site is observed, such as a factor; deterministic ones are not."""
    if not any(map(is_observation, nodes.values())):
        latent = [name for name, site in nodes.items() if is_sampled(site)]
        raise ValueError(
            f"the model observes nothing; its sites are {latent}. Write "
            "pyro.sample(..., obs=x) inside the data plate"
        )


def data_plate(nodes: Mapping[str, Any], batch_size: int) -> str:
    """Returns the name of the data plate in the nodes of a trace.

    It is the plate at dimension -1 that has as many members as the batch, or no size. If there are
    several, it is the one named "data".

    Raises:
        ValueError: If a site is in half precision; if there is no such plate, or several of other
            names; if a plate around it may be the data plate; if the plate subsamples, because its
            sites would be scaled twice; if no latent site lies in it; or if an observed site lies
            in another plate at dimension -1.
    """
    sites = {name: site for name, site in nodes.items() if is_sampled(site)}
    for name, site in sites.items():
        if getattr(site["value"], "dtype", None) in HALF:
            raise ValueError(
                f"the site {name!r} is {site['value'].dtype}, in which log densities are wrong by "
                "whole nats: call float() on the parameters of its distribution"
            )
    stacks = [site["cond_indep_stack"] for site in sites.values()]
    last = {frame.name: frame for stack in stacks for frame in stack if frame.dim == -1}
    for frame in last.values():
        if frame.size == batch_size != frame.full_size != -1:
            raise ValueError(
                f"plate({frame.name!r}, {frame.full_size}) takes {frame.size} of its members, and "
                f"would be scaled twice: write plate({frame.name!r}, len(x))"
            )
    found = [name for name, frame in last.items() if frame.size in (batch_size, -1)]
    if DATA_PLATE in found:
        found = [DATA_PLATE]
    else:
        _check_outer_plates(stacks, batch_size)
    if len(found) != 1:
        what = f"the plates {found}" if found else "no plate"
        raise ValueError(
            f"{what} at dimension -1 can hold the {batch_size} members of the batch; the sites are "
            f"{sorted(sites)}. Write pyro.plate({DATA_PLATE!r}, len(x)) around what belongs to one "
            "member of the batch"
        )
    (plate,) = found
    latent = [name for name, site in sites.items() if not site["is_observed"]]
    if not any(in_plate(sites[name], plate) for name in latent):
        raise ValueError(
            f"no latent site lies in plate({plate!r}), and what belongs to one member of the batch "
            f"must be there; the latent sites are {latent}"
        )
    for name, site in sites.items():
        others = [frame.name for frame in site["cond_indep_stack"] if frame.dim == -1]
        if is_observation(site) and others and others != [plate]:
            raise ValueError(
                f"the observed site {name!r} lies in plate({others[0]!r}): what belongs to one "
                f"member of the batch must be in plate({plate!r})"
            )
    return plate


def _check_outer_plates(stacks: Sequence[Any], batch_size: int) -> None:
    """Raises ValueError if a plate around the plate at dimension -1 may be the data plate."""
    for stack in stacks:
        dims = [frame.dim for frame in stack]  # from the outermost
        around = stack[: dims.index(-1)] if -1 in dims else ()
        for frame in filter(lambda frame: frame.vectorized and frame.dim != -1, stack):
            if frame.name == DATA_PLATE or (frame in around and 1 < frame.size == batch_size):
                raise ValueError(
                    f"plate({frame.name!r}) with {frame.size} members is at dimension {frame.dim}: "
                    f"the data plate must have dim=-1, and must be named {DATA_PLATE!r} if a plate "
                    "around it has as many members as the batch"
                )


def hide_observations(guide: Any) -> Any:
    """Returns a guide without the observed sites of the model that a ``GuideMessenger`` runs."""
    is_messenger = isinstance(guide, GuideMessenger)
    return poutine.block(guide, hide_fn=is_observation) if is_messenger else guide


def check_guide_sites(nodes: Mapping[str, Any]) -> None:
    """Raises ValueError if a guide observes a value, which is no part of q; factors may be."""
    found = [
        name
        for name, site in nodes.items()
        if is_observation(site) and not isinstance(site["fn"], Unit) and site["mask"] is not False
    ]
    if found:
        raise ValueError(
            f"the guide observes {found}, whose density would be divided out of p(x, z): only the "
            "model may have obs="
        )


def check_separable(guide: Any, nodes: Mapping[str, Any], plate: str) -> None:
    """Raises ValueError if a guide cannot be trained on a part of the data.

    The density of an auxiliary site outside the data plate, from which local latents are drawn,
    belongs to all members of a batch, and has no right weight in a minibatch. Pyro's autoguides
    have parameters for each member of the batch that they have seen first.
    """
    sampled = [site for site in nodes.values() if is_sampled(site)]
    auxiliary = [s for s in sampled if s["infer"].get("is_auxiliary") and s["mask"] is not False]
    local = [site["name"] for site in sampled if in_plate(site, plate)]
    points = [s["name"] for s in sampled if isinstance(s["fn"], Delta) and s["name"] in local]
    why = "it is not amortised, and needs all data in one batch (batch_size = number of data)"
    if points and auxiliary and not any(site["name"] in local for site in auxiliary):
        raise ValueError(
            f"the guide draws {points} of all members of a batch from its site "
            f"{auxiliary[0]['name']!r} outside of plate({plate!r}): {why}"
        )
    for auto in autoguides_of(guide):
        if isinstance(auto, AutoMessenger):
            known = [] if plate in auto.amortized_plates else local
        else:
            known = getattr(auto.prototype_trace, "nodes", [])
        held = [name for name in local if name in known]
        if held:
            raise ValueError(
                f"{type(auto).__name__} has parameters for each member of a batch, for the sites "
                f"{held}: {why}"
            )


def nodes_of(program: Any, batch: Sequence[Tensor], **kwargs: Any) -> Mapping[str, Any]:
    """Runs a program once to look at its sites, and returns the nodes of its trace."""
    # validation would refuse draws of a diverged program, which others report better
    unchecked = pyro.validation_enabled(False)
    with poutine.block(), torch.no_grad(), unchecked, nonfinite_as_error():
        trace: Any = poutine.trace(program).get_trace(*batch, **kwargs)
    nodes: Mapping[str, Any] = trace.nodes
    return nodes


def find_data_plate(program: Any, batch: Sequence[Tensor], **kwargs: Any) -> str:
    """Runs a program once, and returns the name of its data plate, see :func:`data_plate`."""
    return data_plate(nodes_of(program, batch, **kwargs), len(batch[0]))
