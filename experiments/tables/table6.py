"""Table 6 of the paper: the time of inference for a batch of 128 images.

    OMP_NUM_THREADS=1 python experiments/tables/table6.py --root ~/.cache/pyro-gpvae

For each data set, dimension and decoder, a VAE is trained for one epoch on a few images, and every
other guide is put on its decoder and, where possible, starts from its encoder. Inference is the
posterior q(z|x) of the same batch and one draw from it. All guides take turns in one process, in
another order in every round, after a warm-up. Compare the ratios to GPVAE with the paper's, not the
times, which were measured on another device.

Writes table6.json, .md and .csv; ``--render`` makes the last two again from the first.
"""

from __future__ import annotations

import itertools
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from score_tables import DATA_NAMES, PUBLISHED, Blocks, markdown, method_label

from pyro_gpvae import ImageModel, fit, initial_sigma, load_data, make_guide
from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_json, write_text
from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.data.images import ImageData
from pyro_gpvae.model.networks import DecoderKind, build_decoder
from pyro_gpvae.runs.folder import warm_guide

#: Guides of the paper, and families that it does not time.
GUIDES = (
    "vae", "sa:1", "sa:4", "iaf:2", "hf:2", "me:2", "rme:2", "iterative:3", "vlae:1", "vlae:2",
    "vlae:4", "vlae:8", "gp",
)  # fmt: skip
DECODERS: tuple[DecoderKind, ...] = ("fc", "conv")
PANELS = {"fc": "fully-connected decoders", "conv": "convolutional decoders"}
#: A column of the table.
KEY = ["decoder", "data", "latent_dim"]
BATCH = 128
_WARM_UP = 2


@dataclass(kw_only=True)
class Options:
    """Options of the benchmark.

    Attributes:
        mnist: Name or .npz path of the digits; the embedded ones are from MNIST.
        omniglot: Name or .npz path of OMNIGLOT; an empty name leaves it out.
        root: Folder of data sets.
        latent_dims: Dimensions p of z.
        guides: Guides to time; "gp" is needed for the ratios.
        repeats: Measurements of each guide.
        train_images: Number of images that the VAE is trained on for one epoch.
        device: "cpu" or "cuda"; None is CUDA if there is one.
        out: Folder of the results.
        render: Only make the table again from table6.json.
    """

    mnist: str = "mnist5k"
    omniglot: str = "omniglot"
    root: str | None = None
    latent_dims: tuple[int, ...] = (10, 50)
    guides: tuple[str, ...] = GUIDES
    repeats: int = 11
    train_images: int = 1280
    device: str | None = None
    out: Path = Path("docs/results")
    render: bool = False


def main(options: Options) -> None:
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        write_json(out / "table6.json", measure(options))
    record = read_json(out / "table6.json")
    table = with_published(record["rows"])
    page = markdown("Table 6: inference time", blocks_of(table), caption(record))
    write_text(out / "table6.csv", table.to_csv(index=False))
    write_text(out / "table6.md", page)
    print(page)


def measure(options: Options) -> dict[str, Any]:
    """Builds all guides, times them in turns, and returns the record."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sources = {"mnist": options.mnist, "omniglot": options.omniglot}
    sources = {data: source for data, source in sources.items() if source}
    places, programs = [], []
    for data, source in sources.items():
        images = load_data(source, root=options.root)
        for cell in itertools.product(options.latent_dims, DECODERS):
            for guide, program in _programs(options, images, *cell, device):
                place = dict(zip(("latent_dim", "decoder"), cell, strict=True))
                places.append({"guide": guide, "data": data} | place)
                programs.append(program)
    times = interleaved(programs, options.repeats, device)
    rows = [place | {"samples_ms": samples} for place, samples in zip(places, times, strict=True)]
    return {
        "batch_size": BATCH,
        "repeats": options.repeats,
        "warm_up": _WARM_UP,
        "train_images": options.train_images,
        "images": sources,
        **environment(device),
        "rows": summarise(rows).to_dict("records"),
    }


def interleaved(
    programs: list[Callable[[], Any]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Returns milliseconds of each program; load on the machine slows down all of them."""
    times: list[list[float]] = [[] for _ in programs]
    order = list(range(len(programs)))
    generator = random.Random(0)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that would need more steps
        for repeat in range(_WARM_UP + repeats):
            generator.shuffle(order)
            for index in order:
                wait()
                start = time.perf_counter()
                programs[index]()
                wait()
                if repeat >= _WARM_UP:
                    times[index].append(1000 * (time.perf_counter() - start))
    return times


