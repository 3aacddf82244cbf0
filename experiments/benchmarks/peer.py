"""How fast are training and test log-likelihoods, beside pythae?

    python3.11 -m venv .venv/pythae
    .venv/pythae/bin/pip install -c constraints.txt torch==2.13.0 pythae==0.1.2
    OMP_NUM_THREADS=1 python experiments/benchmarks/peer.py

pythae is installed in an environment of its own, and works in processes of its own, one that trains
and one that scores; so does this package. Both train in turns on the same random images: the
networks of Table 1, the same batch size, Adam at 5e-4, σ = 1, which pythae knows alone; ``fit``
here, its BaseTrainer there, without progress bar, messages and files, also with fused Adam, which
is not its default. An epoch is timed after a first one, with its page faults, and so are the terms
of eq. (2) that end it here. Then both estimate log p(x) by K importance samples: ``log_evidence``
here, ``get_nll`` there, with the batch size that is fastest. VAE and VAE with two IAF steps of 256
hidden units; ours also see the encoder's features, and have gates and skip connections. First both
score embedded digits with the same trained networks: they must agree. JSON and Markdown are written
to --out.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from _bench import Ceilings, Options, Quartiles, Timings, Work, short
from _handwritten import NETS, VAE, Net, eager
from _report import Report, Target
from _worker import Worker
from step import lasting

from pyro_gpvae import load_data

HERE = Path(__file__).parent
TRAIN, FUSED, NLL = "training", "training, peer's Adam fused", "log p(x)"
#: How many times faster than the peer on a CPU.
LIMITS = {TRAIN: 1.25, NLL: 1.35}


@dataclass(kw_only=True)
class PeerOptions(Options):
    """Options of the comparison.

    Attributes:
        peer: The Python of the environment with pythae.
        script: What answers the requests there.
        latent_dims: Dimensions p of z.
        guides: "vae" and "iaf".
        images: Training images; MNIST has 60,000.
        epochs: Epochs that a timing of training is the mean of.
        backend: Of ``fit``; None is what it chooses for long trainings.
        test_images: Images whose log p(x) is estimated.
        samples: Importance samples K.
        peer_batches: Batch sizes of the peer's estimate, of which it gets the fastest.
        check_images: Embedded digits to train on before scores are compared.
        check_epochs: Epochs of that.
        check_samples: Importance samples of that comparison.
    """

    rounds: int = 3
    peer: Path = Path(".venv/pythae/bin/python")
    script: Path = HERE / "_pythae_worker.py"
    latent_dims: tuple[int, ...] = (10, 50)
    guides: tuple[str, ...] = ("vae", "iaf")
    images: int = 60_000
    epochs: int = 1
    backend: str | None = None
    test_images: int = 128
    samples: int = 100
    peer_batches: tuple[int, ...] = (100, 50, 25, 10)
    check_images: int = 4000
    check_epochs: int = 5
    check_samples: int = 1000


def main(options: PeerOptions) -> None:
    device = options.on()
    ceilings = Ceilings.measure(device)
    report = Report(
        "peer",
        "Training and log p(x) beside pythae",
        options,
        f"Networks of Table 1, batches of 128, {options.images:,} random images, Adam at 5e-4, "
        f"σ = 1; log p(x) of {options.test_images} images, K = {options.samples}. Limit: "
        "operations and unavoidable bytes, without those of the flow, at the speed of the "
        "ceilings.",
        ceilings,
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        with pair(options) as workers:
            report.targets.append(same_quantity(workers, options, folder))
        for guide in options.guides:
            for latent_dim in options.latent_dims:
                # what a process has freed before changes what its allocator costs in training
                with pair(options) as trainers, pair(options) as workers:
                    for each in (trainers, workers):
                        setup(each, options, guide, latent_dim, random_images(options), folder)
                    compare(report, trainers, workers, options, guide, latent_dim)
    report.write()


@contextmanager
def pair(options: PeerOptions) -> Iterator[dict[str, Worker]]:
    """A process of ours, and one of the peer."""
    with (
        Worker(sys.executable, HERE / "_our_worker.py") as ours,
        Worker(options.peer, options.script) as peer,
    ):
        yield {"ours": ours, "peer": peer}


def compare(
    report: Report,
    trainers: dict[str, Worker],
    workers: dict[str, Worker],
    options: PeerOptions,
    guide: str,
    latent_dim: int,
) -> None:
    """Adds a table and the figures for one guide and p; trainers are asked for nothing else."""
    backend = options.backend or lasting(options.on())
    nll: dict[str, Any] = {"num_images": options.test_images, "num_samples": options.samples}
    trials = {b: workers["peer"].ask("nll", **nll, batch_size=b) for b in options.peer_batches}
    best = min(trials, key=lambda batch: trials[batch]["seconds"])
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        f"ours, {TRAIN}": ("train", {"epochs": options.epochs, "backend": backend}),
        f"peer, {TRAIN}": ("train", {"epochs": options.epochs}),
        f"peer, {FUSED}": ("train", {"epochs": options.epochs, "fused": True}),
        f"ours, {NLL}": ("nll", nll),
        f"peer, {NLL}": ("nll", nll | {"batch_size": best}),
    }
    timings = Timings({name: [] for name in requests})
    first: dict[str, list[float]] = {"ours": [], "peer": []}
    faults: dict[str, list[float]] = {n: [] for n, (do, _) in requests.items() if do == "train"}
    ends: list[float] = []
    steps = math.ceil(options.images / NETS["conv"].batch_size)
    order, generator = list(requests), random.Random(options.seed)
    for count in range(options.rounds + 1):
        generator.shuffle(order)
        for name in order:
            do, values = requests[name]
            who = name.partition(",")[0]
            answer = (trainers if do == "train" else workers)[who].ask(do, **values)
            if do == "train":
                first[who].append(answer["first"])
            if count:  # once to warm up
                seconds = answer["epoch"] / options.images if do == "train" else answer["seconds"]
                timings.seconds[name].append(seconds)
                if do == "train":
                    faults[name].append(answer["page_faults"] / steps)
                if end := answer.get("epoch_end"):
                    ends.append(steps * end / (answer["epoch"] - end))
    limits = limits_per_image(report.ceilings, options, latent_dim)
    heading = f"{guide}, p = {latent_dim}"
    counts = "; ".join(f"{name} {Quartiles.of(found)}" for name, found in faults.items())
    report.tables[heading] = (
        f"{table(timings, limits)}\n\nThe terms of eq. (2) after an epoch of ours cost "
        f"{Quartiles.of(ends)} steps. Minor page faults of a step: {counts}."
    )
    if options.on().type == "cpu":
        report.targets += [
            Target(
                f"{heading}, {what}: pythae's time / ours",
                limit,
                timings.ratio(f"peer, {what}", f"ours, {what}").median,
                at_least=True,
            )
            for what, limit in LIMITS.items()
        ]
    report.record[heading] = {
        "seconds_per_image": timings.seconds,
        "limit_seconds_per_image": limits,
        "seconds_until_first_epoch_ends": first,
        "epoch_end_steps": ends,
        "minor_page_faults_per_step": faults,
        "peer_batch_size": best,
        "backend": backend,
    }


def table(timings: Timings, limits: dict[str, float]) -> str:
    """Markdown, ratios first; images per second of medians."""
    lines = [
        "| | pythae's time / ours | ours, images/s | pythae, images/s | ours, times the limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for what in (TRAIN, FUSED, NLL):
        mine, other = f"ours, {NLL if what == NLL else TRAIN}", f"peer, {what}"
        seconds = timings.of(mine).median
        cells = [
            what,
            str(timings.ratio(other, mine)),
            short(1 / seconds),
            short(1 / timings.of(other).median),
            short(seconds / limits[NLL if what == NLL else TRAIN]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def limits_per_image(ceilings: Ceilings, options: PeerOptions, latent_dim: int) -> dict[str, float]:
    """The least seconds that an image can take in training, and for its log p(x)."""
    net = Net("conv", NETS["conv"].image_shape, latent_dim, NETS["conv"].batch_size)
    device = options.on()
    vae = VAE(net).to(device)
    images = torch.zeros(net.batch_size, *net.image_shape, dtype=torch.uint8, device=device)
    step, everything = eager(vae, images), torch.arange(net.batch_size, device=device)
    training = Work.of(lambda: step(everything), vae.parameters(), images)
    vae.requires_grad_(False)
    z = torch.zeros(options.samples, latent_dim, device=device)

    def score() -> None:
        vae.encoder(images[:1].float())
        vae.decoder(z)

    scoring = Work.of(score, (), images[:1])  # a batch shares the parameters
    return {TRAIN: ceilings.limit(training) / net.batch_size, NLL: ceilings.limit(scoring)}


def same_quantity(workers: dict[str, Worker], options: PeerOptions, folder: Path) -> Target:
    """Both score the same digits by the same trained networks, within their Monte-Carlo error."""
    digits = load_data("mnist5k")
    train = digits.train[: options.check_images]
    images = {"train": train.numpy(), "test": digits.test.numpy()}
    setup(workers, options, "vae", options.latent_dims[0], images, folder)
    workers["ours"].ask("train", epochs=options.check_epochs, backend="eager")
    workers["ours"].ask("save", path=str(folder / "weights.npz"))
    workers["peer"].ask("load", path=str(folder / "weights.npz"))
    request = {"num_images": 20, "num_samples": options.check_samples, "batch_size": 100}
    mine, other = (workers[who].ask("nll", **request) for who in ("ours", "peer"))
    difference = abs(mine["mean"] - other["mean"]) / (math.sqrt(2) * mine["error"])
    text = f"the same networks: log p(x) {mine['mean']:.3f} and {other['mean']:.3f}"
    return Target(f"{text} nats, difference in standard errors", 4, difference)


def setup(
    workers: dict[str, Worker],
    options: PeerOptions,
    guide: str,
    latent_dim: int,
    images: dict[str, Any],
    folder: Path,
) -> None:
    """Gives both workers images and networks.

    Raises:
        ValueError: If they have different versions of torch.
    """
    path = folder / "images.npz"
    np.savez(path, **images)
    request = {
        "guide": guide,
        "latent_dim": latent_dim,
        "batch_size": NETS["conv"].batch_size,
        "device": str(options.on()),
        "images": str(path),
        "seed": options.seed,
    }
    versions = {who: worker.ask("setup", **request)["torch"] for who, worker in workers.items()}
    if len(set(versions.values())) > 1:
        raise ValueError(f"both need the same torch, found {versions}: install it with the peer")


def random_images(options: PeerOptions) -> dict[str, Any]:
    shape, generator = NETS["conv"].image_shape, np.random.default_rng(options.seed)
    sizes = {"train": options.images, "test": options.test_images}
    return {
        name: generator.integers(256, size=(size, *shape), dtype=np.uint8)
        for name, size in sizes.items()
    }


if __name__ == "__main__":
    main(tyro.cli(PeerOptions, description=__doc__))
