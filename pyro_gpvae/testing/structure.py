r"""Promises about programs: sites, randomness, gradients, scales, files."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._plates import DATA_PLATE
from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.testing.kit import Kit, all_equal, log_density
from pyro_gpvae.testing.tools import (
    ConstantNoise,
    Finding,
    disturb,
    guide_losses,
    largest_gap,
    raises_error,
    within,
    z_site,
)

__all__ = [
    "check_copy",
    "check_finite",
    "check_gradient",
    "check_image",
    "check_memory",
    "check_pathwise",
    "check_save",
    "check_scale",
    "check_seeded",
    "check_sites",
]


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
        if guide is None or not raises_error(guide, kit.given_x):
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
    if not hasattr(guide, "posterior"):
        return []
    p = z_site(guide, x)["value"].shape[-1]
    q = guide.posterior(x)
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
    return all_equal(
        kit,
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
    finding = all_equal(kit, *image, account)
    if not finding.kept or not isinstance(used, nn.Module):
        return finding
    new = kit.fresh()[1]
    for guide in (used, new):
        disturb(guide, kit.seed + 7)
    finding = all_equal(
        kit,
        kit.rows(used, kit.x),
        kit.rows(new, kit.x),
        "After a change of parameters it gives another {what} than a new guide with these "
        "parameters, by {gap:.1e}.\nLikely cause: a stale cache.",
    )
    if not finding.kept or not hasattr(used, "posterior"):
        return finding
    with torch.no_grad():
        torch.manual_seed(kit.seed)
        q = new.posterior(kit.x)
        first, _ = q.sample((3,)), q.sample((3,))
        torch.manual_seed(kit.seed)
        # another distribution and another tensor: nothing can be remembered about them
        expected = new.posterior(kit.x).log_prob(first.clone())
    return all_equal(
        kit,
        {"log density": q.log_prob(first).detach().mT},
        {"log density": expected.mT},
        "Scored after another sample was drawn, a sample has another log density, by "
        "{gap:.1e}.\nLikely cause: a stale cache of a flow's last sample.",
    )


@torch.no_grad()
def check_image(kit: Kit) -> Finding:
    torch.manual_seed(kit.seed)
    z, _ = kit.draws(kit.guide, kit.x, 3)
    difference = (log_density(kit, kit.x, z) - log_density(kit, kit.other, z)).abs()
    gap = float(difference.amax(0).min())
    account = (
        "Another image gives the same posterior.\nLikely cause: the context does not reach the "
        "distribution, or a cache of earlier images."
    )
    return Finding(f"{gap:.1e}", "> 1e-09", gap > 1e-9, account)


def check_gradient(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    named = {
        f"{owner}.{name}": parameter
        for owner, program in (("guide", guide), ("model", model))
        if isinstance(program, nn.Module)
        for name, parameter in program.train().named_parameters()
        if parameter.requires_grad
    }
    if not named:
        return Finding("-", "-", None, "neither guide nor model has parameters in a module")
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for round_ in range(2):  # a draw may, by bad luck, leave one out
        torch.manual_seed(kit.seed + round_)
        losses, blocks = guide_losses(model, guide, kit.x, 100)
        for loss, block in zip(losses, blocks, strict=True):
            trained = {id(p) for p in block.parameters} if block.parameters else None
            names = [n for n, p in named.items() if trained is None or id(p) in trained]
            gradients = (
                torch.autograd.grad(
                    loss, [named[n] for n in names], allow_unused=True, retain_graph=True
                )
                if names and loss.requires_grad
                else ()
            )
            for name, gradient in zip(names, gradients, strict=False):
                if gradient is not None:
                    total[name] += gradient.abs()
    infinite = [name for name, value in total.items() if not bool(value.isfinite().all())]
    missing = [name for name, value in total.items() if not bool(value.any())]
    figure = f"{len(named) - len(infinite + missing)} of {len(named)}"
    account = (
        f"NaN or infinite gradient: {', '.join(infinite)}.\nLikely cause: a square root or norm "
        "at zero, or an overflow."
        if infinite
        else f"No gradient, or exactly zero: {', '.join(missing)}.\nLikely cause: the context "
        "does not reach the flow, a detached tensor, a layer that is never used, or a block that "
        "leaves it out. Parameters to be left alone need requires_grad_(False)."
    )
    return Finding(figure, "all", not infinite and not missing, account)


def check_pathwise(kit: Kit) -> Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    site = z_site(guide, kit.x)
    z, q = site["value"], site["fn"]
    if not getattr(q, "has_rsample", False):
        return Finding("-", "-", None, "z has no reparametrised samples (has_rsample)")
    named = dict(guide.named_parameters()) if isinstance(guide, nn.Module) else {}
    named = {name: p for name, p in named.items() if p.requires_grad}
    log_q = q.log_prob(z.detach()).sum()
    if not named or not log_q.requires_grad:
        return Finding("-", "-", None, "the density of z depends on no trainable parameter")
    density = torch.autograd.grad(log_q, list(named.values()), allow_unused=True, retain_graph=True)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    moved: Sequence[Tensor | None] = [None] * len(named)
    if z.requires_grad:
        direction = torch.randn_like(z)
        moved = torch.autograd.grad((direction * z).sum(), list(named.values()), allow_unused=True)
    lost = []
    for name, by_density, by_sample in zip(named, density, moved, strict=True):
        shaping = by_density is not None and by_density != 0
        still = shaping if by_sample is None else shaping & (by_sample == 0)
        if torch.is_tensor(still) and bool(still.any()):
            lost.append(f"guide.{name}")
    account = (
        f"Elements of {', '.join(lost)} shape the density, but z has no gradient with respect to "
        "them, although it claims reparametrised samples.\nLikely cause: the sample is detached "
        "(sample for rsample, detach, no_grad)."
    )
    return Finding(f"{len(lost)} detached", "0", not lost, account)


@torch.no_grad()
def check_scale(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    with ConstantNoise() as noise:
        few, _ = guide_losses(model, guide, kit.x, 1000)
        many, _ = guide_losses(model, guide, kit.x, 2000)
        twice, _ = guide_losses(model, guide, torch.cat([kit.x, kit.x]), 1000)
        expected = _global_divergences(guide, kit.x)
    if not noise.complete:
        return Finding("-", "-", None, "the guide draws noise that no constant can replace")
    if not (gap := largest_gap(twice, few)) <= kit.tolerance:
        account = (
            f"With every image twice in the batch the loss changes by {gap:.1e} (relative).\n"
            "Likely cause: a sum over the batch where its mean is due, or 1/B where 1/N is due (N "
            "is the number of training images)."
        )
        return within(gap, kit.tolerance, account)
    # the loss is local + KL / N: what does its dependence on N say about KL?
    found = float((few - many).max()) * 2000
    gap, nearest = min(((abs(found - kl) / (1 + abs(kl))), kl) for kl in expected)
    account = (
        f"loss(N = 1000) − loss(N = 2000) belongs to a global divergence of {found:.4g} nats, but "
        f"KL(q(W) ‖ p(W)) = {nearest:.4g}.\nLikely cause: a missing 1/N: global sites inside the "
        "plate, a divergence added to the terms of every image, or an objective that ignores "
        "the scale of the sites."
        if nearest
        else f"The guide has no global sites, but its loss depends on N, as by a divergence of "
        f"{found:.4g} nats.\nLikely cause: a term of each image outside the plate."
    )
    # KL / N is what is left of a loss of thousands of nats
    return within(gap, kit.tolerance, account)


def _global_divergences(guide: Any, x: Tensor) -> list[float]:
    """KL(q(W) ‖ p(W)) of the guide's global sites: the value, or its estimate by one draw."""
    priors = guide.global_prior() if hasattr(guide, "global_prior") else {}
    trace = poutine.trace(guide).get_trace(x)
    analytic, sampled = 0.0, 0.0
    for name, prior in priors.items():
        site = trace.nodes[name]
        sampled += float((site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])).sum())
        try:
            analytic += float(kl_divergence(site["fn"], prior).sum())
        except NotImplementedError:
            analytic = math.nan
    return [value for value in (analytic, sampled) if not math.isnan(value)]


def check_save(kit: Kit) -> Finding:
    if not isinstance(kit.guide, nn.Module):
        return Finding("-", "-", None, "the guide is not a module")
    buffer = io.BytesIO()
    torch.save(kit.guide.state_dict(), buffer)
    buffer.seek(0)
    other = kit.fresh()[1] if kit.build is None else kit.make(kit.model, seed=2)
    disturb(other, kit.seed + 3)
    other.load_state_dict(torch.load(buffer, weights_only=True, map_location=kit.x.device))
    return all_equal(
        kit,
        kit.rows(other, kit.x),
        kit.rows(kit.guide, kit.x),
        "A guide that loads the state dict gives another {what}, by {gap:.1e}.\nLikely cause: a "
        "tensor, such as a random permutation, that is neither parameter nor buffer; or make= "
        "builds a guide with other options.",
    )
