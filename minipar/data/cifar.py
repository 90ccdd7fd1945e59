"""Read the python version of CIFAR-10: a folder of pickles, opened without trusting them.

A pickle may call any function it names. `_ArraysOnly` knows only the few names that NumPy
writes arrays with, and answers each with a small decoder from this file; everything else is refused.
(Data: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.)
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from minipar.data.dataset import Array
from minipar.errors import DataError, UsageError

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
CLASSES = 10
SHAPE = (3, 32, 32)  # one row of a batch: 1024 red bytes, then green, then blue


class _Dtype:
    """Stands for `numpy.dtype` inside a pickle: integers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        name = code.decode("ascii") if isinstance(code, bytes) else code
        self.dtype: np.dtype[Any] = np.dtype(str(name))
        if self.dtype.kind not in "iu":
            raise pickle.UnpicklingError(f"an array of {self.dtype}, where integers belong")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Array:
    """Stands for `numpy.ndarray` inside a pickle; its state is (version, shape, dtype, is Fortran, bytes)."""

    array: Array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _frombuffer(content, dtype, shape, "F" if fortran else "C").array


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
    made = _Array()
    made.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)
    return made


def _scalar(dtype: _Dtype, content: bytes) -> int:
    return int(np.frombuffer(content, dtype.dtype)[0])


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how Python 3 writes bytes into an old pickle protocol
        raise pickle.UnpicklingError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # an old protocol writes b"" as a call of `bytes` without arguments


class _ArraysOnly(pickle.Unpickler):
    known: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("multiarray", "_reconstruct"): _reconstruct,
        ("multiarray", "scalar"): _scalar,
        ("numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _no_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 1 calls it numpy.core, NumPy 2 numpy._core.
        short = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        try:
            return self.known[short, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused: "
                                         "only integer arrays and plain values are read") from None


def read_batch(path: Path) -> tuple[Array, Array]:
    """One batch file: images uint8 (N, 3, 32, 32) and labels int64 (N,). DataError names the file."""
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    try:
        batch = _ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly any type
        raise DataError(f"{path} is not a readable CIFAR-10 batch (truncated or not of this format): "
                        f"{error or type(error).__name__}") from error
    if file.read(1):
        raise DataError(f"{path} goes on after its pickle ended at byte {file.tell() - 1}")
    data, labels = (_entry(path, batch, key) for key in ("data", "labels"))
    if not isinstance(data, _Array):
        raise DataError(f"{path}: 'data' is a {type(data).__name__}, expected an array")
    pixels = data.array
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataError(f"{path}: 'data' is {pixels.dtype} of shape {pixels.shape}, "
                        "expected uint8 of (N, 3072)")
    try:
        classes = np.array(labels.array if isinstance(labels, _Array) else labels)
    except ValueError as error:
        raise DataError(f"{path}: 'labels' is not a list of integers") from error
    if classes.ndim != 1 or (classes.size and classes.dtype.kind not in "iu"):
        raise DataError(f"{path}: 'labels' is not a list of integers")
    if len(classes) != len(pixels):
        raise DataError(f"{path} has {len(pixels)} images but {len(classes)} labels")
    return pixels.reshape(-1, *SHAPE), classes.astype(np.int64)


def _entry(path: Path, batch: Any, key: str) -> Any:
    if not isinstance(batch, dict):
        raise DataError(f"{path} holds a {type(batch).__name__}, "
                        "expected a dictionary with 'data' and 'labels'")
    for form in (key.encode(), key):  # written by Python 2, or by Python 3
        if form in batch:
            return batch[form]
    raise DataError(f"{path} has no {key!r}: not a batch of CIFAR-10 (CIFAR-100 is not supported)")


def find_cifar(folder: Path) -> tuple[list[Path], Path] | None:
    """The training and test batches in `folder`, None if it has none, DataError if some are missing."""
    paths = [folder / name for name in (*TRAIN, TEST)]
    missing = [path.name for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} of CIFAR-10's data_batch_1 to 5 and test_batch")
    return paths[:-1], paths[-1]
