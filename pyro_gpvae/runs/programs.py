r"""Opens runs, or a model and a guide of the user's own that no run folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._registry import import_named
from pyro_gpvae.data.images import load_data
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.folder import Place, Run, load_run, named_device

__all__ = ["labels_of", "open_run", "open_runs"]


def open_runs(sources: Sequence[str | Path], **place: Unpack[Place]) -> list[Run]:
    """Opens different runs, see :func:`open_run`.

    Raises:
        ValueError: If there is none, or one is given twice; and as :func:`open_run`.
    """
    runs = [open_run(source, **place) for source in sources]
    if not runs or len({run.folder.resolve() for run in runs}) < len(runs):
        raise ValueError(f"expected one or more different run folders, got {len(runs)}")
    return runs


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Names each run by its guide, or by its folder where guides are not unique."""
    guides = [run.config.guide for run in runs]
    return guides if len(set(guides)) == len(guides) else [str(run.folder) for run in runs]


def open_run(source: str | Path, **place: Unpack[Place]) -> Run:
    """Opens a run folder, or what ``module:function`` returns: a model and its guide.

    The function takes no arguments and returns an :class:`pyro_gpvae.ImageModel` and a guide, such
    as any object with ``posterior(x)``, both trained elsewhere. Their data are the embedded digits
    unless ``data`` names others.

    Arguments:
        source: A run folder, or ``module:function``.
        place: See :class:`pyro_gpvae.runs.folder.Place`.

    Raises:
        FileNotFoundError, ValueError: As :func:`pyro_gpvae.load_run`.
        ValueError: If the code is not trusted, cannot be loaded, or returns something else, or if
            its images have another shape.
    """
    module, _, function = str(source).partition(":")
    if not function or Path(source).exists():
        return load_run(source, **place)
    if not place.get("trust_guide", False):
        raise ValueError(
            f"{source} is code, which Python imports to get the model and the guide: if you know "
            "it, pass --trust-guide (in Python, trust_guide=True)"
        )
    try:
        model, guide = getattr(import_named(module), function)()
    except Exception as error:  # whatever the code raises
        raise ValueError(
            f"cannot load {source}: {type(error).__name__}: {error}. Expected a function without "
            "arguments that returns (model, guide)"
        ) from error
    if not isinstance(model, ImageModel):
        raise ValueError(
            f"{source} returned a model of type {type(model).__name__}, expected an ImageModel"
        )
    device = named_device(place.get("device"))
    for program in (model, guide):
        if isinstance(program, torch.nn.Module):
            program.to(device).eval()
    data = load_data(place.get("data") or RunConfig.data, place.get("root"))
    likelihood: Any = "gaussian" if model.sigma is not None else "bernoulli"
    data = data.binarized() if likelihood == "bernoulli" else data
    if data.image_shape != model.image_shape:
        raise ValueError(
            f"the model of {source} has images of shape {model.image_shape}, the data {data.name!r}"
            f" {data.image_shape}: name its own with --data"
        )
    config = RunConfig(
        data=place.get("data") or RunConfig.data, root=place.get("root"), guide=str(source),
        latent_dim=model.latent_dim, likelihood=likelihood, device=str(device),
        epochs=0,  # trained elsewhere
    )  # fmt: skip
    counts = {"train_images": len(data.train), "test_images": len(data.test)}
    record: dict[str, Any] = {"data": counts}
    if model.sigma is not None:
        record["sigma"] = float(model.sigma.detach())
    run = Run(Path(source), config, record, model, guide)
    run.data = data
    run.weights_sha256 = sha256(*_tensors(model), *_tensors(guide))
    return run


def _tensors(program: Any) -> list[torch.Tensor]:
    if not isinstance(program, torch.nn.Module):
        return []
    return [tensor.detach().reshape(-1) for tensor in program.state_dict().values()]
