r"""Data: what is read is what was written, and what is wrong is refused with a reason."""

import gzip
import hashlib
import io
import pickle
import re
import struct
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from any_torchvision import import_torchvision
from PIL import Image
from scipy.io import savemat

from pyro_gpvae import readers as module
from pyro_gpvae.data.images import (
    ImageData,
    available_data,
    check_images,
    load_data,
    split_validation,
    to_float,
)
from pyro_gpvae.data.integrity import ORIGINALS, Original


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def images(*shape, seed=0):
    return torch.from_numpy(pixels(*shape, seed=seed))


# The published formats, written small. The table of checksums gets those of what was written, so
# the check itself stays in force, and any later change of a file is refused.


def publish(monkeypatch, file, content):
    original = Original(len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(ORIGINALS, file, original)


def write_idx(root, monkeypatch, dataset="MNIST", packed=False):
    arrays = {
        "train-images-idx3-ubyte": pixels(5, 28, 28),
        "train-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
        "t10k-images-idx3-ubyte": pixels(3, 28, 28, seed=1),
        "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8),
    }
    raw = root / dataset / "raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
            f">{array.ndim}I", *array.shape
        )
        content = header + array.tobytes()
        publish(monkeypatch, f"{dataset}/raw/{name}", content)
        if packed:
            content = gzip.compress(content)
            publish(monkeypatch, f"{dataset}/raw/{name}.gz", content)
        (raw / (f"{name}.gz" if packed else name)).write_bytes(content)
    train, _, test, _ = arrays.values()
    return train[:, None], test[:, None], torch.arange(5), torch.arange(3)


