"""The inference gap log p(x) - ELBO of each image, and its parts."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal, Unpack, get_args

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal

from pyro_gpvae.core._errors import check_at_least
from pyro_gpvae.core._plates import is_sampled
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._progress import progress_bar
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.batch import Batch, Data, size_of, take, to_batch
from pyro_gpvae.evaluation._common import (
    Settings,
    Work,
    batches,
    check_amortised,
    evaluator,
)
from pyro_gpvae.evaluation.importance import ParetoWarning, evidence_curve, log_weights
from pyro_gpvae.evaluation.optimum import Covariance, optimise_gaussian
from pyro_gpvae.evaluation.reference import reference_evidence
from pyro_gpvae.evaluation.uncertainty import weight_information
from pyro_gpvae.model._local import agree, is_point
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.density import JointDensity, LatentPosterior, base_of
from pyro_gpvae.model.guide import (
    HasGlobalPrior,
    HasMoments,
    HasPosterior,
    check_program_data,
    posterior_of,
)

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
        parts = {
            "log p(x)": self.log_evidence,
            "ELBO": self.elbo,
            "amortisation gap": self.amortisation,
            "approximation gap": self.approximation,
        }
        left, doubtful = (int((~flags).sum()) for flags in (self.converged, self.trusted))
        lines = [f"Gap of {len(self.elbo)} images, means in nats per image:"]
        lines += [f"  {k:<18}{float(v[self.converged].mean()):9.2f}" for k, v in parts.items()]
        lines.append(f"  {left} of them not converged, {doubtful} without a reliable log p(x)")
        return "\n".join(lines)


@evaluator
def decompose(
    model: PyroProgram,
    guide: Any,
    data: Data,
    *,
    num_train: int | None = None,
    num_samples: int = 500,
    reference_samples: int = 1000,
    num_chains: int = 0,
    num_steps: int = 50,
    max_optimum_steps: int = 200,
    **work: Unpack[Work],
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
        model, data: See :func:`pyro_gpvae.log_weights`. All latents must be continuous.
        guide: Any amortised guide for it.
        num_train: The number N of training images, by which eq. (2) divides KL(q(W, U) ‖ p);
            needed only for a guide with ``kl_weights()``.
        num_samples: The number of draws per image for each ELBO.
        reference_samples: The number of draws per image from the guide and from the full optimum,
            for log p(x).
        max_optimum_steps: The largest number of steps of the optimisation of each Gaussian.
        num_chains, num_steps, work: See :func:`pyro_gpvae.reference_evidence`.

    Raises:
        ValueError: If the guide has no density, a number is too small, ``num_train`` is missing,
            the data do not fit the model, or ``moments(x)`` is not four tensors (B, p).
        NonFiniteError: If a density is NaN or +∞; names the images.
        torch.linalg.LinAlgError: If the curvature of an image's log joint is not finite.
    """
    check_at_least(2, num_samples=num_samples, reference_samples=reference_samples)
    settings = Settings(**work)
    size = settings.chunk_size
    check_at_least(1, chunk_size=1 if size is None else size)
    check_program_data(model, data)
    check_amortised(guide)
    first = to_batch(take(data, slice(1)), model, guide)
    with seeded(0, first[0].device):
        like = log_weights(model, guide, first, 1)[0]  # an error before the work, not after it
    kl_global = _kl_global(guide, num_train, like)
    _weight_information(guide, first, like)
    family = _family(guide, JointDensity(model, first, vectorized=True))
    reference: Any = {
        "num_samples": reference_samples, "num_chains": num_chains, "num_steps": num_steps,
        "seed": settings.seed, "chunk_size": size, "vectorized": settings.vectorized,
    }  # fmt: skip
    parts: list[dict[str, Any]] = []
    index = settings.first_image
    with progress_bar(settings.progress, "inference gap", size_of(data), unit="image") as bar:
        for batch in batches(data, model, guide, size=min(BATCH, size or BATCH)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ParetoWarning)  # the result tells it of each image
                found = reference_evidence(model, batch, guide, first_image=index, **reference)
            values = {name: estimate[0] for name, estimate in found.estimates.items()}
            parts.append(
                _elbos(model, guide, batch, num_samples, max_optimum_steps, settings, index)
                | {
                    "log_evidence": found.log_evidence,
                    "evidence_error": found.standard_error,
                    "estimator": found.estimator,
                    "pareto_k": found.pareto_k,
                    "trusted": found.trusted,
                    "refined": values[f"IWAE({reference_samples}), instance:full"],
                    "annealed": values.get(f"AIS({num_steps})", found.log_evidence * math.nan),
                    "weight_information": _weight_information(guide, batch, like),
                    "kl_global": kl_global.expand(len(batch[0])),
                }
            )
            bar.update(len(batch[0]))
            index += len(batch[0])
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    estimator = tuple(name for names in columns.pop("estimator") for name in names)
    joined = {name: torch.cat(values) for name, values in columns.items()}
    return Gap(**joined, estimator=estimator, family=family)


