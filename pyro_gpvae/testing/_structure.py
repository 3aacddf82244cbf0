r"""Promises about structure: sites, gradients, state, and what a call leaves behind."""

from __future__ import annotations

import copy
import io
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing._kit import (
    Finding,
    Kit,
    disturb,
    guide_losses,
    not_checked,
    z_site,
)


@torch.no_grad()
def check_copy(kit: Kit) -> Finding:
    cause = (
        "A tensor of an earlier call that is kept in an attribute cannot be copied; a tensor "
        "made without dtype= does not follow module.double()."
    )
    guide = None
    try:
        kit.copy_given()
        guide = copy.deepcopy(kit.given[1])
        kit.guide(kit.x)
    except Exception as error:
        if guide is None or not _raises(guide, kit.given_x):
            account = f"It raised {type(error).__name__}: {error}\nLikely cause: {cause}"
            return Finding(type(error).__name__, "no error", False, account)
    return Finding(str(kit.x.dtype).removeprefix("torch."), "runs", True)


@torch.no_grad()
def check_sites(kit: Kit) -> Finding:
    problems: list[str] = []
    model, guide = copy.deepcopy(kit.given)
    model = pair(model, guide)
    for x in (kit.given_x, kit.given_x[:1]):
        with pyro.validation_enabled(False):  # which would say less
            problems += _site_problems(model, guide, x) or _posterior_problems(guide, x)
        if problems:
            return Finding("wrong", "z: (B, p)", False, f"For {len(x)} images, {problems[0]}.")
    return Finding(f"z: {tuple(z_site(guide, kit.given_x)['value'].shape)}", "z: (B, p)", True)


