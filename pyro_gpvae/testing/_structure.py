r"""Promises about structure: sites, state, and what a call leaves behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing import _kit
from pyro_gpvae.testing._kit import Finding, Kit, not_checked, sample, z_site


@torch.no_grad()
def check_copy(kit: Kit) -> Finding:
    try:
        kit.copy_given()
        kit.guide(kit.x)
    except Exception as error:
        broken = not hasattr(kit, "pristine")
        with suppress(Exception):  # what fails as given is reported by the next check
            copy.deepcopy(kit.given[1])(kit.given_x)
            broken = True
        if broken:
            seen = f"It raised {type(error).__name__}: {error}"
            return Finding(type(error).__name__, "no error", False, seen)
    return Finding(str(kit.x.dtype).removeprefix("torch."), "runs", True)


@torch.no_grad()
def check_sites(kit: Kit) -> Finding:
    model, guide = copy.deepcopy(kit.given)
    for x in (kit.given_x, kit.given_x[:1]):
        with pyro.validation_enabled(False):  # which would say less
            for problem in _problems(pair(model, guide), guide, x):
                return Finding("wrong", "z: (B, p)", False, f"For {len(x)} images, {problem}.")
    return Finding(f"z: {tuple(z_site(guide, kit.given_x)['value'].shape)}", "z: (B, p)", True)


def _problems(model: Any, guide: Any, x: Tensor) -> Iterator[str]:
    """Yields what is wrong, of which only the first may be asked for."""
    trace = poutine.trace(guide).get_trace(x)
    latents = set(trace.stochastic_nodes)
    if "z" not in latents:
        yield f'the guide has no sample site "z"; its sites are {sorted(latents)}'
    site = trace.nodes["z"]
    plates = {frame.name: frame for frame in site["cond_indep_stack"]}
    if set(plates) != {DATA_PLATE}:
        yield f'site "z" is in the plates {sorted(plates)}, expected {DATA_PLATE!r} alone'
    if (size := plates[DATA_PLATE].full_size) != len(x):
        yield f"the plate has size {size}; it must be the batch size, whatever N is"
    z, batch = site["value"], (len(x),)
    event = (getattr(model, "latent_dim", z.shape[-1]),)
    yield from _wrong(z.shape, batch + event, "z has shape")
    yield from _wrong(site["fn"].log_prob(z).shape, batch, "the log density of z has shape")
    wanted = set(poutine.trace(poutine.replay(model, trace=trace)).get_trace(x).stochastic_nodes)
    if missing := wanted - latents:
        yield f"the model's sites {sorted(missing)} are not sampled by the guide"
    extra = {name for name in latents if not trace.nodes[name]["infer"].get("is_auxiliary")}
    if extra := extra - wanted:
        yield (
            f"the model has no sites {sorted(extra)}, and Pyro would only warn: declare their "
            'priors in global_prior(), or mark them infer={"is_auxiliary": True}'
        )
    z = z_site(guide, x, 3)["value"]
    yield from _wrong(z.shape, (3, *batch, *event), "under a plate of 3 particles z has shape")
    if (q := posterior_of(guide, x)) is not None:
        yield from _wrong(q.batch_shape, batch, "the posterior has batch shape")
        yield from _wrong(q.event_shape, event, "the posterior has event shape")
        z = q.sample((3,))
        yield from _wrong(z.shape, (3, *batch, *event), "the posterior's sample((3,)) has shape")
        yield from _wrong(q.log_prob(z).shape, (3, *batch), "its log density has shape")


def _wrong(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> Iterator[str]:
    if shape != expected:
        yield f"{what} {tuple(shape)}, expected {expected}"


def check_finite(kit: Kit) -> Finding:
    model, guide = copy.deepcopy(kit.given)
    torch.manual_seed(kit.seed)
    with pyro.validation_enabled(False):  # which stops at the first
        weights = log_weights(model, guide, kit.given_x, 4)  # raises an error for NaN and +∞
    count = int((~weights.isfinite()).sum())
    seen = f"{count} of {weights.numel()} log weights are infinite."
    return Finding(f"{count} not finite", "0", count == 0, seen)


def check_seeded(kit: Kit) -> Finding:
    seen = "Two calls under one seed differ in {what}, by {gap:.1e}."
    return kit.all_equal(kit.rows(kit.guide, kit.x), kit.rows(kit.guide, kit.x), seen)


def check_memory(kit: Kit) -> Finding:
    model, used = kit.fresh()
    images = kit.other.clone()
    kit.rows(used, images)
    loss = _kit.guide_losses(model, used, images, 100)[0].sum()
    if loss.requires_grad:
        loss.backward()
    images.copy_(kit.x)  # the same tensor, other images
    new = kit.fresh()[1]
    seen = "After a call with other images the same guide gives another {what}, by {gap:.1e}."
    finding = kit.all_equal(kit.rows(used, images), kit.rows(new, kit.x), seen)
    if not finding.kept or not isinstance(used, nn.Module):
        return finding
    new = kit.fresh()[1]
    for guide in (used, new):
        _kit.disturb(guide, kit.seed + 7)
    seen = "After a change of parameters it gives another {what} than a new guide, by {gap:.1e}."
    finding = kit.all_equal(kit.rows(used, kit.x), kit.rows(new, kit.x), seen)
    torch.manual_seed(kit.seed)
    with torch.no_grad():
        q = posterior_of(new, kit.x)
        if not finding.kept or q is None:
            return finding
        first, _ = q.sample((3,)), q.sample((3,))
        # another distribution and another tensor, of which nothing can be cached
        expected = kit.log_density(new, kit.x, first.clone())
        scored = q.log_prob(first)
    seen = "Scored after another sample was drawn, a sample has another {what}, by {gap:.1e}."
    return kit.all_equal({"log density": scored}, {"log density": expected}, seen)


@torch.no_grad()
def check_image(kit: Kit) -> Finding:
    torch.manual_seed(kit.seed)
    z, _ = sample(kit.guide, kit.x, 3)
    log_q = kit.log_density(kit.guide, kit.x, z)
    gap = float((log_q - kit.log_density(kit.guide, kit.other, z)).abs().amax(0).min())
    return Finding(f"{gap:.1e}", "> 1e-09", gap > 1e-9, "Another image gives the same posterior.")


def check_save(kit: Kit) -> Finding:
    if not isinstance(kit.guide, nn.Module):
        return not_checked("the guide is not a module")
    buffer = io.BytesIO()
    torch.save(kit.guide.state_dict(), buffer)
    buffer.seek(0)
    other: Any = kit.fresh()[1] if kit.build is None else kit.make(kit.model)
    _kit.disturb(other, kit.seed + 3)
    other.load_state_dict(torch.load(buffer, weights_only=True, map_location=kit.x.device))
    seen = "A guide that loads the state dict gives another {what}, by {gap:.1e}."
    return kit.all_equal(kit.rows(other, kit.x), kit.rows(kit.guide, kit.x), seen)
