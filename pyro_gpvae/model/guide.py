r"""The contract of models and guides, and loading guides by name.

**What a program may be.** A model or guide is any Pyro callable of a batch, ``model(*batch)`` and
``guide(*batch)``: a function, a ``functools.partial``, a bound method such as ``vae.guide``, an
``nn.Module``, a ``PyroModule``, or one of Pyro's autoguides. The batch consists of one or several
tensors with the same first dimension B. Images of uint8 become floats in [0, 1], other floats get
the dtype of the parameters, or the default dtype if there are none, and other integers stay
integers. Parameters, buffers, training mode
and device are those of the modules to which the program belongs or refers.

**The data plate** is the plate at dimension -1 with B members, or without a size; its name is free.
What belongs to one member of the batch is sampled inside it: latent sites of any number, name,
shape and support, and at least one observed site of the model. Sites outside are global. The prior
of a global site belongs to the model, or to the guide's ``global_prior()``. :class:`ImageModel` and
its guides sample the site ``"z"`` in ``plate("data", len(x))``.

**Auxiliary sites** of the guide, which the model does not have, are marked with
``infer={"is_auxiliary": True}``. A latent that is a function of one is a ``Delta``, whose
``log_density`` is minus the log-Jacobian, or zero for the identity; another one is refused. Random
variables that the latents are no function of, such as f and log h of a random encoder, are sampled
under ``poutine.mask(mask=False)``: the mean of p(x, z) / q(z | x, auxiliary) is then p(x). An
ELBO that scores them is not a bound. If particles are vectorised, tensors computed from a global or
auxiliary draw have shape (K, B, ...).

**What is optional.** Each ``Protocol`` of this module is an optional part of the contract; the
library uses the parts that it finds.

**What is refused**, with an error that names it: a program without a data plate, with several
that could be meant, or with one that subsamples; a model that observes nothing; a guide that
observes something else than a factor; training with a guide that lacks a latent site of the model;
parameters or sites in half precision; parameters that would never be trained; minibatches for
Pyro's autoguides, which have parameters for each member of the data, and for a guide that draws the
latents of all members from one site; objectives that enumerate sites; and data that the model's
``check_images`` refuses.

A guide that is found by name is a class ``MyGuide(model, **options)``. It is registered as an entry
point of the group ``pyro_gpvae.guides``, or named as ``module:Class``.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, Protocol, runtime_checkable

from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_gpvae.core._programs import modules_of
from pyro_gpvae.core._registry import distribution_name, import_named, registered_guides
from pyro_gpvae.data.batch import Data, batch_of, check_data
from pyro_gpvae.model._local import complete

__all__ = [
    "HasBlocks",
    "HasCheck",
    "HasDiagnostics",
    "HasElbo",
    "HasGlobalPrior",
    "HasMoments",
    "HasPosterior",
    "HasUncertainty",
    "available_guides",
    "check_program_data",
    "load_guide",
    "make_guide",
    "posterior_of",
]


@runtime_checkable
class HasCheck(Protocol):
    """A model that checks its data before training and evaluation; it raises ValueError."""

    def check_images(self, /, *data: Tensor) -> None: ...


@runtime_checkable
class HasPosterior(Protocol):
    """A guide with an exact q(z|x), batch shape (B,), event shape (p,): evaluation's proposal."""

    def posterior(self, /, *batch: Tensor) -> TorchDistribution: ...


@runtime_checkable
class HasGlobalPrior(Protocol):
    """A guide with global random weights outside the data plate, and their priors by name."""

    def global_prior(self) -> Mapping[str, TorchDistribution]: ...


@runtime_checkable
class HasElbo(Protocol):
    """A guide that is trained by another :class:`pyro.infer.ELBO` than ``Trace_ELBO``."""

    def elbo(self) -> Any: ...


@runtime_checkable
class HasBlocks(Protocol):
    """A guide with several :class:`pyro_gpvae.model.elbo.Block`, which are trained together."""

    def blocks(self, model: Any, /) -> Sequence[Any]: ...


@runtime_checkable
class HasDiagnostics(Protocol):
    """A guide that reports scalars by name, which :func:`pyro_gpvae.fit` logs after each epoch."""

    def diagnostics(self, /, *batch: Tensor) -> Mapping[str, Tensor]: ...


@runtime_checkable
class HasUncertainty(Protocol):
    """A guide with a score (B,) that is higher where its inference is less certain."""

    def uncertainty(self, /, *batch: Tensor) -> Tensor: ...


@runtime_checkable
class HasMoments(Protocol):
    """A random encoder, as :func:`pyro_gpvae.decompose` needs it.

    ``moments`` returns mean and variance of f, then of log h, each (B, p); ``kl_weights`` returns
    KL(q(W, U) || p(W, U)) in nats.
    """

    def moments(self, x: Tensor, /) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def kl_weights(self) -> Tensor: ...


