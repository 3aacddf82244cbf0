r"""The formats of image files, parsed from bytes within limits and without running any of them.

What a header announces is compared with what is there before memory is allocated for it. A file
that is something else is a ValueError, or the decompressor's own error where a packed file is
damaged; :func:`pyro_gpvae.data.images.load_data` turns both into a ValueError that names the file.
"""

from __future__ import annotations

import math
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "check_zip",
    "open_member",
    "read_cifar",
    "read_idx",
    "read_mat",
    "read_member",
    "read_npy",
]

Array = npt.NDArray[Any]


def read_idx(content: bytes, ndim: int) -> Array:
    """Returns the uint8 array of an IDX file, the format of MNIST, with ``ndim`` axes."""
    start = struct.pack(">BBBB", 0, 0, 8, ndim)  # 8 is uint8
    if content[:4] != start:
        raise ValueError(f"it begins with {content[:4]!r} instead of {start!r}")
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(f"it ends after {len(content)} bytes, in the header")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if math.prod(shape) != len(content) - header:
        raise ValueError(f"it announces shape {shape} and holds {len(content) - header:,} bytes")
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)


def read_cifar(content: bytes) -> tuple[Array, Array]:
    r"""Returns images (N, 3, 32, 32) and labels (N,) of a batch of CIFAR-10 for Python.

    A batch is a pickle, that is, a program that the module ``pickle`` would run. Here its
    instructions are only listed: the images are its one string of at least 3072 bytes, the labels
    the integers after the word ``labels``, up to the next string.
    """
    strings = ("STRING", "UNICODE", "BYTES", "BYTEARRAY")
    pixels: list[bytes] = []
    labels: list[int] = []
    inside = False
    value: Any
    for opcode, value, _ in pickletools.genops(content):
        if any(kind in opcode.name for kind in strings):
            inside = value in ("labels", b"labels")
            if len(value) >= 3072:
                # pickletools gives the strings of Python 2 as text of one character per byte
                pixels.append(value.encode("latin-1") if isinstance(value, str) else value)
        elif inside and opcode.name in ("BININT", "BININT1", "BININT2"):
            labels.append(value)
    if len(pixels) != 1 or len(pixels[0]) != 3072 * len(labels):
        raise ValueError(
            f"expected one string of 3072 bytes for each of its {len(labels)} labels, found "
            f"strings of {[len(p) for p in pixels[:3]]} bytes"
        )
    if not all(0 <= label <= 9 for label in labels):
        raise ValueError("its labels are not all 0 to 9")
    images = np.frombuffer(bytearray(pixels[0]), np.uint8).reshape(-1, 3, 32, 32)
    return images, np.array(labels, np.int64)


# MATLAB 5.0 MAT-file format, tables 1-1 and 1-3: types of stored numbers, classes of arrays
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_MATRIX, _COMPRESSED = 14, 15
_MAT_LIMIT = 512 * 2**20  # twice what the largest published file unpacks to