def _programs(
    options: Options,
    data: ImageData,
    latent_dim: int,
    decoder: DecoderKind,
    device: torch.device,
) -> list[tuple[str, Callable[[], Any]]]:
    """One inference for a batch of test images, by each guide over the same decoder."""
    train = data.train[: options.train_images]
    with seeded(0, device):
        network = build_decoder(data.image_shape, latent_dim, decoder)
        model = ImageModel(data.image_shape, latent_dim, network, sigma=initial_sigma(train)).to(
            device
        )
        vae = make_guide("vae", model).to(device)
        fit(model, vae, train, epochs=1, progress=False)
        guides = {g: vae if g == "vae" else warm_guide(g, model, vae) for g in options.guides}
    x = to_batch(data.test[:BATCH], model)[0]
    if len(x) < BATCH:
        raise ValueError(f"{data.name} has {len(x)} test images, expected at least {BATCH}")

    def inference(guide: Any) -> Callable[[], Any]:
        return lambda: guide.posterior(x).sample()

    return [(name, inference(guide.to(device).eval())) for name, guide in guides.items()]


def summarise(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns medians, quartiles, and ratios of medians to GPVAE's on the same decoder."""
    table = pd.DataFrame(rows)
    quartiles = [np.quantile(samples, [0.25, 0.5, 0.75]) for samples in table["samples_ms"]]
    table[["ms_low", "ms", "ms_high"]] = np.array(quartiles)
    return table.assign(ratio=_ratios(table, "ms"))


def _ratios(table: pd.DataFrame, column: str) -> pd.Series:
    gp = table[table["guide"] == "gp"].set_index(KEY)[column].rename("of gp")
    return table[column] / table.join(gp, on=KEY)["of gp"]


def with_published(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns the measured rows with the published times and their ratios to GPVAE's."""
    paper = pd.read_csv(PUBLISHED / "table6.csv", comment="#").rename(columns={"ms": "published"})
    paper["published_ratio"] = _ratios(paper, "published")
    table = pd.DataFrame(rows).drop(columns="samples_ms")
    table.insert(0, "method", table["guide"].map(method_label))
    return table.merge(paper, how="left")


def caption(record: dict[str, Any]) -> str:
    threads = f"{record['threads']} thread{'s' if record['threads'] != 1 else ''}"
    text = (
        f"Milliseconds to infer {record['batch_size']} images, the posterior and one draw: median "
        f"(quartiles) of {record['repeats']} measurements after {record['warm_up']} to warm up, "
        f"all methods in turns in one process; {record['device']}, {threads}. Ratio: to GPVAE on "
        "the same decoder. Paper: its milliseconds, on a device that it does not name, and their "
        f"ratio. Every guide over a VAE's decoder after one epoch on {record['train_images']:,} "
        "images; only the VAE itself is trained. "
    )
    images = ", ".join(f"{DATA_NAMES[data]} is {name}" for data, name in record["images"].items())
    return f"{text}Images: {images}."


def blocks_of(table: pd.DataFrame) -> Blocks:
    """Returns a block for each decoder: time, ratio to GPVAE, and the paper's time and ratio."""
    blocks = {}
    for decoder, part in table.groupby("decoder", sort=False):
        texts = []
        for (data, p), cells in part.set_index("method").groupby(KEY[1:], sort=False):
            heads = [f"{DATA_NAMES[data]}, p = {p} (ms)", "ratio", "paper (ratio)"]
            rows = [_texts(row) for _, row in cells.iterrows()]
            texts.append(pd.DataFrame(rows, cells.index, heads))
        blocks[PANELS[str(decoder)]] = pd.concat(texts, axis=1)
    return blocks


def _texts(row: Any) -> list[str]:
    """Returns the three cells of a method and column."""
    published = f"{row['published']:.1f} ({row['published_ratio']:.2f})"
    return [
        f"{row['ms']:.1f} ({row['ms_low']:.1f} to {row['ms_high']:.1f})",
        f"{row['ratio']:.2f}",
        "–" if math.isnan(row["published"]) else published,
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
