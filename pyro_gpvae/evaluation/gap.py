"""The inference gap log p(x) - ELBO of each image, and its parts."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal

from pyro_gpvae.core._chunks import check_chunk_size
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation._common import (
    batches,
    check_at_least,
    check_images,
    evaluator,
    name_of,
    progress_bar,
)
from pyro_gpvae.evaluation.importance import ParetoWarning, evidence_curve, log_weights
from pyro_gpvae.evaluation.optimum import optimise_gaussian
from pyro_gpvae.evaluation.reference import reference_evidence
from pyro_gpvae.evaluation.uncertainty import weight_information
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import HasGlobalPrior, HasMoments, HasPosterior, posterior_of
from pyro_gpvae.model.image_model import ImageModel

__all__ = ["BATCH", "LADDER", "Gap", "decompose"]

Family = Literal["diagonal", "full", "other"]

#: The terms between log p(x) and the bound that was trained, in this order, and what they cost.
LADDER = {
    "beyond_gaussian": "best full Gaussian instead of p(z|x)",
    "independence": "best diagonal Gaussian instead of the best full one",
    "encoder": "the guide instead of the best diagonal Gaussian",
    "weight_information": "random weights of the encoder, I(z; (W, U) | x)",
    "kl_global": "KL(q(W, U) ‖ p) / N",
}

#: The K of the published scores, with the guide's own q.
_PROTOCOL_SAMPLES = 100
#: Images that are refined together. An image has the same numbers in any multiple of a batch.
BATCH = 25


@dataclass(frozen=True, repr=False)
class Gap:
    r"""The decomposition of the inference gap of B images; tensors have shape (B,), in nats.

    With the Gaussians of highest ELBO of each image (Cremer et al. 2018):

    .. math::
        \log p(x) - ELBO[q] = \underbrace{\log p(x) - ELBO[q^*_{full}]}_{\text{beyond Gaussian}}
        + \underbrace{ELBO[q^*_{full}] - ELBO[q^*_{diag}]}_{\text{independence}}
        + \underbrace{ELBO[q^*_{diag}] - ELBO[q]}_{\text{encoder}}

    The optimum of the guide's own family, the full one unless q(z|x) is independent over
    dimensions, separates the approximation gap from the amortisation gap. Flows and mixtures may be
    better than it; their amortisation gap is then negative. For a random encoder (GPVAE), eq. (2)
    of the supplement is :math:`bound = ELBO[q(z|x)] - I(z; (W, U) | x) - \tfrac1N KL(q(W, U) \|
    p)`.

    Attributes:
        log_evidence, evidence_error, estimator, pareto_k, trusted: log p(x), its standard error and
            how it was found, see :class:`pyro_gpvae.evaluation.reference.ReferenceEvidence`.
        elbo: The ELBO of the guide's q(z|x), or, without ``posterior(x)``, of its program given
            its random weights, which then includes their cost. ``elbo_error`` is its standard
            error.
        elbo_full, elbo_diagonal: The ELBOs of the best Gaussians, likewise with errors.
        converged: Whether both optima are within their tolerance.
        iwae: IWAE(100) with the guide's own q.
        refined: IWAE with the full optimum as the proposal, K = ``reference_samples``.
        annealed: AIS; NaN without chains.
        weight_information: I(z; (W, U) | x); zero for a guide that is not random, or whose
            ``elbo`` includes it already; NaN if it is not known.
        kl_global: KL(q(W, U) ‖ p)/N, the same for each image; NaN if it is not known.
        family: The family of the guide's q(z|x): "diagonal", "full", or "other".
    """

    log_evidence: Tensor
    evidence_error: Tensor
    estimator: tuple[str, ...]
    pareto_k: Tensor
    trusted: Tensor
    elbo: Tensor
    elbo_error: Tensor
    elbo_full: Tensor
    elbo_full_error: Tensor
    elbo_diagonal: Tensor
    elbo_diagonal_error: Tensor
    converged: Tensor
    iwae: Tensor
    refined: Tensor
    annealed: Tensor
    weight_information: Tensor
    kl_global: Tensor
    family: Family

    @property
    def approximation(self) -> Tensor:
        """log p(x) - ELBO[q*], q* the optimum of the guide's family."""
        return self.log_evidence - self._optimum

    @property
    def amortisation(self) -> Tensor:
        """ELBO[q*] - ELBO[q]."""
        return self._optimum - self.elbo

    @property
    def bound(self) -> Tensor:
        """Eq. (2) of the supplement; the ELBO where nothing is random; NaN where not known."""
        return self.elbo - self.weight_information - self.kl_global

    @property
    def _optimum(self) -> Tensor:
        return self.elbo_diagonal if self.family == "diagonal" else self.elbo_full

    def table(self) -> pd.DataFrame:
        """Returns one row per image: the fields above, and the gaps that follow from them."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        columns |= {
            "gap": self.log_evidence - self.elbo,
            "approximation": self.approximation,
            "amortisation": self.amortisation,
            "beyond_gaussian": self.log_evidence - self.elbo_full,
            "independence": self.elbo_full - self.elbo_diagonal,
            "encoder": self.elbo_diagonal - self.elbo,
            "bound": self.bound,
        }
        frame: dict[str, Any] = {"image": range(len(self.elbo))}
        for name, value in columns.items():
            if isinstance(value, Tensor):
                value = (value if value.dtype == torch.bool else value.double()).cpu().numpy()
            frame[name] = value
        return pd.DataFrame(frame)

    def __repr__(self) -> str:
        left, doubtful = (int((~flags).sum()) for flags in (self.converged, self.trusted))
        return (
            f"Gap({len(self.elbo)} images, {left} of them not converged, {doubtful} without a "
            "reliable log p(x): "
            f"mean approximation gap {float(self.approximation[self.converged].mean()):.2f} nats, "
            f"amortisation gap {float(self.amortisation[self.converged].mean()):.2f} nats)"
        )


@evaluator
def decompose(
    model: ImageModel,
    guide: Any,
    x: Tensor,
    *,
    num_train: int | None = None,
    num_samples: int = 500,
    reference_samples: int = 1000,
    num_chains: int = 0,
    num_steps: int = 50,
    max_optimum_steps: int = 200,
    chunk_size: int | None = None,
    seed: int = 0,
    first_image: int = 0,
    progress: bool | str = False,
) -> Gap:
    """Measures the parts of the inference gap of each image; see :class:`Gap`.

    All ELBOs of an image are averages of the log weights of ``num_samples`` draws with the same
    noise; the optima start from the guide's mean. A guide with random weights, ``global_prior()``,
    needs ``moments(x)`` and ``kl_weights()``, see :mod:`pyro_gpvae.model.guide`; without them
    ``weight_information``, ``kl_global`` and ``bound`` are NaN.

    References:
        Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders*, 2018.
        https://arxiv.org/abs/1801.03558

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        guide: Any guide for it.
        num_train: The number N of training images, by which eq. (2) divides KL(q(W, U) ‖ p);
            needed only for a guide with ``kl_weights()``.
        num_samples: The number of draws per image for each ELBO.
        reference_samples: The number of draws per image from the guide and from the full optimum,
            for log p(x).
        max_optimum_steps: The largest number of steps of the optimisation of each Gaussian.
        x, num_chains, num_steps, chunk_size, seed, first_image, progress: See
            :func:`pyro_gpvae.reference_evidence`.

    Raises:
        ValueError: If the guide has no density, a number is too small, ``num_train`` is missing,
            x is not a batch of images, or ``moments(x)`` is not four tensors (B, p).
        NonFiniteError: If a density is NaN or +∞; names the images.
        torch.linalg.LinAlgError: If the curvature of an image's log joint is not finite.
    """
    check_at_least(2, num_samples=num_samples, reference_samples=reference_samples)
    check_chunk_size(chunk_size)
    if not isinstance(model, ImageModel):
        raise ValueError(f"the optimum of each image needs an ImageModel, got {name_of(model)}")
    check_images(model, x)
    first = to_batch(x[:1], model, guide)[0]
    kl_global = _kl_global(guide, num_train, first)
    family = _family(guide, first)
    _weight_information(guide, first)  # an error before the work, not after it
    reference: Any = {
        "num_samples": reference_samples, "num_chains": num_chains, "num_steps": num_steps,
        "seed": seed, "chunk_size": chunk_size,
    }  # fmt: skip
    parts: list[dict[str, Any]] = []
    index = first_image
    with progress_bar(progress, "inference gap", len(x), unit="image") as bar:
        for images in batches(x, model, guide, size=min(BATCH, chunk_size or BATCH)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ParetoWarning)  # the result tells it of each image
                found = reference_evidence(model, images, guide, first_image=index, **reference)
            values = {name: estimate[0] for name, estimate in found.estimates.items()}
            parts.append(
                _elbos(
                    model, guide, images, num_samples, max_optimum_steps, chunk_size, seed, index
                )
                | {
                    "log_evidence": found.log_evidence,
                    "evidence_error": found.standard_error,
                    "estimator": found.estimator,
                    "pareto_k": found.pareto_k,
                    "trusted": found.trusted,
                    "refined": values[f"IWAE({reference_samples}), instance:full"],
                    "annealed": values.get(f"AIS({num_steps})", found.log_evidence * math.nan),
                    "weight_information": _weight_information(guide, images).to(images),
                    "kl_global": kl_global.expand(len(images)),
                }
            )
            bar.update(len(images))
            index += len(images)
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    estimator = tuple(name for names in columns.pop("estimator") for name in names)
    joined = {name: torch.cat(values) for name, values in columns.items()}
    return Gap(**joined, estimator=estimator, family=family)


def _elbos(
    model: ImageModel,
    guide: Any,
    images: Tensor,
    num_samples: int,
    max_steps: int,
    chunk_size: int | None,
    seed: int,
    index: int,
) -> dict[str, Tensor]:
    """The ELBOs of the guide and of both optima with common noise, and the guide's IWAE."""
    start = guide if isinstance(guide, HasPosterior) else None
    proposals, converged = {"elbo": guide}, torch.ones(len(images), dtype=torch.bool)
    for covariance in ("full", "diagonal"):
        with seeded(image_seed(seed, index, f"best {covariance}"), images.device):
            best = optimise_gaussian(
                model, images, covariance, start=start, max_steps=max_steps, chunk_size=chunk_size
            )
        proposals[f"elbo_{covariance}"] = PrecomputedPosterior(best.posterior)
        converged = converged.to(best.converged.device) & best.converged
    columns = {"converged": converged}
    for name, q in proposals.items():
        with seeded(image_seed(seed, index, "elbo"), images.device):
            log_w = log_weights(model, q, images, num_samples, chunk_size=chunk_size)
        columns[name] = log_w.mean(0)
        columns[f"{name}_error"] = log_w.std(0) / math.sqrt(num_samples)
        if q is guide:
            count = min(_PROTOCOL_SAMPLES, num_samples)
            columns["iwae"] = evidence_curve(log_w, [count])[count]
    return columns


