"""Read IDX, the format of MNIST: a four-byte magic, the sizes, then the elements, all big-endian.

    offset  bytes  what
    0       2      zero
    2       1      element type: 0x08 uint8, 0x09 int8, 0x0B int16, 0x0C int32, 0x0D float32, 0x0E float64
    3       1      number of dimensions, d
    4       4·d    the sizes, outermost first
    4+4·d   ...    the elements, in C order

(Format: Y. LeCun, C. Cortes, "The MNIST database of handwritten digits".) `read_idx` reads one file,
plain or gzipped; `find_idx` finds the four files of a data set.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from minipar.data.dataset import Array
from minipar.errors import DataError, UsageError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LAYOUT = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte " \
         "(each may end in .gz)"


def read_idx(path: Path, dimensions: int) -> Array:
    """The array in the IDX file `path`, of `dimensions` dimensions, in this machine's byte order.

    DataError names the file and says what is wrong: magic, sizes, or bytes expected and found.
    """
    content, damage = _read(path)
    header = 4 + 4 * dimensions
    if len(content) >= 4:
        zero, code, found_dimensions = struct.unpack(">HBB", content[:4])
        if zero != 0 or code not in TYPES or found_dimensions != dimensions:
            raise DataError(f"{path} has magic 0x{content[:4].hex()}, expected 0x0000080{dimensions} (IDX, "
                            f"{dimensions}-dimensional, of bytes) or another element type in its place of 08")
    if len(content) < header:
        raise DataError(f"{path} is truncated in its header: expected {header} bytes, found {len(content)}"
                        + damage)
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    dtype: np.dtype[Any] = np.dtype(TYPES[content[2]])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) < expected:
        raise DataError(f"{path} is truncated: sizes {shape} of {dtype.name} take {expected} bytes, found "
                        f"{len(content)}{damage}")
    if len(content) > expected:
        raise DataError(f"{path} is too long: sizes {shape} of {dtype.name} take {expected} bytes, found "
                        f"{len(content)}{damage}")
    if damage:
        raise DataError(f"{path} is damaged{damage}")
    elements = np.frombuffer(content, dtype, offset=header).reshape(shape)
    return elements.astype(dtype.newbyteorder("="), copy=False)


def _read(path: Path) -> tuple[bytes, str]:
    """The (unpacked) bytes of `path`, as far as they go, and what stopped them, empty if nothing did."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes(), ""
        content = bytearray()
        with gzip.open(path) as file:
            try:
                # read1 hands over what is unpacked so far; read would lose it when the stream breaks off.
                while piece := file.read1(1 << 20):
                    content += piece
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                return bytes(content), f" (the gzip stream is broken: {error})"
        return bytes(content), ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def find_idx(source: Path) -> tuple[Path, Path, Path, Path] | None:
    """The files of the IDX data set at `source`: train images, train labels, test images, test labels.

    `source` is a folder, the path of the train-images file, or a prefix that the four names begin with
    (`emnist/balanced-`). None if there are no train images there; DataError if another file is missing.
    """
    if source.is_dir():
        folder, prefix = source, ""
    else:
        folder, prefix = source.parent, source.name.partition("train-images")[0]
    train_images = _find(folder, prefix, ("train",), "images", 3)
    if train_images is None:
        return None
    others = {
        "train-labels-idx1-ubyte": _find(folder, prefix, ("train",), "labels", 1),
        "t10k-images-idx3-ubyte": _find(folder, prefix, ("t10k", "test"), "images", 3),
        "t10k-labels-idx1-ubyte": _find(folder, prefix, ("t10k", "test"), "labels", 1),
    }
    missing = [prefix + name for name, path in others.items() if path is None]
    if missing:
        raise DataError(f"{folder} has {train_images.name} but not {', '.join(missing)}: a data set is "
                        f"four files, {LAYOUT}")
    train_labels, test_images, test_labels = (path for path in others.values() if path is not None)
    return train_images, train_labels, test_images, test_labels


def _find(folder: Path, prefix: str, splits: tuple[str, ...], what: str, dimensions: int) -> Path | None:
    for split in splits:
        for mark in "-.":  # some mirrors write train-images.idx3-ubyte
            for ending in ("", ".gz"):
                path = folder / f"{prefix}{split}-{what}{mark}idx{dimensions}-ubyte{ending}"
                if path.is_file():
                    return path
    return None