def read_mat(content: bytes, names: tuple[str, ...]) -> dict[str, Array]:
    """Returns the named real, full, numeric arrays of a MATLAB 5 file, packed or not.

    SciPy's reader is not used, because a damaged file can crash the interpreter in it, and not
    every ``.mat`` file has a published checksum to rule that out.

    References:
        MathWorks. MAT-File Format, Level 5.
        https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
    """
    if len(content) < 128 or content[124:128] != b"\0\1IM":
        raise ValueError("it is not a little-endian MATLAB 5 file")
    found: dict[str, Array] = {}
    position, budget = 128, _MAT_LIMIT
    while position < len(content):
        kind, start, end = _element(content, position)
        if kind == _COMPRESSED:
            body = _unpack(memoryview(content)[start:end], budget)
            budget -= len(body)
            position = end  # packed elements follow each other without padding
        else:
            body = content[position:end]
            position = -(-end // 8) * 8
        kind, start, end = _element(body, 0)
        if kind != _MATRIX:
            raise ValueError(f"it holds an element of type {kind}, expected arrays")
        name, array = _matrix(body[start:end], names)
        if array is not None:
            found[name] = array
    for name in names:
        if name not in found:
            raise ValueError(f"it has no array {name!r}")
    return found


def _unpack(packed: memoryview, budget: int) -> bytes:
    unpacker = zlib.decompressobj()
    tag = unpacker.decompress(packed, 8)
    if len(tag) < 8:
        raise ValueError("a packed array is truncated")
    size = int.from_bytes(tag[4:], "little")
    if size > budget:
        raise ValueError(f"its arrays unpack to more than {_MAT_LIMIT:,} bytes")
    body = unpacker.decompress(unpacker.unconsumed_tail, size) if size else b""
    more = unpacker.decompress(unpacker.unconsumed_tail, 1)  # or the checksum is not compared
    if len(body) != size or more or not unpacker.eof:
        raise ValueError(f"a packed array announces {size:,} bytes and holds another number")
    return tag + body


def _element(content: bytes, position: int) -> tuple[int, int, int]:
    """The type of a data element, and where its data begin and end."""
    if len(content) < position + 8:
        raise ValueError("it is truncated")
    kind, size = struct.unpack_from("<II", content, position)
    start = position + 8
    if kind >> 16:  # at most 4 bytes, beside their size in the tag itself
        kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
    if start + size > len(content) or (start == position + 4 and size > 4):
        raise ValueError(f"an element announces {size:,} bytes, more than there are")
    return kind, start, start + size


def _matrix(body: bytes, names: tuple[str, ...]) -> tuple[str, Array | None]:
    parts: list[tuple[int, bytes]] = []
    position = 0
    while position < len(body) and len(parts) < 4:
        kind, start, end = _element(body, position)
        parts.append((kind, body[start:end]))
        position = position + 8 if start == position + 4 else -(-end // 8) * 8
    if len(parts) < 3 or len(parts[0][1]) != 8 or len(parts[1][1]) % 4:
        raise ValueError("an array has no flags, shape and name")
    flags, shape = parts[0][1], tuple(int(n) for n in np.frombuffer(parts[1][1], "<i4"))
    name = parts[2][1].decode("ascii", "replace")
    if name not in names:
        return name, None
    if flags[0] not in _CLASSES or flags[1] & 0x08 or len(parts) < 4 or parts[3][0] not in _STORED:
        raise ValueError(f"{name!r} is not a real numeric array")
    stored = np.dtype(f"<{_STORED[parts[3][0]]}")
    numbers = parts[3][1]
    if min(shape, default=-1) < 0 or math.prod(shape) * stored.itemsize != len(numbers):
        raise ValueError(f"{name!r} announces shape {shape} and holds {len(numbers):,} bytes")
    array = np.frombuffer(numbers, stored).astype(_CLASSES[flags[0]])
    return name, array.reshape(shape, order="F")


def check_zip(archive: zipfile.ZipFile, limit: int) -> None:
    """Refuses a zip file that could write outside a folder, or unpacks to more than ``limit``."""
    total = 0
    for member in archive.infolist():
        name = member.filename
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or name[1:2] == ":":
            raise ValueError(f"its member {name!r} points outside the archive's folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"its member {name!r} is a link or a device")
        total += member.file_size
    if total > limit:
        raise ValueError(f"its members unpack to {total:,} bytes, more than {limit:,}")


_LZMA_LIMIT = 64 * 2**20  # what the strongest preset needs


def open_member(archive: zipfile.ZipFile, name: str) -> tuple[zipfile.ZipInfo, IO[bytes]]:
    """Opens a member of a zip file, unless it is absent, encrypted, or needs much memory."""
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"it has no member {name!r}") from None
    if member.flag_bits & 1:
        raise ValueError(f"its member {name!r} is encrypted")
    if member.compress_type == zipfile.ZIP_LZMA and archive.fp is not None:
        # liblzma allocates the dictionary that the member's header announces, up to 4 GiB
        archive.fp.seek(member.header_offset + 26)
        archive.fp.seek(sum(struct.unpack("<HH", archive.fp.read(4))), 1)
        size = int.from_bytes(archive.fp.read(9)[5:], "little")
        if size > _LZMA_LIMIT:
            raise ValueError(f"its member {name!r} needs {size:,} bytes to be unpacked")
    return member, archive.open(member)


def read_member(member: zipfile.ZipInfo, stream: IO[bytes]) -> bytearray:
    """Returns what is left of an open member, never more than its entry announces."""
    left = member.file_size - stream.tell()
    content = bytearray()
    # zipfile bounds what deflate gives by the request, but not what lzma and bzip2 do: they get
    # 4 KiB of packed bytes at a time
    deflated = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    step = 1 << 20 if deflated else 4096
    while left > 0 and (piece := stream.read(min(left, step))):
        content += piece
        left -= len(piece)
    if left:
        raise ValueError(f"{member.filename} is {left:,} bytes shorter than announced")
    return content


def read_npy(archive: zipfile.ZipFile, name: str) -> Array:
    """Returns an array of an ``.npz`` file, without any pickle."""
    member, stream = open_member(archive, f"{name}.npy")
    with stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"{name} has .npy version {version}, expected (1, 0) or (2, 0)")
        shape, columns_first, dtype = header
        if dtype.hasobject:
            raise ValueError("it holds pickled objects, which are never loaded")
        size = member.file_size - stream.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{name} announces shape {shape} of {dtype} and holds {size:,} bytes")
        content = read_member(member, stream)
    if not content:  # numpy has no array of a buffer without bytes
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if columns_first else "C")