def write_cifar10(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rows = pixels(12, 3072)  # 3 planes of 32 x 32, two images in each of six batches
    labels = [*range(10), 3, 4]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        content = pickle.dumps({"data": rows[part], "labels": labels[part]})
        (folder / name).write_bytes(content)
        publish(monkeypatch, f"cifar-10-batches-py/{name}", content)
    expected = rows.reshape(-1, 3, 32, 32)
    return expected[:10], expected[10:], torch.tensor(labels[:10]), torch.tensor(labels[10:])


def write_svhn(root, monkeypatch):
    train, test = pixels(5, 3, 32, 32), pixels(3, 3, 32, 32, seed=1)
    for split, array in (("train", train), ("test", test)):
        file = root / f"{split}_32x32.mat"
        labels = np.arange(1, len(array) + 1, dtype=np.uint8)[:, None]
        labels[-1] = 10  # SVHN's name for the digit 0
        arrays = {"X": array.transpose(2, 3, 1, 0), "y": labels}
        savemat(file, arrays, do_compression=split == "train")
        publish(monkeypatch, file.name, file.read_bytes())
    return train, test, torch.tensor([1, 2, 3, 4, 0]), torch.tensor([1, 2, 0])


def write_celeba(root, monkeypatch):
    transforms = import_torchvision().transforms
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    preprocess = transforms.Compose(
        [
            transforms.CenterCrop(148),
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
            transforms.PILToTensor(),
        ]
    )
    parts = {0: [], 1: [], 2: []}
    partition = []
    for i, part in enumerate([0, 2, 0, 1, 1, 2, 0]):
        name = f"{i:06d}.jpg"
        smooth = Image.fromarray(pixels(11, 9, 3, seed=i)).resize((178, 218))
        smooth.save(folder / "img_align_celeba" / name)
        with Image.open(folder / "img_align_celeba" / name) as image:
            parts[part].append(preprocess(image).numpy())
        partition.append((name, part))
    rows = "".join(f"{name} {part} \n" for name, part in partition)
    (folder / "list_eval_partition.txt").write_text(rows)
    publish(monkeypatch, "celeba/list_eval_partition.txt", rows.encode())
    return np.stack(parts[0]), np.stack(parts[2]), None, None


def write_omniglot(root, monkeypatch=None):
    train, test = pixels(5, 1, 28, 28), pixels(3, 1, 28, 28, seed=1)
    columns = {
        # a little off the grid of 255 levels, as resized drawings are: to be rounded, not cut off
        key: np.stack([image[0].ravel("F") for image in array], axis=1).clip(0.3) / 255 - 0.3 / 255
        for key, array in (("data", train), ("testdata", test))
    }
    savemat(root / "chardata.mat", columns)
    return train, test, None, None


def write_fashion(root, monkeypatch):
    return write_idx(root, monkeypatch, "FashionMNIST", packed=True)


def write_packed(root, monkeypatch):
    return write_idx(root, monkeypatch, packed=True)


WRITERS = {
    "mnist": write_idx,
    "fashion_mnist": write_fashion,
    "omniglot": write_omniglot,
    "cifar10": write_cifar10,
    "svhn": write_svhn,
    "celeba": write_celeba,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def equal(data, train, test, train_labels, test_labels):
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train.is_contiguous()
    assert torch.equal(data.train, torch.as_tensor(train))
    assert torch.equal(data.test, torch.as_tensor(test))
    for labels, expected in ((data.train_labels, train_labels), (data.test_labels, test_labels)):
        assert (labels is None) == (expected is None)
        assert expected is None or torch.equal(labels, expected)


def test_every_published_format_has_a_test():
    assert ("mnist5k", *WRITERS) == available_data()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("download", [False, True])  # nothing is missing: no network either way
def test_reads_the_published_format(name, download, tmp_path, monkeypatch):
    expected = WRITERS[name](tmp_path, monkeypatch)
    data = load_data(name, root=tmp_path, download=download)
    equal(data, *expected)
    assert data.name == name
    assert "not the published split" in data.note  # it is smaller


@pytest.mark.parametrize("left", [[], ["t10k-labels-idx1-ubyte"]])
def test_packed_idx_files_are_read_as_they_are(left, tmp_path, monkeypatch):
    expected = write_packed(tmp_path, monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    for name in left:
        (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
        (raw / f"{name}.gz").unlink()
    before = sorted(raw.iterdir())
    equal(load_data("mnist", root=tmp_path), *expected)
    assert sorted(raw.iterdir()) == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_file_is_named_and_not_fetched(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, root=tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / name}.npz" in message
    assert all(file in message for names in module.SOURCES[name].files for file in names)
    assert "download=True" in message
    assert "PYRO_GPVAE_DATA" in message
    assert list(tmp_path.iterdir()) == []


DAMAGED = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion_mnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz",
    "omniglot": "chardata.mat",
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "svhn": "test_32x32.mat",
    "celeba": "celeba/img_align_celeba/000000.jpg",
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "html"])
def test_a_damaged_file_is_one_clear_error(name, damage, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    file = tmp_path / DAMAGED[name]
    content = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "truncated": content[: len(content) // 2], "html": b"<html>404</html>"}[
            damage
        ]
    )
    with pytest.raises(
        ValueError, match=f"{name} could not be read from {re.escape(str(tmp_path))}"
    ):
        load_data(name, root=tmp_path)


def test_a_missing_face_is_named(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000002\.jpg"):
        load_data("celeba", root=tmp_path)


def test_faces_must_be_the_aligned_ones(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "celeba/img_align_celeba/000000.jpg")
    with pytest.raises(ValueError, match=r"size \(64, 64\) instead of \(178, 218\)"):
        load_data("celeba", root=tmp_path)


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('a file of the data set was executed')",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.zeros((784, 2))}, "no array 'testdata'"),
        ({"data": np.zeros((783, 2)), "testdata": np.zeros((784, 2))}, r"\(783, 2\)"),
        ({"data": np.full((784, 2), 2.0), "testdata": np.zeros((784, 2))}, r"floats in \[0, 1\]"),
        ({"data": np.full((784, 2), np.nan), "testdata": np.zeros((784, 2))}, "floats in"),
        ({"data": np.zeros((784, 2), np.uint8), "testdata": np.zeros((784, 2))}, "floats in"),
    ],
)
def test_omniglot_with_other_contents_is_refused(arrays, message, tmp_path):
    savemat(tmp_path / "chardata.mat", arrays)
    with pytest.raises(ValueError, match=message):
        load_data("omniglot", root=tmp_path)


def test_omniglot_is_fetched_only_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    expected = write_omniglot(tmp_path / "server")
    url = (tmp_path / "server" / "chardata.mat").as_uri()
    monkeypatch.setitem(ORIGINALS, "chardata.mat", Original(100_000, None, url))
    root = tmp_path / "new" / "root"
    with pytest.raises(FileNotFoundError):
        load_data("omniglot", root=root)
    equal(load_data("omniglot", root=root, download=True), *expected)
    assert [file.name for file in root.iterdir()] == ["chardata.mat"]  # no .part


def test_a_failed_download_is_an_error_with_the_name(tmp_path, monkeypatch):
    url = (tmp_path / "nowhere.mat").as_uri()
    monkeypatch.setitem(ORIGINALS, "chardata.mat", Original(100_000, None, url))
    with pytest.raises(ValueError, match="omniglot could not be read"):
        load_data("omniglot", root=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_labels_must_match_the_images(tmp_path, monkeypatch):
    write_idx(tmp_path, monkeypatch)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    content = struct.pack(">BBBBI", 0, 0, 8, 1, 2) + bytes([1, 2])
    labels.write_bytes(content)
    publish(monkeypatch, "MNIST/raw/train-labels-idx1-ubyte", content)
    with pytest.raises(ValueError, match=r"mnist could not be read.*train_labels.*\(5,\)"):
        load_data("mnist", root=tmp_path)


# Your own images


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_reads_your_own_images(channels, as_text, tmp_path):
    train, test = pixels(5, 6, 7, *channels), pixels(2, 6, 7, *channels, seed=1)
    file = tmp_path / "mine.npz"
    np.savez(file, train=train, test=test, train_labels=np.arange(5, dtype=np.uint8))
    data = load_data(str(file) if as_text else file)
    shape = (*channels, 6, 7) if channels else (1, 6, 7)
    assert (data.name, data.image_shape, data.num_train) == ("mine", shape, 5)
    expected = [
        array.reshape(*array.shape[:3], -1).transpose(0, 3, 1, 2) for array in (train, test)
    ]
    equal(data, *expected, torch.arange(5), None)
    assert str(tmp_path) not in data.note


def test_npz_in_the_root_comes_first(tmp_path, monkeypatch):
    expected = write_svhn(tmp_path, monkeypatch)
    data = load_data("svhn", root=tmp_path)
    # the recipe that the documentation gives
    np.savez(
        tmp_path / "svhn.npz",
        train=data.train.movedim(1, -1),
        test=data.test.movedim(1, -1),
        train_labels=data.train_labels,
        test_labels=data.test_labels,
    )
    (tmp_path / "train_32x32.mat").unlink()
    data = load_data("svhn", root=tmp_path)
    equal(data, *expected)
    assert data.name == "svhn"
    assert "5 training and 3 test images, published are 73,257 and 26,032" in data.note


def test_an_npz_of_the_published_size_is_not_taken_for_the_published_file(tmp_path, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "mnist", module.SOURCES["mnist"]._replace(sizes=(5, 3)))
    expected = write_idx(tmp_path, monkeypatch)
    assert load_data("mnist", root=tmp_path).note == module.SOURCES["mnist"].note
    np.savez(tmp_path / "mnist.npz", train=expected[0][:, 0], test=expected[1][:, 0])
    assert "if the file holds the published images" in load_data("mnist", root=tmp_path).note


def test_the_root_is_the_environment_variable_by_default(tmp_path, monkeypatch):
    train = pixels(2, 4, 4)
    np.savez(tmp_path / "mnist.npz", train=train, test=train)
    monkeypatch.setenv("PYRO_GPVAE_DATA", str(tmp_path))
    assert load_data("mnist").num_train == 2
    monkeypatch.delenv("PYRO_GPVAE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / ".cache" / "pyro-gpvae"))):
        load_data("mnist")


GOOD = pixels(3, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": GOOD}, "no array 'test'"),
        ({"x": GOOD}, "no array 'train'"),
        ({"train": GOOD / 255, "test": GOOD}, "train has dtype float64 instead of uint8"),
        ({"train": GOOD, "test": GOOD.astype(int)}, "test has dtype int64"),
        ({"train": GOOD[0], "test": GOOD}, r"train has shape \(4, 4\)"),
        ({"train": GOOD[:, None], "test": GOOD}, r"images of shape \(4, 1, 4\) as in train"),
        ({"train": pixels(3, 1, 28, 28), "test": GOOD}, r"\(3, 1, 28, 28\) instead of \(N, H, W"),
        ({"train": GOOD, "test": pixels(3, 5, 4)}, r"expected images of shape \(1, 4, 4\)"),
        ({"train": GOOD[:0], "test": GOOD}, "at least one image"),
        ({"train": GOOD, "test": GOOD, "train_labels": np.arange(2)}, r"shape \(3,\)"),
        ({"train": GOOD, "test": GOOD, "test_labels": np.ones(3)}, "test_labels has dtype float64"),
        ({"train": GOOD, "test": GOOD, "test_labels": np.eye(3, dtype=int)}, "test_labels has"),
        ({"train": np.array([Exploit()], dtype=object), "test": GOOD}, "never loaded"),
    ],
)
def test_an_npz_with_other_contents_is_refused(arrays, message, tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(file)
    assert str(file) in str(caught.value)
    assert "Expected an .npz file with uint8 arrays" in str(caught.value)


def npz_bytes():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, train=GOOD, test=GOOD)
    return buffer.getvalue()


def flipped():
    content = bytearray(npz_bytes())
    content[60:90] = bytes(30)
    return bytes(content)


def npy_bytes():
    buffer = io.BytesIO()
    np.save(buffer, GOOD)
    return buffer.getvalue()


def foreign_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train.npy", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        npz_bytes()[:200],
        npz_bytes()[:-10],
        flipped(),
        b"<!DOCTYPE html><html></html>",
        npy_bytes(),
        pickle.dumps(Exploit()),
        foreign_zip(),
    ],
    ids=["empty", "start", "truncated", "no end", "bits", "html", "npy", "pickle", "zip"],
)
def test_a_damaged_npz_is_one_clear_error(content, tmp_path):
    file = tmp_path / "mnist.npz"
    file.write_bytes(content)
    for arguments in (
        (file,),
        ("mnist", tmp_path),
    ):  # never passed over in silence for another file
        with pytest.raises(ValueError, match=re.escape(f"{file} could not be read: ")) as caught:
            load_data(*arguments)
        assert "unsafe" not in str(caught.value)  # numpy's advice, to load the pickle after all


