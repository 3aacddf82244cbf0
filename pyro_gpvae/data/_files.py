"""Files of images that need no torchvision, and where published data sets are kept."""

from __future__ import annotations

import struct
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_gpvae.core._files import check_size, write_bytes

Array = npt.NDArray[Any]

#: Training and test images (N, C, H, W), and their labels (N,) where they are known.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

NPZ_FORMAT = (
    "Expected an .npz file with uint8 arrays 'train' and 'test' of shape (N, H, W) or (N, H, W, C) "
    "and, if known, integer arrays 'train_labels' and 'test_labels', as written by "
    "numpy.savez_compressed(file, train=..., test=...)."
)


#: Where the files of published data sets are expected below the root.
PUBLISHED = {
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "omniglot": "chardata.mat",
    "cifar10": "cifar-10-batches-py",
    "svhn": "train_32x32.mat",
    "celeba": "celeba/img_align_celeba",
}

_OMNIGLOT = "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat"
_OMNIGLOT_LIMIT = 100 * 2**20  # the largest file that its host keeps
#: Five times the largest published file that is read as a whole.
RAW_LIMIT = 2**30
_COMPRESSED = 15  # the kind of an element in a file of MATLAB 5


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file for reading; ValueError for a folder, and for a FIFO, which would block."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    return path.open("rb")


def to_parts(arrays: Mapping[str, Array]) -> Parts:
    """Converts pixels (N, H, W) or (N, H, W, C) and integer labels (N,), if any, to tensors."""
    images, labels = [], []
    for key in ("train", "test"):
        pixels, classes = arrays.get(key), arrays.get(f"{key}_labels")
        if pixels is None:
            raise ValueError(f"it has no array {key!r}")
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.ndim != 4 or not 1 <= pixels.shape[3] <= 4:
            raise ValueError(f"{key} has shape {pixels.shape} instead of (N, H, W) or (N, H, W, C)")
        if classes is not None and (classes.dtype.kind not in "iu" or classes.ndim != 1):
            raise ValueError(
                f"{key}_labels has dtype {classes.dtype} and shape {classes.shape} instead of (N,)"
            )
        images.append(torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, 3, 1))))
        labels.append(None if classes is None else torch.from_numpy(classes.astype(np.int64)))
    return images[0], images[1], labels[0], labels[1]


def read_npz(file: IO[bytes]) -> Parts:
    """Reads an ``.npz`` file as :data:`NPZ_FORMAT` describes it. Nothing is unpickled.

    The arrays may unpack to 200 times the size of the file (or 64 MiB), and to 16 GiB: images
    compress 2 to 30 times, so a file that claims more is taken for a decompression bomb.

    Raises:
        Exception: Whatever numpy and :func:`to_parts` raise for a file that holds something else.
    """
    limit = min(16 * 2**30, max(64 * 2**20, 200 * file.seek(0, 2)))
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
    # others unpack a piece of the file at once, however large that becomes
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed in another way than numpy does")
    if size > limit:
        raise ValueError(f"its arrays unpack to {size:,} bytes, more than {limit:,}")
    file.seek(0)
    found = np.load(file, allow_pickle=False)
    keys = ("train", "test", "train_labels", "test_labels")
    return to_parts({key: found[key] for key in keys if key in found})


def _check_unpacked(file: IO[bytes]) -> None:
    """Raises ValueError if a file is not of MATLAB 5, or unpacks to more than 1 GiB."""
    head, left = file.read(128), RAW_LIMIT
    if head[:6] != b"MATLAB" or head[126:] != b"IM":
        raise ValueError(f"it begins with {head[:6]!r}, so it is not a file of MATLAB 5")
    while len(tag := file.read(8)) == 8 and left >= 0:
        kind, size = struct.unpack("<II", tag)
        if kind != _COMPRESSED or size > left:
            left -= size
            file.seek(size, 1)
            continue
        content = file.read(size)
        unpacking = zlib.decompressobj()
        while content and left >= 0:
            left -= len(unpacking.decompress(content, 1 << 20))
            content = unpacking.unconsumed_tail
    if left < 0:
        raise ValueError(f"its arrays unpack to more than {RAW_LIMIT:,} bytes")


def read_omniglot(root: Path, download: bool) -> Parts:
    """Reads ``chardata.mat`` of Burda et al., of which no checksum has been published."""
    from scipy.io import loadmat

    path = root / "chardata.mat"
    if download and not path.exists():
        with urllib.request.urlopen(_OMNIGLOT, timeout=60) as answer:
            content = answer.read(_OMNIGLOT_LIMIT)
        root.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    check_size(path, RAW_LIMIT)
    with open_regular(path) as file:
        _check_unpacked(file)
        file.seek(0)
        arrays = loadmat(file, variable_names=("data", "testdata"))
    pixels = {}
    for key, part in (("data", "train"), ("testdata", "test")):
        array = arrays.get(key)
        if array is None:
            raise ValueError(f"it has no array {key!r}")
        if array.ndim != 2 or array.shape[0] != 784:
            raise ValueError(f"{key!r} has shape {array.shape} instead of (784, N)")
        floats = array.dtype.kind == "f" and array.size > 0
        if not (floats and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{key!r} does not hold floats in [0, 1]")
        # MATLAB stores the pixels of a column one after the other: (N, W, H).
        drawings = np.rint(255 * array.T).astype(np.uint8).reshape(-1, 28, 28)
        pixels[part] = drawings.transpose(0, 2, 1)
    return to_parts(pixels)
