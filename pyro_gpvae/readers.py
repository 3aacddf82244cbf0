r"""Readers of the published files of each data set, and of our own ``.npz`` format."""

from __future__ import annotations

import gzip
import shutil
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_gpvae._torchvision import import_torchvision

__all__ = ["NPZ_FORMAT", "SOURCES", "Parts", "Source", "read_npz"]

_Array = npt.NDArray[Any]

#: Images (N, C, H, W) of the training and the test set, and their labels (N,) where known.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

NPZ_FORMAT = (
    "Expected an .npz file with uint8 arrays 'train' and 'test' of shape (N, H, W) or (N, H, W, C) "
    "and, if known, integer arrays 'train_labels' and 'test_labels', as written by "
    "numpy.savez_compressed(file, train=..., test=...)."
)


def _images(array: _Array, name: str) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype} instead of uint8 (values 0 to 255)")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[3] <= 4:
        raise ValueError(f"{name} has shape {array.shape} instead of (N, H, W) or (N, H, W, C)")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 3, 1)))


def _labels(array: _Array | None, name: str) -> Tensor | None:
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name} has dtype {array.dtype} and shape {array.shape} instead of (N,)")
    return torch.from_numpy(array.astype(np.int64))


def read_npz(file: IO[bytes]) -> Parts:
    """Reads :data:`NPZ_FORMAT`, without any pickle; raises ValueError if it is something else."""
    start = file.read(4)
    if start[:2] != b"PK":  # numpy would take anything else for a pickle, and advise to trust it
        raise ValueError(f"it begins with {start!r}, so it is not an .npz file")
    file.seek(0)
    keys = ("train", "test", "train_labels", "test_labels")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in keys if key in archive}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError("it holds pickled objects, which are never loaded") from error
        raise
    for key in ("train", "test"):
        if key not in arrays:
            raise ValueError(f"it has no array {key!r}")
    return (
        _images(arrays["train"], "train"),
        _images(arrays["test"], "test"),
        _labels(arrays.get("train_labels"), "train_labels"),
        _labels(arrays.get("test_labels"), "test_labels"),
    )


def _verify(path: Path, md5: str) -> None:
    # torchvision compares checksums as well, but does not say which file is at fault
    if not import_torchvision().datasets.utils.check_integrity(path, md5):
        raise ValueError(f"{path} does not have the published checksum")


def _read_idx(dataset: str, root: Path, download: bool) -> Parts:
    kind = getattr(import_torchvision().datasets, dataset)
    if not download:  # with it, torchvision checks and unpacks; without, it wants unpacked files
        for file, md5 in kind.resources:
            packed = root / dataset / "raw" / file
            unpacked = packed.with_suffix("")
            if not unpacked.exists():
                _verify(packed, md5)
                with gzip.open(packed, "rb") as stream:
                    _write(unpacked, stream)
    train, test = (kind(root, train=part, download=download) for part in (True, False))
    return train.data.unsqueeze(1), test.data.unsqueeze(1), train.targets, test.targets


def _read_cifar10(root: Path, download: bool) -> Parts:
    cifar10 = import_torchvision().datasets.CIFAR10
    if not download:  # the batches are pickles: none is opened before its checksum was compared
        meta = (cifar10.meta["filename"], cifar10.meta["md5"])
        for file, md5 in (*cifar10.train_list, *cifar10.test_list, meta):
            _verify(root / cifar10.base_folder / file, md5)
    train, test = (cifar10(root, train=part, download=download) for part in (True, False))
    labels = torch.tensor(train.targets), torch.tensor(test.targets)
    return _images(train.data, "train"), _images(test.data, "test"), labels[0], labels[1]


def _read_svhn(root: Path, download: bool) -> Parts:
    svhn = import_torchvision().datasets.SVHN
    if not download:
        for part in ("train", "test"):
            _, file, md5 = svhn.split_list[part]
            _verify(root / file, md5)
    train, test = (svhn(root, split=part, download=download) for part in ("train", "test"))
    images = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in (train, test)]
    return images[0], images[1], _labels(train.labels, "train"), _labels(test.labels, "test")


