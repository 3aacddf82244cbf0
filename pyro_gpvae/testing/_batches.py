r"""Promises about batches and objectives: an image's own result, gradients, and scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model.guide import HasGlobalPrior, posterior_of
from pyro_gpvae.testing import _kit
from pyro_gpvae.testing._kit import Finding, Kit, likely, not_checked, sample, within, z_site


@torch.no_grad()
def check_noise(kit: Kit) -> Finding:
    same = kit.x[:1].expand_as(kit.x).clone()
    torch.manual_seed(kit.seed)
    # global weights of many particles may be large
    traces = torch.cat([z_site(kit.guide, same, 20)["value"] for _ in range(3)])
    draws, _ = sample(kit.guide, same, 1000)
    single = z_site(kit.guide, same)["value"].unsqueeze(0)
    for what, vectors in (("guide's trace", traces), ("posterior", draws), ("program", single)):
        if repeated := vectors[..., 0].numel() - len(vectors.flatten(0, 1).unique(dim=0)):
            seen = f"Of samples of the {what} for images that are all the same, {repeated} repeat."
            return Finding(f"{repeated} equal z", "0", False, seen)
    # given global weights, images are dependent
    exact = posterior_of(kit.guide, same) is not None
    z = draws if exact else traces
    rows, columns = torch.triu_indices(len(same), len(same), 1)
    r = torch.stack([torch.corrcoef(row.mT)[rows, columns] for row in z.unbind(-1)])
    largest = float(r.abs().nan_to_num(1.0).max())
    bound = stats.norm.isf(_kit.FAILURE_RATE / 2 / r.numel()) / math.sqrt(len(z)) if exact else 0.99
    seen = f"Samples of different rows have a correlation of {largest:.3f}."
    return Finding(f"|r| = {largest:.3f}", f"< {bound:.3f}", largest < bound, seen)


def check_batch(kit: Kit) -> Finding:
    rows = kit.rows(kit.guide, kit.x)
    new = {what: value.clone() for what, value in rows.items()}
    for i in {0, len(kit.x) // 2, len(kit.x) - 1}:
        others = kit.other.clone()
        others[i] = kit.x[i]
        for what, value in kit.rows(kit.guide, others).items():
            new[what][i] = value[i]
    seen = "With other images around it, an image has another {what}, by {gap:.1e}."
    return kit.all_equal(new, rows, seen)


def check_chunks(kit: Kit) -> Finding:
    def weights(x: Tensor, chunk_size: int | None = None) -> Tensor:
        return log_weights(kit.model, kit.guide, x, 4, chunk_size=chunk_size)

    with _kit.ConstantNoise() as noise:
        others = {
            "in chunks": weights(kit.x, 3),
            "one at a time": torch.cat([*map(weights, kit.x.split(1))], 1),
            "in reverse order": weights(kit.x.flip(0)).flip(1),
        }
        whole = dict.fromkeys(others, weights(kit.x))
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    return kit.all_equal(others, whole, "Evaluated {what}, log weights differ by {gap:.1e}.")


@torch.no_grad()
def check_traced(kit: Kit) -> Finding:
    """Tests q(z|x) = E[q(z|x, auxiliary)] at samples of the posterior, over traces of the guide."""
    x, num_traces = kit.x[:4], 120
    torch.manual_seed(kit.seed)
    if (q := posterior_of(kit.guide, x)) is None:
        return not_checked("the guide has no posterior")
    points = q.sample((64,))
    # in the middle of q, densities given auxiliary sites vary least
    central = q.log_prob(points).topk(4, dim=0).indices.unsqueeze(-1)
    points = points.gather(0, central.expand(-1, -1, points.shape[-1]))
    log_q, log_traced, traced = [], [], []
    for seed in range(num_traces):
        torch.manual_seed(kit.seed + seed)
        q = posterior_of(kit.guide, x)
        assert q is not None
        log_q.append(q.log_prob(points.clone()))
        torch.manual_seed(kit.seed + seed)
        site = z_site(kit.guide, x, 1)
        traced.append(site["value"][0])
        log_traced.append(torch.cat([site["fn"].log_prob(point[None]) for point in points]))
        if seed == 1:
            gap = _kit.largest_gap(torch.stack(log_traced), torch.stack(log_q))
            if gap <= kit.tolerance:  # the trace samples this very density
                return within(gap, kit.tolerance, "")
    # global weights, auxiliary sites or a random posterior: densities are averaged
    left, right = torch.stack(log_q), torch.stack(log_traced)
    left, right = (left - left[0]).exp(), (right - left[0]).exp()
    random = float((left - left[0]).abs().max()) > kit.tolerance
    right, left = right / left.mean(0), left / left.mean(0)
    gaps = right.mean(0) - left.mean(0)
    variance = right.var(0) + left.var(0)
    scores = gaps / (variance / num_traces).sqrt()
    # the mean of densities that vary much is not normally distributed
    scores[(gaps.abs() < kit.tolerance) | (variance > 0.1)] = 0
    tests = (2 * stats.norm.sf(scores.abs().flatten().cpu().numpy())).tolist()
    if not random:
        a, b = torch.stack(traced).cpu().flatten(1), q.sample((_kit.NUM_DRAWS,)).cpu().flatten(1)
        tests += stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue.tolist()
    seen = "The guide's own trace draws z from another density than posterior(x): p = {p:.1e}."
    return likely(min(1.0, min(tests) * len(tests)), seen)


def check_gradient(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    named: dict[str, Tensor] = {}
    for owner, program in (("guide", guide), ("model", model)):
        if isinstance(program, nn.Module):
            program.train()
        named |= {f"{owner}.{name}": p for name, p in _kit.trainable(program).items()}
    if not named:
        return not_checked("neither guide nor model has parameters in a module")
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for round_ in range(2):  # a draw may, by bad luck, leave one out
        torch.manual_seed(kit.seed + round_)
        losses, blocks = _kit.guide_losses(model, guide, kit.x, 100)
        for loss, block in zip(losses, blocks, strict=True):
            trained = {id(p) for p in block.parameters or named.values()}
            own = {name: p for name, p in named.items() if id(p) in trained}
            for name, gradient in _gradients(loss, own).items():
                total[name] += gradient.abs()
    lost = [name for name, value in total.items() if not (value.any() and value.isfinite().all())]
    seen = f"No gradient, zero, NaN or an infinite one: {', '.join(lost)}."
    return Finding(f"{len(named) - len(lost)} of {len(named)}", "all", not lost, seen)


def _gradients(value: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients with respect to parameters, zero where there are none."""
    if not named or not value.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    return torch.autograd.grad(value, named, retain_graph=True, materialize_grads=True)


