"""Launches the CUDA code of gpu_source on CuPy arrays; compiled at the first call, once for each set of dtypes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minipar.backend import device_module
from minipar.kernels.common import Array, work_dtype
from minipar.kernels.gpu_source import ELEMENTWISE, FUNCTION, FUNCTIONS, NUMBERS_EACH, PREAMBLE, SUM_LANES

C_NAMES = {"float16": "__half", "float32": "float", "float64": "double"}
WARP, WARPS = 32, 4  # threads that share a row, and rows of a block of threads
THREADS = 256  # of a block, side by side
SUM_GROUPS = 64  # parts of a sum that are added up side by side, at most
PIECES = {16: "complex128", 8: "float64", 4: "float32"}  # by bytes: what a thread copies at once

Sizes = tuple[int, ...]


@functools.cache
def _elementwise(name: str, work: np.dtype[Any]) -> Any:
    source, cupy = ELEMENTWISE[name], device_module("cuda")
    inputs, outputs = (text.format(W=work.name) for text in (source.inputs, source.outputs))
    preamble = PREAMBLE % {"work": C_NAMES[work.name]}
    return cupy.ElementwiseKernel(inputs, outputs, source.code, f"minipar_{name}_{work.name}", preamble=preamble)


@functools.cache
def _function(name: str, work: np.dtype[Any], types: tuple[tuple[str, np.dtype[Any]], ...]) -> Any:
    """Return a whole CUDA function; `types` are the dtypes of the letters that its parameters name."""
    parameters, code = FUNCTIONS[name]
    text = FUNCTION.format(
        name=name, parameters=parameters.replace("*", "* __restrict__"), code=code,
        preamble=PREAMBLE % {"work": C_NAMES[work.name]},
        types="\n".join(f"typedef {C_NAMES[dtype.name]} {letter};" for letter, dtype in types),
    )  # fmt: skip
    return device_module("cuda").RawKernel(text, f"minipar_{name}")


def _launch(name: str, types: dict[str, Array], arguments: Any, size: Sizes, blocks: Sizes, threads: Sizes) -> None:
    """Call a function for arrays of a size (rows, width)."""
    if not all(a.flags.c_contiguous for a in arguments if hasattr(a, "flags") and a.ndim):
        raise ValueError(f"{name}: its arrays must be contiguous")
    work = work_dtype(types["T"].dtype)
    kernel = _function(name, work, tuple((letter, a.dtype) for letter, a in types.items()))
    numbers = [work.type(a) if isinstance(a, float) else a for a in arguments]
    kernel(blocks, threads, (*numbers, *size))


def run(name: str, like: Array, *arguments: Any) -> Any:
    """Call an elementwise kernel of gpu_source in the working precision of `like`."""
    return _elementwise(name, work_dtype(like.dtype))(*arguments)


def run_numbers(name: str, types: dict[str, Array], *arguments: Array) -> None:
    """Call a function of gpu_source for every number of `types["T"]` and of other arrays of its shape.

    Args:
        types: an array of each dtype that the function's parameters name, by the letter.
        arguments: contiguous arrays.

    Raises:
        ValueError: an array is not contiguous; the function would take other elements for it.
    """
    size = types["T"].size
    if size:
        _launch(name, types, arguments, (1, size), (-(-size // (THREADS * NUMBERS_EACH)),), (THREADS,))


def run_rows(name: str, types: dict[str, Array], *arguments: Any) -> None:
    """Call a function of gpu_source for every row of `types["T"]` (..., C), a warp for each.

    Args:
        types, arguments: see `run_numbers`; also numbers. Python's floats are given in the working precision.
    """
    x = types["T"]
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    _launch(name, types, arguments, (rows, width), (-(-rows // WARPS),), (WARP, WARPS))


def sum_rows(name: str, types: dict[str, Array], *arguments: Array) -> Array:
    """Add a term of gpu_source up over the rows of `types["T"]` (R, C), always in the same order.

    In two steps, of groups of rows and of the groups, so that all of a GPU has part in it.

    Args:
        types, arguments: see `run_numbers`.

    Returns:
        (C,), in the working precision.
    """
    x = types["T"]
    rows, width = x.shape
    groups = 1 if rows <= SUM_GROUPS else min(SUM_GROUPS, -(-rows // (4 * SUM_LANES)))  # of four rows a thread, or more
    out = device_module("cuda").empty((groups, width), work_dtype(x.dtype))
    _launch(name, types, (*arguments, out), (rows, width), (-(-width // WARP), groups), (WARP, SUM_LANES))
    return out[0] if groups == 1 else sum_rows("sum", {"T": out}, out)


def copy(x: Array, out: Array) -> None:
    """out[...] = x of the same shape, in pieces as wide as both layouts allow: up to eight halves at once."""
    if x.dtype == out.dtype and x.ndim and x.strides[-1] == out.strides[-1] == x.itemsize:
        where = [n for a in (x, out) for n in (a.data.ptr, *a.strides[:-1])]
        piece = math.gcd(16, x.shape[-1] * x.itemsize, *where)
        if piece > x.itemsize:
            kind = PIECES[piece]
            x, out = x.view(kind), out.view(kind)
    out[...] = x


def contiguous(x: Array) -> Array:
    """Return x, or a contiguous copy of it."""
    if x.flags.c_contiguous:
        return x
    out = device_module("cuda").empty(x.shape, x.dtype)
    copy(x, out)
    return out


def copy_rows(x: Array, out: Array) -> None:
    """Copy rows of x (n, C) to a contiguous out (n, W): cut off, or filled up with zeros.

    The rows of x may lie apart, and at odd addresses, where `copy` would move number by number.
    """
    run_rows("copy_rows", {"T": out}, x.data.ptr, out, x.strides[0] // x.itemsize, x.shape[1])
