r"""Traces a training objective and its gradient into a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gpvae.core._errors import UnsupportedError, unvalidated
from pyro_gpvae.core._seeds import preserve_rng, random_state

__all__ = ["TracedLoss", "snapshot", "trace_loss"]

#: Random operators whose numbers depend only on the shape, dtype and device of the result: the
#: method that fills a tensor with them, and its arguments if they are not those of the operator.
_NOISE: dict[str, tuple[str, tuple[float, ...] | None]] = {
    "aten::normal_": ("normal_", None),
    "aten::normal_functional": ("normal_", None),
    "aten::randn": ("normal_", (0.0, 1.0)),
    "aten::randn_like": ("normal_", (0.0, 1.0)),
    "aten::uniform_": ("uniform_", None),
    "aten::rand": ("uniform_", (0.0, 1.0)),
    "aten::rand_like": ("uniform_", (0.0, 1.0)),
    "aten::exponential_": ("exponential_", None),
}


class Draw(NamedTuple):
    """How to repeat one random operator of a program.

    Attributes:
        method: The method of a tensor that fills it with random numbers, such as ``normal_``.
        arguments: The arguments of the method.
        like: A tensor of the same size, strides, dtype and device.
    """

    method: str
    arguments: tuple[float, ...]
    like: Tensor

    def __call__(self) -> Tensor:
        """Draws from the global generator of the device."""
        empty = torch.empty_strided(
            self.like.shape, self.like.stride(), dtype=self.like.dtype, device=self.like.device
        )
        result: Tensor = getattr(empty, self.method)(*self.arguments)
        return result


@dataclass(frozen=True)
class TracedLoss:
    """An objective and its gradient as a function of tensors.

    Attributes:
        graph: The function as a graph of ATen operators. Its arguments are images, all of
            :attr:`inputs` and the noise; it returns the loss and the gradients. It is valid for
            the shape of the images it was traced with. It writes to nothing but ``others``, and
            there only what the program does, such as running statistics.
        leaves: The parameters in which it is differentiated, by name.
        others: All other parameters and buffers, by name.
        used: The names of the parameters that have a gradient.
        draws: The random numbers it needs, in the order of the program.
    """

    graph: GraphModule
    leaves: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    used: tuple[str, ...]
    draws: tuple[Draw, ...]

    def noise(self) -> list[Tensor]:
        """Draws the random numbers that the program itself would have drawn."""
        return [draw() for draw in self.draws]

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The arguments of the graph between the images and the noise."""
        return [*(leaf.detach() for leaf in self.leaves.values()), *self.others.values()]

    def __call__(self, x: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss, and its gradients in the used parameters."""
        with torch.no_grad():
            loss, *gradients = self.graph(x, *self.inputs, *noise)
        return loss, gradients


def trace_loss(
    loss: Callable[[Tensor], Tensor],
    modules: Mapping[str, nn.Module],
    parameters: Sequence[Tensor],
    x: Tensor,
) -> TracedLoss:
    r"""Traces an objective and its gradient, through Pyro's handlers, into a graph of tensors.

    Changes neither tensors nor the global random state.

    Arguments:
        loss: A function from images x (B, C, H, W) to a scalar.
        modules: All modules that it uses.
        parameters: The parameters of these modules in which to differentiate.
        x: Images of the shape that the graph will be called with.

    Raises:
        UnsupportedError: If the program reads a tensor in Python, such as ``if x.sum() > 0``, or
            changes attributes of a module when it is called, since the graph would freeze either;
            if it draws numbers whose distribution depends on tensors other than by
            reparametrisation; or if a parameter belongs to none of the modules.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> traced = trace_loss(
        ...     lambda x: (linear(x) + torch.randn(len(x), 1)).square().sum(),
        ...     {"linear": linear}, list(linear.parameters()), torch.zeros(5, 2))
        >>> len(traced.draws), traced.used
        (1, ('linear.weight', 'linear.bias'))
        >>> value, gradients = traced(torch.ones(5, 2), traced.noise())
    """
    container = nn.ModuleDict(modules)
    tensors: dict[str, Tensor] = dict(container.named_parameters())
    tensors |= dict(container.named_buffers())
    names = {id(tensor): name for name, tensor in tensors.items()}
    _check_parameters(parameters, names)
    trained = {names[id(p)]: p for p in parameters}
    others = {n: t.detach() for n, t in tensors.items() if n not in trained}
    used: list[str] = []

    def function(x: Tensor, *inputs: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs[: len(trained)]]
        values = dict(zip([*trained, *others], [*leaves, *inputs[len(trained) :]], strict=True))
        with torch.enable_grad(), _replaced(container, tensors, values):
            value = loss(x)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        used[:] = [n for n, g in zip(trained, gradients, strict=True) if g is not None]
        return [value.detach(), *(g.detach() for g in gradients if g is not None)]

    before = _attributes(container)
    inputs = [x, *(p.detach() for p in trained.values()), *(t.clone() for t in others.values())]
    with unvalidated(), preserve_rng(x.device):
        outside_torch = _states_outside_torch(x.device)
        try:
            # backward on a GPU has a thread of its own, which is not traced
            with torch.autograd.set_multithreading_enabled(False):
                traced = make_fx(function)(*inputs)
        except RuntimeError as error:
            if "get value out of a tracing tensor" not in str(error):
                raise
            raise UnsupportedError(
                "it reads a tensor in Python, as in `if x.sum() > 0`, .item() or float(x)"
            ) from error
        if _states_outside_torch(x.device) != outside_torch:
            raise UnsupportedError("it draws random numbers of numpy or Python: use pyro.sample")
    after = _attributes(container)
    changed = [name for name in after if name not in before or before[name] != after[name]]
    if changed:
        raise UnsupportedError(f"a call changes its attribute {changed[0]}, which a graph cannot")
    _check_graph(traced)  # before functionalize fails with a message of its own
    draws = _lift_noise(traced)
    with preserve_rng(x.device):
        noise = [draw() for draw in draws]
        # a graph of operators without side effects, but for writes to its inputs
        graph = make_fx(functionalize(traced))(*inputs, *noise)
    return TracedLoss(graph, trained, others, tuple(used), draws)


def _check_parameters(parameters: Sequence[Tensor], names: Mapping[int, str]) -> None:
    """Refuses parameters that belong to no module, or have a hook."""
    missing = [tuple(p.shape) for p in parameters if id(p) not in names]
    if missing:
        raise UnsupportedError(
            f"parameters of shape {', '.join(map(str, missing[:3]))} belong to no module that is "
            "the model or the guide, but to pyro.param or pyro.module statements: make it a "
            "torch.nn.Module or pyro_gpvae.Program that holds them"
        )
    for parameter in parameters:
        own: Any = parameter
        if own._backward_hooks or own._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"its parameter {names[id(parameter)]} has a hook, which a graph would not call"
            )


@contextmanager
def _replaced(
    container: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Puts values in the place of parameters and buffers, wherever modules hold them.

    ``torch.func.functional_call`` loses the parameters of a module that is found twice.
    """
    new = {id(tensor): values[name] for name, tensor in tensors.items()}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, name, tensor)
        for module in container.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    for store, name, tensor in places:
        store[name] = new[id(tensor)]
    try:
        yield
        rebound = [name for store, name, old in places if store.get(name) is not new[id(old)]]
        if rebound:
            raise UnsupportedError(
                f"a call replaces its tensor {rebound[0]}, as PyroParam does: make that a "
                "torch.nn.Parameter, and transform it where it is used; or write to it in place, "
                "with copy_"
            )
    finally:
        for store, name, tensor in places:
            store[name] = tensor


