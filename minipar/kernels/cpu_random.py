"""Counter-based random bits in NumPy, hashed in place block by block; bitwise the plain formula's."""

from __future__ import annotations

import math

import numpy as np

from minipar.kernels.common import Array, keep_threshold
from minipar.kernels.cpu_blocks import block_length, blocks

GAMMA = 0x9E3779B97F4A7C15
UINT64 = np.dtype(np.uint64)


def splitmix64(key: int, index: Array) -> Array:
    """See plain.splitmix64."""
    z = np.empty(index.shape, UINT64)
    flat_index, flat_z, size = index.reshape(-1), z.reshape(-1), block_length(UINT64, 3)
    scratch = np.empty(min(size, z.size), UINT64)
    for span in blocks(z.size, size):
        a = flat_z[span]
        np.multiply(flat_index[span], np.uint64(GAMMA), out=a)
        a += np.uint64((key + GAMMA) % 2**64)
        _mix_(a, scratch[: len(a)])
    return z


def dropout_mask(shape: tuple[int, ...], p: float, key: int, start: int = 0) -> Array:
    """See plain.dropout_mask."""
    threshold, keep = keep_threshold(p), np.empty(shape, bool)
    if threshold >= 2**64:  # p = 1 drops everything
        keep[...] = False
        return keep
    flat, size = keep.reshape(-1), block_length(UINT64, 3)
    count = min(size, math.prod(shape))
    ramp = np.arange(1, count + 1, dtype=UINT64)
    ramp *= np.uint64(GAMMA)
    z, scratch = np.empty((2, count), UINT64)
    for span in blocks(flat.size, size):
        length = span.stop - span.start
        offset = (key + (start + span.start) * GAMMA) % 2**64
        np.add(ramp[:length], np.uint64(offset), out=z[:length])
        _mix_(z[:length], scratch[:length])
        np.greater_equal(z[:length], np.uint64(threshold), out=flat[span])
    return keep


def _mix_(z: Array, scratch: Array) -> None:
    """SplitMix64's bijective mix, in place."""
    np.right_shift(z, np.uint64(30), out=scratch)
    z ^= scratch
    z *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(z, np.uint64(27), out=scratch)
    z ^= scratch
    z *= np.uint64(0x94D049BB133111EB)
    np.right_shift(z, np.uint64(31), out=scratch)
    z ^= scratch
