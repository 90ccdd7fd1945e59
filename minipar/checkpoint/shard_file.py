"""One safetensors file: written with its sum, and checked; `read` reads it box by box.

A safetensors file is the length of its header (8 bytes), the header (JSON: name, dtype, shape and place of
every tensor, padded with spaces to whole 8 bytes), and the tensors' bytes end to end. It is written here, and
not by the library, so that the sum is that of the bytes meant and a full disk is an OSError. The library
reads it: it refuses wrong headers, but loads a flipped data bit without a word, hence the sums.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minipar.backend import Array
from minipar.errors import DataError, UsageError

# The format's names of the dtypes that it shares with NumPy.
DTYPES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
CHUNK = 1 << 20  # bytes hashed at a time


def header(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], about: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a safetensors file, and at which byte of the file each tensor begins.

    Args:
        tensors: shape and dtype's name of each, in the order in which they lie in the file.
        about: the file's metadata; none if it is empty.

    Raises:
        UsageError: an array of a dtype that the format, or NumPy's reader of it, does not know; names the array.
    """
    entries: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    starts, at = {}, 0
    for key, (shape, dtype) in tensors.items():
        if dtype not in DTYPES:
            raise UsageError(f"{key} is {dtype}, which cannot be stored; what can: {', '.join(DTYPES)}")
        starts[key], end = at, at + math.prod(shape) * np.dtype(dtype).itemsize
        entries[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return begin, {key: len(begin) + start for key, start in starts.items()}


def data_of(array: Array) -> memoryview:
    """Return an array's bytes in C order, little-endian as the format is."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def mapped(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file as read-only arrays that are read when they are used."""
    names = {code: name for name, code in DTYPES.items()}
    whole = np.asarray(np.memmap(path, np.uint8, "r"))
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    entries = json.loads(whole[8:begin].tobytes())
    found = {}
    for key, entry in entries.items():
        if key != "__metadata__":
            start, stop = entry["data_offsets"]
            values = whole[begin + start : begin + stop].view(names[entry["dtype"]])
            found[key] = values.reshape(entry["shape"])
    return found


def write_shard(path: Path, tensors: Mapping[str, Array], about: Mapping[str, str]) -> dict[str, Any]:
    """Write host arrays as a safetensors file down to the disk; return {"bytes": …, "sha256": …}.

    Args:
        about: the file's metadata; none if it is empty.

    Raises:
        UsageError: an array of a dtype that cannot be stored, see `header`.
        OSError: the file cannot be written.
    """
    begin, _ = header({key: (array.shape, array.dtype.name) for key, array in tensors.items()}, about)
    digest, size = hashlib.sha256(), 0
    pieces: Iterator[bytes | memoryview] = itertools.chain([begin], map(data_of, tensors.values()))
    with path.open("xb") as file:
        for piece in pieces:
            size += file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        DataError: it is missing, has another size, or other contents.
    """
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            what = "truncated" if size < facts["bytes"] else "too long"
            raise DataError(f"{path} is {what}: {size:,} bytes, the manifest says {facts['bytes']:,}")
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        raise DataError(f"{path} is missing, the manifest lists it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if digest.hexdigest() != facts["sha256"]:
        raise DataError(f"{path} is damaged or of another run: it does not have the sha256 that the manifest says")
