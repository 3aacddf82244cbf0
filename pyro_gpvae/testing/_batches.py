r"""Promises about batches: an image's result is its own, however many are drawn at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from scipy import stats
from torch import Tensor

from pyro_gpvae.evaluation.importance import log_weights
from pyro_gpvae.model.guide import posterior_of
from pyro_gpvae.testing._kit import (
    FAILURE_RATE,
    NUM_DRAWS,
    ConstantNoise,
    Finding,
    Kit,
    guide_traces,
    largest_gap,
    not_checked,
    within,
    z_site,
)


@torch.no_grad()
def check_noise(kit: Kit) -> Finding:
    same = kit.x[:1].expand_as(kit.x).clone()
    torch.manual_seed(kit.seed)
    traces = torch.cat([site["value"] for site in guide_traces(kit.guide, same, 60)])
    draws, _ = kit.draws(kit.guide, same, 1000)
    torch.manual_seed(kit.seed)
    z = z_site(kit.guide, same)["value"].unsqueeze(0)
    for what, sample in (("guide's trace", traces), ("posterior", draws), ("guide's trace", z)):
        vectors = sample.flatten(0, 1)
        repeated = len(vectors) - len(vectors.unique(dim=0))
        if repeated:
            account = (
                f"The same image given {len(same)} times has {repeated} equal z among "
                f"{len(vectors)} of the {what}.\nLikely cause: noise shared over the batch or "
                "over particles (noise of shape (p,), or drawn outside the plate)."
            )
            return Finding(f"{repeated} equal z", "0", False, account)
    # given global weights, images are dependent
    exact = posterior_of(kit.guide, same) is not None
    count, size, p = (draws if exact else traces).shape
    centred = (draws if exact else traces) - (draws if exact else traces).mean(0)
    centred = centred / centred.norm(dim=0)
    correlation = torch.einsum("kbp,kcp->pbc", centred, centred)
    off = correlation[:, *torch.triu_indices(size, size, 1)].abs().max()
    largest = float(off.nan_to_num(1.0))
    num_tests = p * size * (size - 1) / 2
    bound = stats.norm.isf(FAILURE_RATE / 2 / num_tests) / math.sqrt(count) if exact else 0.99
    account = (
        f"Samples of different rows have a correlation of {largest:.3f}.\nLikely cause: noise "
        "shared over the batch."
    )
    return Finding(f"|r| = {largest:.3f}", f"< {bound:.3f}", largest < bound, account)


def check_batch(kit: Kit) -> Finding:
    rows = kit.rows(kit.guide, kit.x)
    worst, changed, at = 0.0, set[str](), 0
    for i in {0, len(kit.x) // 2, len(kit.x) - 1}:
        others = kit.other.clone()
        others[i] = kit.x[i]
        new = kit.rows(kit.guide, others)
        for what in rows:
            gap = largest_gap(new[what][i], rows[what][i])
            if not gap <= kit.tolerance:
                changed.add(what)
            if not gap <= worst:
                worst, at = gap, i
    if not changed:
        return within(worst, kit.tolerance)
    cause = (
        "a mean, norm, sort or normalisation over the batch, such as the batch mean of a gradient "
        "or batch statistics in evaluation"
    )
    if changed <= {"3 samples", "their log density"} and "1 sample" in rows:
        cause = "tile and interleave swapped in sample((K,)): a single sample is right"
    elif changed <= {"their log density", "its log density"}:
        cause = "a density that sees the other rows, such as tile and interleave swapped"
    elif (order := _order(kit)) is not None:
        cause = f"images in another order: row {order[0]} is what image {order[1]} gives"
    account = (
        f"With other images around it, image {at} has another {', another '.join(sorted(changed))},"
        f" by up to {worst:.1e}.\nLikely cause: {cause}."
    )
    return within(worst, kit.tolerance, account)


def _order(kit: Kit) -> tuple[int, int] | None:
    """Returns a row of a batch that equals what another image gives, if there is one."""
    with ConstantNoise():
        rows = kit.rows(kit.guide, kit.x)["z"]
        for j in range(len(kit.x)):
            alone = kit.rows(kit.guide, kit.x[j : j + 1])["z"][0]
            for i in range(len(kit.x)):
                if i != j and largest_gap(rows[i], alone) <= kit.tolerance:
                    return i, j
    return None


def check_chunks(kit: Kit) -> Finding:
    def weights(x: Tensor, chunk_size: int | None = None) -> Tensor:
        return log_weights(kit.model, kit.guide, x, 4, chunk_size=chunk_size)

    with ConstantNoise() as noise:
        whole = weights(kit.x)
        others = {
            "in chunks": weights(kit.x, 3),
            "one at a time": torch.cat([weights(image) for image in kit.x.split(1)], dim=1),
            "in reverse order": weights(kit.x.flip(0)).flip(1),
        }
    if not noise.complete:
        return not_checked("the guide draws noise that no constant can replace")
    gaps = {how: largest_gap(other, whole) for how, other in others.items()}
    how, worst = max(gaps.items(), key=lambda item: item[1])
    if gaps["one at a time"] <= kit.tolerance and gaps["in reverse order"] <= kit.tolerance:
        cause = "samples, or their density, depend on how many are drawn at once"
    else:
        cause = (
            "the size of the batch enters, as by the batch mean of a gradient where its sum is "
            "due; or images in another order; or tile and interleave swapped"
        )
    account = (
        f"Evaluated {how}, log weights differ by {worst:.1e} (relative).\nLikely cause: {cause}."
    )
    return within(worst, kit.tolerance, account)


@torch.no_grad()
def check_traced(kit: Kit) -> Finding:
    """Tests q(z|x) = E[q(z|x, auxiliary)] at samples of the posterior, over traces of the guide."""
    x = kit.x[:4]
    torch.manual_seed(kit.seed)
    if (q := posterior_of(kit.guide, x)) is None:
        return not_checked("the guide has no posterior")
    account = (
        "The guide's own trace draws z from another density than posterior(x): {figure}.\n"
        "Likely cause: a variance taken for a standard deviation in one of them, or a step that "
        "only one of them makes."
    )

    def densities(seed: int, num_traces: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log q(z|x) (4, B), that of each trace (K, 4, B), and the traces' z (K, B, p)."""
        torch.manual_seed(kit.seed + seed)
        log_q = _posterior(kit, x).log_prob(points.clone())
        torch.manual_seed(kit.seed + seed)
        log_traced, z = [], []
        for site in guide_traces(kit.guide, x, num_traces):
            z.append(site["value"])
            shape = site["value"].shape
            log_traced.append(
                torch.stack([site["fn"].log_prob(point.expand(shape)) for point in points], 1)
            )
        return log_q, torch.cat(log_traced), torch.cat(z)

    torch.manual_seed(kit.seed)
    points = q.sample((64,))
    # in the middle of q, densities given auxiliary sites vary least
    central = q.log_prob(points).topk(4, dim=0).indices.unsqueeze(-1)
    points = points.gather(0, central.expand(-1, -1, points.shape[-1]))
    log_q, log_traced, _ = densities(0, 2)
    if (gap := largest_gap(log_traced, log_q.unsqueeze(0).expand_as(log_traced))) <= kit.tolerance:
        return within(gap, kit.tolerance)  # the trace samples this very density
    if largest_gap(densities(1, 1)[0], log_q) <= kit.tolerance:
        # global weights or auxiliary sites, over which the density is to be averaged
        log_q, log_traced, traced = densities(2, 120)
        left, right = torch.ones_like(log_q).unsqueeze(0), (log_traced - log_q).exp()
    else:
        # the posterior itself is random: average both, over seeds
        pairs = [densities(seed, 1)[:2] for seed in range(64)]
        left = torch.stack([pair[0] for pair in pairs]).exp()
        right = torch.cat([pair[1] for pair in pairs]).exp()
        left, right, traced = left / left.mean(0), right / left.mean(0), None
    gaps = right.mean(0) - left.mean(0)
    variance = right.var(0) + left.var(0, correction=0)
    scores = gaps / (variance / len(right)).sqrt()
    # the mean of densities that vary much is not normally distributed
    scores[(gaps.abs() < kit.tolerance) | (variance > 0.1)] = 0
    tests = 2 * stats.norm.sf(scores.abs().flatten().cpu().numpy())
    if traced is not None:
        drawn = _posterior(kit, x).sample((NUM_DRAWS,)).cpu().flatten(1)
        both = zip(traced.cpu().flatten(1).mT.numpy(), drawn.mT.numpy(), strict=True)
        samples = [stats.ks_2samp(a, b, method="asymp").pvalue for a, b in both]
        tests = np.append(tests, samples)
    p_value = min(1.0, float(tests.min()) * len(tests))
    finding = Finding(f"p = {p_value:.1e}", f"> {FAILURE_RATE:.0e}", p_value > FAILURE_RATE)
    return finding._replace(account=account.format(figure=finding.figure))


def _posterior(kit: Kit, x: Tensor) -> TorchDistribution:
    q = posterior_of(kit.guide, x)
    assert q is not None
    return q
