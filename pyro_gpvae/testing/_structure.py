r"""Promises about structure: the model alone, sites, state, and what a call leaves behind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_gpvae.core._plates import data_plate, is_sampled
from pyro_gpvae.data.batch import Batch, take
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing._gradients import Losses, without_gradient
from pyro_gpvae.testing._kit import (
    Finding,
    Kit,
    copied,
    disturb,
    guide_losses,
    in_float64,
    log_weights,
    module_of,
    not_checked,
    trainable,
)


def check_model(kit: Kit) -> Finding:
    model, batch = copied(kit.given[0]), kit.given_batch
    if (module := module_of(model)) is not None:
        module.eval()
    for part in (batch, take(batch, slice(1))):
        try:
            JointDensity(model, part, vectorized=True)
        except ValueError as error:
            return Finding("wrong", "runs", False, f"For {len(part[0])} members: {error}.")
    if module is not None:
        module.double()
        batch = in_float64(batch)
    named = trainable(model, "model")

    def losses(seed: int) -> Losses:
        torch.manual_seed(seed)
        return [(torch.as_tensor(poutine.trace(model).get_trace(*batch).log_prob_sum()), named)]

    lost = without_gradient(named, losses, kit.seed)
    names = ", ".join(lost)
    seen = f"The log joint density has no gradient, zero, NaN or an infinite one, for {names}."
    cause = "a parameter that the model does not use, or a detached tensor"
    return Finding(f"{len(named) - len(lost)} of {len(named)}", "all", not lost, seen, cause)


@torch.no_grad()
def check_copy(kit: Kit) -> Finding:
    try:
        kit.copy_given()
        kit.guide(*kit.batch)
    except Exception as error:
        broken = not hasattr(kit, "pristine")
        with suppress(Exception):  # what fails as given is reported by the next check
            copied(kit.given[1])(*kit.given_batch)
            broken = True
        if broken:
            seen = f"It raised {type(error).__name__}: {error}"
            return Finding(type(error).__name__, "no error", False, seen)
    return Finding(str(kit.dtype).removeprefix("torch."), "runs", True)


@torch.no_grad()
def check_sites(kit: Kit) -> Finding:
    model, guide = copied(kit.given)
    for batch in (kit.given_batch, take(kit.given_batch, slice(1))):
        with pyro.validation_enabled(False):  # which would say less
            for problem in _problems(kit, pair(model, guide), guide, batch):
                count = len(batch[0])
                return Finding("wrong", "as the model's", False, f"For {count} members, {problem}.")
    return Finding(", ".join(kit.sites), "as the model's", True)


def _problems(kit: Kit, model: Any, guide: Any, batch: Batch) -> Iterator[str]:
    """Yields what is wrong, of which only the first may be asked for."""
    size = len(batch[0])
    own, trace = kit.trace(model, batch), kit.trace(guide, batch)
    nodes, latents = trace.nodes, set(trace.stochastic_nodes)
    wanted = {n for n in own.stochastic_nodes if is_sampled(own.nodes[n])}
    if missing := wanted - latents:
        yield (
            f"the model's sites {sorted(missing)} are not sampled by the guide, whose sites are "
            f"{sorted(latents)}"
        )
    try:
        plate = data_plate(nodes, size)
    except ValueError as error:
        yield str(error)
    if plate != kit.structure.plate:
        yield f"the data plate is {plate!r} in the guide and {kit.structure.plate!r} in the model"
    auxiliary = {n for n in latents if nodes[n]["infer"].get("is_auxiliary")}
    if extra := {n for n in latents - auxiliary if is_sampled(nodes[n])} - wanted:
        yield (
            f"the model has no sites {sorted(extra)}, and Pyro would only warn: declare their "
            'priors in global_prior(), or mark them infer={"is_auxiliary": True}'
        )
    for name in kit.sites:
        here, there = nodes[name], own.nodes[name]
        yield from _wrong(here["value"].shape, there["value"].shape, f"{name} has shape")
        shape, expected = (site["fn"].log_prob(site["value"]).shape for site in (here, there))
        yield from _wrong(shape, expected, f"the log density of {name} has shape")
        yield from _unequal_weights(name, here, there)
    particles = kit.trace(guide, batch, 3).nodes
    for name in kit.sites:
        shape, fn = own.nodes[name]["value"].shape, own.nodes[name]["fn"]
        shape = (3,) + (1,) * (kit.structure.nesting + fn.event_dim - len(shape)) + shape
        what = f"under a plate of 3 particles {name} has shape"
        yield from _wrong(particles[name]["value"].shape, shape, what)
    if (q := posterior_of(guide, *batch)) is not None:
        if len(kit.sites) > 1:
            yield f"posterior(x) is a distribution of one site, the model has {sorted(kit.sites)}"
        (event,) = (tuple(own.nodes[name]["fn"].event_shape) for name in kit.sites)
        yield from _wrong(q.batch_shape, (size,), "the posterior has batch shape")
        yield from _wrong(q.event_shape, event, "the posterior has event shape")
        z = q.sample((3,))
        yield from _wrong(z.shape, (3, size, *event), "the posterior's sample((3,)) has shape")
        yield from _wrong(q.log_prob(z).shape, (3, size), "its log density has shape")


def _unequal_weights(name: str, here: Any, there: Any) -> Iterator[str]:
    """Yields why the densities of a site count differently in guide and model, or not at all."""
    scale, expected = (torch.as_tensor(s["scale"]).double() for s in (here, there))
    if not bool(torch.isclose(scale, expected).all()):
        yield (
            f"the site {name!r} has the scale {float(scale.max()):g} in the guide and "
            f"{float(expected.max()):g} in the model: put poutine.scale around both, or neither"
        )
    kept = [torch.as_tensor(True if s["mask"] is None else s["mask"]) for s in (here, there)]
    if not torch.equal(*torch.broadcast_tensors(*kept)) or not bool(kept[0].any()):
        where = ["guide"] * (not kept[0].all()) + ["model"] * (not kept[1].all())
        yield (
            f"the site {name!r} is masked in the {' and the '.join(where)}, so that its density"
            " does not count: remove poutine.mask, or mask the same members in both"
        )


def _wrong(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> Iterator[str]:
    if shape != expected:
        yield f"{what} {tuple(shape)}, expected {tuple(expected)}"


def check_finite(kit: Kit) -> Finding:
    model, guide = copied(kit.given)
    torch.manual_seed(kit.seed)
    with pyro.validation_enabled(False):  # which stops at the first
        # raises an error for NaN and +∞
        weights = log_weights(model, guide, kit.given_batch, 4)
    count = int((~weights.isfinite()).sum())
    seen = f"{count} of {weights.numel()} log weights are infinite."
    return Finding(f"{count} not finite", "0", count == 0, seen)


def check_seeded(kit: Kit) -> Finding:
    seen = "Two calls under one seed differ in {what}, by {gap:.1e}."
    return kit.all_equal(kit.rows(kit.guide, kit.batch), kit.rows(kit.guide, kit.batch), seen)


def check_memory(kit: Kit) -> Finding:
    model, used = kit.fresh()
    batch = tuple(tensor.clone() for tensor in kit.other)
    kit.rows(used, batch)
    loss = guide_losses(model, used, batch, 100)[0].sum()
    if loss.requires_grad:
        loss.backward()
    for tensor, value in zip(batch, kit.batch, strict=True):
        tensor.copy_(value)  # the same tensor, other members
    new = kit.fresh()[1]
    seen = "After a call with another batch the same guide gives another {what}, by {gap:.1e}."
    finding = kit.all_equal(kit.rows(used, batch), kit.rows(new, kit.batch), seen)
    if not finding.kept or module_of(used) is None:
        return finding
    new = kit.fresh()[1]
    for guide in (used, new):
        disturb(guide, kit.seed + 7)
    seen = "After a change of parameters it gives another {what} than a new guide, by {gap:.1e}."
    finding = kit.all_equal(kit.rows(used, kit.batch), kit.rows(new, kit.batch), seen)
    torch.manual_seed(kit.seed)
    with torch.no_grad():
        q = posterior_of(new, *kit.batch)
        if not finding.kept or q is None:
            return finding
        first, _ = q.sample((3,)), q.sample((3,))
        scored = q.log_prob(first)
        torch.manual_seed(kit.seed)
        # another distribution and another tensor, of which nothing can be cached
        again: Any = posterior_of(new, *kit.batch)
        expected = again.log_prob(first.clone())
    seen = "Scored after another sample was drawn, a sample has another {what}, by {gap:.1e}."
    return kit.all_equal({"log density": scored}, {"log density": expected}, seen)


def check_image(kit: Kit) -> Finding:
    rows = [kit.rows(kit.guide, batch) for batch in (kit.batch, kit.other)]
    here, there = (torch.cat([value.flatten(1) for value in row.values()], 1) for row in rows)
    gap = float((here - there).abs().amax(1).min())
    return Finding(f"{gap:.1e}", "> 1e-09", gap > 1e-9, "Another x gives the same posterior.")


def check_save(kit: Kit) -> Finding:
    if (module := module_of(kit.guide)) is None:
        return not_checked("the guide is not a module")
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other: Any = kit.fresh()[1] if kit.build is None else kit.build(kit.model)
    reloaded: Any = module_of(other)
    disturb(reloaded.to(kit.dtype).eval(), kit.seed + 3)
    state = torch.load(buffer, weights_only=True, map_location=kit.batch[0].device)
    reloaded.load_state_dict(state)
    seen = "A guide that loads the state dict gives another {what}, by {gap:.1e}."
    return kit.all_equal(kit.rows(other, kit.batch), kit.rows(kit.guide, kit.batch), seen)
