r"""Readers of the published files of each data set, and of our own ``.npz`` format.

A file is verified (:mod:`pyro_gpvae.data.integrity`), parsed within limits (:mod:`pyro_gpvae.data.formats`),
and left as it was: nothing is unpacked to disk, and no pickle is run.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.data.formats import (
    Array,
    check_zip,
    open_member,
    read_cifar,
    read_idx,
    read_mat,
    read_member,
    read_npy,
)
from pyro_gpvae.data.integrity import ORIGINALS, read_original, verify, verify_content

__all__ = ["NPZ_FORMAT", "SOURCES", "Parts", "Source", "read_npz"]

#: Images (N, C, H, W) of the training and the test set, and their labels (N,) where known.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

NPZ_FORMAT = (
    "Expected an .npz file with uint8 arrays 'train' and 'test' of shape (N, H, W) or (N, H, W, C) "
    "and, if known, integer arrays 'train_labels' and 'test_labels', as written by "
    "numpy.savez_compressed(file, train=..., test=...)."
)


def _images(array: Array, name: str) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype} instead of uint8 (values 0 to 255)")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[3] <= 4:
        raise ValueError(f"{name} has shape {array.shape} instead of (N, H, W) or (N, H, W, C)")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 3, 1)))


def _labels(array: Array | None, name: str) -> Tensor | None:
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name} has dtype {array.dtype} and shape {array.shape} instead of (N,)")
    return torch.from_numpy(array.astype(np.int64))


_NPZ_LIMIT = 16 * 2**30


def read_npz(file: IO[bytes]) -> Parts:
    """Reads :data:`NPZ_FORMAT`, without any pickle; raises ValueError if it is something else."""
    start = file.read(4)
    if start[:2] != b"PK":
        raise ValueError(f"it begins with {start!r}, so it is not an .npz file")
    # images pack 2 to 30 times, and blank ones 1000 times: megabytes of those are a bomb
    limit = min(_NPZ_LIMIT, max(64 * 2**20, 200 * file.seek(0, 2)))
    with zipfile.ZipFile(file) as archive:
        members = set(archive.namelist())
        known = ("train", "test", "train_labels", "test_labels")
        keys = [key for key in known if f"{key}.npy" in members]
        size = sum(archive.getinfo(f"{key}.npy").file_size for key in keys)
        if size > limit:
            raise ValueError(f"its arrays unpack to {size:,} bytes, more than {limit:,}")
        arrays = {key: read_npy(archive, key) for key in keys}
    for key in ("train", "test"):
        if key not in arrays:
            raise ValueError(f"it has no array {key!r}")
    return (
        _images(arrays["train"], "train"),
        _images(arrays["test"], "test"),
        _labels(arrays.get("train_labels"), "train_labels"),
        _labels(arrays.get("test_labels"), "test_labels"),
    )


def _read_idx(dataset: str, root: Path) -> Parts:
    arrays: list[Tensor] = []
    for name in _IDX:
        file = f"{dataset}/raw/{name}"
        if (root / file).exists():
            content = read_original(root, file)
        else:
            with gzip.open(io.BytesIO(read_original(root, f"{file}.gz"))) as stream:
                content = stream.read(ORIGINALS[file].size + 1)
            verify_content(content, file, f"the content of {root / file}.gz")
        arrays.append(torch.from_numpy(read_idx(content, 3 if "images" in name else 1)))
    train, train_labels, test, test_labels = arrays
    return train.unsqueeze(1), test.unsqueeze(1), train_labels.long(), test_labels.long()


def _read_cifar10(root: Path) -> Parts:
    if all((root / file).exists() for file in _CIFAR):
        batches = {file: read_cifar(read_original(root, file)) for file in _CIFAR}
    else:
        batches = _unpack_cifar10(root / _CIFAR_ARCHIVE)
    images, labels = ([torch.from_numpy(batches[file][i]) for file in _CIFAR] for i in (0, 1))
    return torch.cat(images[:5]), images[5], torch.cat(labels[:5]), labels[5]


def _unpack_cifar10(path: Path) -> dict[str, tuple[Array, Array]]:
    batches: dict[str, tuple[Array, Array]] = {}
    with path.open("rb") as stream:
        verify(stream, _CIFAR_ARCHIVE, path)
        with tarfile.open(fileobj=stream, mode="r|gz") as archive:
            for member in archive:
                if member.name not in _CIFAR:
                    continue
                # None, or a link's target, if it is not a file
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise ValueError(f"{member.name} in {path} is not a regular file")
                content = file.read(ORIGINALS[member.name].size + 1)
                verify_content(content, member.name, f"{member.name} in {path}")
                batches[member.name] = read_cifar(content)
    if missing := [file for file in _CIFAR if file not in batches]:
        raise ValueError(f"{path} has no {missing[0]}")
    return batches


def _read_svhn(root: Path) -> Parts:
    parts: list[tuple[Tensor, Tensor | None]] = []
    for file in ("train_32x32.mat", "test_32x32.mat"):
        arrays = read_mat(read_original(root, file), ("X", "y"))
        images, digits = arrays["X"], arrays["y"]
        if images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise ValueError(f"X in {file} has shape {images.shape} instead of (32, 32, 3, N)")
        if not np.isin(digits, range(1, 11)).all():
            raise ValueError(f"y in {file} does not hold labels 1 to 10")
        labels = digits.reshape(-1).astype(np.int64) % 10  # 10 is SVHN's name for the digit 0
        parts.append((_images(np.moveaxis(images, 3, 0), f"X in {file}"), _labels(labels, file)))
    (train, train_labels), (test, test_labels) = parts
    return train, test, train_labels, test_labels


def _read_omniglot(root: Path) -> Parts:
    arrays = read_mat(read_original(root, "chardata.mat"), ("data", "testdata"))
    parts: list[Tensor] = []
    for key, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != 784:
            raise ValueError(f"{key!r} has shape {array.shape} instead of (784, N)")
        floats = array.dtype.kind == "f" and array.size > 0
        if not (floats and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{key!r} does not hold floats in [0, 1]")
        # MATLAB stores columns one after the other: (N, W, H)
        pixels = np.rint(255 * array.T).astype(np.uint8).reshape(-1, 28, 28)
        parts.append(_images(pixels.transpose(0, 2, 1), key))
    return parts[0], parts[1], None, None


def _read_celeba(root: Path) -> Parts:
    text = read_original(root, _PARTITION).decode("ascii")
    rows = re.findall(r"^(\d{6}\.jpg) ([012])\s*$", text, re.M)
    if len(rows) != len(text.splitlines()):
        raise ValueError(f"{root / _PARTITION} has a line that is not like '000001.jpg 0'")
    train, test = ([name for name, part in rows if part == wanted] for wanted in "02")
    path = root / _CELEBA_ARCHIVE
    if not path.exists():  # only unpacked: the single pictures have no published checksums
        read = partial(_picture, path.with_suffix(""))
        return _faces(train, read), _faces(test, read), None, None
    with path.open("rb") as stream:
        verify(stream, _CELEBA_ARCHIVE, path)
        with zipfile.ZipFile(stream) as archive:
            check_zip(archive, _CELEBA_LIMIT)
            read = partial(_packed_picture, archive)
            return _faces(train, read), _faces(test, read), None, None


def _picture(folder: Path, name: str) -> bytes:
    with (folder / name).open("rb") as file:
        return file.read(_FACE_LIMIT + 1)


def _packed_picture(archive: zipfile.ZipFile, name: str) -> bytes:
    member, stream = open_member(archive, f"img_align_celeba/{name}")
    with stream:
        if member.file_size > _FACE_LIMIT:
            raise ValueError(f"{name} announces {member.file_size:,} bytes, more than a face has")
        return bytes(read_member(member, stream))


def _faces(names: list[str], read: Callable[[str], bytes]) -> Tensor:
    from PIL import Image

    # 2 GB as uint8 for all training images: filled one by one, never held twice
    images = torch.empty(len(names), 3, 64, 64, dtype=torch.uint8)
    for index, name in enumerate(names):
        content = read(name)
        if len(content) > _FACE_LIMIT:
            raise ValueError(f"{name} has more than {_FACE_LIMIT:,} bytes")
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.size != (178, 218):  # known before any pixel is decoded
                raise ValueError(f"{name} has size {image.size} instead of (178, 218)")
            face = image.convert("RGB").crop((15, 35, 163, 183))  # the central 148 x 148
            face = face.resize((64, 64), Image.Resampling.BICUBIC)  # antialiased in Pillow
        images[index] = torch.from_numpy(np.array(face)).movedim(2, 0)
    return images


_IDX = tuple(
    f"{file}-ubyte"
    for file in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR = tuple(
    f"cifar-10-batches-py/{batch}"
    for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
)
_PARTITION = "celeba/list_eval_partition.txt"
_CELEBA_ARCHIVE = "celeba/img_align_celeba.zip"
_CELEBA_LIMIT = 4 * 2**30
_FACE_LIMIT = 256 * 2**10  # the pictures have some 7 KB


class Source(NamedTuple):
    """How a data set is published, and who reads it."""

    read: Callable[[Path], Parts]
    files: tuple[tuple[str, ...], ...]  # all are needed, each unpacked or, last, as it is fetched
    sizes: tuple[int, int]  # of the published training and test sets
    note: str


def _idx_source(dataset: str) -> Source:
    return Source(
        partial(_read_idx, dataset),
        tuple((f"{dataset}/raw/{file}", f"{dataset}/raw/{file}.gz") for file in _IDX),
        (60_000, 10_000),
        "The official training and test sets, complete.",
    )


SOURCES: dict[str, Source] = {
    "mnist": _idx_source("MNIST"),
    "fashion_mnist": _idx_source("FashionMNIST"),
    "omniglot": Source(
        _read_omniglot,
        (("chardata.mat",),),
        (24_345, 8_070),
        "Omniglot, 28x28, in the split of Burda et al. (2016), complete.",
    ),
    "cifar10": Source(
        _read_cifar10,
        tuple((file, _CIFAR_ARCHIVE) for file in _CIFAR),
        (50_000, 10_000),
        "The official training and test sets, complete.",
    ),
    "svhn": Source(
        _read_svhn,
        (("train_32x32.mat",), ("test_32x32.mat",)),
        (73_257, 26_032),
        "The official training and test sets without the extra images, complete.",
    ),
    "celeba": Source(
        _read_celeba,
        (("celeba/img_align_celeba", _CELEBA_ARCHIVE), (_PARTITION,)),
        (162_770, 19_962),
        "The official training and test sets, complete: central 148x148 pixels, resized to 64x64.",
    ),
}
