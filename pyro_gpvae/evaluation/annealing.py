"""AIS and BDMC: log p(x) by annealed importance sampling, and bounds on both sides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack, cast

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_gpvae.core._chunks import halving_chunks
from pyro_gpvae.core._errors import NonFiniteError, check_at_least, nonfinite_as_error
from pyro_gpvae.core._programs import PyroProgram
from pyro_gpvae.core._progress import progress_bar, tqdm
from pyro_gpvae.core._seeds import image_seed, seeded
from pyro_gpvae.data.batch import Batch, Data, size_of, take, to_batch
from pyro_gpvae.evaluation._common import (
    MAX_IMAGES,
    Settings,
    Work,
    batches,
    check_amortised,
    check_log_weights,
    device_of,
    evaluator,
)
from pyro_gpvae.evaluation._hmc import AnnealingPath, Forward, Start, chains_with_pilots
from pyro_gpvae.evaluation.importance import Evidence, ParetoWarning
from pyro_gpvae.model.density import JointDensity
from pyro_gpvae.model.guide import check_program_data
from pyro_gpvae.model.image_model import ImageModel

__all__ = [
    "AnnealedEvidence", "Sandwich", "annealed_evidence", "bidirectional", "sigmoidal_schedule",
]  # fmt: skip

_Result = TypeVar("_Result")
_WEIGHT = "a log p(x, z) or log q(z|x) in annealing"
#: The smallest effective number of chains that is not warned of.
_MIN_EFFECTIVE = 3


@dataclass(frozen=True)
class AnnealedEvidence:
    """Annealed estimates of log p(x) for B images, in nats; every tensor has shape (B,).

    Attributes:
        log_evidence: log of the mean weight of the chains; a lower bound in expectation.
        standard_error: Its Monte-Carlo standard error. It is too small if few chains carry the
            weight, and does not see a mode that no chain has found.
        effective_sample_size: (Σ w)² / Σ w² over chains, between 1 and ``num_chains``.
        acceptance_rate: The mean acceptance probability of the HMC moves.
        num_chains: The number of chains per image.
        num_steps: The number of steps of the schedule.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance_rate: Tensor
    num_chains: int
    num_steps: int


