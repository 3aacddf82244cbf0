"""Image data sets: :class:`ImageData` and :func:`load_data`."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_gpvae.data._files import NPZ_FORMAT, PUBLISHED, open_regular, read_npz, read_omniglot
from pyro_gpvae.data._torchvision import read_published

__all__ = [
    "ImageData",
    "available_data",
    "check_images",
    "load_data",
    "split_validation",
]


def check_images(images: Tensor, name: str = "images") -> None:
    """Checks that images are a non-empty uint8 tensor of shape (B, C, H, W).

    Raises:
        TypeError, ValueError: If they are not; the message begins with ``name``.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise TypeError(f"{name}: expected a torch.Tensor, got {kind}; try torch.from_numpy")
    if images.dtype != torch.uint8:
        raise ValueError(
            f"{name}: expected uint8 values 0 to 255, got {images.dtype}. If they are floats in "
            f"[0, 1], multiply by 255 and convert: (255 * images).round().to(torch.uint8)."
        )
    shape, hint = tuple(images.shape), ""
    if images.ndim == 3:
        hint = "; add the channel with images.unsqueeze(1)"
    elif images.ndim == 4 and shape[1] > 4 >= shape[3]:
        hint = "; move the channels with images.movedim(-1, 1)"
    if images.ndim != 4 or images.numel() == 0 or hint:
        raise ValueError(
            f"{name}: expected at least one image, shape (B, C, H, W), got {shape}{hint}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Training and test images.

    Attributes:
        name: What tables call the data.
        train: Training images, (N, C, H, W), uint8.
        test: Test images, (M, C, H, W), uint8.
        train_labels: Classes of the training images, (N,), int64, if they are known.
        test_labels: Classes of the test images, (M,), int64, if they are known.

    Raises:
        TypeError: If images or labels are not tensors.
        ValueError: If a dtype or shape is wrong, or training and test images differ in shape.

    Example:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> ImageData("blank", train=images, test=images[:1])
        ImageData('blank', train=(3, 1, 8, 8), test=(1, 1, 8, 8))
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        check_images(self.train, "train")
        check_images(self.test, "test")
        if self.test.shape[1:] != self.train.shape[1:]:
            raise ValueError(
                f"test: expected images of shape {self.image_shape} as in train, "
                f"got {tuple(self.test.shape[1:])}"
            )
        _check_labels(self.train_labels, len(self.train), "train_labels")
        _check_labels(self.test_labels, len(self.test), "test_labels")

    def __repr__(self) -> str:
        train, test = tuple(self.train.shape), tuple(self.test.shape)
        return f"ImageData({self.name!r}, train={train}, test={test})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def binarized(self, seed: int = 0) -> ImageData:
        """Returns images whose pixels are drawn once: 255 with probability x / 255, else 0.

        The draw is fixed by ``seed``. An image does not change with the number of images after it.

        References:
            R. Salakhutdinov and I. Murray. On the quantitative analysis of deep belief networks.
            ICML 2008. https://doi.org/10.1145/1390156.1390266
        """
        return replace(
            self,
            name=f"{self.name}-binarized",
            train=_binarize(self.train, [seed, 0]),
            test=_binarize(self.test, [seed, 1]),
        )

    def take(self, train: int | None = None, test: int | None = None) -> ImageData:
        """Returns the first ``train`` training and the first ``test`` test images (None: all).

        Raises:
            ValueError: If a number is less than 1, or greater than the number of images.
        """
        for part, count, images in (("train", train, self.train), ("test", test, self.test)):
            if count is not None and not 1 <= count <= len(images):
                raise ValueError(f"{part}: expected 1 to {len(images)} images, got {count}")
        return replace(
            self,
            train=self.train[:train],
            test=self.test[:test],
            train_labels=None if self.train_labels is None else self.train_labels[:train],
            test_labels=None if self.test_labels is None else self.test_labels[:test],
        )


def _check_labels(labels: Tensor | None, count: int, name: str) -> None:
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(labels).__name__}")
    if labels is not None and (labels.dtype, *labels.shape) != (torch.int64, count):
        raise ValueError(
            f"{name}: expected one int64 label for each image, shape ({count},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )


def _binarize(images: Tensor, seed: list[int]) -> Tensor:
    # This is exact: a uniform integer in 0..254 is below x with probability x / 255.
    uniform = np.random.default_rng(seed).integers(255, size=images.shape, dtype=np.uint8)
    return (images > torch.from_numpy(uniform).to(images.device)).to(torch.uint8) * 255


def split_validation(images: Tensor, num_validation: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits images at random into (train, validation), without overlap.

    Arguments:
        images: (N, ...).
        num_validation: The number of images to hold out, at least 1 and less than N.
        seed: The seed of the split. The global random state is neither read nor changed.

    Raises:
        ValueError: If one of the two parts would be empty.

    Example:
        >>> train, validation = split_validation(load_data("mnist5k").train, 500)
        >>> len(train), len(validation)
        (3500, 500)
    """
    if not 1 <= num_validation < len(images):
        raise ValueError(
            f"num_validation: expected between 1 and {len(images) - 1} of the {len(images)} "
            f"images, got {num_validation}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
    return images[order[num_validation:]], images[order[:num_validation]]


def available_data() -> tuple[str, ...]:
    """Returns the names that :func:`load_data` knows.

    Example:
        >>> available_data()
        ('mnist5k', 'mnist', 'fashion_mnist', 'omniglot', 'cifar10', 'svhn', 'celeba')
    """
    return ("mnist5k", *PUBLISHED)


def load_data(
    name_or_path: str | Path, root: str | Path | None = None, download: bool = False
) -> ImageData:
    """Loads a data set by name, or your own images from an ``.npz`` file.

    ``mnist5k`` ships with the package. Any other name is looked up below ``root``: first as
    ``<name>.npz``, which is read fastest, then as the published files in the folders where
    torchvision keeps them (``chardata.mat`` of Burda et al. for ``omniglot``). Reading all faces of
    ``celeba`` takes minutes; ``numpy.savez(root / "celeba.npz", train=data.train.movedim(1, -1),
    test=data.test.movedim(1, -1))`` keeps them for the next time.

    An ``.npz`` file holds uint8 arrays ``train`` and ``test`` of shape (N, H, W) or (N, H, W, C)
    and, if they are known, integer arrays ``train_labels`` and ``test_labels``. Nothing in it is
    unpickled. Torchvision unpickles the batches of CIFAR-10 after it has compared their MD5 sums.

    Arguments:
        name_or_path: One of :func:`available_data`, or the path of an ``.npz`` file.
        root: The folder of the files; by default the environment variable ``PYRO_GPVAE_DATA``, or
            ``~/.cache/pyro-gpvae``.
        download: Whether to download missing files. ``celeba`` needs the package ``gdown``.

    Returns:
        The images (N, C, H, W). All digits of ``mnist5k`` are from MNIST's official training set,
        so scores on them do not compare with published ones.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it was expected.
        ValueError: If the name is unknown, or a file is damaged, is not a regular file, or holds
            something else.

    References:
        MNIST: LeCun et al. 1998. Fashion-MNIST: Xiao et al. 2017, https://arxiv.org/abs/1708.07747.
        Omniglot: Lake et al. 2015, https://doi.org/10.1126/science.aab3050; its split: Burda et al.
        2016, https://arxiv.org/abs/1509.00519. CIFAR-10: Krizhevsky 2009. SVHN: Netzer et al. 2011.
        CelebA: Liu et al. 2015, https://arxiv.org/abs/1411.7766.

    Example:
        >>> load_data("mnist5k")
        ImageData('mnist5k', train=(4000, 1, 28, 28), test=(1000, 1, 28, 28))
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(".npz") or Path(name).name != name:
        return _load_npz(Path(name_or_path).expanduser())
    if name == "mnist5k":
        with (resources.files("pyro_gpvae.data") / "mnist5k.npz").open("rb") as stream:
            return ImageData(name, *read_npz(stream))
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name.lower(), available_data(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown data set {name!r}.{hint} Expected one of {', '.join(available_data())}, "
            f"or the path of an .npz file."
        )
    folder = Path(root or os.environ.get("PYRO_GPVAE_DATA") or "~/.cache/pyro-gpvae").expanduser()
    if (folder / f"{name}.npz").exists():
        return _load_npz(folder / f"{name}.npz")
    return _load_published(name, folder, download)


def _load_npz(path: Path) -> ImageData:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. {NPZ_FORMAT}")
    try:
        with open_regular(path) as stream:
            return ImageData(path.stem, *read_npz(stream))
    except Exception as error:  # zipfile, zlib, lzma and numpy each have their own
        raise ValueError(f"{path} could not be read: {_cause(error)}. {NPZ_FORMAT}") from error


def _load_published(name: str, root: Path, download: bool) -> ImageData:
    path = root / PUBLISHED[name]
    if not path.exists() and not download:
        raise FileNotFoundError(
            f"{name}: found neither {root / name}.npz nor {path}. Download it with download=True "
            f"(--download), or name the folder that has it with root or the environment variable "
            f"PYRO_GPVAE_DATA. {NPZ_FORMAT}"
        )
    try:
        read = read_omniglot if name == "omniglot" else partial(read_published, name)
        return ImageData(name, *read(root, download))
    except ImportError:
        raise
    except Exception as error:  # torchvision, scipy, Pillow and the network each have their own
        raise ValueError(
            f"{name} could not be read from {root}: {_cause(error)}. Expected the published files "
            f"in {path}. Delete what is damaged or incomplete, then download it with "
            f"download=True (--download)."
        ) from error


def _cause(error: Exception) -> str:
    text, kind = str(error).rstrip("."), type(error).__name__
    return f"{kind}: {text}" if text and type(error) is not ValueError else text or kind
