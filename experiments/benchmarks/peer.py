"""Training and test log-likelihoods compared with pythae.

    python3.11 -m venv .venv/pythae
    .venv/pythae/bin/pip install -c constraints.txt torch==2.13.0 pythae==0.1.2
    OMP_NUM_THREADS=1 python experiments/benchmarks/peer.py

Each library runs in an environment and in processes of its own, one that trains and one that
scores. Both train in turns on the same random images with the networks of Table 1, the same batch
size, Adam at 5e-4 and σ = 1: ``fit`` here, BaseTrainer there, also with fused Adam, which is not
pythae's default. The first epoch is not timed. Then both estimate log p(x) with K importance
samples: ``log_evidence`` here, ``get_nll`` there with its fastest batch size. The guides are a VAE
and a VAE with two IAF steps of 256 hidden units; our IAF steps have the encoder's features, gates
and skip connections in addition. First, both score embedded digits with the same trained networks,
and the results must agree.
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
import tyro
from _bench import Options, Timings, publish, short
from _handwritten import NETS
from _worker import Worker

from pyro_gpvae import load_data

HERE = Path(__file__).parent
TRAIN, FUSED, NLL = "training", "training, peer's Adam fused", "log p(x)"


@dataclass(kw_only=True)
class PeerOptions(Options):
    """Options of the comparison.

    Attributes:
        peer: Python of the environment with pythae.
        script: Program that answers the requests there.
        latent_dims: Dimensions p of z.
        guides: "vae" and "iaf".
        images: Number of training images; MNIST has 60,000.
        epochs: Number of epochs over which a timing of training is averaged.
        backend: Backend of ``fit``.
        test_images: Number of images whose log p(x) is estimated.
        samples: Importance samples K.
        peer_batches: Batch sizes of pythae's estimate; the fastest is used.
        check_images: Embedded digits to train on before scores are compared.
        check_epochs: Epochs of that training.
        check_samples: Importance samples of that comparison.
    """

    rounds: int = 3
    peer: Path = Path(".venv/pythae/bin/python")
    script: Path = HERE / "_pythae_worker.py"
    latent_dims: tuple[int, ...] = (10, 50)
    guides: tuple[str, ...] = ("vae", "iaf")
    images: int = 60_000
    epochs: int = 1
    backend: str = "compiled"
    test_images: int = 128
    samples: int = 100
    peer_batches: tuple[int, ...] = (100, 50, 25, 10)
    check_images: int = 4000
    check_epochs: int = 5
    check_samples: int = 1000


Workers = dict[str, Worker]


def measure(options: PeerOptions) -> dict[str, Any]:
    """Returns the agreement of both scores, and the seconds per image of all requests."""
    shape, generator = NETS["conv"].image_shape, np.random.default_rng(options.seed)
    sizes = {"train": options.images, "test": options.test_images}
    images = {
        n: generator.integers(256, size=(k, *shape), dtype=np.uint8) for n, k in sizes.items()
    }
    with pair(options, "vae", options.latent_dims[0], digits(options)) as workers:
        record: dict[str, Any] = {"check": same_quantity(workers, options)}
    for guide in options.guides:
        for p in options.latent_dims:
            start = pair(options, guide, p, images), pair(options, guide, p, images)
            # memory that a process has freed before changes the cost of its training
            with start[0] as trainers, start[1] as workers:
                record[f"{guide}, p = {p}"] = compare(trainers, workers, options)
    return record


@contextmanager
def pair(
    options: PeerOptions, guide: str, latent_dim: int, images: dict[str, Any]
) -> Iterator[Workers]:
    """Starts a process of each library, and gives both the same images and networks.

    Raises:
        ValueError: If they have different versions of torch.
    """
    with (
        TemporaryDirectory() as folder,
        Worker(sys.executable, HERE / "_our_worker.py") as ours,
        Worker(options.peer, options.script) as peer,
    ):
        path = Path(folder) / "images.npz"
        np.savez(path, **images)
        request = {
            "guide": guide,
            "latent_dim": latent_dim,
            "batch_size": NETS["conv"].batch_size,
            "device": str(options.on()),
            "images": str(path),
            "seed": options.seed,
        }
        workers = {"ours": ours, "peer": peer}
        versions = {who: w.ask("setup", **request)["torch"] for who, w in workers.items()}
        if len(set(versions.values())) > 1:
            raise ValueError(f"both need the same torch, found {versions}")
        yield workers


def digits(options: PeerOptions) -> dict[str, Any]:
    """Returns embedded digits, on which both libraries are compared before they are timed."""
    data = load_data("mnist5k")
    return {"train": data.train[: options.check_images].numpy(), "test": data.test.numpy()}


def compare(trainers: Workers, workers: Workers, options: PeerOptions) -> dict[str, Any]:
    """Times all requests in turns, after one round of warm-up."""
    nll: dict[str, Any] = {"num_images": options.test_images, "num_samples": options.samples}
    trials = {b: workers["peer"].ask("nll", **nll, batch_size=b) for b in options.peer_batches}
    best = min(trials, key=lambda batch: trials[batch]["seconds"])
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        f"ours, {TRAIN}": ("train", {"epochs": options.epochs, "backend": options.backend}),
        f"peer, {TRAIN}": ("train", {"epochs": options.epochs}),
        f"peer, {FUSED}": ("train", {"epochs": options.epochs, "fused": True}),
        f"ours, {NLL}": ("nll", nll),
        f"peer, {NLL}": ("nll", nll | {"batch_size": best}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    order, generator = list(requests), random.Random(options.seed)
    for count in range(options.rounds + 1):
        generator.shuffle(order)
        for name in order:
            do, values = requests[name]
            who = name.partition(",")[0]
            answer = (trainers if do == "train" else workers)[who].ask(do, **values)
            if count:
                found = answer["epoch"] / options.images if do == "train" else answer["seconds"]
                seconds[name].append(found)
    return {"seconds_per_image": seconds, "peer_batch_size": best, "backend": options.backend}


def page(record: dict[str, Any]) -> Iterator[str]:
    """Makes the parts of the page from a record."""
    yield "# Training and log p(x) compared with pythae"
    check = record["check"]
    yield (
        f"The same trained networks have log p(x) {check['ours']:.3f} here and "
        f"{check['peer']:.3f} nats in pythae, a difference of "
        f"{short(check['standard_errors'])} standard errors."
    )
    for guide in record["guides"]:
        for p in record["latent_dims"]:
            yield f"## {guide}, p = {p}"
            yield table(Timings(record[f"{guide}, p = {p}"]["seconds_per_image"]))
    yield (
        f"Networks of Table 1, batches of 128, {record['images']:,} random images, Adam at 5e-4, "
        f"σ = 1; log p(x) of {record['test_images']} images, K = {record['samples']}."
    )


def table(timings: Timings) -> str:
    """Returns a Markdown table of ratios, and images per second of the medians."""
    lines = [
        "| | pythae's time / ours | ours, images/s | pythae, images/s |",
        "|---|--:|--:|--:|",
    ]
    for what in (TRAIN, FUSED, NLL):
        mine, other = f"ours, {NLL if what == NLL else TRAIN}", f"peer, {what}"
        speeds = [short(1 / timings.of(name).median) for name in (mine, other)]
        lines.append(f"| {what} | {timings.ratio(other, mine)} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def same_quantity(workers: Workers, options: PeerOptions) -> dict[str, float]:
    """Scores the same digits by the same trained networks, in both libraries.

    Raises:
        ValueError: If the scores differ by more than 4 standard errors.
    """
    workers["ours"].ask("train", epochs=options.check_epochs, backend="eager")
    with TemporaryDirectory() as folder:
        workers["ours"].ask("save", path=f"{folder}/weights.npz")
        workers["peer"].ask("load", path=f"{folder}/weights.npz")
    request = {"num_images": 20, "num_samples": options.check_samples, "batch_size": 100}
    mine, other = (workers[who].ask("nll", **request) for who in ("ours", "peer"))
    difference = abs(mine["mean"] - other["mean"]) / (math.sqrt(2) * mine["error"])
    if difference > 4:
        raise ValueError(
            f"log p(x) of the same networks is {mine['mean']:.3f} here and {other['mean']:.3f} in "
            f"pythae, a difference of {difference:.1f} standard errors"
        )
    return {"ours": mine["mean"], "peer": other["mean"], "standard_errors": difference}


def main(options: PeerOptions) -> None:
    publish("peer", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(PeerOptions, description=__doc__))
