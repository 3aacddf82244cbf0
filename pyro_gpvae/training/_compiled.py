r"""The compiled training step: traced once, compiled by torch, and compared with the eager one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gpvae.core._errors import UnsupportedError, unvalidated
from pyro_gpvae.core._seeds import preserve_rng, random_state
from pyro_gpvae.data.batch import Batch

if TYPE_CHECKING:
    from pyro_gpvae.training.step import TrainingStep

Evaluate = Callable[[Batch], tuple[Tensor, list[Tensor]]]

#: The methods of a tensor that draw the numbers of random operators.
_NOISE = {
    **dict.fromkeys(("aten::normal_", "aten::normal_functional"), "normal_"),
    **dict.fromkeys(("aten::randn", "aten::randn_like"), "normal_"),
    **dict.fromkeys(("aten::uniform_", "aten::rand", "aten::rand_like"), "uniform_"),
    "aten::exponential_": "exponential_",
}


def _draw(like: Tensor, method: str, arguments: tuple[float, ...]) -> Tensor:
    """Draws a tensor of the same layout with a method such as ``normal_``."""
    new = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    result: Tensor = getattr(new, method)(*arguments)
    return result


@dataclass
class TracedLoss:
    """An objective and its gradient as a function of tensors, for minibatches of one shape."""

    #: A function of a minibatch, ``leaves``, ``others`` and noise; it writes only to ``others``.
    graph: Callable[..., Sequence[Tensor]]
    leaves: Mapping[str, Tensor]  #: the parameters in which it is differentiated
    others: Mapping[str, Tensor]  #: all other parameters and buffers
    used: Sequence[str]  #: the parameters that have a gradient
    draws: Sequence[Callable[[], Tensor]]  #: the random numbers, in the order of the program
    is_first: bool = True  #: whether a step begins with it

    def __post_init__(self) -> None:
        self.inputs = [*(leaf.detach() for leaf in self.leaves.values()), *self.others.values()]

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss and the gradients, which the parameters get as well."""
        on_cuda = batch[0].device.type == "cuda"
        # the results of the step before are no longer needed, but those of earlier blocks are
        if on_cuda and self.is_first:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            loss, *gradients = self.graph(*batch, *self.inputs, *(draw() for draw in self.draws))
        for parameter in self.leaves.values():  # another block may have left a gradient
            parameter.grad = None
        for name, gradient in zip(self.used, gradients, strict=True):
            parameter = self.leaves[name]
            # Adam's fused kernels go through the memory of both, whatever the strides
            same = gradient.stride() == parameter.stride()
            parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
        # the next replay of a CUDA graph overwrites the loss
        return loss.clone() if on_cuda else loss, gradients


def compile_blocks(step: TrainingStep, batch: Batch) -> list[Evaluate]:
    """Compiles each block of a step for minibatches of one shape, or raises UnsupportedError."""
    compiled: list[Evaluate] = []
    mode = "reduce-overhead" if step.device.type == "cuda" else None
    # a graph that has frozen values read from the batch computes something else from other values
    other = tuple(_another(tensor) for tensor in batch)
    for number, block in enumerate(step.blocks):
        objective = step.objectives[number]
        before = _plain(getattr(objective, "__dict__", None))

        loss = partial(step.loss, number)
        traced = trace_loss(loss, step.modules, block.parameters, batch)
        if _plain(getattr(objective, "__dict__", None)) != before:
            raise UnsupportedError("its objective changes its attributes, which a graph cannot")
        traced.is_first = number == 0
        traced.graph = torch.compile(traced.graph, fullgraph=True, dynamic=False, mode=mode)
        with warnings.catch_warnings():
            # whether to compute in TF32 is the user's decision
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            _verify(step, number, traced, batch)
            _verify(step, number, traced, other)
        compiled.append(traced)
    return compiled