def test_a_path_that_is_no_file_is_an_error(tmp_path):
    for path in (tmp_path / "none.npz", str(tmp_path / "none"), "none.npz"):
        with pytest.raises(FileNotFoundError, match=r"none.* does not exist"):
            load_data(path)
    with pytest.raises(ValueError, match="IsADirectoryError"):
        load_data(tmp_path)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'fashion_mnist'"):
        load_data("Fashion-MNIST")
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet'.*mnist5k, mnist, .*celeba"):
        load_data("imagenet")
    with pytest.raises(ValueError, match="unknown data set ''"):
        load_data("")


# Embedded digits


def test_the_embedded_digits_are_those_of_their_readme():
    folder = resources.files("pyro_gpvae.data")
    content = (folder / "mnist5k.npz").read_bytes()
    assert len(content) < 1_000_000
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text("utf-8")


def test_the_embedded_digits_are_balanced_and_disjoint(tmp_path):
    data = load_data("mnist5k", root=tmp_path)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    distinct = {image.numpy().tobytes() for image in torch.cat([data.train, data.test])}
    assert len(distinct) == 5000
    assert "do not compare" in data.note


# ImageData, splits, conversions


def test_image_data_describes_itself():
    data = ImageData("blank", images(3, 1, 8, 9), images(2, 1, 8, 9))
    assert (data.image_shape, data.num_train, data.note) == ((1, 8, 9), 3, "")
    assert repr(data) == "ImageData('blank', train=(3, 1, 8, 9), test=(2, 1, 8, 9))"
    with pytest.raises(AttributeError):
        data.name = "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": images(3, 1, 8, 8) / 255}, "train: expected uint8"),
        ({"test": images(3, 8, 8)}, r"test: expected shape \(B, C, H, W\)"),
        ({"test": images(3, 1, 8, 7)}, r"test: expected images of shape \(1, 8, 8\)"),
        ({"test": images(0, 1, 8, 8)}, "test: expected at least one image"),
        ({"train_labels": torch.arange(2)}, r"train_labels: .*shape \(3,\)"),
        ({"test_labels": torch.zeros(3)}, "test_labels: .*int64"),
    ],
)
def test_image_data_refuses(change, message):
    arguments = {"name": "blank", "train": images(3, 1, 8, 8), "test": images(3, 1, 8, 8)}
    with pytest.raises(ValueError, match=message):
        ImageData(**{**arguments, **change})


