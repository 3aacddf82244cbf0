r"""The guide contract, and loading guides by name.

A guide is any Pyro callable ``guide(x)`` that samples the site ``"z"`` inside
``plate("data", len(x))`` for images x (B, C, H, W). Such a guide trains with
:class:`pyro.infer.SVI` or :func:`pyro_gpvae.fit`, and is evaluated by
:func:`pyro_gpvae.log_evidence`. The methods below are optional. Each has a ``Protocol`` in this
module, and the library uses the methods that it finds:

``posterior(x) -> Distribution``
    q(z|x), batch shape (B,), event shape (p,), with an exact normalised ``log_prob``. Evaluation
    uses it as the proposal. Without it, evaluation replays the callable.
``global_prior() -> dict[str, Distribution]``
    The priors of the guide's global random weights by name. The guide samples these sites outside
    the plate; :func:`pyro_gpvae.pair` adds them to the model.
``elbo() -> Objective``
    The objective that trains the guide, such as a :class:`pyro.infer.ELBO`; by default
    ``Trace_ELBO``.
``blocks(model) -> list[Block]``
    Objectives that are optimised in turn on every minibatch, each over its own parameters; by
    default one objective trains all parameters. See :class:`pyro_gpvae.model.elbo.Block`.
``diagnostics(x) -> dict[str, Tensor]``
    Scalars that :func:`pyro_gpvae.fit` logs after each epoch.
``uncertainty(x) -> Tensor``
    A score (B,) that is higher where the guide's inference is less certain.
``moments(x)`` and ``kl_weights()``
    Mean and variance of f and of log h, four tensors (B, p), and KL(q(W, U) ‖ p). A random encoder
    needs them for :func:`pyro_gpvae.decompose`, which computes I(z; W, U | x) from them.

A guide may have auxiliary sites in the plate, which the model does not have. Mark them with
``infer={"is_auxiliary": True}``, and sample them under ``poutine.mask(mask=False)``: the mean of
p(x, z) / q(z | x, auxiliary) is then p(x). An ELBO that scores them without a counterpart in the
model is not a bound, and training makes them as wide as possible. If particles are vectorised, a
second plate lies to the left of the images, so that tensors computed from a global or auxiliary
draw have shape (K, B, ...).

A guide that is found by name is a class whose constructor takes the model first, as in
``MyGuide(model, **options)``. It is registered as an entry point of the group
``pyro_gpvae.guides``, or named as ``module:Class``.
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

from pyro_gpvae.core._registry import (
    distribution_name,
    import_named,
    registered_guides,
)

__all__ = [
    "HasBlocks",
    "HasDiagnostics",
    "HasElbo",
    "HasGlobalPrior",
    "HasMoments",
    "HasPosterior",
    "HasUncertainty",
    "available_guides",
    "load_guide",
    "make_guide",
    "posterior_of",
]


@runtime_checkable
class HasPosterior(Protocol):
    """A guide with a posterior distribution for each image."""

    def posterior(self, x: Tensor, /) -> TorchDistribution:
        """Returns q(z|x), batch shape (B,), event shape (p,), normalised and exact."""


@runtime_checkable
class HasGlobalPrior(Protocol):
    """A guide with global random weights, which it samples outside the data plate."""

    def global_prior(self) -> Mapping[str, TorchDistribution]:
        """Returns the priors of the global sites by name."""


@runtime_checkable
class HasElbo(Protocol):
    """A guide that asks for an objective other than ``Trace_ELBO``."""

    def elbo(self) -> Any:
        """Returns the objective, such as a :class:`pyro.infer.ELBO`."""


@runtime_checkable
class HasBlocks(Protocol):
    """A guide whose parameters are trained in blocks, one after the other on each minibatch."""

    def blocks(self, model: Any, /) -> Sequence[Any]:
        """Returns the blocks, a list of :class:`pyro_gpvae.model.elbo.Block`."""


@runtime_checkable
class HasDiagnostics(Protocol):
    """A guide that reports scalars to the training log."""

    def diagnostics(self, x: Tensor, /) -> Mapping[str, Tensor]:
        """Returns scalars by name, for images x (B, C, H, W)."""


@runtime_checkable
class HasUncertainty(Protocol):
    """A guide that scores how uncertain its own inference is."""

    def uncertainty(self, x: Tensor, /) -> Tensor:
        """Returns one score for each image, (B,): the higher, the less certain."""


@runtime_checkable
class HasMoments(Protocol):
    """A random encoder whose f and log h are Gaussian."""

    def moments(self, x: Tensor, /) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns mean and variance of f(x), then of log h(x), each (B, p)."""

    def kl_weights(self) -> Tensor:
        """Returns KL(q(W, U) || p(W, U)) in nats, shape ()."""


