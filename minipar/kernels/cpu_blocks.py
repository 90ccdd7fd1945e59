"""How the fast kernels cut their work: blocks that stay in a core's L2 cache, matrices that BLAS takes as is.

A NumPy call reads and writes its whole operands, so a formula of ten calls over a large array makes ten
trips to main memory. Cut into blocks of a few hundred KiB, the same ten calls make one trip; much smaller
blocks lose to the half microsecond that each call costs. Scratch is local to a call, because ranks may be
threads of one process.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minipar.kernels.common import Array

CACHE_BYTES = 512 * 1024  # what one block's arrays may take together: half of a usual 1 MiB L2 cache
LINE_BYTES = 64


def block_length(dtype: np.dtype, arrays: int) -> int:
    """How many elements of each of `arrays` arrays stay in cache together.

    Whole cache lines, so that each block begins within its line as its array does: NumPy's loops are some 5 %
    slower on operands that are out of step with one another.
    """
    whole = LINE_BYTES // dtype.itemsize
    return CACHE_BYTES // (arrays * dtype.itemsize) // whole * whole


def row_block(width: int, dtype: np.dtype, arrays: int) -> int:
    """How many rows of `width` elements of each of `arrays` arrays stay in cache together."""
    return max(1, block_length(dtype, arrays) // max(1, width))


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0..total-1 in order."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def scalar(value: float, dtype: np.dtype) -> Array:
    """`value` as an array of no axes, for a call per block: NumPy needs 0.8 µs more for a Python number each time."""
    return np.array(value, dtype)


def blas(x: Array) -> Array:
    """`x` if each of its matrices (last two axes) can go to BLAS as it lies, else a contiguous copy.

    BLAS wants one of the two axes dense and the other striding over at least it. NumPy multiplies anything
    else, such as a broadcast gradient, with a loop that is many times slower.
    """
    (rows, columns), (down, across), item = x.shape[-2:], x.strides[-2:], x.itemsize
    by_rows = across == item and down >= columns * item and down % item == 0
    by_columns = down == item and across >= rows * item and across % item == 0
    return x if by_rows or by_columns else np.ascontiguousarray(x)