def _another(tensor: Tensor) -> Tensor:
    """Returns other values than those of a tensor (B, ...), which a program accepts as well."""
    if tensor.is_floating_point() and bool(((tensor >= 0) & (tensor <= 1)).all()):
        return 1 - tensor
    return tensor[:1].expand_as(tensor).contiguous()


def _verify(step: TrainingStep, block: int, compiled: Evaluate, batch: Batch) -> None:
    """Compares a compiled block with the eager one on the same noise, and changes nothing."""
    results: list[Tensor] = []
    # eager twice: a program that counts its calls returns something else the second time
    for evaluate in (None, None, compiled):
        try:
            with preserve_rng(step.device, list(step.buffers.values())):
                loss, gradients = (evaluate or partial(step.evaluate, block))(batch)
                norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
                results.append(torch.stack([loss.detach(), norm.to(loss)]).double())
        finally:
            step.optimizers[block].zero_grad()
    # a GPU may multiply in TF32, which has 10 bits, and adds in any order
    on_cpu = step.device.type == "cpu"
    rtol = 1e-8 if step.dtype == torch.float64 else 1e-4 if on_cpu else 1e-3
    first, second, found = results
    exact = 8 * torch.finfo(step.dtype).eps if on_cpu else rtol
    same = torch.allclose(first, found, rtol=rtol, equal_nan=True)
    if not same or not torch.allclose(first, second, rtol=exact, atol=0, equal_nan=True):
        raise UnsupportedError(
            f"loss and gradient norm are {found.tolist()} with backend 'compiled', but "
            f"{first.tolist()} and, called again on the same noise, {second.tolist()} with 'eager'"
        )


def trace_loss(
    loss: Callable[[Batch], Tensor],
    modules: Mapping[str, nn.Module],
    parameters: Sequence[Tensor],
    batch: Batch,
) -> TracedLoss:
    """Traces an objective and its gradient in parameters of modules, for one shape of minibatch.

    Changes neither tensors nor the global random state. Raises UnsupportedError if a graph would
    freeze or lose what the program does.
    """
    container = nn.ModuleDict({name.replace(".", "_"): m for name, m in modules.items()})
    tensors: dict[str, Tensor] = dict(container.named_parameters())
    tensors |= dict(container.named_buffers())
    names = {id(tensor): name for name, tensor in tensors.items()}
    _check_parameters(parameters, names)
    trained = {names[id(p)]: p for p in parameters}
    others = {n: t.detach() for n, t in tensors.items() if n not in trained}
    used: list[str] = []

    def function(*tensors_in: Tensor) -> list[Tensor]:
        x, inputs = tensors_in[: len(batch)], tensors_in[len(batch) :]
        leaves = [value.detach().requires_grad_() for value in inputs[: len(trained)]]
        values = dict(zip([*trained, *others], [*leaves, *inputs[len(trained) :]], strict=True))
        with torch.enable_grad(), _replaced(container, tensors, values):
            value = loss(x)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        used[:] = [n for n, g in zip(trained, gradients, strict=True) if g is not None]
        return [value.detach(), *(g.detach() for g in gradients if g is not None)]

    device = batch[0].device
    before = _python_state(container, device)
    inputs = [
        *batch,
        *(p.detach() for p in trained.values()),
        *(t.clone() for t in others.values()),
    ]
    with unvalidated(), preserve_rng(device):
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
        after = _python_state(container, device)
    changed = [name for name in after if name not in before or before[name] != after[name]]
    if changed:
        raise UnsupportedError(f"a call changes {changed[0]}, which a graph cannot")
    _check_constants(traced)
    draws = _lift_noise(traced)
    with preserve_rng(device):
        noise = [draw() for draw in draws]
        # a graph of operators without side effects, but for writes to its inputs
        graph = make_fx(functionalize(traced))(*inputs, *noise)
    return TracedLoss(graph, trained, others, used, draws)


