"""What does a training step cost whose images stay in a file, beside one in memory?

    OMP_NUM_THREADS=1 python experiments/benchmarks/streaming.py --cold

Random images of the size of MNIST's are written to a temporary file and memory-mapped. Steps on
the same networks take turns: images in memory (a part of them: all have to fit), from the file
with a thread that gathers the next minibatch, and from the file without one. A file that is much
smaller than the memory stays in the page cache: then this measures the gather, not the disk;
``--cold`` asks the kernel now and then to forget the file, as it must if the file is larger than
the memory. JSON and Markdown are written to --out.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from _bench import Ceilings, Options, Program, interleave
from _handwritten import NETS, Net
from _report import Report, Target
from step import lasting, on_batches, ours
from torch import Tensor

from pyro_gpvae.core._seeds import seeded
from pyro_gpvae.data.images import memory_mapped
from pyro_gpvae.training._streaming import Gathering
from pyro_gpvae.training.step import Backend

RESIDENT, THREAD = "in memory", "file, next minibatch in a thread"


@dataclass(kw_only=True)
class StreamingOptions(Options):
    """Options of the measurement.

    Attributes:
        gigabytes: Size of the file, in units of 2^30 bytes.
        folder: Where to write it; None is the system's folder for temporary files.
        resident: Images in memory.
        batch_size: Images per step.
        latent_dim: Dimension p of z.
        backend: Of the steps; None is what ``fit`` chooses for long trainings.
        cold: Whether the page cache forgets the file now and then.
    """

    gigabytes: float = 2.0
    folder: Path | None = None
    resident: int = 16_384
    batch_size: int = 128
    latent_dim: int = 10
    backend: Backend | None = None
    cold: bool = False


def main(options: StreamingOptions) -> None:
    device = options.on()
    net = Net("conv", NETS["conv"].image_shape, options.latent_dim, options.batch_size)
    backend = options.backend or lasting(device)
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        seeded(options.seed, device),
    ):
        path = write(Path(folder) / "images.npy", net, options)
        mapped = memory_mapped(path)
        resident = mapped[: options.resident].clone().to(device)
        step = ours(net, "vae", resident, backend)
        with Gathering(mapped, device) as gather:
            forget = forgetting(path) if options.cold else lambda: None
            programs: dict[str, Program] = {
                RESIDENT: on_batches(step, resident, net.batch_size),
                THREAD: file_step(step, gather, mapped, net, forget),
                "file, without a thread": plain_step(step, mapped, net, forget),
            }
            timings = interleave(programs, device, options)
    cache = "forgotten by the page cache every 100 steps" if options.cold else "in the page cache"
    report = Report(
        "streaming",
        "A step whose images stay in a file",
        options,
        f"{len(mapped):,} images, {mapped.nbytes / 2**30:.1f} GiB, {cache}; networks of Table 1, "
        f"p = {options.latent_dim}, batches of {net.batch_size}, backend {backend}.",
        Ceilings.measure(device),
    )
    found = timings.ratio(THREAD, RESIDENT).median
    report.targets.append(Target(f"{THREAD} / {RESIDENT}", 1.05, found))
    report.tables["A step"] = timings.table(RESIDENT)
    report.record["seconds"] = timings.seconds
    report.write()


def write(path: Path, net: Net, options: StreamingOptions) -> Path:
    """Writes random images, a part at a time."""
    shape = net.image_shape
    count = int(options.gigabytes * 2**30) // int(np.prod(shape))
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
    generator = np.random.default_rng(options.seed)
    for start in range(0, count, 65_536):
        part = file[start : start + 65_536]
        part[:] = generator.integers(256, size=part.shape, dtype=np.uint8)
    file.flush()
    return path


def forgetting(path: Path) -> Callable[[], None]:
    """Asks the kernel to forget a file, every 100th call."""
    calls = itertools.count()

    def forget() -> None:
        if next(calls) % 100 == 0:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return forget


def batches(count: int, batch_size: int) -> itertools.cycle[Tensor]:
    """Minibatches of a permutation, again and again."""
    full = count // batch_size * batch_size
    return itertools.cycle(torch.randperm(count)[:full].split(batch_size))


def file_step(
    step: Callable[[Tensor], Tensor],
    gather: Gathering,
    images: Tensor,
    net: Net,
    forget: Callable[[], None],
) -> Program:
    """A step during which a thread gathers the next minibatch."""
    numbers = itertools.pairwise(batches(len(images), net.batch_size))

    def program() -> Tensor:
        forget()
        return step(gather(*next(numbers)))

    return program


def plain_step(
    step: Callable[[Tensor], Tensor], images: Tensor, net: Net, forget: Callable[[], None]
) -> Program:
    """A step that gathers its minibatch itself."""
    numbers = batches(len(images), net.batch_size)

    def program() -> Tensor:
        forget()
        return step(images[next(numbers)])

    return program


if __name__ == "__main__":
    main(tyro.cli(StreamingOptions, description=__doc__))
