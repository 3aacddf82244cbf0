"""Do the readers of files survive damaged and malicious ones? Mutations of small valid files.

    python experiments/reliability/fuzz_readers.py --inputs 100000 --seed 0

Every reader gets its share of the inputs and must either accept one or refuse it with the error
that it documents, within the memory and the time of the options. Checksums are switched off for
nine inputs in ten (the table gets those of the mutated file), or no parser would be reached.
Prints a row a reader, and ends with exit code 1 if any input had another outcome; those inputs are
kept in --out. Should one crash the interpreter, it is the file "input" there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import random
import resource
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors import SafetensorError
from scipy.io import savemat

from pyro_gpvae import ImageModel, load_data, make_guide
from pyro_gpvae.core._files import read_json
from pyro_gpvae.data.integrity import ORIGINALS, Original
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.training.checkpoint import load_weights, save_weights


@dataclass(kw_only=True)
class Options:
    """Options of the fuzzer.

    Attributes:
        inputs: Mutated files in all, divided among the readers.
        seed: Seed of the mutations; input i of a reader depends on nothing else.
        readers: Which readers; none is all.
        memory: MiB that the process may grow by.
        seconds: Time that one input may take.
        out: Folder of the inputs that went wrong.
    """

    inputs: int = 100_000
    seed: int = 0
    readers: tuple[str, ...] = ()
    memory: int = 1024
    seconds: float = 10.0
    out: Path = Path("runs/fuzz_readers")


# What a refusal may be made of: anything else is a bug in disguise, also behind a ValueError.
REFUSALS: tuple[type[BaseException], ...] = (ValueError, OSError, EOFError, NotImplementedError)
REFUSALS += (struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
REFUSALS += (SafetensorError,)


@dataclass
class Reader:
    """Valid files, and what reads a mutated one; it may raise a ValueError and nothing else."""

    samples: list[bytes]
    read: Callable[[bytes], object]
    causes: tuple[type[BaseException], ...] = REFUSALS


NUMBERS = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63)
WORDS = (
    b"null true -1 1e999 NaN [] {} {[]} ../../x /x <html> 1099511627776 (2147483648,) = , :".split()
)
WORDS += [b"'O'", b'""', b"\x80\x05.", b"9" * 400, b"[" * 5000, b"-" * 5000]


def mutate(samples: list[bytes], rng: random.Random) -> bytes:
    """A valid file with one to eight changes, more of them near its ends, where headers are."""
    data = bytearray(rng.choice(samples))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        near = min(len(data), 400) if rng.random() < 0.7 else len(data)
        start = rng.randrange(near + 1)
        if rng.random() < 0.3:
            start = len(data) - start
        stop = min(len(data), start + rng.choice((1, 2, 4, 8, 40, len(data))))
        kind = rng.randrange(8)
        if kind == 0:
            data[start : start + 1] = rng.randbytes(1)
        elif kind == 1:
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(("little", "big")))
            width = rng.choice((1, 2, 4, 8))
            data[start : start + width] = number[:width] if number[0] else number[-width:]
        elif kind == 2:
            word = rng.choice(WORDS)
            data[start : start + rng.choice((0, len(word)))] = word
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop]
        elif kind == 5:
            data[start:stop] = rng.randbytes(min(stop - start, 64))
        elif kind == 6:
            data[start:] = rng.choice(samples)[start:]
        elif data:
            data[min(start, len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(data)


def pixels(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def npz(compression: int) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "train": pixels(3, 5, 5),
        "test": pixels(2, 5, 5, 1),
        "train_labels": np.arange(3),
    }
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def cifar(images: int) -> bytes:
    """A batch as Python 2 wrote it, with protocol 2."""
    data = pixels(images, 3072).tobytes()
    labels = b"".join(b"K" + bytes([i % 10]) for i in range(images))
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]"
        + b"q\x05("
        + labels
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00"
        + b"\x85q\tU\x01b\x87Rq\n(K\x01M"
        + struct.pack("<H", images)
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0bU\x02u1K\x00K\x01\x87Rq\x0c(K\x03U\x01|NNNJ\xff\xff"
        + b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(data))
        + data
        + b"tbU\tfilenamesq\r]q\x0e(U\x05a.pngq\x0feu."
    )


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mat(arrays: dict[str, Any], packed: bool) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays, do_compression=packed)
    return buffer.getvalue()


def face() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(11, 9, 3)).resize((178, 218)).save(buffer, "JPEG", quality=20)
    return buffer.getvalue()


def faces(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in ("000001.jpg", "000002.jpg"):
            archive.writestr(f"img_align_celeba/{name}", face())
    return buffer.getvalue()


def original(content: bytes) -> Original:
    return Original(len(content), hashlib.sha256(content).hexdigest())


def published(
    root: Path,
    name: str,
    files: dict[str, bytes],
    samples: list[bytes],
    unpacked: dict[str, bytes] | None = None,
) -> Reader:
    """A data set of which the first file is mutated; ``unpacked`` is what is in it."""
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    table = {file: original(content) for file, content in (files | (unpacked or {})).items()}
    target = next(iter(files))

    def read(content: bytes) -> object:
        (root / target).write_bytes(content)
        ORIGINALS.update(table)
        if content[-1:] >= b"\x1a":  # nine in ten
            ORIGINALS[target] = original(content)
        return load_data(name, root=root)

    return Reader(samples, read)


def build(root: Path) -> dict[str, Reader]:
    """All readers, each with a folder of its own."""
    images, labels = idx(pixels(2, 28, 28)), idx(pixels(2))
    first = "MNIST/raw/train-images-idx3-ubyte"
    others = {
        "MNIST/raw/train-labels-idx1-ubyte": labels,
        "MNIST/raw/t10k-images-idx3-ubyte": images,
        "MNIST/raw/t10k-labels-idx1-ubyte": labels,
    }
    packed = gzip.compress(images)
    names = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
    batches = {f"cifar-10-batches-py/{name}": cifar(2) for name in (*names, "test_batch")}
    archive = tar(batches)
    drawings = {"data": np.linspace(0, 1, 784 * 2).reshape(784, 2)}
    drawings["testdata"] = drawings["data"][:, :1]
    chardata = [mat(drawings, packed) for packed in (False, True)]
    house = {"X": pixels(32, 32, 3, 2), "y": np.array([[1], [10]], np.uint8)}
    svhn = [mat(house, packed) for packed in (False, True)]
    zipped = [faces(zipfile.ZIP_STORED), faces(zipfile.ZIP_DEFLATED)]
    split = {"celeba/list_eval_partition.txt": b"000001.jpg 0 \n000002.jpg 2 \n"}
    picture = "celeba/img_align_celeba/"
    pictures = {f"{picture}000001.jpg": face(), f"{picture}000002.jpg": face()}

    own = root / "own.npz"
    weights, config = root / "weights.safetensors", root / "config.json"
    model, guide = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)
    save_weights(weights, model, guide)
    options = json.dumps(vars(RunConfig(seed=3, chunk_size=9, warm_start="x"))).encode()
    image_model = ImageModel((1, 28, 28), 2)
    specs = b"vae gp:covariance=full,num_nodes=8 vlae:2 rme:2,repulsion=0.5 iaf:1 hf:2".split()
    specs += b"guides:GaussianGuide sa lowrank:rank=2 instance:full iterative full".split()

    def read_own(content: bytes) -> object:
        own.write_bytes(content)
        return load_data(own)

    def read_weights(content: bytes) -> object:
        weights.write_bytes(content)
        load_weights(weights, model, guide)
        return model

    def read_config(content: bytes) -> object:
        config.write_bytes(content)
        return RunConfig.from_json(read_json(config), config)

    def read_guide(content: bytes) -> object:
        return make_guide(content.decode("utf-8", "replace"), image_model)

    compressions = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return {
        "npz": Reader([npz(compression) for compression in compressions], read_own),
        "mnist idx": published(root / "1", "mnist", {first: images} | others, [images]),
        "mnist gzip": published(
            root / "2", "mnist", {f"{first}.gz": packed} | others, [packed], {first: images}
        ),
        "cifar10 batch": published(root / "3", "cifar10", batches, [cifar(2), cifar(1)]),
        "cifar10 tar.gz": published(
            root / "4", "cifar10", {"cifar-10-python.tar.gz": archive}, [archive], batches
        ),
        "omniglot mat": published(root / "5", "omniglot", {"chardata.mat": chardata[0]}, chardata),
        "svhn mat": published(
            root / "6", "svhn", {"train_32x32.mat": svhn[0], "test_32x32.mat": svhn[1]}, svhn
        ),
        "celeba zip": published(
            root / "7", "celeba", {"celeba/img_align_celeba.zip": zipped[0]} | split, zipped
        ),
        "celeba jpeg": published(root / "8", "celeba", pictures | split, [face()]),
        "celeba split": published(root / "9", "celeba", split | pictures, list(split.values())),
        "weights": Reader([weights.read_bytes()], read_weights),
        "config": Reader([options], read_config, (*REFUSALS, RecursionError)),  # deep JSON
        # what a module of the user's raises is the user's
        "guide": Reader(specs, read_guide, (*REFUSALS, ImportError, AttributeError, TypeError)),
    }


def outcome(reader: Reader, content: bytes, seconds: float) -> str:
    """ "accepted", "refused", or what else happened."""
    begin = time.monotonic()
    try:
        reader.read(content)
        result = "accepted"
    except Exception as error:
        result = "refused" if isinstance(error, ValueError | FileNotFoundError) else repr(error)
        cause: BaseException | None = error
        while cause is not None:
            if not isinstance(cause, reader.causes):
                result = repr(cause)
            cause = cause.__cause__
    took = time.monotonic() - begin
    return result if took < seconds else f"took {took:.1f} s"


@contextmanager
def at_most(memory: int) -> Iterator[None]:
    """Lets the process grow by so many MiB at most (where the system tells its size)."""
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main(options: Options) -> int:
    """Runs the readers; returns how many inputs had another outcome than the two allowed."""
    options.out.mkdir(parents=True, exist_ok=True)
    table, total = dict(ORIGINALS), 0
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            readers = build(Path(folder))
            chosen = options.readers or tuple(readers)
            each = -(-options.inputs // len(chosen))
            print(
                f"{'reader':<15} {'inputs':>8} {'refused':>8} {'accepted':>8} {'other':>6} seconds"
            )
            for name in chosen:
                begin = time.monotonic()
                with at_most(options.memory):
                    counts = fuzz(name, readers[name], each, options)
                took = time.monotonic() - begin
                print(
                    f"{name:<15} {each:>8} {counts['refused']:>8} {counts['accepted']:>8} "
                    f"{counts['other']:>6} {took:7.1f}",
                    flush=True,
                )
                total += counts["other"]
        finally:
            ORIGINALS.clear()
            ORIGINALS.update(table)
    print(f"seed {options.seed}, {each * len(chosen)} inputs, {total} with another outcome")
    return total


def fuzz(name: str, reader: Reader, inputs: int, options: Options) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0, "other": 0}
    assert outcome(reader, reader.samples[0], options.seconds) == "accepted", name
    kept = options.out / "input"
    for i in range(inputs):
        content = mutate(reader.samples, random.Random(f"{options.seed} {name} {i}"))
        kept.write_bytes(content)
        result = outcome(reader, content, options.seconds)
        counts[result if result in counts else "other"] += 1
        if result not in counts:
            print(f"  {name} {i}: {result[:300]}")
            kept.rename(options.out / f"{name.replace(' ', '-')}-{options.seed}-{i}")
    kept.unlink(missing_ok=True)
    return counts


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)) > 0)
