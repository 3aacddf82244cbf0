"""Run folders: what a finished run consists of, and how it is read back.

A run folder holds ``config.json`` (the options), ``record.json`` (options, versions, commit,
device, seconds, scores, and the SHA-256 of images and weights), ``history.csv`` (one row per
epoch), ``scores.csv`` (one row per test image) and ``weights.safetensors``. While a run is trained,
its folder is ``RUN.partial`` with ``config.json``, the checkpoint files and a lock.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from pyro_gpvae.core._environment import sha256
from pyro_gpvae.core._files import partial_folder, read_json
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
    "Place",
    "Run",
    "build_model",
    "check_images",
    "check_record",
    "check_trust",
    "load_images",
    "load_run",
    "named_device",
    "warm_guide",
]

RUN_FILES = ("config.json", "history.csv", "record.json", "scores.csv", "weights.safetensors")

#: The newest format of run folders that this version writes; it reads all older ones.
FORMAT = 1

#: Images of more pixels would only fail in the allocator.
_MOST_PIXELS = 1 << 22


class Place(TypedDict, total=False):
    """Where the parts of a run are now, and whether its guide is trusted.

    Attributes:
        data: Name or .npz path of the data, if they are not where the configuration says.
        root: The folder of data sets, likewise.
        device: Where to put model and guide; by default the device of the run.
        trust_guide: Whether a guide outside the registered ones may be imported.
    """

    data: str | None
    root: str | None
    device: str | None
    trust_guide: bool


@dataclass
class Run:
    """A finished run, read back from its folder.

    Attributes:
        folder: The folder.
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
    def weights_sha256(self) -> str:
        """The SHA-256 of the file of the weights."""
        return hashlib.sha256((self.folder / "weights.safetensors").read_bytes()).hexdigest()

    @property
    def total_epochs(self) -> int:
        """The epochs of the run and of those that it started from."""
        count, record = self.config.epochs, self.record.get("warm_start")
        while record:
            count += record["config"]["epochs"]
            record = record.get("warm_start")
        return count

    @cached_property
    def data(self) -> ImageData:
        """The images that the run was trained and evaluated on, read at first use.

        Raises:
            FileNotFoundError: If they are not where the run found them; names --data.
            ValueError: If they are not the images of the run.
        """
        try:
            data = load_images(self.config)
        except FileNotFoundError as error:
            where = "say where the data of the run are now with --data or --root"
            raise FileNotFoundError(f"{self.folder}: {error} Or {where}.") from error
        check_images(data, self.record, self.folder / "record.json")
        return data


