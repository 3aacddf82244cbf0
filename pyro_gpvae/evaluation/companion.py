r"""Scores that tell a better model from a better proposal, beside IWAE with the guide's own q."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

from pyro_gpvae.core._programs import with_own_parameters
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.evaluation.annealing import annealed_evidence
from pyro_gpvae.evaluation.generation import estimated_mean
from pyro_gpvae.evaluation.importance import PARETO_LIMIT, Evidence, as_pixels, log_weights
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import make_guide

__all__ = ["WIDTHS", "Scaled", "companion_scores", "width_images"]

#: The factors c that the spread of a posterior is multiplied by.
WIDTHS = (0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

# images worked on together: each is refined, and its posterior computed, once
_BATCH = 100


class Scaled(TorchDistribution):
    r"""Distribution of :math:`c_0 + c (z - c_0)`, :math:`z \sim q`: q, wider about a centre.

    .. math:: q_c(z') = q\bigl(c_0 + (z' - c_0) / c\bigr) \, c^{-p}

    which is exact for any q and any centre; with its mean as the centre, the mean stays, and
    standard deviations are multiplied by c.

    The draw that a sample came from is remembered, and scored in its stead: an autoregressive
    flow, too, then knows its density at no cost.

    Arguments:
        base: q, with batch shape (B,) and event shape (p,).
        centre: The centre, (B, p).
        factor: c.

    Raises:
        ValueError: If c is not positive and finite.

    Example:
        >>> import pyro.distributions as dist
        >>> q = dist.Normal(torch.ones(1, 2), 0.5).to_event(1)
        >>> wide = Scaled(q, q.mean, 2.0)
        >>> expected = dist.Normal(torch.ones(1, 2), 1.0).to_event(1)
        >>> z = torch.tensor([[0.0, 2.5]])
        >>> bool(torch.isclose(wide.log_prob(z), expected.log_prob(z)))
        True
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(
        self,
        base: Any,
        centre: Tensor,
        factor: float,
        validate_args: bool | None = None,
    ) -> None:
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"the factor must be positive and finite, got {factor}")
        self.base = base
        self.centre = centre
        self.factor = factor
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(
        self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Scaled:
        new = self._get_checked_instance(Scaled, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        new.base = self.base.expand(shape)
        new.centre = self.centre.expand(shape + self.event_shape)
        new.factor = self.factor
        new._last = None
        super(Scaled, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        z = self.base.sample(torch.Size(sample_shape))
        value: Tensor = self.centre + self.factor * (z - self.centre)
        self._last = value, z
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._last is not None and self._last[0] is value:
            z = self._last[1]
        else:
            z = self.centre + (value - self.centre) / self.factor
        density: Tensor = self.base.log_prob(z)
        return density - self.event_shape.numel() * math.log(self.factor)


def width_images(train: Tensor, num_validation: int, limit: int = 200) -> tuple[Tensor, str]:
    """The images that the width factor is chosen on, and what they are.

    Arguments:
        train: All training images of a run, those held out included.
        num_validation: How many of them the run held out.
        limit: At most so many are taken.

    Returns:
        Held-out images where there are any, else the first training images: never test images.
    """
    if num_validation:
        return split_validation(train, num_validation)[1][:limit], "held-out training images"
    return train[:limit], "training images: none were held out"


@with_own_parameters
@torch.no_grad()
def companion_scores(
    model: Any,
    guide: Any,
    x: Tensor,
    validation: Tensor,
    *,
    num_samples: int = 100,
    widths: Sequence[float] = WIDTHS,
    num_chains: int = 8,
    num_steps: int = 30,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: bool | str = False,
) -> tuple[dict[str, Any], pd.DataFrame]:
    r"""Scores the same images with better and better proposals over the same model.

    All estimates are lower bounds of log p(x) in expectation. IWAE(K) with the guide's own q, the
    published protocol, mixes two things: how likely the model makes an image, and how well q
    proposes. Beside it stand, all on the same images:

    * ``own``: the ELBO and IWAE(K) of the guide's q;
    * ``width``: IWAE(K) of q with its spread multiplied by c (see :class:`Scaled`), where c is
      the factor of highest IWAE(K) on the validation images. What this gains over ``own``, a
      wider q would have gained without a better model;
    * ``optimum``: the ELBO and IWAE(K) of the Gaussian of highest ELBO of each image (the guide
      ``instance:full``), the reference score of the model;
    * ``annealed``: annealed importance sampling from there, see
      :func:`pyro_gpvae.evaluation.annealing.annealed_evidence`.

    The width needs a guide with ``posterior(x)``; without one its entry says so. An image whose
    optimum has not converged is counted, and stays: its IWAE is a lower bound all the same.

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        guide: Any guide for it.
        x: Images (B, C, H, W), uint8 or floats in [0, 1].
        validation: Images to choose c on, likewise, and none of x.
        num_samples: K.
        widths: The factors c to choose from.
        num_chains: Chains per image of annealing, at least 2; 0 is none.
        num_steps: Its steps.
        chunk_size: How many latent vectors are decoded at once; bounds the memory.
        seed: The same seed gives the same numbers; the global random state is left as it was.
        progress: Whether to show a progress bar over images; a text is its label.

    Returns:
        The means for a record, with Monte-Carlo errors, c, and the seconds that each took; and a
        table with a row for each image, in nats.

    Raises:
        ValueError: If there are no images, no widths, or a number is too small.
        torch.linalg.LinAlgError: If the curvature of an image's log joint is not finite.
    """
    for name, images in (("x", x), ("validation", validation)):
        if not isinstance(images, Tensor) or len(images) == 0:
            raise ValueError(f"{name} must hold at least one image")
    if num_chains < 0 or num_chains == 1:
        raise ValueError(f"num_chains must be 0 (no annealing) or at least 2, got {num_chains}")
    if not widths:
        raise ValueError("widths must hold at least one factor")
    device = next(model.parameters()).device
    has_posterior = hasattr(guide, "posterior")
    optimiser = make_guide("instance:full", model, warm_start=guide if has_posterior else None)
    seconds = dict.fromkeys(("own", "width", "optimum", "annealed"), 0.0)

    def iwae(q: Any, images: Tensor, stream: int) -> Evidence:
        with seeded(stream, device):  # the same stream for every q: common noise
            weights = log_weights(model, q, images, num_samples, chunk_size=chunk_size)
        return Evidence.from_log_weights(weights)

    def posterior(images: Tensor, begin: int) -> Any:
        # not the stream of iwae: a q that was refined on some noise must meet other noise
        with seeded(image_seed(seed, begin, "posterior"), device):
            return guide.posterior(images)

    def mean(q: Any) -> Tensor:
        with seeded(0, device):  # always the same draws, where it takes some
            return estimated_mean(q)[0]

    def wider(q: Any, centre: Tensor, c: float) -> Any:
        return PrecomputedPosterior(q if c == 1 else Scaled(q, centre, c))

    label = progress if isinstance(progress, str) else "companion"
    parts: list[dict[str, Tensor]] = []
    size = min(_BATCH, chunk_size or _BATCH)
    with tqdm(total=len(x), desc=label, unit="image", disable=not progress) as bar:
        curve: dict[float, float] = {}
        if has_posterior:
            started = time.monotonic()
            totals = dict.fromkeys(widths, 0.0)
            for begin in range(0, len(validation), size):
                images = as_pixels(model, validation[begin : begin + size])
                q = posterior(images, begin)
                centre = mean(q)
                for c in widths:
                    scores = iwae(wider(q, centre, c), images, seed + begin).log_evidence
                    totals[c] += float(scores.sum())
            curve = {c: total / len(validation) for c, total in totals.items()}
            best = max(curve, key=lambda c: curve[c])
            seconds["width"] += time.monotonic() - started
        for begin in range(0, len(x), size):
            images = as_pixels(model, x[begin : begin + size])
            part: dict[str, Tensor] = {}

            started = time.monotonic()
            q = None
            if has_posterior:
                q = posterior(images, begin)
            _add(
                part,
                "own",
                iwae(guide if q is None else PrecomputedPosterior(q), images, seed + begin),
            )
            seconds["own"] += time.monotonic() - started

            if q is not None:
                started = time.monotonic()
                proposal = wider(q, mean(q), best)
                _add(part, "width", iwae(proposal, images, seed + begin))
                seconds["width"] += time.monotonic() - started

            started = time.monotonic()
            with seeded(image_seed(seed, begin, "optimum"), device):
                optimum = optimiser.optimise(images)
            reference = PrecomputedPosterior(optimum.posterior)
            _add(part, "optimum", iwae(reference, images, seed + begin))
            part["optimum_converged"] = optimum.converged
            seconds["optimum"] += time.monotonic() - started

            if num_chains:
                started = time.monotonic()
                annealed = annealed_evidence(
                    model,
                    images,
                    reference,
                    num_chains=num_chains,
                    num_steps=num_steps,
                    chunk_size=chunk_size,
                    seed=seed,
                    first_image=begin,
                )
                part["annealed_log_evidence"] = annealed.log_evidence
                part["annealed_standard_error"] = annealed.standard_error
                seconds["annealed"] += time.monotonic() - started
            parts.append(part)
            bar.update(len(images))

    table = pd.DataFrame({k: torch.cat([p[k] for p in parts]).cpu().numpy() for k in parts[0]})
    record: dict[str, Any] = {
        "num_images": len(x),
        "num_samples": num_samples,
        "seed": seed,
        "own": _summary(table, "own"),
        "width": {"missing": f"{type(guide).__name__} has no posterior(x)"},
        "optimum": _summary(table, "optimum")
        | {"not_converged": int((~table["optimum_converged"]).sum())},
        "annealed": {"missing": "not asked for"},
        "seconds": seconds,
    }
    if curve:
        record["width"] = _summary(table, "width") | {
            "factor": best,
            "factors": list(curve),
            "validation_log_evidence": list(curve.values()),
            "validation_images": len(validation),
        }
    if num_chains:
        chains = {"num_chains": num_chains, "num_steps": num_steps}
        record["annealed"] = _summary(table, "annealed") | chains
    return record, table


def _add(part: dict[str, Tensor], name: str, evidence: Evidence) -> None:
    part[f"{name}_elbo"] = evidence.elbo
    part[f"{name}_log_evidence"] = evidence.log_evidence
    part[f"{name}_standard_error"] = evidence.standard_error
    part[f"{name}_pareto_k"] = evidence.pareto_k


def _summary(table: pd.DataFrame, name: str) -> dict[str, Any]:
    """Means over images; nats per image."""
    error = table[f"{name}_standard_error"].astype(float)
    summary: dict[str, Any] = {
        "log_evidence": float(table[f"{name}_log_evidence"].astype(float).mean()),
        "monte_carlo_error": float(error.pow(2).sum(skipna=False) ** 0.5 / len(table)),
    }
    if f"{name}_elbo" in table:
        summary["elbo"] = float(table[f"{name}_elbo"].astype(float).mean())
        summary["heavy_tails"] = int((table[f"{name}_pareto_k"] > PARETO_LIMIT).sum())
    return summary
