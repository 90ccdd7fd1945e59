"""Launches the CUDA code of gpu_source on CuPy arrays; compiled at the first call, once for each set of dtypes."""

from __future__ import annotations

import functools
import math
from typing import Any

from minipar.backend import device_module
from minipar.kernels.common import Array, work_dtype
from minipar.kernels.gpu_source import ELEMENTWISE, FUNCTION, PREAMBLE, ROWS, SUMS

C_NAMES = {"float16": "__half", "float32": "float", "float64": "double"}
WARP, WARPS = 32, 4  # threads that share a row, and rows of a block of threads


@functools.cache
def _elementwise(name: str, work: str) -> Any:
    source, cupy = ELEMENTWISE[name], device_module("cuda")
    inputs, outputs = (text.format(W=work) for text in (source.inputs, source.outputs))
    preamble = PREAMBLE % {"work": C_NAMES[work]}
    return cupy.ElementwiseKernel(inputs, outputs, source.code, f"minipar_{name}_{work}", preamble=preamble)


@functools.cache
def _sum(name: str, work: str) -> Any:
    source, cupy = SUMS[name], device_module("cuda")
    return cupy.ReductionKernel(
        source.inputs.format(W=work), f"{work} out", source.term, "a + b", "out = a", "0",
        f"minipar_{name}_{work}", reduce_type=C_NAMES[work], preamble=PREAMBLE % {"work": C_NAMES[work]},
    )  # fmt: skip


@functools.cache
def _rows(name: str, work: str, types: tuple[tuple[str, str], ...]) -> Any:
    source, cupy = ROWS[name], device_module("cuda")
    text = FUNCTION.format(
        name=name, parameters=source.parameters, code=source.code, preamble=PREAMBLE % {"work": C_NAMES[work]},
        types="\n".join(f"typedef {C_NAMES[dtype]} {letter};" for letter, dtype in types),
    )  # fmt: skip
    return cupy.RawKernel(text, f"minipar_{name}")


def run(name: str, like: Array, *arguments: Any) -> Any:
    """Call an elementwise kernel of gpu_source in the working precision of `like`."""
    return _elementwise(name, work_dtype(like.dtype).name)(*arguments)


def sum_rows(name: str, like: Array, *arguments: Array) -> Array:
    """Add a term of gpu_source up over the rows of matrices (R, C) or (R, 1): (C,), in the working precision of `like`.

    In two steps, of up to 128 groups of rows and of the groups: CuPy gives one sum to one block of threads at most,
    so that C sums over all rows would leave most of a GPU idle.
    """
    work = work_dtype(like.dtype).name
    groups = math.gcd(len(arguments[0]), 128)
    split = [x.reshape(groups, -1, x.shape[1]) for x in arguments]
    return _sum("sum", work)(_sum(name, work)(*split, axis=1), axis=0)


def run_rows(name: str, types: dict[str, Array], *arguments: Any) -> None:
    """Call a function of gpu_source for every row of `types["T"]` (..., C), a warp for each.

    Args:
        types: an array of each dtype that the function's parameters name, by the letter.
        arguments: contiguous arrays, and numbers. Python's floats are given in the working precision.

    Raises:
        ValueError: an array is not contiguous; the function would take other elements for it.
    """
    if not all(a.flags.c_contiguous for a in arguments if hasattr(a, "flags") and a.ndim):
        raise ValueError(f"{name}: its arrays must be contiguous")
    x = types["T"]
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    work = work_dtype(x.dtype)
    kernel = _rows(name, work.name, tuple((letter, a.dtype.name) for letter, a in types.items()))
    numbers = [work.type(a) if isinstance(a, float) else a for a in arguments]
    kernel((-(-rows // WARPS),), (WARP, WARPS), (*numbers, rows, width))
