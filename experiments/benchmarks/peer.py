"""Training and test log-likelihoods compared with pythae.

    python3.11 -m venv .venv/pythae
    .venv/pythae/bin/pip install -c constraints.txt torch==2.13.0 pythae==0.1.2
    OMP_NUM_THREADS=1 python experiments/benchmarks/peer.py

Each library runs in an environment of its own, and each timing in a new process. Both train in
turns on the same random images with the networks of Table 1, the same batch size, Adam at 5e-4 and
σ = 1: ``fit`` here, BaseTrainer there, also with fused Adam, which is not pythae's default. The
first epoch is not timed. Then both estimate log p(x) with K importance samples: ``log_evidence``
here, ``get_nll`` there with its fastest batch size. The guides are a VAE and a VAE with two IAF
steps of 256 hidden units; our IAF steps have the encoder's features, gates and skip connections in
addition. First, both score embedded digits with the same trained networks, and the results must
agree.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from _bench import Options, Timings, publish, short
from _handwritten import NETS

from pyro_gpvae import load_data

HERE = Path(__file__).parent
TRAIN, FUSED, NLL = "training", "training, peer's Adam fused", "log p(x)"
CHECK_SAMPLES = 1000


@dataclass(kw_only=True)
class PeerOptions(Options):
    """Options of the comparison.

    Attributes:
        peer: Python of the environment with pythae.
        script: Program that trains and scores there.
        latent_dims: Dimensions p of z.
        guides: "vae" and "iaf".
        images: Number of training images; MNIST has 60,000.
        epochs: Number of epochs over which a timing of training is averaged.
        backend: Backend of ``fit``.
        test_images: Number of images whose log p(x) is estimated.
        samples: Importance samples K.
        peer_batches: Batch sizes of pythae's estimate; the fastest is used.
        check_epochs: Epochs on 4,000 digits before scores are compared.
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
    check_epochs: int = 5


def measure(options: PeerOptions) -> dict[str, Any]:
    """Returns the agreement of both scores, and the seconds per image of all requests."""
    with TemporaryDirectory() as folder:
        data, weights = load_data("mnist5k"), f"{folder}/weights.npz"
        digits = save(folder, "digits", data.train[:4000].numpy(), data.test[:20].numpy())
        request = {"guide": "vae", "images": digits, "num_samples": CHECK_SAMPLES}
        request["latent_dim"] = options.latent_dims[0]
        training = {"epochs": options.check_epochs, "backend": "eager", "save": weights}
        mine = ask(options, "ours", task="nll", **request, **training)
        other = ask(options, "peer", task="nll", **request, load=weights, batch_sizes=[100])
        record: dict[str, Any] = {"check": same_quantity(mine, other)}
        shape, generator = NETS["conv"].image_shape, np.random.default_rng(options.seed)
        sizes = (options.images, options.test_images)
        arrays = [generator.integers(256, size=(k, *shape), dtype=np.uint8) for k in sizes]
        images = save(folder, "random", *arrays)
        for guide, p in itertools.product(options.guides, options.latent_dims):
            request = {"guide": guide, "latent_dim": p, "images": images}
            record[f"{guide}, p = {p}"] = {"seconds_per_image": compare(options, request)}
    return record


def save(folder: str, name: str, train: Any, test: Any) -> str:
    """Writes images for both libraries, and returns the path."""
    np.savez(f"{folder}/{name}.npz", train=train, test=test)
    return f"{folder}/{name}.npz"


def ask(options: PeerOptions, who: str, **request: Any) -> dict[str, Any]:
    """Returns what a new process of one of the libraries answers.

    Memory that a process has freed before would change the cost of its training.
    """
    ours = who == "ours"
    python = sys.executable if ours else str(options.peer)
    script = HERE / "_our_worker.py" if ours else options.script
    request |= {"device": str(options.on()), "seed": options.seed}
    command = [python, str(script), json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # libraries print more
    if answer["torch"] != torch.__version__:
        raise ValueError(f"both need torch {torch.__version__}, found {answer['torch']}")
    return answer


def compare(options: PeerOptions, request: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the seconds per image of all tasks, which take turns in a random order."""
    train: dict[str, Any] = {"task": "train", "epochs": options.epochs}
    nll: dict[str, Any] = {"task": "nll", "num_samples": options.samples}
    tasks = {
        f"ours, {TRAIN}": train | {"backend": options.backend},
        f"peer, {TRAIN}": train,
        f"peer, {FUSED}": train | {"fused": True},
        f"ours, {NLL}": nll,
        f"peer, {NLL}": nll | {"batch_sizes": options.peer_batches},
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    order, generator = list(tasks), random.Random(options.seed)
    for _ in range(options.rounds):
        generator.shuffle(order)
        for name in order:
            answer = ask(options, name.partition(",")[0], **request, **tasks[name])
            trained = "epoch" in answer
            seconds[name].append(answer["epoch"] / options.images if trained else answer["seconds"])
    return seconds


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


def same_quantity(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Compares the scores that both libraries give to the same digits and trained networks.

    Raises:
        ValueError: If the scores differ by more than 4 standard errors.
    """
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
