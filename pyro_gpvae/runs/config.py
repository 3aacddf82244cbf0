"""The options of a run; nothing heavy is imported, so that the command starts quickly."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["PLACE", "RunConfig", "check_same"]

#: Options that say where a run is computed, not what is computed.
PLACE = ("root", "device", "chunk_size")

_LEAST = {"latent_dim": 1, "epochs": 1, "batch_size": 1, "num_samples": 1, "train_images": 2}
_LEAST |= {"test_images": 1, "chunk_size": 1, "validation": 0, "seed": 0}
#: Larger values would only fail in the allocator.
_MOST = {"latent_dim": 100_000, "seed": 2**63 - 1}

#: What older versions wrote: options that no longer exist.
_RETIRED = ("download",)


@dataclass(kw_only=True)
class RunConfig:
    """The options that decide the outcome of a run.

    Attributes:
        data: Name of a data set, or path of an .npz file with uint8 arrays "train" and "test"
            of shape (N, H, W) or (N, H, W, C).
        root: Folder where data sets are kept; None is the environment variable PYRO_GPVAE_DATA,
            or ~/.cache/pyro-gpvae.
        guide: NAME, NAME:OPTIONS or MODULE:CLASS, such as "vae", "gp:covariance=full" or
            "my_guides:MyGuide"; "pyro-gpvae guides" lists the names.
        latent_dim: Dimension p of z.
        decoder: "conv" is the convolutional decoder of the paper's Tables 1-3, "fc" has two
            fully-connected hidden layers and as many parameters.
        likelihood: "gaussian" with one learned σ, or "bernoulli" on binarised pixels.
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Step size of Adam.
        sigma_learning_rate: Step size of Adam for log σ alone; None is learning_rate, the paper's
            protocol, with which σ needs hundreds of epochs. With 0.01 it follows the
            reconstruction error from the first epochs on.
        validation: Number of training images held out (the same for every seed), whose ELBO is
            logged after each epoch.
        keep_best: Keep the weights of the epoch with the highest validation ELBO, not the last.
        train_images: Number of training images to use, from the first on; None is all.
        test_images: Number of test images to evaluate, from the first on; None is all.
        num_samples: Importance samples K per image for log p(x).
        seed: Seed of the initial weights, the permutations, the samples, and the evaluation.
        device: "cpu", "cuda" or "cuda:INDEX"; None is CUDA if there is one, else the CPU.
        chunk_size: Latent vectors decoded at once in the evaluation, which bounds the memory and
            decides the order of random numbers. None is 640 on a CPU and 65,536 on a GPU.
        warm_start: Run folder to start from: the model gets its weights, the guide the weights
            of its encoder where the guide can use them.
        freeze_decoder: Train the guide only, and keep the decoder of the warm start.
        backend: How a training step is made: "eager" or "compiled"; "auto" chooses.
        precision: Precision of the networks in training: "float32" or "bf16" (autocast).
            Evaluation is in float32.
        on_nonfinite: What to do about a loss or gradient that is NaN or infinite: "stop", or
            "skip" the update; more than 100 skipped updates stop the run.
    """

    data: str = "mnist5k"
    root: str | None = None
    guide: str = "gp"
    latent_dim: int = 10
    decoder: Literal["conv", "fc"] = "conv"
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 5e-4
    sigma_learning_rate: float | None = None
    validation: int = 0
    keep_best: bool = False
    train_images: int | None = None
    test_images: int | None = None
    num_samples: int = 100
    seed: int = 0
    device: str | None = None
    chunk_size: int | None = None
    warm_start: str | None = None
    freeze_decoder: bool = False
    backend: Literal["auto", "eager", "compiled"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def check(self) -> None:
        """Refuses values that would only fail after hours of training.

        Raises:
            ValueError: If a value is wrong; names the option, the value and what was expected.
        """
        for name, hint in get_type_hints(RunConfig).items():
            value = getattr(self, name)
            options = get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                valid, expected = value in options, f"one of {options}"
            else:
                # An integer is accepted as a float, but True, also an int, never as a number.
                types = (*options, int) if float in options else options
                valid = isinstance(value, types) and (bool in options or type(value) is not bool)
                expected = " or ".join(t.__name__.replace("NoneType", "None") for t in options)
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        for name, least in _LEAST.items():
            value, most = getattr(self, name), _MOST.get(name, 2**31 - 1)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most:,}"
                raise ValueError(f"{name} must be {bound}, got {value:,}")
        if self.freeze_decoder and self.warm_start is None:
            raise ValueError("freeze_decoder needs a warm_start, whose trained decoder it keeps")
        if self.keep_best and not self.validation:
            raise ValueError("keep_best chooses an epoch by held-out images: give validation")
        for name in ("learning_rate", "sigma_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"{name} must be positive, got {rate}")
        if self.sigma_learning_rate is not None and (
            self.freeze_decoder or self.likelihood != "gaussian"
        ):
            raise ValueError(
                "sigma_learning_rate needs a learned σ: a Gaussian likelihood, and no "
                "freeze_decoder"
            )

    def moved(
        self, data: str | None = None, root: str | None = None, device: str | None = None
    ) -> RunConfig:
        """Returns the options with other places, and paths that hold in any working directory.

        None keeps a place; paths of the data become absolute.
        """
        data, root = data or self.data, root or self.root
        if data.endswith(".npz") or Path(data).name != data:  # a path, as load_data sees it
            data = os.path.abspath(os.path.expanduser(data))
        if root is not None:
            root = os.path.abspath(os.path.expanduser(root))
        return dataclasses.replace(self, data=data, root=root, device=device or self.device)

    @staticmethod
    def from_json(values: Mapping[str, Any], source: str | Path) -> RunConfig:
        """Builds a checked configuration from the content of a file.

        Options that only older versions had are ignored.

        Raises:
            ValueError: If an option is unknown or wrong; names the file.
        """
        values = {name: value for name, value in values.items() if name not in _RETIRED}
        known = {field.name for field in dataclasses.fields(RunConfig)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(
                f"{source} has the unknown option {unknown[0]!r}: was it written by another "
                f"version? Known are {', '.join(sorted(known))}."
            )
        try:
            (config := RunConfig(**values)).check()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return config


def check_same(found: RunConfig, wanted: RunConfig, source: Path) -> None:
    """Raises ValueError if the run of a folder has other options, apart from its place."""
    found = found.moved()  # older versions recorded relative paths
    for option, value in vars(wanted.moved()).items():
        if option not in PLACE and getattr(found, option) != value:
            raise ValueError(
                f"{source} was trained with {option} = {getattr(found, option)!r}, not {value!r}: "
                "choose another folder, or delete it"
            )
