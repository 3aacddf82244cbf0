"""The weights of a model and a guide as a safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_gpvae.core._files import check_size, write_bytes
from pyro_gpvae.training.checkpoint import check_extra_state, copy_tensors

__all__ = ["load_weights", "save_weights"]


def save_weights(path: str | Path, model: Any, guide: Any) -> str:
    """Writes the parameters and buffers of model and guide to one file; returns its SHA-256.

    Names start with ``model.`` and ``guide.``. The file is complete or absent.

    Raises:
        ValueError: If model or guide is not a module, so that its parameters cannot be found.
    """
    # safetensors refuses tensors that share memory (tied weights): every name gets a copy
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(model, guide).items()
    }
    content = safetensors.torch.save(tensors)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: str | Path, model: Any, guide: Any, sha256: str | None = None) -> None:
    """Reads what :func:`save_weights` wrote into the modules, which keep their device.

    Nothing is changed unless the whole file fits. No code in the file can run.

    Arguments:
        path: The file.
        model, guide: The modules.
        sha256: The SHA-256 that the file must have; None is any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or is another one, holds other tensors than model and
            guide have, or a parameter in it is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}: expected one that train wrote")
    expected = _named_tensors(model, guide)
    # of twice the precision, with names
    check_size(path, sum(2 * t.nbytes + 1000 for t in expected.values()) + 10**6)
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file that was written: its SHA-256 differs")
    try:
        found = safetensors.torch.load(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"cannot read the weights in {path}: {error}. The file is damaged or not in the "
            "safetensors format: copy it again, or train again."
        ) from error
    for name, tensor in found.items():
        if isinstance(expected.get(name), nn.Parameter) and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} in {path} is not finite: the training diverged")
    copy_tensors(found, expected, str(path))


def _named_tensors(model: Any, guide: Any) -> dict[str, Tensor]:
    """Returns the parameters and buffers of model and guide by name."""
    named: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if not isinstance(program, nn.Module):
            raise ValueError(
                f"the {role} is a {type(program).__name__}, expected a torch.nn.Module: "
                "only a module's parameters can be saved"
            )
        check_extra_state(role, program)
        tensors = program.state_dict(keep_vars=True)
        named |= {f"{role}.{name}": value for name, value in tensors.items()}
    return named
