r"""Run folders: what a finished run consists of, and reading it back.

A run folder holds ``config.json`` (every option), ``record.json`` (options, versions, commit,
device, seconds, scores), ``history.csv`` (a row an epoch), ``scores.csv`` (a row a test image),
``weights.safetensors``, and ``manifest.json`` (sizes and SHA-256 of the others).
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._files import MANIFEST, check_manifest, partial_folder, read_json
from pyro_gpvae.core._programs import own_parameters
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import ImageData, load_data
from pyro_gpvae.model.guide import available_guides, load_guide, make_guide
from pyro_gpvae.model.image_model import ImageModel
from pyro_gpvae.model.networks import ImageShape, build_decoder
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.weights import load_weights

__all__ = [
    "RUN_FILES",
    "Run",
    "build_model",
    "check_options",
    "check_trust",
    "load_images",
    "load_run",
    "named_device",
    "warm_guide",
    "warm_start",
]

RUN_FILES = (
    "config.json",
    "history.csv",
    "manifest.json",
    "record.json",
    "scores.csv",
    "weights.safetensors",
)

#: The newest format of run folders that this version writes, and reads with all older ones.
FORMAT = 1


@dataclass
class Run:
    """A finished run, read back from its folder.

    Attributes:
        folder: Where it lies.
        config: Its options.
        record: The content of ``record.json``.
        model: The trained model.
        guide: The trained guide.
    """

    folder: Path
    config: RunConfig
    record: dict[str, Any]
    model: ImageModel
    guide: Any

    @cached_property
    def data(self) -> ImageData:
        """The images that the run was trained and evaluated on, read at first use.

        Raises:
            ValueError: If they are not the same images as in the run.
        """
        data = load_images(self.config)
        for part, images in (("train", data.train), ("test", data.test)):
            if sha256(images) != self.record["data"][f"{part}_sha256"]:
                raise ValueError(
                    f"the {part} images of {self.config.data!r} are not those of the run "
                    f"{self.folder}: its scores cannot be reproduced. Point --data or --root to "
                    "the files it was trained on."
                )
        return data


def load_run(
    folder: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    device: str | None = None,
    trust_guide: bool = False,
) -> Run:
    """Reads a run folder back: configuration, record, trained model and guide.

    No file of a run can run code: weights are safetensors, the rest is JSON and CSV. A guide
    that is named ``module:Class``, though, is imported, from the current directory if it is there.

    Arguments:
        folder: The run folder.
        data: Where the data lie now, if not where the configuration says.
        root: Likewise, the folder of data sets.
        device: Where to put model and guide; by default the device of the run.
        trust_guide: Whether a guide outside the registered ones may be imported.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing, or the run not finished.
        ValueError: If a file is damaged or of a newer format, the files do not fit each other, or
            the guide is not registered and not trusted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        begun = partial_folder(folder).is_dir()
        hint = f"it is not finished: continue it (--resume {folder})" if begun else ""
        raise FileNotFoundError(
            f"there is no run folder {folder}: {hint or 'expected one that train wrote'}"
        )
    if not (folder / "record.json").exists() and (
        inside := sorted(path.parent.name for path in folder.glob("*/record.json"))
    ):
        raise ValueError(f"{folder} holds the runs {', '.join(inside)}: name one of them")
    if (folder / MANIFEST).exists():  # runs of version 0.1 have none
        check_manifest(folder)
    source = folder / "config.json"
    config = RunConfig.from_json(read_json(source), source)
    check_trust(config.guide, source, trust_guide)
    config = dataclasses.replace(
        config,
        data=data or config.data,
        root=root or config.root,
        device=device or config.device,
    )
    record = read_json(folder / "record.json")
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise ValueError(
            f"{folder} has format {record['format']}, this version reads up to {FORMAT}: "
            "upgrade pyro-gpvae"
        )
    try:
        channels, height, width = (int(size) for size in record["data"]["image_shape"])
        [record["data"][name] for name in ("train_sha256", "test_sha256", "train_images")]
        record["scores"]["log_evidence"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'record.json'} is not the record of a run: {error!r}"
        ) from error
    target = named_device(config.device)
    with seeded(config.seed, torch.device("cpu")), torch.no_grad():
        model = build_model(config, (channels, height, width), sigma=1.0)
        guide = make_guide(config.guide, model).eval()
        with own_parameters(model, guide):
            guide(torch.zeros(1, *model.image_shape))  # Pyro makes some parameters at first use
    load_weights(folder / "weights.safetensors", model, guide)
    model.to(target).eval()
    guide.to(target)
    return Run(folder, config, record, model, guide)


def warm_start(config: RunConfig, trust_guide: bool) -> Run | None:
    """The run that a run starts from, if there is one; see :func:`load_run` about trust."""
    if config.warm_start is None:
        return None
    return load_run(config.warm_start, trust_guide=trust_guide)


def check_options(run: Run, config: RunConfig, ignore: Collection[str], advice: str) -> None:
    """Refuses a finished run that has other options than are wanted.

    Arguments:
        run: The run.
        config: The options that are wanted.
        ignore: The names of those that may differ.
        advice: What the error tells to do.

    Raises:
        ValueError: If another option differs; names it.
    """
    for option, wanted in vars(config).items():
        found = getattr(run.config, option)
        if wanted != found and option not in ignore:
            raise ValueError(
                f"{run.folder} was trained with {option} = {found!r}, not {wanted!r}: {advice}"
            )


def check_trust(guide: str, source: Path, trust_guide: bool) -> None:
    """Refuses to import code because a file says so: ValueError unless the guide is trusted."""
    if not trust_guide and guide.partition(":")[0] not in available_guides():
        raise ValueError(
            f"{source} names the guide {guide!r}, which is not registered: to load it, Python "
            "imports it, from the current directory if it is there. If you know that code, pass "
            "--trust-guide (in Python, trust_guide=True)."
        )


def load_images(config: RunConfig, data: ImageData | None = None) -> ImageData:
    """The images of a configuration: cut down and binarised as it says.

    Arguments:
        config: The options.
        data: The whole data set, if it is loaded already.

    Raises:
        FileNotFoundError, ValueError: As :func:`pyro_gpvae.load_data`.
    """
    if data is None:
        data = load_data(config.data, root=config.root, download=config.download)
    data = data.take(config.train_images, config.test_images)
    return data.binarized() if config.likelihood == "bernoulli" else data


def build_model(config: RunConfig, image_shape: ImageShape, sigma: float) -> ImageModel:
    """The model of a configuration, with random weights."""
    decoder = build_decoder(image_shape, config.latent_dim, config.decoder)
    return ImageModel(
        image_shape, config.latent_dim, decoder, likelihood=config.likelihood, sigma=sigma
    )


def warm_guide(spec: str, model: ImageModel, trained: Any) -> Any:
    """Builds a guide as :func:`pyro_gpvae.make_guide` does, from a trained one where it can:
    if its constructor takes a ``warm_start``."""
    name, _, options = spec.partition(":")
    if name not in available_guides() and options:
        name = ":".join(spec.split(":")[:2])
    if "warm_start" not in inspect.signature(load_guide(name)).parameters:
        return make_guide(spec, model)
    try:
        return make_guide(spec, model, warm_start=trained)
    except ValueError as error:
        guide = make_guide(spec, model)  # if it was not the warm start, this fails as well
        warnings.warn(f"{spec} cannot start from the trained guide: {error}", stacklevel=2)
        return guide


def named_device(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU if there is one: ValueError if it is not
    there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:INDEX") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"the device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are "
            "visible; use --device cpu"
        )
    return device