@dataclass(frozen=True)
class Sandwich:
    """Bounds of log p(x), in expectation, for B simulated images, in nats; each (B,).

    Attributes:
        lower, lower_error: From the start to the posterior, and its Monte-Carlo standard error.
        upper, upper_error: From the posterior back to the start, and its error for this z.
        x: The simulated data, (B, ...), not confined to [0, 1]; a tuple for a model of tuples.
        z: The latent vectors u that they were simulated from, (B, n).
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor
    x: Any
    z: Tensor

    @property
    def gap(self) -> float:
        """The mean of upper - lower over the images."""
        return float((self.upper - self.lower).mean())


@evaluator
def annealed_evidence(
    model: PyroProgram,
    data: Data,
    guide: PyroProgram | None = None,
    *,
    num_chains: int = 16,
    num_steps: int = 100,
    num_leapfrog: int = 3,
    **work: Unpack[Work],
) -> AnnealedEvidence:
    r"""Estimates log p(x) of every image by annealed importance sampling (AIS, Neal 2001).

    .. math::
        \log f_\beta(u) = (1 - \beta) \log q_0(u) + \beta \log p(x, u), \qquad
        \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
                 [\log p(x, u_{t-1}) - \log q_0(u_{t-1})]

    for unconstrained latents u, see :class:`pyro_gpvae.model.density.JointDensity`. Chains start at
    :math:`u_0 \sim q_0`, the prior or the guide's q(z|x), and follow a sigmoidal schedule β with
    one HMC move after each step. The mean of w is p(x) exactly. For every four chains a pilot chain
    adapts the step size to 65 % acceptance and is then discarded: a chain that adapted to its own
    past would have a biased weight. Momenta have the inverse covariance of the start. Every image
    has its own random numbers, so results do not depend on batches or chunks, except for rounding
    and for guides whose ``posterior(x)`` draws random numbers. Warns of images for which fewer than
    about three chains carry the weight.

    References:
        Wu, Burda, Salakhutdinov and Grosse, *On the quantitative analysis of decoder-based
        generative models*, 2017. https://arxiv.org/abs/1611.04273

    Arguments:
        model, data: See :func:`pyro_gpvae.log_weights`. All latents must be continuous.
        guide: A guide with ``posterior(x)``, or whose only site is q(z|x), to start from; None
            starts from the model's prior.
        num_chains: The number of chains per image.
        num_steps: The number T of steps of the schedule.
        num_leapfrog: The number of gradients per HMC move.
        work: See :class:`pyro_gpvae.evaluation._common.Work`.

    Raises:
        ValueError: If a number is not positive, the data do not fit the model, the guide has no
            density, or the model has a discrete latent site or observes nothing.
        NonFiniteError: If log p(x, u) or log q(u) is NaN or +∞ where a chain starts; names the
            images. Moves to such a u are rejected.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> x = model.images(3)
        >>> result = annealed_evidence(model, x, seed=0)
        >>> bool(((result.log_evidence - model.log_evidence(x)).abs() < 0.2).all())
        True
    """
    check_program_data(model, data)
    annealing = _Annealing(model, guide, num_chains, num_steps, num_leapfrog, Settings(**work))

    def run(size: int) -> AnnealedEvidence:
        with annealing.bar(-(-size_of(data) // size) * num_steps) as bar:
            parts = [chains for chains, _ in annealing.forward(data, size, bar)]
        evidence = Evidence.from_log_weights(torch.cat([part.log_weights for part in parts], 1))
        return AnnealedEvidence(
            evidence.log_evidence,
            evidence.standard_error,
            evidence.effective_sample_size,
            torch.cat([part.acceptance for part in parts], 1).mean(0),
            num_chains,
            num_steps,
        )

    result = annealing.run(run, data)
    few = int((result.effective_sample_size < min(_MIN_EFFECTIVE, num_chains / 2)).sum())
    if few:
        warnings.warn(
            f"fewer than {_MIN_EFFECTIVE} of {num_chains} chains carry the weight of {few} of "
            f"{size_of(data)} images: their log p(x) by annealing is too low by an unknown amount, "
            "and so is its standard error. Raise num_steps, or start from a better guide",
            ParetoWarning,
            stacklevel=4,
        )
    return result


@evaluator
def bidirectional(
    model: PyroProgram,
    guide: PyroProgram | None = None,
    *,
    num_images: int,
    like: Data | None = None,
    num_chains: int = 16,
    num_steps: int = 100,
    num_leapfrog: int = 3,
    **work: Unpack[Work],
) -> Sandwich:
    r"""Bounds log p(x) on both sides for images simulated from the model (BDMC).

    The z that an image x was simulated from is an exact draw of p(z|x). Chains from it back to
    the start :math:`q_0` have weights with :math:`E[1/w] = 1/p(x)`, so that, in expectation,

    .. math::
        \log \tfrac1M \sum_m w_m^{\text{forward}}
        \;\le\; \log p(x) \;\le\; -\log \tfrac1M \sum_m 1 / w_m^{\text{back}} .

    Where both bounds meet, annealing has converged, including all modes, for images like these.

    References:
        Grosse, Ancha and Roy, *Measuring the reliability of MCMC inference with bidirectional
        Monte Carlo*, 2016. https://arxiv.org/abs/1606.02275

    Arguments:
        model: As in :func:`annealed_evidence`.
        num_images: The number of images to simulate. An image of a seed is the same in every call.
        like: Data with one member, whose observations are simulated, and whose other tensors, such
            as labels, are kept; by default zeros of the shape of an
            :class:`pyro_gpvae.ImageModel`.
        guide, num_chains, num_steps, num_leapfrog, work: As in :func:`annealed_evidence`, and so
            are the errors.

    Example:
        >>> from pyro_gpvae.testing import linear_gaussian
        >>> model = linear_gaussian((1, 4, 4), latent_dim=2).double()
        >>> bidirectional(model, num_images=8, seed=0).gap < 0.2
        True
    """
    check_at_least(1, num_images=num_images)
    if like is None:
        if not isinstance(model, ImageModel):
            raise ValueError("the model has no image_shape: pass data of one member as like=")
        like = torch.zeros(1, *model.image_shape)
    blank = to_batch(take(like, slice(1)), model, guide)
    annealing = _Annealing(model, guide, num_chains, num_steps, num_leapfrog, Settings(**work))
    indices = range(annealing.first_image, annealing.first_image + num_images)

    def run(size: int) -> Sandwich:
        density = JointDensity(model, blank, vectorized=True)
        pairs = [_simulate(density, annealing.seed, index) for index in indices]
        data = tuple(map(torch.cat, zip(*(batch for batch, _ in pairs), strict=True)))
        u = torch.cat([u for _, u in pairs])
        lower: list[Tensor] = []
        upper: list[Tensor] = []
        with annealing.bar(-(-num_images // size) * 2 * num_steps) as bar:
            for forward, path in annealing.forward(data, size, bar):
                begin = sum(part.shape[1] for part in lower)
                end = u[begin : begin + forward.log_weights.shape[1]]
                back = path.back(end, forward.steps, annealing.schedule, num_leapfrog, bar)
                check_log_weights(back, indices[begin], _WEIGHT)
                lower.append(forward.log_weights)
                upper.append(-back)
        below, above = (Evidence.from_log_weights(torch.cat(part, 1)) for part in (lower, upper))
        errors = below.standard_error, above.standard_error
        x = data[0] if isinstance(like, Tensor) else data
        return Sandwich(below.log_evidence, -above.log_evidence, *errors, x, u)

    return annealing.run(run, blank)


def sigmoidal_schedule(num_steps: int, steepness: float = 4.0) -> list[float]:
    r"""Returns :math:`\beta_0 = 0, \dots, \beta_T = 1`, equally spaced through a sigmoid.

    Example:
        >>> [round(beta, 3) for beta in sigmoidal_schedule(4)]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    check_at_least(1, num_steps=num_steps)
    s = torch.linspace(-steepness, steepness, num_steps + 1, dtype=torch.float64, device="cpu")
    s = s.sigmoid()
    return cast(list[float], ((s - s[0]) / (s[-1] - s[0])).tolist())


