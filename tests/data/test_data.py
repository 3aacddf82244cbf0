"""Data sets: what is read is what was written, and what is wrong is refused with a reason."""

import hashlib
import io
import os
import pickle
import re
import resource
import struct
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from pyro_gpvae.data._torchvision import import_torchvision
from pyro_gpvae.data.images import available_data, load_data


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def images(*shape, seed=0):
    return torch.from_numpy(pixels(*shape, seed=seed))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


# --- published files, written small; torchvision's MD5 sums become those of what was written ----


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_mnist(root, monkeypatch, kind="MNIST"):
    parts = {"train": (pixels(5, 28, 28), 5), "t10k": (pixels(3, 28, 28, seed=1), 3)}
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for part, (array, count) in parts.items():
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, *array.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + array.tobytes())
        header = struct.pack(">BBBBI", 0, 0, 8, 1, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))
    train, test = (array[:, None] for array, _ in parts.values())
    return train, test, torch.arange(5), torch.arange(3)


def write_cifar10(root, monkeypatch):
    kind = import_torchvision().datasets.CIFAR10
    folder = root / kind.base_folder
    folder.mkdir()
    rows, labels = pixels(12, 3072), [*range(10), 3, 4]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        batch = {"data": rows[part], "labels": labels[part]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(kind, "train_list", sums[:5])
    monkeypatch.setattr(kind, "test_list", sums[5:])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / "batches.meta")})
    expected = rows.reshape(-1, 3, 32, 32)
    return expected[:10], expected[10:], torch.tensor(labels[:10]), torch.tensor(labels[10:])


def write_svhn(root, monkeypatch):
    kind = import_torchvision().datasets.SVHN
    train, test = pixels(5, 3, 32, 32), pixels(3, 3, 32, 32, seed=1)
    sums = {}
    for split, array in (("train", train), ("test", test)):
        file = root / f"{split}_32x32.mat"
        labels = np.arange(1, len(array) + 1, dtype=np.uint8)[:, None]
        labels[-1] = 10  # SVHN's name for the digit 0
        savemat(file, {"X": array.transpose(2, 3, 1, 0), "y": labels})
        sums[split] = ["", file.name, md5(file)]
    monkeypatch.setattr(kind, "split_list", sums)
    return train, test, torch.tensor([1, 2, 3, 4, 0]), torch.tensor([1, 2, 0])


def write_celeba(root, monkeypatch):
    torchvision = import_torchvision()
    kind, transforms = torchvision.datasets.CelebA, torchvision.transforms
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    bicubic = transforms.InterpolationMode.BICUBIC
    preprocess = transforms.Compose(
        [transforms.CenterCrop(148), transforms.Resize(64, bicubic), transforms.PILToTensor()]
    )
    parts, rows = {0: [], 1: [], 2: []}, []
    for i, part in enumerate([0, 2, 0, 1, 1, 2, 0]):
        name = f"{i:06d}.jpg"
        smooth = Image.fromarray(pixels(11, 9, 3, seed=i)).resize((178, 218))
        smooth.save(folder / "img_align_celeba" / name)
        with Image.open(folder / "img_align_celeba" / name) as image:
            parts[part].append(preprocess(image).numpy())
        rows.append((name, part))
    sums = []
    for drive, old, file in kind.file_list:
        if file.endswith(".txt"):
            header = "" if file in ("list_eval_partition.txt", "identity_CelebA.txt") else "7\nx\n"
            lines = "".join(f"{name} {part}\n" for name, part in rows)
            (folder / file).write_text(header + lines)
            old = md5(folder / file)
        sums.append((drive, old, file))
    monkeypatch.setattr(kind, "file_list", sums)
    return np.stack(parts[0]), np.stack(parts[2]), None, None


def write_omniglot(root, monkeypatch):
    train, test = pixels(5, 1, 28, 28), pixels(3, 1, 28, 28, seed=1)
    columns = {  # a little off the grid of 255 levels, as resized drawings are: to be rounded
        key: np.stack([image[0].ravel("F") for image in array], axis=1).clip(0.3) / 255 - 0.3 / 255
        for key, array in (("data", train), ("testdata", test))
    }
    savemat(root / "chardata.mat", columns)
    return train, test, None, None


WRITERS = {
    "mnist": write_mnist,
    "fashion_mnist": partial(write_mnist, kind="FashionMNIST"),
    "omniglot": write_omniglot,
    "cifar10": write_cifar10,
    "svhn": write_svhn,
    "celeba": write_celeba,
}
A_FILE = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion_mnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte",
    "omniglot": "chardata.mat",
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "svhn": "test_32x32.mat",
    "celeba": "celeba/img_align_celeba/000000.jpg",
}


