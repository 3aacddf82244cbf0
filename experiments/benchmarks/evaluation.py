"""The cost of log p(x) compared with the decoder's forward pass.

    OMP_NUM_THREADS=1 python experiments/benchmarks/evaluation.py

For each guide, the log weights of K samples of B images take turns with forward passes of the
decoder on K·B latent vectors in the same chunks, and with q(z|x) alone. The networks are untrained,
because training does not change the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from _bench import Options, Program, Timings, interleave, publish

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._chunks import default_chunk_size
from pyro_gpvae.evaluation.importance import log_weights

SHAPE = (1, 28, 28)
DECODER = "decoder"


@dataclass(kw_only=True)
class EvaluationOptions(Options):
    """Options of the measurement.

    Attributes:
        guides: Guides whose evaluation is timed.
        latent_dims: Dimensions p of z.
        samples: Importance samples K.
        images: Images B.
    """

    rounds: int = 9
    guides: tuple[str, ...] = ("vae", "gp", "vlae:1", "iaf:2", "me:2")
    latent_dims: tuple[int, ...] = (10, 50)
    samples: int = 100
    images: int = 128


def measure(options: EvaluationOptions) -> dict[str, Any]:
    """Returns the seconds of decoder, evaluations and encoders for each p."""
    torch.manual_seed(options.seed)
    return {f"p = {p}": {"seconds": costs(options, p).seconds} for p in options.latent_dims}


def costs(options: EvaluationOptions, latent_dim: int) -> Timings:
    """Times decoder, evaluations and encoders in turns."""
    device = options.on()
    model = ImageModel(SHAPE, latent_dim).to(device).requires_grad_(False)
    x = torch.rand(options.images, *SHAPE, device=device)
    z = torch.randn(options.samples * options.images, latent_dim, device=device)
    # whole samples of a batch of images, as log_weights decodes them
    rows = max(1, default_chunk_size(device) // options.images) * options.images

    def decode() -> None:
        for part in z.split(rows):
            model.decoder(part)

    programs: dict[str, Program] = {DECODER: decode}
    for name in options.guides:
        guide = make_guide(name, model).to(device).eval()
        programs[name] = partial(log_weights, model, guide, x, options.samples)
        programs[f"{name}, q(z\\|x) alone"] = partial(guide.posterior, x)
    with torch.no_grad():
        return interleave(programs, device, options, warm_up=1)


def page(record: dict[str, Any]) -> Iterator[str]:
    """Makes the parts of the page from a record."""
    yield "# An evaluation"
    for p in record["latent_dims"]:
        yield f"## p = {p}"
        yield Timings(record[f"p = {p}"]["seconds"]).table(DECODER)
    yield (
        f"K = {record['samples']}, B = {record['images']}, decoder of Table 1, the default "
        "chunk_size, untrained networks."
    )


def main(options: EvaluationOptions) -> None:
    publish("evaluation", options, lambda: measure(options), page)


if __name__ == "__main__":
    main(tyro.cli(EvaluationOptions, description=__doc__))