def check_pathwise(kit: Kit) -> Finding:
    _, guide = kit.fresh()
    torch.manual_seed(kit.seed)
    site = z_site(guide, kit.x)
    z, q = site["value"], site["fn"]
    if not getattr(q, "has_rsample", False):
        return not_checked("z has no reparametrised samples (has_rsample)")
    named = _kit.trainable(guide)
    log_q = q.log_prob(z.detach()).sum()
    if not named or not log_q.requires_grad:
        return not_checked("the density of z depends on no trainable parameter")
    density = _gradients(log_q, named)
    # a random direction: the gradient of a plain sum may vanish by symmetry
    moved = _gradients((torch.randn_like(z) * z).sum(), named)
    lost = [n for n in named if bool(((density[n] != 0) & (moved[n] == 0)).any())]
    names = ", ".join(f"guide.{name}" for name in lost)
    seen = f"Elements of {names} shape the density, but z has no gradient with respect to them."
    return Finding(f"{len(lost)} detached", "0", not lost, seen)


@torch.no_grad()
def check_scale(kit: Kit) -> Finding:
    model, guide = kit.fresh()
    with _kit.ConstantNoise() as noise:
        few, _ = _kit.guide_losses(model, guide, kit.x, 1000)
        many, _ = _kit.guide_losses(model, guide, kit.x, 2000)
        twice, _ = _kit.guide_losses(model, guide, torch.cat([kit.x, kit.x]), 1000)
        expected = _global_divergences(guide, kit.x)
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    if not (gap := _kit.largest_gap(twice, few)) <= kit.tolerance:
        seen = "With every image twice in the batch the loss changes by {gap:.1e} (relative)."
        cause = "a sum over the batch where its mean is due, or 1/B instead of 1/N"
        return within(gap, kit.tolerance, seen, cause)
    # the loss is local + KL / N: what does its dependence on N say about KL?
    found = float((few - many).max()) * 2000
    gap, nearest = min((abs(found - kl) / (1 + abs(kl)), kl) for kl in expected)
    seen = (
        f"The loss depends on N as if KL(q(W) ‖ p(W)) were {found:.4g}; it is {nearest:.4g} nats."
    )
    return within(gap, kit.tolerance, seen)


def _global_divergences(guide: Any, x: Tensor) -> list[float]:
    """Returns KL(q(W) ‖ p(W)) of the global sites: its value if known, and an estimate."""
    priors = guide.global_prior() if isinstance(guide, HasGlobalPrior) else {}
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
