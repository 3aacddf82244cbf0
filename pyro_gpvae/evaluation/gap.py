r"""The inference gap log p(x) - ELBO of each image, and what it consists of."""

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
from tqdm.auto import tqdm

from pyro_gpvae.core._programs import with_own_parameters
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.images import to_float
from pyro_gpvae.evaluation.importance import (
    ParetoWarning,
    device_and_dtype,
    evidence_curve,
    log_weights,
)
from pyro_gpvae.evaluation.reference import reference_evidence
from pyro_gpvae.evaluation.uncertainty import weight_information
from pyro_gpvae.model._precomputed import PrecomputedPosterior
from pyro_gpvae.model.guide import make_guide

__all__ = ["BATCH", "LADDER", "Gap", "decompose"]

Family = Literal["diagonal", "full", "other"]

#: The rungs from log p(x) down to the bound that was trained, in this order: what each one costs.
LADDER = {
    "beyond_gaussian": "best full Gaussian instead of p(z|x)",
    "independence": "best diagonal Gaussian instead of the best full one",
    "encoder": "the guide instead of the best diagonal Gaussian",
    "spread": "spread of a random encoder, I(z; (W, U) | x)",
    "kl_global": "KL(q(W, U) ‖ p) / N",
}

#: The K of the published scores, with the guide's own q.
_PROTOCOL_SAMPLES = 100
#: How many images are worked on together; one of them has the same numbers in any multiple of it.
BATCH = 25