def _kl_global(guide: Any, num_train: int | None, like: Tensor) -> Tensor:
    """KL(q(W, U) ‖ p)/N of a random encoder, NaN if it is not known, zero for others: ()."""
    if not isinstance(guide, HasMoments):
        return like.new_full((), math.nan if _is_random(guide) else 0.0)
    if num_train is None or num_train < 1:
        raise ValueError(
            "num_train must be the number of training images, by which eq. (2) divides the "
            f"guide's kl_weights(): got {num_train}"
        )
    kl: Tensor = guide.kl_weights()
    return kl.to(like) / num_train


def _weight_information(guide: Any, x: Tensor) -> Tensor:
    """I(z; (W, U) | x), NaN if it is not known, zero if nothing is random: (B,)."""
    # without posterior(x), z is scored given the weights, and the ELBO includes their cost
    if not (_is_random(guide) and isinstance(guide, HasPosterior)):
        return x.new_zeros(len(x))
    if not isinstance(guide, HasMoments):
        return x.new_full((len(x),), math.nan)
    return weight_information(guide, x)


def _is_random(guide: Any) -> bool:
    return isinstance(guide, HasGlobalPrior) and bool(guide.global_prior())


def _family(guide: Any, x: Tensor) -> Family:
    """The family whose optimum is the guide's own; an error if the guide has no density."""
    with seeded(0, x.device):
        q: Any = posterior_of(guide, x)
        if q is None:
            q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"]
        z = q.sample()
    inner = q
    while not isinstance(inner, Delta) and hasattr(inner, "base_dist"):
        inner = inner.base_dist
    try:
        if isinstance(inner, Delta):
            raise NotImplementedError
        q.log_prob(z)
    except NotImplementedError:
        raise ValueError(
            f"the guide {name_of(guide)} has no density: its z is "
            f"{'a point' if isinstance(inner, Delta) else type(q).__name__}, so that its ELBO is "
            "minus infinity or unknown. The gap needs a guide whose q(z|x) has a log_prob."
        ) from None
    if not isinstance(guide, HasPosterior):
        return "other"
    if isinstance(q, Independent):
        return "diagonal"
    return "full" if isinstance(q, MultivariateNormal | LowRankMultivariateNormal) else "other"
