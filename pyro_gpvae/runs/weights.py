r"""The weights of a model and a guide as a safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_gpvae.core._files import write_bytes
from pyro_gpvae.training.checkpoint import check_extra_state, copy_tensors

__all__ = ["load_weights", "save_weights", "weights_sha256"]


def save_weights(path: str | Path, model: Any, guide: Any) -> None:
    """Writes the parameters and buffers of model and guide to one safetensors file.

    Names start with ``model.`` and ``guide.``. The file is complete or absent, never half-written.

    Raises:
        ValueError: If model or guide is not a module, so that its parameters cannot be found.
    """
    # safetensors refuses tensors that share memory (tied weights): every name gets a copy
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(model, guide).items()
    }
    write_bytes(path, safetensors.torch.save(tensors))


def load_weights(path: str | Path, model: Any, guide: Any) -> None:
    """Reads what :func:`save_weights` wrote, into the modules, which keep their device and dtype.

    Nothing is changed unless the whole file fits. No code in the file can run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds other tensors than model and guide have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weights file {path}: expected one that training wrote, "
            "such as RUN/weights.safetensors"
        )
    try:
        found = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read the weights in {path}: {error}. The file is damaged or not in the "
            "safetensors format: copy it again, or train again."
        ) from error
    copy_tensors(found, _named_tensors(model, guide), str(path))


def weights_sha256(model: nn.Module, guide: nn.Module) -> str:
    """Returns the SHA-256 of the parameters and buffers: names, shapes, dtypes and values.

    The result is hexadecimal, and the same on any device.
    """
    digest = hashlib.sha256()
    for program in (model, guide):
        for name, tensor in sorted(program.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _named_tensors(model: Any, guide: Any) -> dict[str, Tensor]:
    """The parameters and buffers of model and guide by name."""
    named: dict[str, Tensor] = {}
    for role, program in (("model", model), ("guide", guide)):
        if not isinstance(program, nn.Module):
            raise ValueError(
                f"the {role} is a {type(program).__name__}, expected a torch.nn.Module: "
                "only a module's parameters can be saved"
            )
        check_extra_state(role, program)
        named |= {f"{role}.{name}": value for name, value in program.state_dict().items()}
    return named
