r"""The options of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["RunConfig"]


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides the outcome of a run.

    Attributes:
        data: Name of a data set, or path of an .npz file with uint8 arrays "train" and "test"
            of shape (N, H, W) or (N, H, W, C).
        root: Folder where data sets are kept; None is the environment variable PYRO_GPVAE_DATA,
            or ~/.cache/pyro-gpvae.
        download: Download the data set if it is not in the folder.
        guide: NAME, NAME:OPTIONS or MODULE:CLASS, such as "vae", "gp:covariance=full" or
            "my_guides:MyGuide"; "pyro-gpvae guides" lists the names.
        latent_dim: Dimension p of z.
        decoder: "conv" is the convolutional decoder of the paper's Tables 1-3, "fc" has two
            fully-connected hidden layers and as many parameters.
        likelihood: "gaussian" with one learned σ, or "bernoulli" on binarised pixels.
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Step size of Adam.
        validation: Number of training images held out (the same for every seed), whose ELBO is
            logged after each epoch.
        train_images: Use only the first so many training images; None is all.
        test_images: Evaluate only the first so many test images; None is all.
        num_samples: Importance samples K per image for log p(x).
        seed: Seed of initial weights, permutations, samples, and of the evaluation.
        device: "cpu", "cuda" or "cuda:INDEX"; None is CUDA if there is one, else the CPU.
        chunk_size: Latent vectors decoded at once in evaluation: bounds the memory. It decides the
            order of random numbers. None is 640 on a CPU; on a GPU 65,536, or as many as fit half
            of its free memory at the evaluation. The record says how many.
        warm_start: Folder of a finished run: the model starts from its weights, and the guide
            from its encoder where the guide can.
        freeze_decoder: Train the guide only, on the decoder of the warm start as it is.
        backend: How a step is made: "eager", "compiled" or, on CUDA, "captured"; "auto" chooses.
        precision: Of the networks' matrix products and convolutions in training: "float32", "tf32"
            (NVIDIA GPUs) or "bf16"; "default" is torch's own setting. Evaluation is in float32.
        on_nonfinite: "stop" at a loss or gradient that is NaN or infinite, or "skip" the update;
            more than 100 of them stop the run.
    """

    data: str = "mnist5k"
    root: str | None = None
    download: bool = False
    guide: str = "gp"
    latent_dim: int = 10
    decoder: Literal["conv", "fc"] = "conv"
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 5e-4
    validation: int = 0
    train_images: int | None = None
    test_images: int | None = None
    num_samples: int = 100
    seed: int = 0
    device: str | None = None
    chunk_size: int | None = None
    warm_start: str | None = None
    freeze_decoder: bool = False
    backend: Literal["auto", "eager", "compiled", "captured"] = "auto"
    precision: Literal["default", "float32", "tf32", "bf16"] = "default"
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def check(self) -> None:
        """Refuses values that would only fail after hours of training.

        Raises:
            ValueError: Names the option, its value and what was expected.
        """
        for name, hint in get_type_hints(RunConfig).items():
            value = getattr(self, name)
            options = get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                valid, expected = value in options, f"one of {options}"
            else:
                # a whole number will do for a float, but True, also an int, never for a number
                types = (*options, int) if float in options else options
                valid = isinstance(value, types) and (bool in options or type(value) is not bool)
                expected = " or ".join(t.__name__.replace("NoneType", "None") for t in options)
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        least = dict.fromkeys(("latent_dim", "epochs", "batch_size", "num_samples"), 1)
        least |= {"train_images": 2, "test_images": 1, "chunk_size": 1, "validation": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        if self.freeze_decoder and self.warm_start is None:
            raise ValueError("freeze_decoder needs a warm_start, whose trained decoder it keeps")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @staticmethod
    def from_json(values: dict[str, Any], source: str | Path) -> RunConfig:
        """Builds a checked configuration from a file's content; errors name the file."""
        known = {field.name for field in dataclasses.fields(RunConfig)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(
                f"{source} has the unknown option {unknown[0]!r}: was it written by another "
                f"version? Known are {', '.join(sorted(known))}."
            )
        config = RunConfig(**values)
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return config
