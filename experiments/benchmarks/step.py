"""What does a training step cost, beside hand-written PyTorch and plain Pyro; GPVAE beside VAE?

    OMP_NUM_THREADS=1 python experiments/benchmarks/step.py

For the networks of Table 1 (p = 50, batches of 128), and for a tiny net whose steps are all
overhead: a VAE written in plain PyTorch with fused Adam (on CUDA also as a captured graph); the
same networks under ``pyro.infer.SVI`` with ``pyro.optim.Adam``, and as fast as that goes
(ClippedAdam, validation off); and ``pyro_gpvae`` with each of its backends, for VAE and GPVAE. All
train on random images, the same batches of uint8. Then inference, q(z|x) and one draw, of GPVAE and
VAE; ``experiments/tables/table6.py`` does that for all guides. JSON and Markdown are written to
--out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pyro
import pyro.distributions as dist
import torch
import tyro
from _bench import Ceilings, Options, Program, Timings, Work, interleave
from _handwritten import NETS, VAE, Net, Step, captured, decoder, eager, features
from _report import Report, Target, profile
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam, ClippedAdam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.training.step import Backend, TrainingStep

HAND, GRAPH, PLAIN, TUNED = "hand-written", "hand-written, captured", "SVI", "SVI, tuned"


@dataclass(kw_only=True)
class StepOptions(Options):
    """Options of the measurement.

    Attributes:
        nets: "conv", Table 1, and "tiny".
        backends: Of our steps; None is all that the device can do.
        images: Training images.
    """

    nets: tuple[str, ...] = tuple(NETS)
    backends: tuple[Backend, ...] | None = None
    images: int = 4096


def main(options: StepOptions) -> None:
    report = Report(
        "step",
        "A training step",
        options,
        "VAE and GPVAE: the guides vae and gp. conv: networks of Table 1, 28×28, p = 50, B = 128; "
        f"tiny: 8×8, 64 hidden units, p = 5, B = 32. {options.images:,} random images, Adam at "
        "5e-4. SVI: validation and pyro.optim.Adam; tuned: neither, but ClippedAdam. Limit: "
        "operations and unavoidable bytes of the hand-written step at the speed of the ceilings.",
        Ceilings.measure(options.on()),
    )
    for name in options.nets:
        measure(report, options, name, NETS[name])
    report.write()


def measure(report: Report, options: StepOptions, name: str, net: Net) -> None:
    """Adds tables and targets for one pair of networks."""
    device = options.on()
    cuda = device.type == "cuda"
    with seeded(options.seed, device):
        shape = (options.images, *net.image_shape)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        yardstick = VAE(net).to(device)
        steps: dict[str, Step] = {HAND: eager(yardstick, images)}
        if cuda:
            steps[GRAPH] = captured(VAE(net).to(device), images, net.batch_size)
        steps[PLAIN] = svi(VAE(net).to(device), images, f"{name}.plain", tuned=False)
        steps[TUNED] = svi(VAE(net).to(device), images, f"{name}.tuned", tuned=True)
        all_backends = [b for b in get_args(Backend) if b != "captured" or cuda]
        backends = options.backends or all_backends
        for backend, guide in itertools.product(backends, ("vae", "gp")):
            steps[f"{guide}, {backend}"] = ours(net, guide, images, backend)
        work = Work.of(
            on_batches(steps[HAND], images, net.batch_size),
            yardstick.parameters(),
            images[: net.batch_size],
        )
        limit = report.ceilings.limit(work)
        programs = {k: on_batches(step, images, net.batch_size) for k, step in steps.items()}
        timings = interleave(programs, device, options)
        inference = interleave(inferences(net, images), device, options)
        mine = timings.fastest(f"vae, {backend}" for backend in backends)
        targets = list(step_targets(name, timings, mine, cuda))
        found = inference.ratio("gp", "vae").median
        targets.append(Target(f"{name}, inference, GPVAE / VAE", 1.05, found))
        report.tables[f"{name}: a step"] = timings.table(HAND, dict.fromkeys(steps, limit))
        report.tables[f"{name}: inference"] = inference.table("vae")
        if any(target.reached is False for target in targets):
            for missed in (HAND, mine, mine.replace("vae", "gp")):
                text = profile(programs[missed], device, 10 * options.seconds)
                report.tables[f"{name}: profile of {missed}"] = text
    report.targets += targets
    report.record[name] = {
        "flops": work.flops,
        "bytes": work.bytes,
        "limit_seconds": limit,
        "step_seconds": timings.seconds,
        "inference_seconds": inference.seconds,
    }


def step_targets(name: str, timings: Timings, mine: str, cuda: bool) -> Iterator[Target]:
    """The figures to reach. ``mine`` is the VAE with the fastest backend."""
    if cuda:
        against_svi = timings.ratio(PLAIN, mine).median
        yield Target(f"{name}, SVI / {mine}", 10, against_svi, at_least=True)
        yield Target(f"{name}, {mine} / {GRAPH}", 1.1, timings.ratio(mine, GRAPH).median)
    else:
        limit = {"conv": 0.85, "tiny": 1.0}[name]
        yield Target(f"{name}, {mine} / {HAND}", limit, timings.ratio(mine, HAND).median)
    gp = mine.replace("vae", "gp")
    yield Target(f"{name}, {gp} / {mine}", 1.10, timings.ratio(gp, mine).median)


def lasting(device: torch.device) -> Backend:
    """The backend that ``fit`` chooses for a training as long as the paper's."""
    return "captured" if device.type == "cuda" else "compiled"


def on_batches(step: Step, images: Tensor, batch_size: int) -> Program:
    """A step on the next batch of a permutation, again and again."""
    order = torch.randperm(len(images), device=images.device).split(batch_size)
    batches = itertools.cycle([index for index in order if len(index) == batch_size])
    return lambda: step(next(batches))


def ours(net: Net, guide: str, images: Tensor, backend: Backend) -> TrainingStep:
    """A step of this package."""
    model, made = (program.to(images.device).train() for program in pair(net, guide))
    return TrainingStep(
        model,
        made,
        images,
        batch_size=net.batch_size,
        learning_rate=5e-4,
        backend=backend,
    )


def pair(net: Net, guide: str) -> tuple[ImageModel, Any]:
    """Model and guide with the library's own networks, or with tiny ones."""
    tiny = net.kind == "fc"
    model = ImageModel(net.image_shape, net.latent_dim, decoder(net) if tiny else None)
    return model, make_guide(guide, model, **({"encoder": features(net)} if tiny else {}))


def svi(vae: VAE, images: Tensor, name: str, tuned: bool) -> Step:
    """Plain Pyro, as in its VAE tutorial: modules in the parameter store, SVI.step."""
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


def inferences(net: Net, images: Tensor) -> dict[str, Program]:
    """q(z|x) of a batch and one draw from it, as Table 6 times it for all guides."""
    x = images[: net.batch_size].float() / 255

    def program(guide: Any) -> Callable[[], object]:
        @torch.no_grad()
        def infer() -> object:
            return guide.posterior(x).sample()

        return infer

    return {name: program(pair(net, name)[1].to(x.device).eval()) for name in ("vae", "gp")}


if __name__ == "__main__":
    main(tyro.cli(StepOptions, description=__doc__))
