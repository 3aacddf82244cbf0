r"""The parameters that a training changes: their names and their learning rates."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_gpvae.core._errors import NonFiniteError, nonfinite_as_error
from pyro_gpvae.core._plates import (
    check_guide_sites,
    check_observes,
    check_separable,
    data_plate,
    hide_observations,
    is_sampled,
)
from pyro_gpvae.core._programs import PyroProgram, autoguides_of, modules_of
from pyro_gpvae.data.batch import Batch
from pyro_gpvae.model._local import check_kinds
from pyro_gpvae.model._pairing import pair
from pyro_gpvae.model._points import check_points
from pyro_gpvae.model.elbo import Block


def modules_by_role(model: PyroProgram, guide: PyroProgram) -> dict[str, nn.Module]:
    """Returns the modules of both programs by names that begin with "model" or "guide"."""
    found: dict[str, nn.Module] = {}
    for role, program in (("model", model), ("guide", guide)):
        for name, module in modules_of(program).items():
            if not any(module is each for each in found.values()):
                found[f"{role}.{name}".removesuffix(".")] = module
    return found


def named_parameters(
    model: PyroProgram, guide: PyroProgram, batch: Batch, num_images: int
) -> dict[str, Tensor]:
    """Returns the parameters of modules and of ``pyro.param`` statements, by name.

    Raises ValueError if model and guide cannot be trained on ``num_images`` members of data.
    """
    # Pyro's autoguides create their parameters when they are first run
    capture = poutine.trace(param_only=True)
    # the first step says where something is not finite
    with suppress(NonFiniteError), torch.no_grad(), nonfinite_as_error(), capture:
        guide_trace: Any = poutine.trace(hide_observations(guide)).get_trace(*batch)
        check_guide_sites(guide_trace.nodes)
        plate = data_plate(guide_trace.nodes, len(batch[0]))
        if len(batch[0]) != num_images:
            check_separable(guide, guide_trace.nodes, plate)
        replayed = poutine.replay(pair(model, guide), trace=guide_trace)
        model_trace: Any = poutine.trace(replayed).get_trace(*batch)
        check_observes(model_trace.nodes)
        check_kinds(guide_trace.nodes, model_trace.nodes)
        check_points(guide, batch, guide_trace, model_trace, plate)
        _check_sampled(guide_trace.nodes, model_trace.nodes)
    for auto in autoguides_of(guide):
        for parameter in auto.parameters():
            parameter.data = parameter.data.clone()  # its first value may be a tensor of the model
    named: dict[str, Tensor] = {}
    for role, module in modules_by_role(model, guide).items():
        named |= {f"{role}.{name}": p for name, p in module.named_parameters()}
    known = {id(p) for p in named.values()}
    programs: dict[str, int] = {}
    for site in capture.trace.nodes.values():
        value: Any = site["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if id(leaf) not in known:
            known.add(id(leaf))
            # a Program that is called inside a function has a name of this process only
            owner, dot, attribute = str(site["name"]).partition(".")
            if re.fullmatch(r"\w+-[0-9a-f]+", owner) and dot:
                owner = f"program-{programs.setdefault(owner, len(programs))}"
            named[f"param.{owner}{dot}{attribute}"] = leaf
    return named


def _check_sampled(q: Mapping[str, Any], p: Mapping[str, Any]) -> None:
    """Raises ValueError if the guide lacks a latent site, whose density no ELBO could compare."""
    latent = [n for n, s in p.items() if is_sampled(s) and not s["is_observed"]]
    left = [n for n in latent if n not in q and p[n]["mask"] is not False]
    if left:
        raise ValueError(
            f"the guide does not sample the sites {left} of the model, and no ELBO is known "
            "without: sample them in the guide, or sum discrete ones out in the model, for example "
            "by dist.MixtureSameFamily"
        )


def knows_members(guide: PyroProgram, parameters: Mapping[str, Tensor], num_images: int) -> bool:
    """Returns whether a guide may have parameters for each member of the data, in their order."""
    own = [p for name, p in parameters.items() if not name.startswith("model")]
    return any(p.shape[:1] == (num_images,) for p in own) or bool(autoguides_of(guide))


def check_leaves(loss: Tensor, trained: Sequence[Tensor]) -> None:
    """Raises ValueError if a loss depends on a parameter that is not among those of the programs.

    Tensors that are no ``nn.Parameter`` are ignored: a program may differentiate in them.
    """
    known = {id(p) for p in trained}
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [inner for inner, _ in node.next_functions]
        leaf: Any = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise ValueError(
                f"the loss depends on a parameter of shape {tuple(leaf.shape)} that is neither the "
                "model's nor the guide's, and would never be trained. Let both be torch.nn.Modules "
                "that hold all of theirs (in an nn.ModuleList, not in a list or a function), and "
                "make the guide for this model; or call requires_grad_(False). If pyro.module was "
                "given another module of the same name before, call pyro.clear_param_store()"
            )


def parameter_groups(
    blocks: Sequence[Block], parameters: Mapping[str, Tensor], learning_rates: Mapping[str, float]
) -> list[list[dict[str, Any]]]:
    """Returns for each block the groups of its parameters, one for each learning rate."""
    names = {id(p): name for name, p in parameters.items()}
    trained: set[int] = set()
    for p in itertools.chain(*(block.parameters for block in blocks)):
        if id(p) in trained:  # a parameter that no module holds has no name
            name = names.get(id(p), f"of shape {tuple(p.shape)}")
            raise ValueError(f"the parameter {name} is in several blocks, or twice in one")
        trained.add(id(p))
    rates = {}
    for name, rate in learning_rates.items():
        if name not in parameters or id(parameters[name]) not in trained:
            known = ", ".join(n for n, p in parameters.items() if id(p) in trained)
            raise ValueError(
                f"learning_rates names {name!r}, which is not trained; the parameters are {known}"
            )
        rates[id(parameters[name])] = rate
    groups = []
    for block in blocks:
        usual: dict[str, Any] = {"params": [p for p in block.parameters if id(p) not in rates]}
        own = [p for p in block.parameters if id(p) in rates]
        others = [{"params": [p], "lr": rates[id(p)]} for p in own]
        groups.append([usual, *others] if usual["params"] else others)
    return groups