def _site_problems(model: Any, guide: Any, x: Tensor) -> list[str]:
    trace = poutine.trace(guide).get_trace(x)
    latents = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    if "z" not in latents:
        return [f'the guide has no sample site "z"; its sites are {sorted(latents)}']
    site = latents["z"]
    plates = {frame.name: frame for frame in site["cond_indep_stack"]}
    if set(plates) != {DATA_PLATE}:
        return [f'site "z" is in the plates {sorted(plates)}, expected {DATA_PLATE!r} alone']
    if (size := plates[DATA_PLATE].full_size) != len(x):
        return [f"the plate has size {size}; it must be the batch size, whatever N is"]
    expected = (len(x), getattr(model, "latent_dim", site["value"].shape[-1]))
    if site["value"].shape != expected:
        return [f"z has shape {tuple(site['value'].shape)}, expected {expected}"]
    if (shape := site["fn"].log_prob(site["value"]).shape) != expected[:1]:
        return [f"the log density of z has shape {tuple(shape)}, expected {expected[:1]}"]
    model_trace = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    wanted = {
        name
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    if missing := wanted - set(latents):
        return [f"the model's sites {sorted(missing)} are not sampled by the guide"]
    extra = {
        name
        for name, node in latents.items()
        if name not in wanted and not node["infer"].get("is_auxiliary")
    }
    if extra:
        return [
            f"the model has no sites {sorted(extra)}, and Pyro would only warn: declare their "
            'priors in global_prior(), or mark them infer={"is_auxiliary": True}'
        ]
    shape = z_site(guide, x, 3)["value"].shape
    if shape != (3, *expected):
        return [f"under a plate of 3 particles z has shape {tuple(shape)}"]
    return []


def _posterior_problems(guide: Any, x: Tensor) -> list[str]:
    if (q := posterior_of(guide, x)) is None:
        return []
    p = z_site(guide, x)["value"].shape[-1]
    z = q.sample((3,))
    for what, shape, expected in (
        ("batch shape", q.batch_shape, (len(x),)),
        ("event shape", q.event_shape, (p,)),
        ("sample((3,)) of shape", z.shape, (3, len(x), p)),
        ("log_prob of shape", q.log_prob(z).shape, (3, len(x))),
    ):
        if shape != expected:
            return [f"the posterior has {what} {tuple(shape)}, expected {expected}"]
    return []


def check_finite(kit: Kit) -> Finding:
    model, guide = copy.deepcopy(kit.given)
    torch.manual_seed(kit.seed)
    cause = (
        "\nLikely cause: a scale that over- or underflows, or a density of zero where it samples."
    )
    try:
        with pyro.validation_enabled(False):  # which stops at the first
            weights = log_weights(model, guide, kit.given_x, 4)
    except NonFiniteError as error:
        return Finding("not finite", "0", False, f"{error}.{cause}")
    count = int((~weights.isfinite()).sum())  # -∞ is left
    account = f"{count} of {weights.numel()} log weights are infinite.{cause}"
    return Finding(f"{count} not finite", "0", count == 0, account)


def check_seeded(kit: Kit) -> Finding:
    first, again = kit.rows(kit.guide, kit.x), kit.rows(kit.guide, kit.x)
    return kit.all_equal(
        first,
        again,
        "Two calls under one seed differ in {what}, by {gap:.1e}.\nLikely cause: noise from "
        "numpy, random or a generator of its own (use pyro.sample or torch), or state that a "
        "call leaves behind.",
    )


def check_memory(kit: Kit) -> Finding:
    model, used = kit.fresh()
    images = kit.other.clone()
    kit.rows(used, images)
    loss = guide_losses(model, used, images, 100)[0].sum()
    if loss.requires_grad:
        loss.backward()
    images.copy_(kit.x)  # the same tensor, other images
    image = kit.rows(used, images), kit.rows(kit.fresh()[1], kit.x)
    account = (
        "After a call with other images the same guide gives another {what}, by {gap:.1e}.\n"
        "Likely cause: a stale cache, of features or of a flow's last sample."
    )
    finding = kit.all_equal(*image, account)
    if not finding.kept or not isinstance(used, nn.Module):
        return finding
    new = kit.fresh()[1]
    for guide in (used, new):
        disturb(guide, kit.seed + 7)
    finding = kit.all_equal(
        kit.rows(used, kit.x),
        kit.rows(new, kit.x),
        "After a change of parameters it gives another {what} than a new guide with these "
        "parameters, by {gap:.1e}.\nLikely cause: a stale cache.",
    )
    with torch.no_grad():
        torch.manual_seed(kit.seed)
        q = posterior_of(new, kit.x)
        if not finding.kept or q is None:
            return finding
        first, _ = q.sample((3,)), q.sample((3,))
        # another distribution and another tensor, of which nothing can be cached
        expected = _log_density(kit, new, kit.x, first.clone())
    return kit.all_equal(
        {"log density": q.log_prob(first).detach().mT},
        {"log density": expected.mT},
        "Scored after another sample was drawn, a sample has another log density, by "
        "{gap:.1e}.\nLikely cause: a stale cache of a flow's last sample.",
    )


@torch.no_grad()
def check_image(kit: Kit) -> Finding:
    torch.manual_seed(kit.seed)
    z, _ = kit.draws(kit.guide, kit.x, 3)
    difference = (
        _log_density(kit, kit.guide, kit.x, z) - _log_density(kit, kit.guide, kit.other, z)
    ).abs()
    gap = float(difference.amax(0).min())
    account = (
        "Another image gives the same posterior.\nLikely cause: the context does not reach the "
        "distribution, or a cache of earlier images."
    )
    return Finding(f"{gap:.1e}", "> 1e-09", gap > 1e-9, account)


def check_save(kit: Kit) -> Finding:
    if not isinstance(kit.guide, nn.Module):
        return not_checked("the guide is not a module")
    buffer = io.BytesIO()
    torch.save(kit.guide.state_dict(), buffer)
    buffer.seek(0)
    other: Any = kit.fresh()[1] if kit.build is None else kit.make(kit.model, seed=2)
    disturb(other, kit.seed + 3)
    other.load_state_dict(torch.load(buffer, weights_only=True, map_location=kit.x.device))
    return kit.all_equal(
        kit.rows(other, kit.x),
        kit.rows(kit.guide, kit.x),
        "A guide that loads the state dict gives another {what}, by {gap:.1e}.\nLikely cause: a "
        "tensor, such as a random permutation, that is neither parameter nor buffer; or make= "
        "builds a guide with other options.",
    )


def _log_density(kit: Kit, guide: PyroProgram, x: Tensor, z: Tensor) -> Tensor:
    """Returns log q(z|x) (K, B) at given z (K, B, p), always under the same seed."""
    torch.manual_seed(kit.seed)
    q = posterior_of(guide, x)
    log_q: Tensor = (z_site(guide, x)["fn"] if q is None else q).log_prob(z)
    return log_q


def _raises(guide: PyroProgram, x: Tensor) -> bool:
    try:
        guide(x)
    except Exception:
        return True
    return False
