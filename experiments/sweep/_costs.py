r"""What a cell of a plan will cost, from the step times of runs that are finished."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import cache

import pandas as pd
from _plans import Cell

from pyro_gpvae.data.images import PUBLISHED, load_data


def step_times(frame: pd.DataFrame) -> pd.DataFrame:
    """What a step of training, and the evaluation of an image, took in finished runs; in ms.

    Arguments:
        frame: As :func:`pyro_gpvae.runs.results.read_results` returns it.
    """
    keys = ["guide", "data", "latent_dim", "decoder", "batch_size", "num_samples", "threads"]
    rows = frame.assign(
        step_ms=1000 * frame["train_seconds"] / frame["steps"],
        image_ms=1000 * frame["test_seconds"] / frame["num_test"],
    )
    table = rows.groupby([*keys, "device"], sort=True)[["step_ms", "image_ms"]].mean()
    return table.astype(float).round(3).reset_index()


def seconds(cell: Cell, times: pd.DataFrame) -> float | None:
    """What a cell will cost in seconds; None if there is no similar run.

    Arguments:
        cell: The cell.
        times: As of :func:`step_times`. The row counts that has the same guide, shape of images
            and decoder, and the nearest p; of several, the first.
    """
    config = cell.config
    train, test = _sizes(config.data)
    train = (config.train_images or train) - config.validation
    test = config.test_images or test
    similar = times[
        (times["decoder"] == config.decoder)
        & (times["guide"].map(_plain) == _plain(config.guide))
        & (times["data"].map(_shape) == _shape(config.data))
    ]
    if similar.empty:
        return None
    unlike = pd.DataFrame(
        {
            "p": (similar["latent_dim"] - config.latent_dim).abs(),
            "guide": similar["guide"] != config.guide,
            "data": similar["data"] != config.data,
        }
    )
    best = similar.loc[unlike.sort_values(["p", "guide", "data"], kind="stable").index[0]]
    steps = config.epochs * math.ceil(train / config.batch_size)
    step = best["step_ms"] * config.batch_size / best["batch_size"]
    image = best["image_ms"] * config.num_samples / best["num_samples"]
    return float(steps * step + test * image) / 1000


def _plain(guide: str) -> str:
    """A guide's name with its numbers, without the options that hardly change its cost."""
    return ",".join(part for part in guide.split(",") if "=" not in part).partition("=")[0]


def _shape(data: str) -> str:
    """The published data set whose images have the same shape and networks."""
    alike = {"mnist5k": "mnist", "fashion_mnist": "mnist", "omniglot": "mnist", "svhn": "cifar10"}
    return alike.get(data, data)


@cache
def _sizes(name: str) -> tuple[int, int]:
    if name in PUBLISHED:
        return PUBLISHED[name].sizes
    data = load_data(name)  # the embedded digits, or the user's own file
    return len(data.train), len(data.test)


def duration(time_in_seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(90061.4)
        '1 day, 1:01:01'
    """
    return str(timedelta(seconds=round(time_in_seconds)))