@dataclass(frozen=True, repr=False)
class Gap:
    r"""The decomposition of the inference gap of B images; tensors have shape (B,), in nats.

    For every guide the same ladder (Cremer et al. 2018), with the Gaussians of highest ELBO of
    each image, of full and of diagonal covariance:

    .. math::
        \log p(x) - ELBO[q] = \underbrace{\log p(x) - ELBO[q^*_{full}]}_{\text{beyond Gaussian}}
        + \underbrace{ELBO[q^*_{full}] - ELBO[q^*_{diag}]}_{\text{independence}}
        + \underbrace{ELBO[q^*_{diag}] - ELBO[q]}_{\text{encoder}}

    The approximation gap ends, and the amortisation gap begins, at the optimum of the guide's
    own family: the diagonal one if q(z|x) is independent over dimensions, the full one if it is
    a multivariate normal. Flows and mixtures have no cheap optimum; the full Gaussian is their
    reference, and the amortisation gap may be negative where they beat it.

    A random encoder (GPVAE) pays two prices more before the bound that it was trained on, eq. (2)
    of the supplement:

    .. math:: bound = ELBO[q(z|x)] - I(z; (W, U) | x) - \tfrac1N KL(q(W, U) \| p)

    Attributes:
        log_evidence: log p(x), see :func:`pyro_gpvae.evaluation.reference.reference_evidence`.
        evidence_error: Its Monte-Carlo standard error; likewise the following.
        estimator: What it is from, a name an image.
        pareto_k: The tail of the weights behind it: above 0.7 it cannot be trusted.
        trusted: Whether any estimate of log p(x) is reliable, see
            :func:`pyro_gpvae.evaluation.reference.reference_evidence`.
        elbo: Of the guide's q(z|x), or, without ``posterior(x)``, of its program given its random
            weights, which then pays for them here.
        elbo_error: Its error.
        elbo_full: Of the best Gaussian with full covariance.
        elbo_full_error: Its error.
        elbo_diagonal: Of the best Gaussian with diagonal covariance.
        elbo_diagonal_error: Its error.
        converged: Whether both optima are within their tolerance.
        iwae: The importance-weighted bound for K = 100 with the guide's own q.
        refined: The same with the full optimum as proposal, K = ``reference_samples``.
        annealed: By annealed importance sampling; not a number if it was not asked for.
        spread: I(z; (W, U) | x); zero for a guide that is not random, or whose ``elbo`` pays for
            it already; not a number where it is not known.
        kl_global: KL(q(W, U) ‖ p)/N, the same for each image; not a number where it is not known.
        family: Of the guide's q(z|x): "diagonal", "full", or "other".
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
    spread: Tensor
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
        return self.elbo - self.spread - self.kl_global

    @property
    def _optimum(self) -> Tensor:
        return self.elbo_diagonal if self.family == "diagonal" else self.elbo_full

    def table(self) -> pd.DataFrame:
        """A row an image: the fields above, and the gaps that follow from them."""
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


@with_own_parameters
@torch.no_grad()
def decompose(
    model: Any,
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
    r"""Measures where the inference gap of each image comes from; see :class:`Gap`.

    All ELBOs of an image are averages of the log weights of ``num_samples`` draws with the same
    noise; the optima start from the guide's mean.

    A guide with random weights, ``global_prior()``, tells their prices by two methods more, which
    the guide contract leaves to it:

    * ``moments(x) -> (a, v, b, r)``, each (B, p): means and variances of f(x) ~ N(a, v) and of
      log h(x) ~ N(b, r), for z | f, h ~ N(f, h²). It gives ``spread``.
    * ``kl_weights() -> Tensor``, shape (): KL(q(W, U) ‖ p) in nats. It gives ``kl_global``.

    Without them ``spread``, ``kl_global`` and ``bound`` are not known: NaN, "not known" in tables.

    **A limit.** The optima, and all estimates of log p(x) from them, start from one mode of the
    posterior. Where it has several, log p(x) and the approximation gap may be too small by -log of
    that mode's share, with small errors, ``converged`` and ``trusted``: see
    :func:`pyro_gpvae.evaluation.reference.reference_evidence`.

    References:
        Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders*, 2018.
        https://arxiv.org/abs/1801.03558

    Arguments:
        model: An :class:`pyro_gpvae.ImageModel`.
        guide: Any guide for it, of ours or of the user's.
        x: Images (B, C, H, W), uint8 or floats in [0, 1].
        num_train: The number N of training images, which eq. (2) divides KL(q(W, U) ‖ p) by;
            needed for a guide with ``kl_weights()`` only.
        num_samples: Draws per image for each ELBO.
        reference_samples: Draws per image from the guide and from the full optimum, for log p(x).
        num_chains: Chains per image of annealed importance sampling from the full optimum, at
            least 2; 0 is none. Fewer than 8 are never trusted, see
            :func:`pyro_gpvae.evaluation.reference.reference_evidence`.
        num_steps: Its steps.
        max_optimum_steps: Of the optimisation of each image's Gaussians.
        chunk_size: How many latent vectors are decoded at once; bounds the memory. It changes the
            order of random numbers, and so the results within their errors.
        seed: The same seed gives the same numbers; the global random state is left as it was.
        first_image: The index of the first image of x, where x is a part of a data set.
        progress: Whether to show a progress bar over images; a text is its label.

    Raises:
        ValueError: If the guide has no density, a number is too small, ``num_train`` is missing,
            x is not a batch of images, or ``moments(x)`` is not as above.
        NonFiniteError: If a density is NaN or +∞; names the images.
        torch.linalg.LinAlgError: If the curvature of an image's log joint is not finite.
    """
    for name, value, least in (
        ("num_samples", num_samples, 2),
        ("reference_samples", reference_samples, 2),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if not isinstance(x, Tensor) or x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be images (B, C, H, W), got {getattr(x, 'shape', type(x))}")
    if not (hasattr(model, "log_joint") and hasattr(model, "check_images")):
        raise ValueError(
            f"the optimum of each image needs an ImageModel, got {type(model).__name__}"
        )
    model.check_images(x)
    device, dtype = device_and_dtype(model, x)
    like = torch.empty((), device=device, dtype=dtype)
    kl_global = _kl_global(guide, num_train, like)
    first = to_float(x[:1].to(device), dtype)
    family = _family(guide, first)
    _spread(guide, first)  # an error before the work, not after it
    start = guide if hasattr(guide, "posterior") else None
    full, diagonal = (
        make_guide(spec, model, warm_start=start, max_steps=max_optimum_steps)
        for spec in ("instance:full", "instance:diagonal")
    )
    parts: list[dict[str, Tensor]] = []
    estimators: list[str] = []
    size = min(BATCH, chunk_size or BATCH)
    label = progress if isinstance(progress, str) else "inference gap"
    with tqdm(total=len(x), desc=label, unit="image", disable=not progress) as bar:
        for begin in range(0, len(x), size):
            images = to_float(x[begin : begin + size].to(device), dtype)
            index = first_image + begin
            with seeded(image_seed(seed, index, "best full"), device):
                best_full = full.optimise(images)
            with seeded(image_seed(seed, index, "best diagonal"), device):
                best_diagonal = diagonal.optimise(images)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ParetoWarning)  # the result says it of each image
                reference = reference_evidence(
                    model,
                    images,
                    guide,
                    num_samples=reference_samples,
                    num_chains=num_chains,
                    num_steps=num_steps,
                    chunk_size=chunk_size,
                    seed=seed,
                    first_image=index,
                )
            said = {name: estimate[0] for name, estimate in reference.estimates.items()}
            estimators.extend(reference.estimator)
            part = {
                "log_evidence": reference.log_evidence,
                "evidence_error": reference.standard_error,
                "pareto_k": reference.pareto_k,
                "trusted": reference.trusted,
                "refined": said[f"IWAE({reference_samples}), instance:full"],
                "converged": best_full.converged & best_diagonal.converged,
                "spread": _spread(guide, images).to(reference.log_evidence),
                "kl_global": kl_global.expand(len(images)),
            }
            nothing = torch.full_like(reference.log_evidence, math.nan)
            part["annealed"] = said.get(f"AIS({num_steps})", nothing)
            log_w = {}
            for name, q in (
                ("elbo", guide),
                ("elbo_full", PrecomputedPosterior(best_full.posterior)),
                ("elbo_diagonal", PrecomputedPosterior(best_diagonal.posterior)),
            ):
                with seeded(image_seed(seed, index, "elbo"), device):  # common noise
                    log_w[name] = log_weights(model, q, images, num_samples, chunk_size=chunk_size)
            for name, values in log_w.items():
                part[name] = values.mean(0)
                part[f"{name}_error"] = values.std(0) / math.sqrt(num_samples)
            curve = evidence_curve(log_w["elbo"], [min(_PROTOCOL_SAMPLES, num_samples)])
            part["iwae"] = next(iter(curve.values()))
            parts.append(part)
            bar.update(len(images))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Gap(**columns, estimator=tuple(estimators), family=family)


@torch.no_grad()
def _kl_global(guide: Any, num_train: int | None, like: Tensor) -> Tensor:
    """KL(q(W, U) ‖ p)/N of a random encoder, NaN if it does not say, zero for others: ()."""
    if not hasattr(guide, "kl_weights"):
        return like.new_full((), math.nan if _is_random(guide) else 0.0)
    if num_train is None or num_train < 1:
        raise ValueError(
            "num_train must be the number of training images, by which eq. (2) divides the "
            f"guide's kl_weights(): got {num_train}"
        )
    kl: Tensor = guide.kl_weights()
    return kl.to(like) / num_train


def _spread(guide: Any, x: Tensor) -> Tensor:
    """I(z; (W, U) | x), NaN if the guide does not tell, zero if there is none: (B,)."""
    # without posterior(x), z is scored given the weights, and the ELBO has paid
    if not (_is_random(guide) and hasattr(guide, "posterior")):
        return x.new_zeros(len(x))
    if not hasattr(guide, "moments"):
        return x.new_full((len(x),), math.nan)
    return weight_information(guide, x)


def _is_random(guide: Any) -> bool:
    return hasattr(guide, "global_prior") and bool(guide.global_prior())


@torch.no_grad()
def _family(guide: Any, x: Tensor) -> Family:
    """Which optimum is the guide's own; an error if it has no density."""
    with seeded(0, x.device):
        if hasattr(guide, "posterior"):
            q = guide.posterior(x)
        else:
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
            f"the guide {type(guide).__name__} has no density: its z is "
            f"{'a point' if isinstance(inner, Delta) else type(q).__name__}, so that its ELBO is "
            "minus infinity or unknown. The gap needs a guide whose q(z|x) has a log_prob."
        ) from None
    if not hasattr(guide, "posterior"):
        return "other"
    if isinstance(q, Independent):
        return "diagonal"
    return "full" if isinstance(q, MultivariateNormal | LowRankMultivariateNormal) else "other"