def load_run(folder: str | Path, **place: Unpack[Place]) -> Run:
    """Reads a run folder back: configuration, record, trained model and guide.

    No file of a run can run code: weights are safetensors, the rest is JSON and CSV. A guide that
    is named ``module:Class``, however, is imported, from the current directory if it lies there.

    Arguments:
        folder: The run folder.
        place: See :class:`Place`.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing, or the run not finished.
        ValueError: If a file is damaged or of a newer format, the files do not fit each other, the
            training diverged, or the guide is neither registered nor trusted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "expected one that train wrote"
        if partial_folder(folder).is_dir():
            hint = f"it is not finished: continue it (--resume {folder})"
        raise FileNotFoundError(f"there is no run folder {folder}: {hint}")
    if not (folder / "record.json").exists() and (
        inside := sorted(path.parent.name for path in folder.glob("*/record.json"))
    ):
        raise ValueError(f"{folder} holds the runs {', '.join(inside)}: name one of them")
    source = folder / "config.json"
    config = RunConfig.from_json(read_json(source), source)
    record = read_json(folder / "record.json")
    recorded = check_record(record, folder / "record.json")
    for name, value in vars(recorded).items():
        if value != getattr(config, name):
            raise ValueError(
                f"{folder / 'record.json'} and config.json differ: {name} is {value!r} and "
                f"{getattr(config, name)!r}"
            )
    check_trust(config.guide, source, place.get("trust_guide", False))
    config = config.moved(place.get("data"), place.get("root"), place.get("device"))
    target = named_device(config.device)
    channels, height, width = record["data"]["image_shape"]
    with seeded(config.seed, torch.device("cpu")), torch.no_grad():
        model = build_model(config, (channels, height, width), sigma=1.0)
        guide = make_guide(config.guide, model).eval()
        with own_parameters(model, guide):
            guide(torch.zeros(1, *model.image_shape))  # Pyro makes some parameters at first use
    load_weights(folder / "weights.safetensors", model, guide, record.get("weights_sha256"))
    model.to(target).eval()
    guide.to(target)
    return Run(folder, config, record, model, guide)


def check_record(record: dict[str, Any], source: Path) -> RunConfig:
    """Checks that the content of a file is the record of a run, and returns its configuration.

    Raises:
        ValueError: If it is anything else, of a newer format, or of a training that diverged.
            Names the file.
    """
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise ValueError(
            f"{source} has format {record['format']}, this version reads up to {FORMAT}: "
            "upgrade pyro-gpvae"
        )
    try:
        shape = record["data"]["image_shape"]
        counts = [*shape, record["data"]["train_images"]]
        start = record.get("warm_start")
        while start is not None:
            counts.append(start["config"]["epochs"])
            start = start.get("warm_start")
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in counts):
            raise ValueError(f"{counts} are not counts")
        if math.prod(shape) > _MOST_PIXELS:
            raise ValueError(f"{shape} are more than {_MOST_PIXELS:,} pixels")
        # null is a Monte-Carlo error that is not known
        numbers = [record["seconds"]["training"], record["scores"]["monte_carlo_error"] or 0]
        if not all(isinstance(x, float | int) for x in numbers):
            raise ValueError(f"{numbers} are not numbers")
        if not isinstance(record.get("versions", {}), dict):
            raise ValueError(f"{record['versions']!r} are not versions")
        [record["data"][name] for name in ("train_sha256", "test_sha256")]
        scores = [record["scores"][name] for name in ("elbo", "log_evidence")]
        config = dict(record["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not the record of a run: {error!r}") from error
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in scores):
        raise ValueError(
            f"{source}: the training diverged: the ELBO is {scores[0]}, log p(x) {scores[1]}. "
            "Train again, with a smaller learning rate"
        )
    return RunConfig.from_json(config, f"{source}: config")


def check_trust(guide: str, source: Path, trust_guide: bool) -> None:
    """Raises ValueError if a file names a guide that is neither registered nor trusted."""
    if not trust_guide and guide.partition(":")[0] not in available_guides():
        raise ValueError(
            f"{source} names the guide {guide!r}, which is not registered: to load it, Python "
            "imports it, from the current directory if it is there. If you know that code, pass "
            "--trust-guide (in Python, trust_guide=True)."
        )


def load_images(
    config: RunConfig, data: ImageData | None = None, download: bool = False
) -> ImageData:
    """Returns the images of a configuration, cut down and binarised as it says.

    The data set is read unless it is given as ``data``.
    """
    data = data or load_data(config.data, config.root, download)
    data = data.take(config.train_images, config.test_images)
    return data.binarized() if config.likelihood == "bernoulli" else data


def check_images(data: ImageData, record: dict[str, Any], source: Path) -> None:
    """Raises ValueError if images are not those of a record; names file and field."""
    for part, images in (("train", data.train), ("test", data.test)):
        if sha256(images) != record["data"][f"{part}_sha256"]:
            raise ValueError(
                f"{source}: data.{part}_sha256 is not that of the {part} images of {data.name!r} "
                "here, so that its scores cannot be reproduced: point --data or --root to the "
                "files it was trained on"
            )
    counts = {
        "train_images": len(data.train) - record["config"].get("validation", 0),
        "test_images": len(data.test),
    }
    for name, count in counts.items():
        if record["data"].get(name) != count:
            raise ValueError(
                f"{source}: data.{name} is {record['data'].get(name)!r}, expected {count} for the "
                "images of this run: the file was changed after the training"
            )


def build_model(config: RunConfig, image_shape: ImageShape, sigma: float) -> ImageModel:
    """Builds the model of a configuration, with random weights."""
    decoder = build_decoder(image_shape, config.latent_dim, config.decoder)
    return ImageModel(
        image_shape, config.latent_dim, decoder, likelihood=config.likelihood, sigma=sigma
    )


def warm_guide(spec: str, model: ImageModel, trained: Any) -> Any:
    """Builds a guide as :func:`pyro_gpvae.make_guide`, from a trained guide where it can be.

    A guide can start from another one if its constructor has an argument ``warm_start``.
    """
    name, _, options = spec.partition(":")
    if name not in available_guides() and options:
        name = ":".join(spec.split(":")[:2])
    if "warm_start" not in inspect.signature(load_guide(name)).parameters:
        return make_guide(spec, model)
    try:
        return make_guide(spec, model, warm_start=trained)
    except ValueError as error:
        guide = make_guide(spec, model)  # fails as well if the warm start is not the reason
        warnings.warn(f"{spec} cannot start from the trained guide: {error}", stacklevel=2)
        return guide


def named_device(name: str | None) -> torch.device:
    """Returns the device of a name; None is the GPU if there is one, else the CPU.

    Raises:
        ValueError: If the name is unknown, or the device is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"the device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are "
            "visible; use --device cpu"
        )
    return device
