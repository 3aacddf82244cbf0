"""Files from strangers are refused by name: nothing in them runs, escapes, or fills the memory."""

import ast
import gzip
import io
import os
import pickle
import re
import stat
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from test_data import DAMAGED, WRITERS, equal, pixels, publish, write_packed

from pyro_gpvae import integrity, load_data, readers
from pyro_gpvae.data.formats import read_cifar, read_idx, read_mat
from pyro_gpvae.data.images import available_data
from pyro_gpvae.data.integrity import ORIGINALS, Original, fetch
from pyro_gpvae.training.checkpoint import load_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import fuzz_readers

ROOT = Path(__file__).parents[2]

# No package runs what it reads

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "torch.jit.load"}
CALLS |= {"torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput"}
OPTIONS = {"allow_pickle": True, "shell": True}
SHORT = {"np": "numpy", "pd": "pandas"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return SHORT.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def dangers(source):
    """What a module could run that it was given as data, as line numbers and names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            # not only calls: map(eval, lines) is no better. A method such as guide.eval() is
            # another name
            names = [dotted(node)]
        found += [(node.lineno, n) for n in names if n in CALLS or n.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            for option in OPTIONS:
                if given.get(option, False) is not False:
                    found.append((node.lineno, option))
            if dotted(node.func) == "torch.load" and given.get("weights_only") is not True:
                found.append((node.lineno, "torch.load"))
    return found


FILES = sorted(
    path for folder in ("pyro_gpvae", "guides") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from joblib import load",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=choice)",
        "eval(text)",
        "map(eval, texts)",
        "exec(text)",
        "yaml.load(text)",
        "os.system(text)",
        "from os import system",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=choice)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
    ],
)
def test_the_search_finds_what_it_should(source):
    assert dangers(source)


def test_the_search_knows_what_is_harmless():
    assert not dangers("guide.eval(); torch.load(p, weights_only=True); np.load(p)")
    assert not dangers("subprocess.run(['git']); np.load(p, allow_pickle=False); re.compile('a')")
    assert len(FILES) > 40


# A payload that would show


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    """A folder that a payload would make; it does, where a payload runs."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.rmdir()
    yield path
    assert not path.exists()


def test_a_malicious_checkpoint_does_not_run(canary, tmp_path):
    model, guide = torch.nn.Linear(2, 1), torch.nn.Linear(1, 2)
    before = [p.clone() for p in model.parameters()]
    file = tmp_path / "weights.safetensors"
    torch.save({"model.weight": Payload(canary)}, file)
    for content in (file.read_bytes(), pickle.dumps(Payload(canary))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            load_weights(file, model, guide)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_malicious_npz_does_not_run(canary, tmp_path):
    file, images = tmp_path / "mine.npz", pixels(2, 4, 4)
    for arrays in (
        {"train": np.array([Payload(canary)], object), "test": images},
        {"train": images, "test": images, "train_labels": np.array([Payload(canary)] * 2, object)},
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match="pickled objects, which are never loaded"):
            load_data(file)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("where", ["instead", "images", "labels"])
def test_a_malicious_cifar_batch_does_not_run(where, published, canary, tmp_path, monkeypatch):
    WRITERS["cifar10"](tmp_path, monkeypatch)
    rows = pixels(2, 3072)
    batch = {
        "instead": Payload(canary),
        "images": {"data": [rows, Payload(canary)], "labels": [1, 2]},
        "labels": {"data": rows, "labels": [Payload(canary), 1]},
    }
    name, content = "cifar-10-batches-py/data_batch_2", pickle.dumps(batch[where])
    (tmp_path / name).write_bytes(content)
    if published:  # even if its checksum were right
        publish(monkeypatch, name, content)
        if where == "images":
            assert load_data("cifar10", root=tmp_path).num_train == 10
            return
    reason = "one string of 3072 bytes" if published else "not the published file"
    with pytest.raises(ValueError, match=f"cifar10 could not be read.*{reason}"):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["svhn", "omniglot"])
def test_a_malicious_mat_does_not_run(name, canary, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    file = {"svhn": "train_32x32.mat", "omniglot": "chardata.mat"}[name]
    content = pickle.dumps(Payload(canary))
    (tmp_path / file).write_bytes(content)
    publish(monkeypatch, file, content)
    with pytest.raises(ValueError, match="not a little-endian MATLAB 5 file"):
        load_data(name, root=tmp_path)


# The published file or none


def tree(root):
    return {str(p.relative_to(root)): p.is_file() and p.read_bytes() for p in root.rglob("*")}


def write_cifar_archive(root, monkeypatch, change=None):
    """CIFAR-10 as it is fetched; ``change`` may put something else into the archive."""
    expected = WRITERS["cifar10"](root, monkeypatch)
    folder = root / "cifar-10-batches-py"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        if change:
            change(archive)
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (root / "cifar-10-python.tar.gz").write_bytes(buffer.getvalue())
    publish(monkeypatch, "cifar-10-python.tar.gz", buffer.getvalue())
    return expected


def write_celeba_archive(root, monkeypatch, change=None):
    expected = WRITERS["celeba"](root, monkeypatch)
    folder = root / "celeba" / "img_align_celeba"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        if change:
            change(archive)
        for file in sorted(folder.iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
            file.unlink()
    folder.rmdir()
    (root / "celeba" / "img_align_celeba.zip").write_bytes(buffer.getvalue())
    publish(monkeypatch, "celeba/img_align_celeba.zip", buffer.getvalue())
    return expected


ARCHIVES = {"mnist": write_packed, "cifar10": write_cifar_archive, "celeba": write_celeba_archive}
PACKED = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte.gz",
    "cifar10": "cifar-10-python.tar.gz",
    "celeba": "celeba/img_align_celeba.zip",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_read_where_they_lie(name, tmp_path, monkeypatch):
    expected = ARCHIVES[name](tmp_path, monkeypatch)
    before = tree(tmp_path)
    equal(load_data(name, root=tmp_path), *expected)
    assert tree(tmp_path) == before


def never(*arguments, **keywords):
    raise AssertionError("a file was parsed that is not the published one")


CHANGES = {
    "a web page": lambda content: b"<!DOCTYPE html><html>404</html>",
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte longer": lambda content: content + b"\n",
    "one bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("name", "packed"),
    [(name, False) for name in WRITERS if name != "omniglot"] + [(name, True) for name in ARCHIVES],
)
def test_another_file_is_refused_before_it_is_parsed(name, packed, change, tmp_path, monkeypatch):
    (ARCHIVES if packed else WRITERS)[name](tmp_path, monkeypatch)
    file = PACKED[name] if packed else DAMAGED[name]
    if name == "celeba" and not packed:
        file = "celeba/list_eval_partition.txt"
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(CHANGES[change](content))
    before = tree(tmp_path)
    for module, parser in (
        (gzip, "open"),
        (tarfile, "open"),
        (zipfile, "ZipFile"),
        (readers, "_faces"),
    ):
        if packed:
            monkeypatch.setattr(module, parser, never)
    if name in ("svhn", "cifar10"):
        original = {"svhn": "read_mat", "cifar10": "read_cifar"}[name]
        true = getattr(readers, original)
        wrong = CHANGES[change](content)
        monkeypatch.setattr(readers, original, lambda c, *a: never() if c == wrong else true(c, *a))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / file} is not the")) as caught:
        load_data(name, root=tmp_path)
    message = str(caught.value)
    if change == "one bit flipped":
        assert re.search(r"expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}", message)
    elif change == "a web page":
        assert "it is a web page of 31 bytes, expected" in message
    else:
        assert (
            f"expected {len(content):,} bytes, found {len(CHANGES[change](content)):,}" in message
        )
    assert tree(tmp_path) == before


def test_what_an_archive_holds_is_checked_as_well(tmp_path, monkeypatch):
    write_packed(tmp_path, monkeypatch)
    file = PACKED["mnist"]
    for content in (gzip.compress(b"x"), gzip.compress(bytes(2**24)), gzip.compress(bytes(3936))):
        (tmp_path / file).write_bytes(content)
        publish(monkeypatch, file, content)
        with pytest.raises(ValueError, match=r"the content of .*images-idx3-ubyte\.gz is not the"):
            load_data("mnist", root=tmp_path)


def test_chardata_has_no_checksum_but_limits(tmp_path, monkeypatch):
    WRITERS["omniglot"](tmp_path, monkeypatch)
    assert ORIGINALS["chardata.mat"].sha256 is None
    monkeypatch.setitem(ORIGINALS, "chardata.mat", Original(1000, None))
    with pytest.raises(ValueError, match=r"chardata\.mat is not .* expected 1 to 1,000 bytes"):
        load_data("omniglot", root=tmp_path)


def test_the_table_covers_every_published_file():
    for name, source in readers.SOURCES.items():
        for names in source.files:
            assert names[-1] in ORIGINALS, name
            assert ORIGINALS[names[-1]].url.startswith("http")
            known = [file for file in names if file != "celeba/img_align_celeba"]
            assert all(file in ORIGINALS for file in known)
    digests = [original.sha256 for original in ORIGINALS.values() if original.sha256]
    assert len(set(digests)) == len(digests) == len(ORIGINALS) - 1
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


# Paths, links, bombs, although the checksum be right


def add_tar_link(kind, name="cifar-10-batches-py/data_batch_2"):
    def change(archive):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)

    return change


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_in_place_of_a_batch_is_refused(kind, tmp_path, monkeypatch):
    write_cifar_archive(tmp_path, monkeypatch, add_tar_link(kind))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"data_batch_2 in .* is not a regular file"):
        load_data("cifar10", root=tmp_path)
    assert tree(tmp_path) == before


