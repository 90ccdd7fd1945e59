"""How arrays travel through MPI: as they are, as bytes, or by way of the host's memory.

A GPU array is handed to MPI only if the library says that it can read GPU memory; otherwise it is staged
through pinned host buffers. Either way its stream is synchronised first, since MPI would otherwise read
whatever the memory held before. Copies of dtypes that MPI does not know (bfloat16) go as bytes; a reduction
of them is refused.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from minipar.backend import Array, array_module, is_gpu_array, synchronize
from minipar.errors import UsageError

NATIVE = frozenset("?bBhHiIlLqQefdgFDG")  # dtypes that MPI knows, as NumPy's characters
HEADER_BYTES = 192  # of the message that announces an array


class Staged(NamedTuple):
    """Arrays that MPI may use, and where the result goes afterwards."""

    x: Array
    out: Array | None
    target: Any  # the GPU array that `out` is copied to, or None


@functools.cache
def cuda_aware() -> bool:
    """Return whether MPI reads GPU memory: what MINIPAR_CUDA_AWARE says (0 or 1), else what MPI says."""
    said = os.environ.get("MINIPAR_CUDA_AWARE")
    if said in ("0", "1"):
        return said == "1"
    if said is not None:
        raise UsageError(f"MINIPAR_CUDA_AWARE={said!r} must be 0 or 1")
    kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds")  # MPI 4.1
    return kinds is not None and any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))


def stage(x: Array, out: Array | None = None, op: str | None = None) -> Staged:
    """Return `x` and `out` as arrays that MPI can read and write; `out` may be `x`. `op`: how they are reduced."""
    if not is_gpu_array(x):
        return Staged(x, out, None)
    synchronize(x)
    if cuda_aware() and not reduced_by_python(op, x.dtype):
        return Staged(x, out, None)
    host = pinned(x.shape, x.dtype)
    x.get(out=host)  # type: ignore[attr-defined]
    if out is None or out is x:
        return Staged(host, None if out is None else host, out)
    return Staged(host, pinned(out.shape, out.dtype), out)


def unstage(staged: Staged) -> None:
    """Copy the result to the GPU array that it is meant for, if there is one."""
    if staged.target is not None:
        staged.target.set(staged.out)
        synchronize(staged.target)  # the host buffer may be reused from here on


def joined(parts: Sequence[Array]) -> Array:
    """Return staged arrays one after the other, as MPI may read them."""
    flat = array_module(parts[0]).concatenate([part.reshape(-1) for part in parts])
    synchronize(flat)
    return flat  # type: ignore[no-any-return]


def receive_buffer(out: Array | None, shape: tuple[int, ...], dtype: Any, gpu: bool) -> Array:
    """Return the array that MPI writes a message into: where it belongs, or else memory of the host.

    Args:
        out: where it belongs; None for a new array, on a GPU if `gpu`.
    """
    if not (gpu if out is None else is_gpu_array(out)):
        return np.empty(shape, dtype) if out is None else out
    if not cuda_aware():
        return pinned(shape, np.dtype(dtype))
    target = sys.modules["cupy"].empty(shape, dtype) if out is None else out
    synchronize(target)  # work that is still queued may use this memory, also as what it was before
    return target


def may_lie_on_a_gpu() -> bool:
    """Return whether a message to this process may be meant for a GPU, as only its header tells."""
    return "cupy" in sys.modules


def pinned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an uninitialised NumPy array in page-locked memory, which the GPU copies to at full speed."""
    cupy = sys.modules["cupy"]
    n = math.prod(shape)
    memory = cupy.cuda.alloc_pinned_memory(max(n * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype, n).reshape(shape)


def on_device(host: Array, gpu: bool) -> Array:
    """Return `host`, as a GPU array if so asked."""
    if not gpu:
        return host
    import cupy

    return cupy.asarray(host)  # type: ignore[no-any-return]


def as_buffer(x: Array) -> Array:
    """Return `x` if MPI knows its dtype, else its bytes."""
    return x if x.dtype.char in NATIVE else x.reshape(-1).view(np.uint8)


def elements(x: Array, rows: Sequence[int]) -> list[int]:
    """Return how many elements of the buffer `as_buffer(x)` so many rows of `x` are."""
    width = math.prod(x.shape[1:]) * (1 if x.dtype.char in NATIVE else x.itemsize)
    return [n * width for n in rows]


def cut(flat: Array, shapes: Sequence[tuple[int, ...]], gpu: bool) -> list[Array]:
    """Cut a receive buffer, which is used for nothing else, into arrays of these shapes."""
    parts, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        parts.append(on_device(flat[start:stop].reshape(shape), gpu))
        start = stop
    return parts


# Reductions -------------------------------------------------------------------------------------------


@functools.cache
def reduction(op: str | None, dtype: np.dtype[Any]) -> Any:
    """Return the MPI operation of an `op` on a dtype.

    Raises:
        UsageError: MPI cannot reduce this dtype.
    """
    char = dtype.char
    if char not in NATIVE:
        raise UsageError(f"MPI can copy {dtype} but not reduce it; convert to float32 first")
    if char == "?":
        return MPI.LOR if op in ("sum", "max") else MPI.LAND
    if op in ("max", "min"):
        return _extremum(op, dtype) if reduced_by_python(op, dtype) else {"max": MPI.MAX, "min": MPI.MIN}[op]
    return MPI.SUM if op == "sum" else MPI.PROD


def reduced_by_python(op: str | None, dtype: np.dtype[Any]) -> bool:
    """Return whether MPI calls Python to reduce, which cannot read a GPU's memory."""
    return op in ("max", "min") and dtype.char in "efdg"


def _extremum(op: str, dtype: np.dtype[Any]) -> Any:
    """Return max or min that keeps NaN, which MPI's own drop or keep depending on the order of ranks."""
    ufunc = np.maximum if op == "max" else np.minimum

    def combine(source: Any, target: Any, datatype: Any) -> None:
        total = np.frombuffer(target, dtype)
        ufunc(total, np.frombuffer(source, dtype), out=total)

    return MPI.Op.Create(combine, commute=True)


# Headers ----------------------------------------------------------------------------------------------


def pack_header(x: Array) -> bytes:
    """Return the message that announces `x`: its dtype, shape, and whether it lies on a GPU."""
    text = f"{x.dtype.name};{int(is_gpu_array(x))};{','.join(map(str, x.shape))}".encode()
    if len(text) > HEADER_BYTES:
        raise UsageError(f"send: shape {x.shape} has too many axes to announce")
    return text.ljust(HEADER_BYTES)


def read_header(header: bytearray) -> tuple[tuple[int, ...], Any, bool]:
    """Return the shape, the dtype and whether the sender's array lies on a GPU."""
    name, gpu, shape = header.decode().rstrip().split(";")
    return tuple(map(int, shape.split(","))) if shape else (), np.dtype(name), gpu == "1"