def _elbos(
    model: PyroProgram,
    guide: Any,
    batch: Batch,
    num_samples: int,
    max_steps: int,
    settings: Settings,
    index: int,
) -> dict[str, Tensor]:
    """The ELBOs of the guide and of both optima with common noise, and the guide's IWAE."""
    seed, size, device = settings.seed or 0, settings.chunk_size, batch[0].device
    best = {}
    for covariance in get_args(Covariance):
        with seeded(image_seed(seed, index, f"best {covariance}"), device):
            best[covariance] = optimise_gaussian(
                model, batch, covariance, start=guide, max_steps=max_steps, chunk_size=size,
                vectorized=settings.vectorized,
            )  # fmt: skip
    proposals = {f"elbo_{c}": PrecomputedPosterior(found.posterior) for c, found in best.items()}
    columns = {"converged": best["full"].converged & best["diagonal"].converged}
    for name, q in {"elbo": guide, **proposals}.items():
        with seeded(image_seed(seed, index, "elbo"), device):
            log_w = log_weights(
                model, q, batch, num_samples, chunk_size=size,
                vectorized=None if best["full"].density.vectorized else False,
            )  # fmt: skip
        columns[name] = log_w.mean(0)
        columns[f"{name}_error"] = log_w.std(0) / math.sqrt(num_samples)
        if q is guide:
            count = min(_PROTOCOL_SAMPLES, num_samples)
            columns["iwae"] = evidence_curve(log_w, [count])[count]
    return columns


def _kl_global(guide: Any, num_train: int | None, like: Tensor) -> Tensor:
    """KL(q(W, U) ‖ p)/N of a random encoder, NaN if it is not known, zero for others: ()."""
    if not isinstance(guide, HasMoments):
        return like.new_tensor(math.nan if _is_random(guide) else 0.0)
    if num_train is None or num_train < 1:
        raise ValueError(
            "num_train must be the number of training images, by which eq. (2) divides the "
            f"guide's kl_weights(): got {num_train}"
        )
    return guide.kl_weights().to(like) / num_train


def _weight_information(guide: Any, batch: Batch, like: Tensor) -> Tensor:
    """I(z; (W, U) | x), NaN if it is not known, zero if nothing is random: (B,)."""
    # without posterior(x), z is scored given the weights, and the ELBO includes their cost
    is_paid = not (_is_random(guide) and isinstance(guide, HasPosterior))
    if isinstance(guide, HasMoments) and not is_paid:
        return weight_information(guide, batch[0]).to(like)
    return like.new_full((len(batch[0]),), 0.0 if is_paid else math.nan)


def _is_random(guide: Any) -> bool:
    return isinstance(guide, HasGlobalPrior) and bool(guide.global_prior())


def _family(guide: Any, density: JointDensity) -> Family:
    """The family whose optimum is the guide's own."""
    batch = density.batch
    with seeded(0, batch[0].device):
        q: Any = posterior_of(guide, *batch)
    if q is not None:
        known = density.is_plain or isinstance(q, LatentPosterior)
        return _family_of([base_of(q)]) if known else "other"
    traces: list[Any] = []
    for seed in (0, 1):
        with seeded(seed, batch[0].device):
            traces.append(poutine.trace(guide).get_trace(*batch).nodes)
    nodes = traces[0]
    sampled = {name: site for name, site in nodes.items() if is_sampled(site)}
    if any(site["is_observed"] for site in sampled.values()):  # a factor
        return "other"
    free = [name for name, site in sampled.items() if not is_point(site["fn"])]
    scores = [
        [trace[name]["fn"].log_prob(nodes[name]["value"]) for name in free] for trace in traces
    ]
    # the draws are u itself, and none depends on another
    values = [nodes[name]["value"].reshape(len(density), -1) for name in free]
    u = density.unconstrain({name: nodes[name]["value"] for name in density.sites}).u
    drawn = torch.cat(values, dim=-1)
    same = u.shape == drawn.shape and agree(u.sort(-1).values, drawn.sort(-1).values)
    independent = all(agree(a, b) for a, b in zip(*scores, strict=True))
    return _family_of([nodes[name]["fn"] for name in free]) if same and independent else "other"


def _family_of(parts: list[Any]) -> Family:
    if all(isinstance(part, Independent) or part.event_dim == 0 for part in parts):
        return "diagonal"
    full = len(parts) == 1 and isinstance(parts[0], MultivariateNormal | LowRankMultivariateNormal)
    return "full" if full else "other"