@dataclass
class _Annealing:
    """The settings that both estimators share, and the forward chains."""

    model: PyroProgram
    guide: PyroProgram | None
    num_chains: int
    num_steps: int
    num_leapfrog: int
    settings: Settings

    def __post_init__(self) -> None:
        check_at_least(1, num_chains=self.num_chains, num_leapfrog=self.num_leapfrog)
        check_amortised(self.guide)
        self.schedule = sigmoidal_schedule(self.num_steps)
        self.first_image, self.vectorized = self.settings.first_image, self.settings.vectorized
        seed = self.settings.seed
        self.seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed

    def run(self, work: Callable[[int], _Result], data: Data) -> _Result:
        """Calls the work with the number of images whose chains fit into a chunk."""
        device = device_of(data, self.model, self.guide)
        chains, size = chains_with_pilots(self.num_chains), self.settings.chunk_size
        with seeded(self.seed, device), device:  # instead of a default device
            return halving_chunks(lambda size: work(max(1, size // chains)), size, device)

    def bar(self, total: int) -> tqdm:
        return progress_bar(self.settings.progress, "annealing", total)

    def forward(self, data: Data, size: int, bar: tqdm) -> Iterator[tuple[Forward, AnnealingPath]]:
        """Yields the forward chains and the paths of ``size`` images at a time."""
        index = self.first_image
        # the guide is asked for whole parts, of at least MAX_IMAGES images
        for batch in batches(data, self.model, self.guide, size=-(-MAX_IMAGES // size) * size):
            density = JointDensity(self.model, batch, vectorized=self.vectorized)
            self.vectorized = density.vectorized
            indices = range(index, index + len(density))
            start = Start.of(density, self.guide, self.seed, indices)
            for at in range(0, len(density), size):
                part = slice(at, at + size)
                path = AnnealingPath.of(start[part], self.seed, indices[part], self.num_chains)
                chains = path.forward(self.schedule, self.num_leapfrog, bar)
                check_log_weights(chains.log_weights, index + at, _WEIGHT)
                yield chains, path
            index += len(density)


def _simulate(density: JointDensity, seed: int, index: int) -> tuple[Batch, Tensor]:
    """Draws one member of the data from the model, and its u (1, n)."""
    structure, batch = density.structure, list(density.batch)
    program = poutine.uncondition(poutine.block(density.model, hide_fn=structure.is_global))
    with seeded(image_seed(seed, index, "simulation"), batch[0].device):
        try:
            with nonfinite_as_error():
                nodes: Any = poutine.trace(program).get_trace(*batch).nodes
        except NonFiniteError as error:
            raise NonFiniteError(
                f"image {index} cannot be simulated: {error}", images=[index]
            ) from error
    simulated: dict[int, Tensor] = {}
    for name, site in nodes.items():
        if not structure.is_local(site) or not site["infer"].get("was_observed"):
            continue
        if site["infer"].get("_deterministic"):
            continue
        number = _tensor_of(site["infer"]["obs"], batch)
        if number is None or number in simulated or isinstance(site["fn"], Unit):
            raise ValueError(
                f"the data cannot be simulated: the observation {name!r} is not one of their "
                "tensors, or another site observes the same one"
            )
        simulated[number] = site["value"].reshape(batch[number].shape).to(batch[number].dtype)
    latents = {name: nodes[name]["value"] for name in density.sites}
    data = tuple(simulated.get(number, tensor) for number, tensor in enumerate(batch))
    return data, density.unconstrain(latents).u


def _tensor_of(value: Tensor, batch: Sequence[Tensor]) -> int | None:
    """The number of the tensor that is observed as this value, perhaps in another shape."""
    alike = [n for n, tensor in enumerate(batch) if tensor.numel() == value.numel()]
    same = [n for n in alike if batch[n].data_ptr() == value.data_ptr()]
    equal = [n for n in alike if torch.equal(batch[n].flatten(), value.flatten().to(batch[n]))]
    return next(iter(same or equal), None)
