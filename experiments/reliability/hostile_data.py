r"""Damages data files in many ways, and reads them.

    OMP_NUM_THREADS=1 python experiments/reliability/hostile_data.py --attempts 1000

The files are small ones in the formats of ``.npz``, MNIST, OMNIGLOT and CIFAR-10. Each attempt is a
flipped, cut, repeated, exchanged or endless file, a lying header, a decompression bomb, a pickle
that would leave a trace, a FIFO, a device or a folder. It must be refused with an error that a
command prints as one line, or give images; it may use 2 GiB of memory and 20 seconds.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from _attempt import attempt, damaged, publish
from scipy.io import savemat

from pyro_gpvae.data.images import load_data


@dataclass(kw_only=True)
class Options:
    """Options of the campaign.

    Attributes:
        attempts: How many files.
        seed: Of the damage.
        out: Folder of the record; None is none.
    """

    attempts: int = 1000
    seed: int = 0
    out: Path | None = None


class _Exploit:
    """A pickle that makes a folder when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def main(options: Options) -> bool:
    choose, found = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        root, trace = Path(folder), Path(folder) / "trace"
        files = _write(root)
        for _ in range(options.attempts):
            name = choose.choice(list(files))
            path = choose.choice(files[name])
            content = path.read_bytes()
            what = _damage(path, choose, trace)
            source = root / "own.npz" if name == "own" else name
            outcome, text = attempt(partial(_read, source, root))
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(content)
            if what == "bomb" and outcome == "accepted":
                outcome = "broken"
            if trace.exists():
                trace.rmdir()
                outcome, text = "broken", "code in the file was executed"
            found.append((name, outcome, f"{what} in {path.name}: {text}"))
    return publish("hostile_data", options.out, {"attempts": options.attempts}, found)


def _write(root: Path) -> dict[str, list[Path]]:
    """Writes sound files; returns the paths of each data set."""
    pixels = np.random.default_rng(0).integers(256, size=(6, 28, 28), dtype=np.uint8)
    np.savez_compressed(root / "own.npz", train=pixels, test=pixels[:2])
    columns = pixels.reshape(6, 784).T / 255
    savemat(root / "chardata.mat", {"data": columns, "testdata": columns}, do_compression=True)
    for part in ("MNIST/raw", "cifar-10-batches-py"):
        (root / part).mkdir(parents=True)
    idx = {"images-idx3": struct.pack(">4i", 0x803, 6, 28, 28) + pixels.tobytes()}
    idx["labels-idx1"] = struct.pack(">2i", 0x801, 6) + bytes(6)
    for part in ("train", "t10k"):
        for kind, content in idx.items():
            (root / "MNIST/raw" / f"{part}-{kind}-ubyte").write_bytes(content)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"data": pixels}))
    for source in (root / "own.npz", "omniglot", "mnist"):
        _read(source, root)
    names = {
        "own": "own.npz",
        "omniglot": "chardata.mat",
        "mnist": "MNIST/raw/*",
        "cifar10": "c*/*",
    }
    return {name: sorted(root.glob(glob)) for name, glob in names.items()}


def _read(name: str | Path, root: Path) -> str:
    return repr(load_data(name, root=root))


def _damage(path: Path, choose: random.Random, trace: Path) -> str:
    """Replaces a file by a damaged one, or by something else; returns what was done."""
    content = path.read_bytes()
    kinds = ["bits", "cut", "repeat", "numbers", "empty", "endless", "pickle", *_OTHER]
    kind = choose.choice([*kinds, *["bomb"] * (path.suffix in _BOMBS)])
    if kind in _OTHER:
        path.unlink()
        _OTHER[kind](path)
        return kind
    array = damaged(content, kind, choose, flips=(1, 2, 16))
    if kind == "numbers":  # in a header: shapes, sizes and offsets
        where = choose.choice([4, 8, 12, choose.randrange(max(1, len(array) - 8))])
        array[where : where + 4] = struct.pack(choose.choice("<>") + "I", choose.choice(_NUMBERS))
    elif kind == "bomb":
        array = bytearray(_bomb(path.suffix))
    elif kind == "pickle":
        array = bytearray(_pickle(path, _Exploit(trace)))
    path.write_bytes(array)
    if kind == "endless":  # a hole, which takes no room on the disk
        with path.open("r+b") as file:
            file.truncate(4 << 30)
    return kind


_BOMBS = (".mat", ".npz")
_NUMBERS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_OTHER: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
}


@cache
def _bomb(suffix: str) -> bytes:
    """Returns a file that unpacks to a thousand times its size."""
    zeros = bytes(1 << 20)
    if suffix == ".mat":
        size, pack = 1200 << 20, zlib.compressobj(1)
        head = struct.pack("<12I", 14, size + 64, 6, 8, 6, 0, 5, 8, 784, size // 6272, 1, 4)
        packed = pack.compress(head + b"data" + bytes(4) + struct.pack("<II", 9, size))
        packed += b"".join(pack.compress(zeros) for _ in range(1200)) + pack.flush()
        sound = io.BytesIO()
        savemat(sound, {})
        return sound.getvalue()[:128] + struct.pack("<II", 15, len(packed)) + packed
    stream = io.BytesIO()
    np.savez_compressed(stream, train=np.zeros((100 << 10, 32, 32), np.uint8), test=zeros)
    return stream.getvalue()


def _pickle(path: Path, exploit: _Exploit) -> bytes:
    if path.suffix != ".npz":
        return pickle.dumps(exploit)
    stream = io.BytesIO()
    np.savez(
        stream, train=np.array([exploit], dtype=object), test=np.array([exploit], dtype=object)
    )
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