def _states_outside_torch(device: torch.device) -> dict[str, list[float]]:
    """The global random states of numpy and Python."""
    return {n: t.tolist() for n, t in random_state(device).items() if n not in ("torch", "cuda")}


def _attributes(container: nn.Module) -> dict[str, Any]:
    """The attributes of modules in Python, which a graph would freeze."""
    return {
        f"{prefix}.{name}": snapshot(value)
        for prefix, module in container.named_modules()
        for name, value in vars(module).items()
        if name not in _ATTRIBUTES_OF_EVERY_MODULE
    }


_ATTRIBUTES_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def snapshot(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Returns the numbers and texts in a value, also inside collections and plain objects.

    Arguments:
        value: Anything; the identity of a tensor stands for it.
        inside: The ids of the values it is part of.
    """
    if isinstance(value, Tensor):
        return id(value)
    if value is None or isinstance(value, int | str | bool | np.generic):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    if id(value) in inside:
        return None
    inside = (*inside, id(value))
    if isinstance(value, dict):
        return {key: snapshot(inner, inside) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__name__, [snapshot(inner, inside) for inner in value]
    if isinstance(value, nn.Module | type | FunctionType | ModuleType):
        return None
    return snapshot(getattr(value, "__dict__", None), inside)


def _lift_noise(traced: GraphModule) -> tuple[Draw, ...]:
    """Makes the results of random operators the last inputs of the graph."""
    graph = traced.graph
    nodes = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    draws, holders = [], []
    for node in nodes:
        operator = node.target._schema.name
        generator = node.kwargs.get("generator")
        if operator not in _NOISE or generator is not None or not _is_whole(node):
            raise UnsupportedError(
                f"it draws random numbers by {operator}, from data, from a generator of its own, "
                "or into a part of a tensor"
            )
        method, arguments = _NOISE[operator]
        own = tuple(float(a) for a in node.args[1:])
        value = node.meta["val"]
        draws.append(Draw(method, own if arguments is None else arguments, value))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        for i in reversed(range(len(nodes))):
            holders.append(graph.placeholder(f"noise_{i}"))
    for node, holder in zip(nodes, reversed(holders), strict=True):
        holder.meta = dict(node.meta)
        node.replace_all_uses_with(holder)
        if node.target._schema.is_mutable:  # tensor.normal_() is the tensor as well
            node.args[0].replace_all_uses_with(holder, delete_user_cb=lambda u, n=node: u is not n)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return tuple(draws)


def _is_whole(node: Node) -> bool:
    """Whether a random operator makes a tensor, or fills one that nothing has used yet."""
    if not node.target._schema.is_mutable:  # type: ignore[union-attr]
        return True
    made, before = node.args[0], set()
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        before.add(earlier)
    if not isinstance(made, Node) or made.op != "call_function":
        return False
    fresh = made.target._schema.name.removeprefix("aten::").removeprefix("new_")  # type: ignore[union-attr]
    fresh = fresh.removesuffix("_like")
    return fresh in ("empty", "empty_strided", "zeros") and not before & set(made.users)


def _shape_depends_on_data(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices: Any = node.args[1]  # numbers are as many as there are; a mask is not
    return any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)


def _check_graph(graph: GraphModule) -> None:
    """Refuses a graph that trains or writes to tensors that are not among its inputs, and one with
    shapes that depend on data."""
    for node in graph.graph.nodes:
        if _shape_depends_on_data(node):
            raise UnsupportedError(
                f"the shape of what {node.target} returns depends on data, as in x[x > 0]"
            )
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise UnsupportedError(
                f"it uses a parameter of shape {tuple(tensor.shape)} that belongs to no module"
            )
        for user in node.users:
            schema: Any = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable and user.args[0] is node:
                raise UnsupportedError(
                    f"it writes to a tensor of shape {tuple(tensor.shape)} that is no buffer"
                )