def equal(data, train, test, train_labels, test_labels):
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train.is_contiguous()
    assert torch.equal(data.train, torch.as_tensor(train))
    assert torch.equal(data.test, torch.as_tensor(test))
    for labels, expected in ((data.train_labels, train_labels), (data.test_labels, test_labels)):
        assert (labels is None) == (expected is None)
        assert expected is None or torch.equal(labels, expected)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("download", [False, True])  # nothing is missing: no network either way
def test_reads_the_published_files(name, download, tmp_path, monkeypatch):
    assert ("mnist5k", *WRITERS) == available_data()
    expected = WRITERS[name](tmp_path, monkeypatch)
    data = load_data(name, root=tmp_path, download=download)
    equal(data, *expected)
    assert data.name == name
    # the recipe of the documentation; such a file comes first, and is not taken for the original
    arrays = {"train": data.train.movedim(1, -1), "test": data.test.movedim(1, -1)}
    labels = {} if data.train_labels is None else {"train_labels": data.train_labels}
    np.savez(tmp_path / f"{name}.npz", **arrays, **labels)
    (tmp_path / A_FILE[name]).unlink()
    data = load_data(name, root=tmp_path)
    equal(data, *expected[:3], None)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_and_damaged_files_are_refused_by_name(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"download=True.*PYRO_GPVAE_DATA") as caught:
        load_data(name, root=tmp_path / "empty")
    assert str(tmp_path / "empty" / f"{name}.npz") in str(caught.value)
    assert not (tmp_path / "empty").exists(), "nothing is downloaded or made"
    WRITERS[name](tmp_path, monkeypatch)
    file = tmp_path / A_FILE[name]
    content = file.read_bytes()
    for wrong in (b"", content[: len(content) // 2], b"<html>404</html>", None, "fifo"):
        file.unlink()
        if wrong == "fifo":
            os.mkfifo(file)
        elif wrong is not None:
            file.write_bytes(wrong)
        kind = FileNotFoundError if name == "omniglot" and wrong is None else ValueError
        with pytest.raises(kind, match=rf"{name}.*{re.escape(str(tmp_path))}"):
            load_data(name, root=tmp_path)
        file.touch()


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('a data file was executed')",)


@pytest.mark.parametrize("file", ["data_batch_2", "batches.meta"])
def test_a_pickle_that_is_not_the_published_one_is_never_loaded(file, tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match="cifar10 could not be read"):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.zeros((784, 2))}, "no array 'testdata'"),
        ({"data": np.zeros((783, 2)), "testdata": np.zeros((784, 2))}, r"\(783, 2\)"),
        ({"data": np.full((784, 2), np.nan), "testdata": np.zeros((784, 2))}, "floats in"),
        ({"data": np.zeros((784, 2), np.uint8), "testdata": np.zeros((784, 2))}, "floats in"),
    ],
)
def test_omniglot_with_other_contents_is_refused(arrays, message, tmp_path):
    savemat(tmp_path / "chardata.mat", arrays)
    with pytest.raises(ValueError, match=message):
        load_data("omniglot", root=tmp_path)


def test_omniglot_is_downloaded_only_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    expected = write_omniglot(tmp_path / "server", monkeypatch)
    url = (tmp_path / "server" / "chardata.mat").as_uri()
    monkeypatch.setattr("pyro_gpvae.data._files._OMNIGLOT", url)
    root = tmp_path / "new" / "root"
    equal(load_data("omniglot", root=root, download=True), *expected)
    assert [file.name for file in root.iterdir()] == ["chardata.mat"]


def test_faces_must_be_the_aligned_ones(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "celeba/img_align_celeba/000000.jpg")
    with pytest.raises(ValueError, match=r"size \(64, 64\) instead of \(178, 218\)"):
        load_data("celeba", root=tmp_path)


# --- your own images ----------------------------------------------------------------------------

GOOD = pixels(3, 4, 4)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_reads_your_own_images(channels, tmp_path, monkeypatch):
    train, test = pixels(5, 6, 7, *channels), pixels(2, 6, 7, *channels, seed=1)
    file = tmp_path / "mine.npz"
    np.savez(file, train=train, test=test, train_labels=np.arange(5, dtype=np.uint8))
    monkeypatch.setenv("HOME", str(tmp_path))
    shapes = [(len(a), 6, 7, *(channels or (1,))) for a in (train, test)]
    expected = [
        a.reshape(s).transpose(0, 3, 1, 2) for a, s in zip((train, test), shapes, strict=True)
    ]
    for path in (file, str(file), "~/mine.npz", Path("~") / "mine.npz"):
        data = load_data(path)
        assert (data.name, len(data.train)) == ("mine", 5)
        assert data.image_shape == tuple(expected[0].shape[1:])
        equal(data, *expected, torch.arange(5), None)