def posterior_of(guide: Any, x: Tensor) -> TorchDistribution | None:
    """Returns q(z|x) of a guide, or None if the guide has no ``posterior``."""
    return guide.posterior(x) if isinstance(guide, HasPosterior) else None


def available_guides() -> dict[str, EntryPoint]:
    """Returns the registered guides by name, sorted."""
    return {name: points[0] for name, points in registered_guides().items()}


def load_guide(name: str) -> Callable[..., Any]:
    """Returns the guide class of a registered name, or of ``module:Class``.

    A registered name comes first. Any other module is imported from ``sys.path``, or else from
    the working directory.

    Raises:
        ValueError: If there is no such guide (the message suggests the nearest name), or if two
            distributions register the name.

    Example:
        >>> load_guide("gp").__name__
        'GPGuide'
    """
    registered = registered_guides()
    if name in registered:
        return _load_registered(name, registered[name])
    module, _, attribute = name.partition(":")
    near = difflib.get_close_matches(module, registered, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if not attribute:
        raise ValueError(
            f"unknown guide {name!r}: {hint}Registered guides are {', '.join(registered)}; "
            "name your own guide as 'module:Class'."
        )
    try:
        found = getattr(import_named(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"cannot load the guide {name!r}: {type(error).__name__}: {error}. "
            f"{hint.capitalize()}"
            "Expected 'module:Class', where the module is installed or lies in the working "
            "directory."
        ) from error
    if not callable(found):
        raise ValueError(f"the guide {name!r} is {found!r}, expected a class or a function")
    return found


def _load_registered(name: str, points: Sequence[EntryPoint]) -> Callable[..., Any]:
    """Imports a registered guide, unless several distributions register its name."""
    if len(points) > 1:
        by = " and ".join(distribution_name(point) for point in points)
        raise ValueError(
            f"the distributions {by} both register the guide {name!r}: uninstall one of them, or "
            f"name the guide as {' or '.join(repr(point.value) for point in points)}"
        )
    try:
        guide: Callable[..., Any] = points[0].load()
    except Exception as error:
        module = points[0].value.partition(":")[0]
        raise ValueError(
            f"cannot load the guide {name!r} from {points[0].value!r}: {error}. Does another file "
            f"or folder named {module!r} hide the installed package?"
        ) from error
    return guide


def make_guide(spec: str, model: Any, **defaults: Any) -> Any:
    """Builds a guide for a model from a line of text.

    Arguments:
        spec: ``NAME``, ``NAME:OPTIONS``, ``MODULE:CLASS`` or ``MODULE:CLASS:OPTIONS``. Options
            are separated by commas: values in the constructor's order, then ``key=value``.
        model: The model, which is the first argument of the constructor.
        defaults: Further keyword arguments, such as ``warm_start``; options in ``spec`` override
            them.

    Raises:
        ValueError: If there is no such guide, or if it does not take the options.

    Example:
        >>> from pyro_gpvae import ImageModel
        >>> guide = make_guide("gp:covariance=full,num_nodes=32", ImageModel((1, 28, 28), 2))
        >>> guide.num_nodes
        32
    """
    name, _, options = spec.partition(":")
    if name not in available_guides() and options:
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
    """Raises ValueError if a value does not match the annotation of the constructor."""
    hint = str(getattr(parameter, "annotation", ""))
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
    kind = hint.removesuffix(" | None")
    wrong = kind in kinds and (
        not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool")
    )
    if "Module" in hint and isinstance(value, str | int | float):
        wrong = True
    if wrong and not (value is None and hint.endswith("None")):
        raise ValueError(f"in the guide {spec!r}, {option} must be {hint}, got {value!r}")
    # options are numbers of layers, components or steps: a foreign file must not fill the memory
    if isinstance(value, int) and abs(value) > 10_000:
        raise ValueError(f"in the guide {spec!r}, {option} must be at most 10000, got {value!r}")


def _literal(text: str) -> Any:
    """Returns the Python number, boolean or None that a text denotes, or the text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text.strip()
    return value if isinstance(value, int | float | str | None) else text.strip()