def _check_parameters(parameters: Sequence[Tensor], names: Mapping[int, str]) -> None:
    for parameter in parameters:
        if id(parameter) not in names:
            raise UnsupportedError(
                f"a parameter of shape {tuple(parameter.shape)} belongs to no module that is the "
                "model or the guide, but to a pyro.param or pyro.module statement: make it a "
                "torch.nn.Module or pyro_gpvae.Program that holds it"
            )
        own: Any = parameter
        if own._backward_hooks or own._post_accumulate_grad_hooks:
            raise UnsupportedError(
                f"its parameter {names[id(parameter)]} has a hook, which a graph would not call"
            )


@contextmanager
def _replaced(
    container: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Puts values in the place of parameters and buffers, wherever modules hold them."""
    # torch.func.functional_call loses the parameters of a module that is found twice
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
                "torch.nn.Parameter, and write to buffers in place, with copy_"
            )
    finally:
        for store, name, tensor in places:
            store[name] = tensor


_ATTRIBUTES_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _python_state(container: nn.Module, device: torch.device) -> dict[str, Any]:
    """What a graph would freeze: attributes of modules, random states of numpy and Python."""
    state: dict[str, Any] = {
        f"the attribute {prefix}.{name}": _plain(value)
        for prefix, module in container.named_modules()
        for name, value in vars(module).items()
        if name not in _ATTRIBUTES_OF_EVERY_MODULE
    }
    for name, value in random_state(device).items():
        if name not in ("torch", "cuda"):
            state[f"the random state of {name}, not of torch"] = value.tolist()
    return state


def _plain(value: Any) -> Any:
    """The numbers and texts in a value and in its collections, and the identity of tensors."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Tensor):
        return id(value)
    return repr(value) if isinstance(value, int | float | str | set) else None


def _check_constants(traced: GraphModule) -> None:
    """Refuses a graph that trains or writes to tensors that are not among its inputs."""
    for node in traced.graph.find_nodes(op="get_attr"):
        tensor = getattr(traced, node.target)
        schemas = [(user, getattr(user.target, "_schema", None)) for user in node.users]
        written = any(s and s.is_mutable and user.args[0] is node for user, s in schemas)
        if isinstance(tensor, Tensor) and (tensor.requires_grad or written):
            raise UnsupportedError(
                f"it trains or writes to a tensor of shape {tuple(tensor.shape)} that is neither "
                "a parameter nor a buffer of a module"
            )


def _lift_noise(traced: GraphModule) -> list[Callable[[], Tensor]]:
    """Makes the results of random operators the last inputs of the graph."""
    # inductor's fallback_random draws the eager numbers as well, but changes their order
    graph = traced.graph
    draws: list[Callable[[], Tensor]] = []
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        operator = node.target._schema.name
        own_generator = node.kwargs.get("generator") is not None
        if operator not in _NOISE or own_generator or not _fills_new_tensor(node):
            raise UnsupportedError(
                f"it draws random numbers by {operator}, from data, from a generator of its own, "
                "or into a part of a tensor"
            )
        # randn and rand have sizes as arguments, and the method's default parameters
        arguments = () if "::rand" in operator else tuple(float(a) for a in node.args[1:])
        with graph.inserting_after(last):
            last = graph.placeholder(f"noise_{len(draws)}")
        draws.append(partial(_draw, node.meta["val"], _NOISE[operator], arguments))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        if node.target._schema.is_mutable:  # tensor.normal_() is the tensor as well
            node.args[0].replace_all_uses_with(last, delete_user_cb=lambda u, n=node: u is not n)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return draws


def _fills_new_tensor(node: Node) -> bool:
    """Whether a random operator makes a tensor, or fills one that nothing has used yet."""
    target: Any = node.target
    if not target._schema.is_mutable:
        return True
    made: Any = node.args[0]
    if made.op != "call_function" or next(iter(made.users)) is not node:
        return False
    name = made.target._schema.name.removeprefix("aten::").removeprefix("new_")
    return name.removesuffix("_like") in ("empty", "empty_strided", "zeros")