def test_image_data_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"train: .*ndarray"):
        ImageData("blank", pixels(3, 1, 8, 8), images(3, 1, 8, 8))
    with pytest.raises(TypeError, match=r"test_labels: .*list"):
        ImageData("blank", images(1, 1, 8, 8), images(1, 1, 8, 8), test_labels=[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images(2, 1, 8, 8) / 255, r"multiply by 255"),
        (images(2, 1, 8, 8).long(), "int64"),
        (images(2, 8, 8), r"unsqueeze\(1\)"),
        (images(2, 64), r"got \(2, 64\)"),
        (images(2, 0, 8, 8), "at least one"),
        (images(2, 8, 8, 3), r"movedim\(-1, 1\)"),
    ],
)
def test_check_images_says_what_to_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_images(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_float_divides_by_255(dtype):
    every = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    result = to_float(every, dtype)
    assert result.dtype == dtype
    assert torch.equal(result.flatten(), torch.arange(256, dtype=dtype) / 255)
    assert torch.equal(to_float(result, dtype), result)
    assert torch.equal((255 * result).round().to(torch.uint8), every)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((1, 1, 2, 2), float("nan")), "found nan"),
        (torch.full((1, 1, 2, 2), 1.5), "found 1.5"),
        (torch.full((1, 1, 2, 2), -0.25), "found -0.25"),
        (torch.full((1, 1, 2, 2), float("inf")), "found inf"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), "int64"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.bool), "bool"),
        (torch.zeros(1, 2, 2), r"\(B, C, H, W\), got \(1, 2, 2\)"),
    ],
)
def test_to_float_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        to_float(wrong)