def posterior_of(guide: Any, *batch: Tensor) -> TorchDistribution | None:
    """Returns q(z|x) of a guide, or None if the guide has no ``posterior``."""
    return complete(guide.posterior(*batch)) if isinstance(guide, HasPosterior) else None


def check_program_data(model: Any, data: Data, name: str = "data") -> None:
    """Checks that data are tensors with the same first dimension, which the model accepts.

    Raises:
        TypeError: If they are something else, such as a list.
        ValueError: If there is no member, or if ``check_images`` of the model refuses them.
    """
    check_data(data, name)
    owner = modules_of(model).get("", model)
    if isinstance(owner, HasCheck):
        owner.check_images(*batch_of(data))


def available_guides() -> dict[str, EntryPoint]:
    """Returns the registered guides by name, sorted."""
    return {name: points[0] for name, points in registered_guides().items()}


def load_guide(name: str) -> Callable[..., Any]:
    """Returns the guide class of a registered name, or else of ``module:Class``.

    Raises:
        ValueError: If there is no such guide, or if two distributions register the name.

    Example:
        >>> load_guide("gp").__name__
        'GPGuide'
    """
    registered = registered_guides()
    points = registered.get(name, [])
    if len(points) > 1:
        by = " and ".join(distribution_name(point) for point in points)
        raise ValueError(
            f"the distributions {by} both register the guide {name!r}: uninstall one of them, or "
            f"name the guide as {' or '.join(repr(point.value) for point in points)}"
        )
    module, _, attribute = name.partition(":")
    near = difflib.get_close_matches(module, registered, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near and not attribute.isidentifier() else ""
    if not (points or attribute):
        raise ValueError(
            f"unknown guide {name!r}: {hint}Registered guides are {', '.join(registered)}; "
            "name your own guide as 'module:Class'."
        )
    try:
        found = points[0].load() if points else getattr(import_named(module), attribute)
    except Exception as error:  # whatever the module raises
        raise ValueError(
            f"cannot load the guide {name!r}: {type(error).__name__}: {error}. {hint.capitalize()}"
            "Expected 'module:Class' in an installed module, which no other file may hide, or in "
            "the working directory."
        ) from error
    if not callable(found):
        raise ValueError(f"the guide {name!r} is {found!r}, expected a class or a function")
    return found


def make_guide(spec: str, model: Any, **defaults: Any) -> Any:
    """Builds a guide for a model from a line of text.

    Arguments:
        spec: ``NAME`` or ``MODULE:CLASS``, and optionally ``:OPTIONS``, which are separated by
            commas: values in the constructor's order, then ``key=value``.
        model: The first argument of the constructor.
        defaults: Further keyword arguments; options in ``spec`` override them.

    Raises:
        ValueError: If there is no such guide, or if it does not take the options.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = make_guide("gp:covariance=full,num_nodes=32", ImageModel((1, 28, 28), 2))
        >>> guide.num_nodes
        32
    """
    name, _, options = spec.partition(":")
    if name not in registered_guides() and options:
        attribute, _, options = options.partition(":")
        name = f"{name}:{attribute}"
    factory = load_guide(name)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if equals:
            kwargs[key.strip()] = _literal(value)
        elif kwargs:
            raise ValueError(f"in {spec!r}, the value {option!r} follows a key=value option")
        else:
            args.append(_literal(option))
    kwargs = defaults | kwargs
    try:
        signature = inspect.signature(factory)
        bound = signature.bind(model, *args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the guide {name!r} does not take these options ({error}); it is built by "
            f"{name}{signature}"
        ) from error
    for option, value in list(bound.arguments.items())[1:]:
        _check_type(spec, option, signature.parameters.get(option), value)
    return factory(model, *args, **kwargs)


def _check_type(spec: str, option: str, parameter: inspect.Parameter | None, value: Any) -> None:
    hint = str(getattr(parameter, "annotation", ""))
    kinds = {"int": int, "float": int | float, "bool": bool}
    kind = hint.removesuffix(" | None")
    if value is None and kind != hint:
        return
    wrong = kind in kinds and not isinstance(value, kinds[kind])
    wrong = wrong or (kind in ("int", "float") and isinstance(value, bool))
    if wrong or ("Module" in hint and isinstance(value, str | int | float)):
        raise ValueError(f"in the guide {spec!r}, {option} must be {hint}, got {value!r}")
    # options are numbers of layers, components or steps: a foreign file must not fill the memory
    if isinstance(value, int) and abs(value) > 10_000:
        raise ValueError(f"in the guide {spec!r}, {option} must be at most 10000, got {value!r}")


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text.strip()
    return value if isinstance(value, int | float | str | None) else text.strip()
