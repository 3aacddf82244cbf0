r"""Published files: their sizes and SHA-256, compared before a byte of them is parsed."""

from __future__ import annotations

import hashlib
import importlib
import urllib.request
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ORIGINALS", "Original", "fetch", "read_original", "verify", "verify_content"]


class Original(NamedTuple):
    """A file as its authors publish it.

    Attributes:
        size: Its size in bytes; the most that is read, where no checksum is known.
        sha256: Its SHA-256, or None where nobody has published a checksum.
        url: Where it is fetched from; empty if it is part of another file.
    """

    size: int
    sha256: str | None
    url: str = ""


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_OMNIGLOT = "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat"
_DRIVE = "https://drive.google.com/uc?id="

#: By path below the root, in the folders where torchvision keeps them. The authors publish MD5
#: sums, if any, and files of equal MD5 can be made: these are the SHA-256 that other projects check
#: for the same files. ``chardata.mat`` has no checksum at all: it is parsed within limits, and
#: 100 MiB is the largest file that its host keeps.
ORIGINALS: dict[str, Original] = {
    "MNIST/raw/train-images-idx3-ubyte": Original(
        47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "MNIST/raw/train-labels-idx1-ubyte": Original(
        60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "MNIST/raw/t10k-images-idx3-ubyte": Original(
        7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "MNIST/raw/t10k-labels-idx1-ubyte": Original(
        10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
    "MNIST/raw/train-images-idx3-ubyte.gz": Original(
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        f"{_MNIST}train-images-idx3-ubyte.gz",
    ),
    "MNIST/raw/train-labels-idx1-ubyte.gz": Original(
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        f"{_MNIST}train-labels-idx1-ubyte.gz",
    ),
    "MNIST/raw/t10k-images-idx3-ubyte.gz": Original(
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        f"{_MNIST}t10k-images-idx3-ubyte.gz",
    ),
    "MNIST/raw/t10k-labels-idx1-ubyte.gz": Original(
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        f"{_MNIST}t10k-labels-idx1-ubyte.gz",
    ),
    "FashionMNIST/raw/train-images-idx3-ubyte": Original(
        47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "FashionMNIST/raw/train-labels-idx1-ubyte": Original(
        60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "FashionMNIST/raw/t10k-images-idx3-ubyte": Original(
        7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "FashionMNIST/raw/t10k-labels-idx1-ubyte": Original(
        10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
    "FashionMNIST/raw/train-images-idx3-ubyte.gz": Original(
        26_421_880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        f"{_FASHION}train-images-idx3-ubyte.gz",
    ),
    "FashionMNIST/raw/train-labels-idx1-ubyte.gz": Original(
        29_515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        f"{_FASHION}train-labels-idx1-ubyte.gz",
    ),
    "FashionMNIST/raw/t10k-images-idx3-ubyte.gz": Original(
        4_422_102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        f"{_FASHION}t10k-images-idx3-ubyte.gz",
    ),
    "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz": Original(
        5_148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        f"{_FASHION}t10k-labels-idx1-ubyte.gz",
    ),
    "cifar-10-python.tar.gz": Original(
        170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", _CIFAR
    ),
    "cifar-10-batches-py/data_batch_1": Original(
        31_035_704, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"
    ),
    "cifar-10-batches-py/data_batch_2": Original(
        31_035_320, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"
    ),
    "cifar-10-batches-py/data_batch_3": Original(
        31_035_999, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"
    ),
    "cifar-10-batches-py/data_batch_4": Original(
        31_035_696, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"
    ),
    "cifar-10-batches-py/data_batch_5": Original(
        31_035_623, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"
    ),
    "cifar-10-batches-py/test_batch": Original(
        31_035_526, "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"
    ),
    "train_32x32.mat": Original(
        182_040_794,
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        f"{_SVHN}train_32x32.mat",
    ),
    "test_32x32.mat": Original(
        64_275_384,
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        f"{_SVHN}test_32x32.mat",
    ),
    "chardata.mat": Original(100 * 2**20, None, _OMNIGLOT),
    "celeba/img_align_celeba.zip": Original(
        1_443_490_838,
        "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",
        f"{_DRIVE}0B7EVK8r0v71pZjFTYXZWM3FlRnM",
    ),
    "celeba/list_eval_partition.txt": Original(
        2_836_386,
        "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7",
        f"{_DRIVE}0B7EVK8r0v71pY0NSMzRuSXJEVkk",
    ),
}


def verify(stream: BufferedReader, file: str, path: Path | str) -> None:
    """Compares an open file with the published one, and leaves it at its beginning.

    Arguments:
        stream: The file, open for reading; what is parsed later must come from this very stream.
        file: Its name in :data:`ORIGINALS`.
        path: What error messages call it.

    Raises:
        ValueError: Another size or SHA-256; gives both, expected and found.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    start = stream.read(64)
    stream.seek(0)
    _compare(file, path, size, start, lambda: hashlib.file_digest(stream, "sha256").hexdigest())
    stream.seek(0)


def verify_content(content: bytes, file: str, path: Path | str) -> None:
    """Does the same for what was unpacked from another file."""
    _compare(file, path, len(content), content, lambda: hashlib.sha256(content).hexdigest())


def read_original(root: Path, file: str) -> bytes:
    """Returns the content of a published file below the root: the very bytes that were verified.

    Raises:
        ValueError: It is not the published file.
        OSError: It cannot be read.
    """
    with (root / file).open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        content = stream.read(ORIGINALS[file].size + 1)
    size = max(size, len(content))
    _compare(file, root / file, size, content, lambda: hashlib.sha256(content).hexdigest())
    return content


def _compare(
    file: str, path: Path | str, size: int, content: bytes, digest: Callable[[], str]
) -> None:
    original = ORIGINALS[file]
    expected = f"{original.size:,}" if original.sha256 else f"1 to {original.size:,}"
    problem = ""
    if content[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        problem = f"it is a web page of {size:,} bytes, expected {expected}"
    elif not (size == original.size if original.sha256 else 0 < size <= original.size):
        problem = f"expected {expected} bytes, found {size:,}"
    elif original.sha256 and (found := digest()) != original.sha256:
        problem = f"expected SHA-256 {original.sha256}, found {found}"
    if problem:
        raise ValueError(f"{path} is not the published file: {problem}")


def fetch(root: Path, file: str) -> None:
    """Downloads a published file below the root; it appears there once it is verified.

    Raises:
        ValueError: What was sent is not the published file.
        OSError: The network or the disk failed.
        ModuleNotFoundError: The file is on Google Drive, and ``gdown`` is not installed.
    """
    path, original = root / file, ORIGINALS[file]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        if original.url.startswith(_DRIVE):
            _gdown().download(url=original.url, output=str(part), quiet=True)
        else:
            request = urllib.request.Request(original.url, headers={"User-Agent": "pyro-gpvae"})
            with urllib.request.urlopen(request, timeout=60) as answer, part.open("wb") as target:
                left = original.size + 1  # an endless answer must not fill the disk
                while left > 0 and (piece := answer.read(min(left, 1 << 20))):
                    left -= target.write(piece)
        with part.open("rb") as stream:
            verify(stream, file, original.url)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _gdown() -> Any:
    try:
        return importlib.import_module("gdown")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files on Google Drive need gdown: install it with pip install gdown"
        ) from None
