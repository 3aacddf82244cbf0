"""Published image data sets, read and downloaded by :mod:`torchvision.datasets`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.core._files import check_size
from pyro_gpvae.data._files import PUBLISHED, RAW_LIMIT, Parts, open_regular, to_parts

# A torch.library.Library removes its operators when it is collected, so it is kept here.
_declared: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """Imports torchvision, also where its compiled operators cannot be loaded.

    A torchvision that was built for CUDA cannot load its compiled operators into a CPU build of
    torch. Its import then fails, because it describes the shapes of two operators, ``nms`` and
    ``qnms``, that do not exist. In this case both are declared without an implementation, and the
    import is repeated. Data sets and transforms then work; operators on boxes do not.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    # The failed import leaves submodules behind, which must be imported again.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def read_published(name: str, root: Path, download: bool) -> Parts:
    """Reads the training and test sets of MNIST, Fashion-MNIST, CIFAR-10, SVHN or CelebA.

    Torchvision compares CIFAR-10, SVHN and the text files of CelebA with their MD5 sums before it
    reads them, and every archive that it downloads before it is unpacked. The batches of CIFAR-10
    are pickles, which torchvision unpickles after this comparison.
    """
    datasets = import_torchvision().datasets
    if name in ("svhn", "celeba"):
        kind = datasets.SVHN if name == "svhn" else datasets.CelebA
        train, test = (kind(root, split, download=download) for split in ("train", "test"))
    else:
        kinds = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}
        kind = kinds.get(name, datasets.CIFAR10)
        for file in (root / PUBLISHED[name]).glob("*-ubyte"):
            check_size(file, RAW_LIMIT)
        train, test = (kind(root, part, download=download) for part in (True, False))
    if name == "celeba":
        return _faces(root, train.filename), _faces(root, test.filename), None, None
    pixels = [np.asarray(part.data) for part in (train, test)]
    if name == "svhn":  # (N, C, H, W)
        pixels = [np.moveaxis(part, 1, -1) for part in pixels]
    labels = [np.asarray(x.labels if name == "svhn" else x.targets) for x in (train, test)]
    keys = ("train", "test", "train_labels", "test_labels")
    return to_parts(dict(zip(keys, [*pixels, *labels], strict=True)))


def _faces(root: Path, names: list[str]) -> Tensor:
    """Returns the central 148 × 148 pixels of each face, resized to 64 × 64."""
    from PIL import Image

    # All training images need 2 GB as uint8, so the tensor is filled in place.
    images = torch.empty(len(names), 3, 64, 64, dtype=torch.uint8)
    for index, name in enumerate(names):
        path = root / "celeba" / "img_align_celeba" / Path(name).name
        with open_regular(path) as file, Image.open(file, formats=["JPEG"]) as image:
            if image.size != (178, 218):  # known before any pixel is decoded
                raise ValueError(f"{name} has size {image.size} instead of (178, 218)")
            face = image.convert("RGB").crop((15, 35, 163, 183))
            face = face.resize((64, 64), Image.Resampling.BICUBIC)
        images[index] = torch.from_numpy(np.array(face)).movedim(2, 0)
    return images