def test_to_float_wants_a_floating_point_type():
    with pytest.raises(ValueError, match=r"floating-point type, got torch\.int64"):
        to_float(images(1, 1, 2, 2), torch.int64)


def test_binarized_keeps_the_intensity_on_average():
    # 20,000 draws for each of the 256 values; z-scores beyond 5 have probability 6e-7 each
    values = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(20_000, 1, 16, 16)
    data = ImageData("grey", values, values[:1]).binarized(seed=3)
    assert set(data.train.unique().tolist()) == {0, 255}
    p = torch.arange(256, dtype=torch.float64) / 255
    mean = (data.train == 255).double().mean(0).flatten()
    assert mean[0] == 0
    assert mean[255] == 1
    z = (mean - p)[1:255] / (p * (1 - p) / 20_000).sqrt()[1:255]
    assert z.abs().max() < 5


def test_binarized_is_fixed_by_its_seed_and_nothing_else():
    data = load_data("mnist5k").take(50, 20)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once, again, other = data.binarized(1), data.binarized(1), data.binarized(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once.train, again.train)
    assert torch.equal(once.test, again.test)
    assert not torch.equal(once.train, other.train)
    assert torch.equal(once.take(7, 3).train, data.take(7, 3).binarized(1).train)
    assert torch.equal(once.take(7, 3).test, data.take(7, 3).binarized(1).test)
    assert torch.equal(once.binarized(5).train, once.train)
    assert not torch.equal(
        once.train[:20], ImageData("x", data.test, data.train).binarized(1).test[:20]
    )
    assert once.name == "mnist5k-binarized"
    assert "Binarised once with seed 1" in once.note
    assert torch.equal(once.train_labels, data.train_labels)


def test_take_keeps_the_first():
    data = load_data("mnist5k")
    part = data.take(30)
    equal(part, data.train[:30], data.test, data.train_labels[:30], data.test_labels)
    assert "first 30 of 4,000 training and 1,000 of 1,000 test images" in part.note
    equal(data.take(test=1), data.train, data.test[:1], data.train_labels, data.test_labels[:1])
    assert data.take() is data
    unlabelled = ImageData("x", data.train, data.test).take(2, 2)
    assert unlabelled.train_labels is unlabelled.test_labels is None


@pytest.mark.parametrize("counts", [{"train": 0}, {"train": 4001}, {"test": -1}, {"test": 1001}])
def test_take_refuses(counts):
    (part,) = counts
    with pytest.raises(ValueError, match=f"{part}: expected 1 to .* got {counts[part]}"):
        load_data("mnist5k").take(**counts)


def test_split_validation_is_a_partition_fixed_by_its_seed():
    everything = torch.arange(100)[:, None, None, None].expand(100, 1, 2, 2).to(torch.uint8)
    state = torch.get_rng_state()
    train, validation = split_validation(everything, 30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(train), len(validation)) == (70, 30)
    assert sorted(torch.cat([train, validation])[:, 0, 0, 0].tolist()) == list(range(100))
    assert torch.equal(validation, split_validation(everything, 30, seed=1)[1])
    assert not torch.equal(validation, split_validation(everything, 30, seed=2)[1])
    assert validation[:, 0, 0, 0].tolist() != list(range(30))


@pytest.mark.parametrize("size", [0, -1, 10, 11])
def test_split_validation_refuses(size):
    with pytest.raises(ValueError, match=f"between 1 and 9 of the 10 images, got {size}"):
        split_validation(images(10, 1, 2, 2), size)


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "mine.npz", train=GOOD, test=GOOD)
    assert load_data("~/mine.npz").num_train == 3
    assert load_data(Path("~") / "mine.npz").num_train == 3