def test_other_members_of_a_tar_are_never_written(tmp_path, monkeypatch):
    def change(archive):
        for name in ("../escaped", "/tmp/escaped-cifar"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        add_tar_link(tarfile.SYMTYPE, "cifar-10-batches-py")(archive)

    root = tmp_path / "root"
    root.mkdir()
    expected = write_cifar_archive(root, monkeypatch, change)
    before = tree(tmp_path)
    equal(load_data("cifar10", root=root), *expected)
    assert tree(tmp_path) == before
    assert not Path("/tmp/escaped-cifar").exists()


def zip_link(archive):
    info = zipfile.ZipInfo("img_align_celeba/000009.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def zip_bomb(archive):
    archive.writestr("a.jpg", bytes(2**26), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda archive: archive.writestr("../a.jpg", b""), "'../a.jpg' points outside"),
        (lambda archive: archive.writestr("a/../../b", b""), "'a/../../b' points outside"),
        (lambda archive: archive.writestr("/a.jpg", b""), "'/a.jpg' points outside"),
        (lambda archive: archive.writestr("C:a.jpg", b""), "'C:a.jpg' points outside"),
        (lambda archive: archive.writestr("..\\a.jpg", b""), "points outside"),
        (zip_link, "'img_align_celeba/000009.jpg' is a link"),
        (zip_bomb, r"unpack to 67,\d+,\d+ bytes, more than 10,000,000"),
    ],
)
def test_a_malicious_zip_is_refused(change, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CELEBA_LIMIT", 10_000_000)
    write_celeba_archive(tmp_path, monkeypatch, change)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_data("celeba", root=tmp_path)
    assert tree(tmp_path) == before


def test_a_face_that_is_none_is_refused(tmp_path, monkeypatch):
    write_celeba_archive(tmp_path, monkeypatch)
    monkeypatch.setattr(readers, "_FACE_LIMIT", 100)
    with pytest.raises(ValueError, match=r"000000\.jpg announces .* more than a face has"):
        load_data("celeba", root=tmp_path)
    (tmp_path / "b").mkdir()
    WRITERS["celeba"](tmp_path / "b", monkeypatch)
    with pytest.raises(ValueError, match=r"000000\.jpg has more than 100 bytes"):
        load_data("celeba", root=tmp_path / "b")


def test_a_partition_names_pictures_only(tmp_path, monkeypatch):
    WRITERS["celeba"](tmp_path, monkeypatch)
    file = "celeba/list_eval_partition.txt"
    content = b"../../../etc/passwd 0 \n"
    (tmp_path / file).write_bytes(content)
    publish(monkeypatch, file, content)
    with pytest.raises(ValueError, match=r"a line that is not like '000001\.jpg 0'"):
        load_data("celeba", root=tmp_path)


@pytest.fixture
def little_memory():
    """At most 16 MiB are allocated by what a test does in it."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


def npz_of(header, content=b"", compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("train.npy", array)
        archive.writestr("test.npy", array)
    return buffer.getvalue()


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 28, 28)}"
BLANK = "{'descr': '|u1', 'fortran_order': False, 'shape': (41943040, 1, 1)}"


def test_an_npz_that_announces_more_than_it_holds_is_refused(tmp_path, little_memory):
    file = tmp_path / "a.npz"
    file.write_bytes(npz_of(HUGE, bytes(100)))
    with pytest.raises(ValueError, match=r"announces shape \(1099511627776, 28, 28\) of uint8"):
        load_data(file)


def test_a_bomb_in_an_npz_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    file.write_bytes(npz_of(BLANK, bytes(41943040)))
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"arrays unpack to 83,886,\d+ bytes, more than 67,108,864"
    ):
        load_data(file)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_bomb_that_announces_little_is_cut_off(tmp_path):
    content = npz_of(BLANK.replace("41943040", "4"), bytes(41943040))
    size = struct.pack("<I", 41943040 + 10 + len(BLANK.replace("41943040", "4")))
    assert content.count(size) == 4  # before and in the directory, for both arrays
    content = content.replace(size, struct.pack("<I", len(BLANK) - 7 + 10 + 4))
    (tmp_path / "a.npz").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="Bad CRC-32"):
        load_data(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_blank_images_are_no_bomb(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz", train=np.zeros((9999, 28, 28), np.uint8), test=pixels(1, 28, 28)
    )
    assert load_data(tmp_path / "a.npz").num_train == 9999


def test_an_npz_that_asks_for_a_dictionary_of_gigabytes_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    content = bytearray(npz_of(BLANK, b"", zipfile.ZIP_LZMA))
    start = 30 + len("train.npy") + 4  # after the local header, version and size of the properties
    assert content[start : start + 1] == b"\x5d"
    content[start + 1 : start + 5] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"'train.npy' needs 4,294,967,295 bytes to be unpacked"):
        load_data(file)


def test_an_encrypted_npz_is_refused(tmp_path):
    content = bytearray(npz_of(BLANK))
    directory = content.index(b"PK\x01\x02")
    content[6] |= 1
    content[directory + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"'train.npy' is encrypted"):
        load_data(tmp_path / "a.npz")


def test_an_idx_that_announces_more_than_it_holds_is_refused(little_memory):
    with pytest.raises(ValueError, match=r"announces shape \(4294967295, 4294967295, 255\)"):
        read_idx(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 255) + bytes(99), 3)
    with pytest.raises(ValueError, match="begins with"):
        read_idx(b"<html>", 3)
    with pytest.raises(ValueError, match="in the header"):
        read_idx(struct.pack(">BBBBI", 0, 0, 8, 3, 1), 3)


def mat_bytes(packed=False, **arrays):
    buffer = io.BytesIO()
    savemat(buffer, arrays, do_compression=packed)
    return buffer.getvalue()


def pack(content, announced=None):
    """An uncompressed .mat file with its first array packed, that announces another size."""
    body = content[128:]
    if announced is not None:
        body = body[:4] + struct.pack("<I", announced) + body[8:]
    squeezed = zlib.compress(body)
    return content[:128] + struct.pack("<II", 15, len(squeezed)) + squeezed


def test_a_mat_that_announces_more_than_it_holds_is_refused(little_memory):
    content = mat_bytes(x=np.zeros((3, 2)))
    assert read_mat(pack(content), ("x",))["x"].shape == (3, 2)
    for size, reason in (
        (2**32 - 1, "unpack to more than"),
        (2**28, "holds another"),
        (8, "holds"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_mat(pack(content, size), ("x",))
    shape = content.index(struct.pack("<ii", 3, 2))
    for n in (2**31 - 1, -3, 4):
        wrong = content[:shape] + struct.pack("<i", n) + content[shape + 4 :]
        with pytest.raises(ValueError, match=f"announces shape \\({n}, 2\\)"):
            read_mat(wrong, ("x",))
    with pytest.raises(ValueError, match="more than there are"):
        read_mat(content[:128] + struct.pack("<II", 14, 2**32 - 1) + bytes(8), ("x",))
    with pytest.raises(ValueError, match="no array 'y'"):
        read_mat(content, ("y",))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_mat_files_are_read_as_scipy_reads_them(kind, packed):
    rng = np.random.default_rng(0)
    for shape in ((3, 2), (1, 1), (2, 3, 4, 5), (0, 3), (1, 4)):
        array = (100 * rng.random(shape)).astype(kind)
        content = mat_bytes(packed, other="text", ab=array, c={"field": 1}, d=np.eye(2))
        expected = loadmat(io.BytesIO(content))
        found = read_mat(content, ("ab", "d"))
        for name in ("ab", "d"):
            assert found[name].dtype == expected[name].dtype
            assert np.array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    "value", ["text", np.array([1j]), {"field": 1}, np.array([[1, "a"]], object)]
)
def test_a_mat_with_other_arrays_is_refused(value):
    with pytest.raises(ValueError, match="'x' is not a real numeric array"):
        read_mat(mat_bytes(x=value), ("x",))


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_batches_are_found_without_unpickling(protocol):
    rows, labels = pixels(1003, 3072), [int(n) for n in pixels(1003) % 10]
    for batch in (
        {"data": rows, "labels": labels},
        {"labels": labels, "x": ["a"] * 9, "data": rows},
    ):
        images, found = read_cifar(pickle.dumps(batch, protocol))
        assert np.array_equal(images.reshape(1003, -1), rows)
        assert found.tolist() == labels


def test_cifar_batches_of_python_2_are_read():
    images, labels = read_cifar(fuzz_readers.cifar(3))
    assert np.array_equal(images, fuzz_readers.pixels(3, 3072).reshape(3, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2]


# The network


@pytest.fixture
def no_sockets(monkeypatch):
    monkeypatch.setattr("socket.socket", never)
    monkeypatch.setattr("socket.create_connection", never)
    monkeypatch.setattr("socket.getaddrinfo", never)


@pytest.mark.parametrize("name", available_data())
def test_offline_no_socket_is_opened(name, no_sockets, tmp_path, monkeypatch):
    if name == "mnist5k":
        assert load_data(name).num_train == 4000
        return
    with pytest.raises(FileNotFoundError, match="download=True"):
        load_data(name, root=tmp_path)
    expected = WRITERS[name](tmp_path, monkeypatch)
    equal(load_data(name, root=tmp_path), *expected)
    file = next(iter(sorted(path for path in tmp_path.rglob("*") if path.is_file())))
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=name):
        load_data(name, root=tmp_path)


def server(tmp_path, monkeypatch, content, size=None):
    """A published file of five bytes, and what its server sends."""
    (tmp_path / "sent").write_bytes(content)
    publish(monkeypatch, "a/b.mat", b"right")
    url = (tmp_path / "sent").as_uri()
    monkeypatch.setitem(ORIGINALS, "a/b.mat", ORIGINALS["a/b.mat"]._replace(url=url))


def test_a_download_is_verified_before_it_appears(tmp_path, monkeypatch):
    server(tmp_path, monkeypatch, b"right")
    fetch(tmp_path / "root", "a/b.mat")
    assert tree(tmp_path / "root") == {"a": False, "a/b.mat": b"right"}


@pytest.mark.parametrize("content", [b"", b"wrong", b"<html>Not found</html>", bytes(10_000_000)])
def test_another_download_is_refused_and_removed(content, tmp_path, monkeypatch):
    server(tmp_path, monkeypatch, content)
    with pytest.raises(ValueError, match=r"sent is not the published file: "):
        fetch(tmp_path / "root", "a/b.mat")
    assert tree(tmp_path / "root") == {"a": False}


def test_google_drive_needs_gdown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gdown"):
        load_data("celeba", root=tmp_path, download=True)


@pytest.mark.parametrize("content", [b"right", b"<html>Quota exceeded</html>"])
def test_what_gdown_brings_is_verified(content, tmp_path, monkeypatch):
    asked = []

    def download(url, output, quiet):
        asked.append(url)
        Path(output).write_bytes(content)

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    publish(monkeypatch, "a.zip", b"right")
    url = f"{integrity._DRIVE}ID"
    monkeypatch.setitem(ORIGINALS, "a.zip", ORIGINALS["a.zip"]._replace(url=url))
    if content == b"right":
        fetch(tmp_path, "a.zip")
        assert tree(tmp_path) == {"a.zip": b"right"}
    else:
        with pytest.raises(ValueError, match="it is a web page"):
            fetch(tmp_path, "a.zip")
        assert tree(tmp_path) == {}
    assert asked == [url]


def test_a_wrong_file_is_not_replaced_by_a_download(no_sockets, tmp_path, monkeypatch):
    WRITERS["svhn"](tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").write_bytes(b"mine")
    with pytest.raises(ValueError, match="Delete what is damaged"):
        load_data("svhn", root=tmp_path, download=True)
    assert (tmp_path / "test_32x32.mat").read_bytes() == b"mine"


# Mutations


def test_mutated_files_are_refused_or_read(tmp_path, capsys):
    options = fuzz_readers.Options(inputs=2600, seed=1, out=tmp_path / "out")
    assert fuzz_readers.main(options) == 0, capsys.readouterr().out
    assert list(options.out.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[1:-1]]
    for name, inputs, refused, accepted, other, _ in rows:
        assert (int(inputs), int(other)) == (200, 0), name
        assert int(refused) > 40, name
        assert int(accepted) > 0, name
    assert ORIGINALS["train_32x32.mat"].size == 182_040_794  # the table is what it was


def test_the_fuzzer_sees_what_is_wrong():
    def raising(error, cause=None):
        def read(content):
            raise error from cause

        return fuzz_readers.outcome(fuzz_readers.Reader([], read), b"", seconds=1)

    assert raising(ValueError("it is damaged")) == "refused"
    assert raising(ValueError(), zlib.error()) == "refused"
    assert raising(ValueError(), MemoryError()) == "MemoryError()"
    assert raising(IndexError()) == "IndexError()"
    assert raising(zlib.error()) == "error()"  # must be turned into the documented error
    accepting = fuzz_readers.Reader([], lambda content: None)
    assert fuzz_readers.outcome(accepting, b"", seconds=1) == "accepted"
    assert fuzz_readers.outcome(accepting, b"", seconds=0).startswith("took")