def _read_celeba(root: Path, download: bool) -> Parts:
    from PIL import Image

    celeba = import_torchvision().datasets.CelebA
    if not download:
        for _, md5, file in celeba.file_list:
            if file.endswith(".txt"):  # the archive may be deleted once unpacked
                _verify(root / celeba.base_folder / file, md5)
    parts: list[Tensor] = []
    for split in ("train", "test"):
        dataset = celeba(root, split=split, target_type=[], download=download)
        # 2 GB as uint8 for all training images: filled one by one, never held twice
        images = torch.empty(len(dataset), 3, 64, 64, dtype=torch.uint8)
        for index in range(len(dataset)):
            with dataset[index][0] as image:
                if image.size != (178, 218):
                    raise ValueError(f"an image of size {image.size} instead of (178, 218)")
                face = image.convert("RGB").crop((15, 35, 163, 183))  # the central 148 x 148
                face = face.resize((64, 64), Image.Resampling.BICUBIC)  # antialiased in Pillow
            images[index] = torch.from_numpy(np.array(face)).movedim(2, 0)
        parts.append(images)
    return parts[0], parts[1], None, None


_CHARDATA_URL = (
    "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat"
)


def _read_omniglot(root: Path, download: bool) -> Parts:
    from scipy.io import loadmat

    file = root / "chardata.mat"
    if download and not file.exists():
        with urllib.request.urlopen(_CHARDATA_URL, timeout=60) as stream:
            _write(file, stream)
    arrays = loadmat(file, variable_names=["data", "testdata"])
    parts: list[Tensor] = []
    for key in ("data", "testdata"):
        if key not in arrays:
            raise ValueError(f"it has no array {key!r}")
        array = arrays[key]
        if array.ndim != 2 or array.shape[0] != 784:
            raise ValueError(f"{key!r} has shape {array.shape} instead of (784, N)")
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{key!r} does not hold floats in [0, 1]")
        # MATLAB stores columns one after the other: (N, W, H)
        pixels = np.rint(255 * array.T).astype(np.uint8).reshape(-1, 28, 28)
        parts.append(_images(pixels.transpose(0, 2, 1), key))
    return parts[0], parts[1], None, None


def _write(path: Path, stream: IO[bytes]) -> None:
    # Under another name first, so that what an interruption leaves is never taken for the file.
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        shutil.copyfileobj(stream, file)
    part.replace(path)


class Source(NamedTuple):
    """How a data set is published, and who reads it."""

    read: Callable[[Path, bool], Parts]
    files: tuple[str, ...]  # below the root, as published
    sizes: tuple[int, int]  # of the published training and test sets
    note: str


def _idx_source(dataset: str) -> Source:
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return Source(
        partial(_read_idx, dataset),
        tuple(f"{dataset}/raw/{file}-ubyte" for file in files),
        (60_000, 10_000),
        "The official training and test sets, complete.",
    )


SOURCES: dict[str, Source] = {
    "mnist": _idx_source("MNIST"),
    "fashion_mnist": _idx_source("FashionMNIST"),
    "omniglot": Source(
        _read_omniglot,
        ("chardata.mat",),
        (24_345, 8_070),
        "Omniglot, 28x28, in the split of Burda et al. (2016), complete.",
    ),
    "cifar10": Source(
        _read_cifar10,
        tuple(
            f"cifar-10-batches-py/{batch}"
            for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        (50_000, 10_000),
        "The official training and test sets, complete.",
    ),
    "svhn": Source(
        _read_svhn,
        ("train_32x32.mat", "test_32x32.mat"),
        (73_257, 26_032),
        "The official training and test sets without the extra images, complete.",
    ),
    "celeba": Source(
        _read_celeba,
        (
            "celeba/img_align_celeba",
            "celeba/list_eval_partition.txt",
            "celeba/identity_CelebA.txt",
            "celeba/list_attr_celeba.txt",
            "celeba/list_bbox_celeba.txt",
            "celeba/list_landmarks_align_celeba.txt",
        ),
        (162_770, 19_962),
        "The official training and test sets, complete: central 148x148 pixels, resized to 64x64.",
    ),
}
