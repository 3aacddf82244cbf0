"""Small trainings of the toy model, and what they leave, for tests that compare two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyro
import torch
from torch import nn
from toy import linear_encoder, linear_model, uint8

from pyro_gpvae import fit

#: Two full minibatches an epoch, and a last one of 5.
N, B = 21, 8
Outcome = tuple[dict[str, torch.Tensor], pd.DataFrame]


def of(kind: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """The toy model, and a guide of a class with its encoder, in float64; always the same."""
    torch.manual_seed(0)
    model = linear_model()
    return model, kind(model, linear_encoder(), **options).double()


def tensors(model: Any, guide: Any) -> dict[str, torch.Tensor]:
    """All that a training changes, by name: parameters and buffers of modules, params of Pyro."""
    found: dict[str, torch.Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            found |= {f"{role}.{n}": t for n, t in program.state_dict().items()}
    found |= {n: p.detach() for n, p in pyro.get_param_store().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def trained(make_pair: Callable[[], Any], data: Any = None, epochs: int = 3, **options: Any) -> Any:
    """What a training makes of a fresh pair, and its history."""
    pyro.clear_param_store()
    model, guide = make_pair()
    options = {"batch_size": B, "learning_rate": 5e-3, "progress": False, "seed": 3} | options
    history = fit(model, guide, uint8(N) if data is None else data, epochs=epochs, **options)
    return tensors(model, guide), history.frame().drop(columns="seconds")


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 0.0) -> None:
    """Two trainings have the same weights and history."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert list(found[1].columns) == list(expected[1].columns)
    ours, theirs = (torch.from_numpy(frame.to_numpy(float)) for _, frame in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_backends_agree(make_pair: Callable[[], Any], **options: Any) -> None:
    """A compiled training has the weights and history of an eager one, which moves."""
    eager = trained(make_pair, backend="eager", **options)
    before = tensors(*make_pair())
    assert any(not torch.equal(eager[0][name], value) for name, value in before.items())
    assert_same(trained(make_pair, backend="compiled", **options), eager, 1e-10)