def test_the_root_is_the_environment_variable_by_default(tmp_path, monkeypatch):
    np.savez(tmp_path / "mnist.npz", train=GOOD, test=GOOD)
    monkeypatch.setenv("PYRO_GPVAE_DATA", str(tmp_path))
    assert len(load_data("mnist").train) == 3
    monkeypatch.delenv("PYRO_GPVAE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / ".cache" / "pyro-gpvae"))):
        load_data("mnist")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": GOOD}, "no array 'test'"),
        (
            {"train": GOOD / 255, "test": GOOD},
            "train: expected uint8 .* got torch.float64",
        ),
        ({"train": GOOD[0], "test": GOOD}, r"train has shape \(4, 4\)"),
        ({"train": GOOD[:, None], "test": GOOD}, r"images of shape \(4, 1, 4\) as in train"),
        ({"train": pixels(3, 1, 28, 28), "test": GOOD}, r"\(3, 1, 28, 28\) instead of \(N, H, W"),
        ({"train": GOOD[:0], "test": GOOD}, "at least one image"),
        ({"train": GOOD, "test": GOOD, "train_labels": np.arange(2)}, r"shape \(3,\)"),
        ({"train": GOOD, "test": GOOD, "test_labels": np.ones(3)}, "test_labels has dtype float64"),
        ({"train": np.array([Exploit()], dtype=object), "test": GOOD}, "Object arrays cannot be"),
    ],
)
def test_an_npz_with_other_contents_is_refused(arrays, message, tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(file)
    assert str(file) in str(caught.value)
    assert "Expected an .npz file with uint8 arrays" in str(caught.value)


def npz_of(shape, content):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", array)
        archive.writestr("test.npy", array)
    return buffer.getvalue()


def npz_that_announces_little():
    """Its members unpack to 40 MiB, and announce 4 bytes of pixels."""
    blank = bytes(40 * 2**20)
    content = npz_of((4, 1, 1), blank)
    true = len(blank) + 10 + len("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1, 1)}")
    assert content.count(struct.pack("<I", true)) == 4  # before and in the directory
    return content.replace(struct.pack("<I", true), struct.pack("<I", true - len(blank) + 4))


def flipped():
    content = bytearray(npz_of((2, 4, 4), bytes(range(32))))
    content[60:90] = bytes(30)
    return bytes(content)


HOSTILE = {
    "empty": b"",
    "start": b"PK",
    "truncated": npz_of((3, 4, 4), GOOD.tobytes())[:200],
    "flipped bits": flipped(),
    "html": b"<!DOCTYPE html><html></html>",
    "pickle": pickle.dumps(Exploit()),
    "foreign": npz_of("text", b""),
    "huge shape": npz_of((2**40, 28, 28), bytes(100)),
    "short content": npz_of((5, 28, 28), bytes(100)),
    "bomb": npz_of((40 * 2**20, 1, 1), bytes(40 * 2**20)),
    "liar": npz_that_announces_little(),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_npz_is_refused_by_name_and_takes_little_memory(content, tmp_path):
    file = tmp_path / "mnist.npz"
    file.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for arguments in ((file,), ("mnist", tmp_path)):  # never passed over for another file
        with pytest.raises(ValueError, match=re.escape(f"{file} could not be read: ")) as caught:
            load_data(*arguments)
        assert "unsafe" not in str(caught.value), "numpy's advice to load the pickle after all"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 2**10  # KiB


def test_blank_images_are_not_taken_for_a_bomb(tmp_path):
    blank = np.zeros((9999, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", train=blank, test=blank[:1])
    assert len(load_data(tmp_path / "a.npz").train) == 9999


def test_a_path_that_is_no_file_is_an_error(tmp_path):
    for path in (tmp_path / "none.npz", str(tmp_path / "none"), "none.npz"):
        with pytest.raises(FileNotFoundError, match=r"none.* does not exist"):
            load_data(path)
    os.mkfifo(tmp_path / "fifo.npz")
    for path in (tmp_path, tmp_path / "fifo.npz"):
        with pytest.raises(ValueError, match="not a regular file"):
            load_data(path)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'fashion_mnist'"):
        load_data("Fashion-MNIST")
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet'.*mnist5k, mnist, .*celeba"):
        load_data("imagenet")
