"""The cost of a training step compared with plain PyTorch and plain Pyro; GPVAE and VAE.

    OMP_NUM_THREADS=1 python experiments/benchmarks/step.py

For the networks of Table 1 (p = 50, batches of 128) and for a tiny network, whose steps consist of
overhead, these train on the same batches of random uint8 images: a VAE in plain PyTorch with fused
Adam; the same networks with ``pyro.infer.SVI`` and ``pyro.optim.Adam``, and tuned (ClippedAdam,
validation off); and ``pyro_gpvae`` with each backend, VAE and GPVAE. Inference is timed by
``experiments/tables/table6.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import tyro
from _bench import Options, Program, Timings, interleave, publish
from _handwritten import NETS, VAE, Net, Step, decoder, eager, features
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam, ClippedAdam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.training.step import TrainingStep

Backend = Literal["eager", "compiled"]
HAND, PLAIN, TUNED = "hand-written", "SVI", "SVI, tuned"


@dataclass(kw_only=True)
class StepOptions(Options):
    """Options of the measurement.

    Attributes:
        nets: "conv", the networks of Table 1, and "tiny".
        backends: Backends of our training step.
        images: Number of training images.
    """

    nets: tuple[str, ...] = tuple(NETS)
    backends: tuple[Backend, ...] = ("eager", "compiled")
    images: int = 4096


def measure(options: StepOptions) -> dict[str, Any]:
    """Returns the seconds of steps for each pair of networks."""
    record: dict[str, Any] = {}
    device = options.on()
    for name in options.nets:
        net = NETS[name]
        with seeded(options.seed, device):
            shape = (options.images, *net.image_shape)
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)
            steps: dict[str, Step] = {HAND: eager(VAE(net).to(device), images)}
            steps[PLAIN] = svi(VAE(net).to(device), images, f"{name}.plain", tuned=False)
            steps[TUNED] = svi(VAE(net).to(device), images, f"{name}.tuned", tuned=True)
            for backend, guide in itertools.product(options.backends, ("vae", "gp")):
                steps[f"{guide}, {backend}"] = ours(net, guide, images, backend)
            programs = {k: on_batches(step, images, net.batch_size) for k, step in steps.items()}
            record[name] = {"step_seconds": interleave(programs, device, options).seconds}
    return record


def page(record: dict[str, Any]) -> Iterator[str]:
    """Makes the parts of the page from a record."""
    yield "# A training step"
    for name in record["nets"]:
        yield f"## {name}"
        yield Timings(record[name]["step_seconds"]).table(HAND)
    yield (
        "VAE and GPVAE: the guides vae and gp. conv: networks of Table 1, 28×28, p = 50, B = 128; "
        f"tiny: 8×8, 64 hidden units, p = 5, B = 32. {record['images']:,} random images, Adam at "
        "5e-4. SVI: validation and pyro.optim.Adam; tuned: no validation, ClippedAdam."
    )


def on_batches(step: Step, images: Tensor, batch_size: int) -> Program:
    """Returns a program that makes a step on the next batch of a permutation."""
    order = torch.randperm(len(images), device=images.device).split(batch_size)
    batches = itertools.cycle([index for index in order if len(index) == batch_size])
    return lambda: step(next(batches))


def ours(net: Net, guide: str, images: Tensor, backend: Backend) -> Step:
    """Returns a step of this package."""
    model, made = (program.to(images.device).train() for program in programs_of(net, guide))
    step = TrainingStep(model, made, images[: net.batch_size], len(images), backend=backend)
    return lambda index: step(images[index])


def programs_of(net: Net, guide: str) -> tuple[ImageModel, Any]:
    """Returns model and guide with the library's own networks, or with tiny ones."""
    tiny = net.kind == "fc"
    model = ImageModel(net.image_shape, net.latent_dim, decoder(net) if tiny else None)
    return model, make_guide(guide, model, **({"encoder": features(net)} if tiny else {}))


def svi(vae: VAE, images: Tensor, name: str, tuned: bool) -> Step:
    """Returns a step of plain Pyro, written as in its VAE tutorial."""
    p = vae.net.latent_dim

    def model(x: Tensor) -> None:
        pyro.module(f"{name}.decoder", vae.decoder)
        sigma = pyro.param(f"{name}.log_sigma", torch.zeros((), device=x.device)).exp()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), p), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(vae.decoder(z), sigma).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name}.encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = vae.encoder(x).chunk(2, dim=1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    optimizer = ClippedAdam({"lr": 5e-4}) if tuned else Adam({"lr": 5e-4})
    inference: Any = SVI(model, guide, optimizer, TraceMeanField_ELBO())

    def step(index: Tensor) -> object:
        with pyro.validation_enabled(not tuned):
            return inference.step(images[index].float() / 255)

    return step


def main(options: StepOptions) -> None:
    publish("step", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(StepOptions, description=__doc__))
