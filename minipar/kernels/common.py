"""What all sets of kernels share: the working precision, the sizes of windows, the checks of indices.

Every check that kernels make is here, so that the fast ones and the plain ones refuse the same things with
the same words.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar.errors import UsageError

Array = Any  # a numpy or cupy array
Pair = tuple[int, int]  # (vertical, horizontal)

GELU_A = math.sqrt(2.0 / math.pi)
GELU_B = 0.044715


def work_dtype(dtype: Any) -> np.dtype:
    """The precision that a kernel computes in: float32 for two-byte floats, else the dtype itself."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def widen(x: Array) -> Array:
    """`x` in its working precision: a float32 copy of a two-byte float array, else `x` itself."""
    return x.astype(work_dtype(x.dtype), copy=False)


def placed(x: Array, out: Array | None) -> Array:
    """`x`, copied into `out` where that is given."""
    if out is None:
        return x
    out[...] = x
    return out


def rows(x: Array) -> Array:
    """x (..., C) as (R, C): leading axes flattened, without a copy where the strides allow it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def by_channel(x: Array) -> Array:
    """x (N, C, *) as (N, C, S): the positions of a channel in one axis, without a copy where strides allow it."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """How many windows of `kernel` taps fit in `size` elements: the output size of a convolution or pool.

    Raises UsageError if not even one fits.
    """
    reach = dilation * (kernel - 1) + 1
    count = (size + 2 * padding - reach) // stride + 1
    if count < 1:
        raise UsageError(
            f"a window reaching over {reach} elements does not fit in {size} padded by {padding} "
            "on both sides; use a smaller kernel or dilation, or more padding"
        )
    return count


def output_size(
    x_shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)
) -> Pair:
    """(OH, OW) of windows over the last two axes of `x_shape`."""
    return (
        window_count(x_shape[-2], kernel[0], stride[0], padding[0], dilation[0]),
        window_count(x_shape[-1], kernel[1], stride[1], padding[1], dilation[1]),
    )


def check_conv(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], groups: int) -> None:
    """Raises UsageError unless (N, C, H, W) and (O, C/groups, kh, kw) belong together."""
    channels, (out, per_group) = x_shape[1], weight_shape[:2]
    if channels % groups or out % groups:
        raise UsageError(f"groups={groups} must divide the {channels} input and {out} output channels")
    if per_group * groups != channels:
        raise UsageError(
            f"weight of shape {tuple(weight_shape)} with groups={groups} expects {per_group * groups} "
            f"input channels, but x has {channels}"
        )


def check_pool(kernel: Pair, padding: Pair) -> None:
    """Raises UsageError for padding over half the kernel: some windows would hold nothing but padding."""
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise UsageError(f"pooling padding {padding} must be at most half the kernel {kernel}")


def tap_dtype(kernel: Pair) -> np.dtype:
    """The integer type that numbers the taps of a pooling kernel."""
    return np.dtype(np.int16 if kernel[0] * kernel[1] <= 2**15 else np.int32)


def check_indices(name: str, ids: Array, size: int, ignore: int | None = None) -> None:
    """Raises UsageError if an integer in `ids` is outside 0..size-1 (and is not `ignore`)."""
    if ids.dtype.kind not in "iu":
        raise UsageError(f"{name} must be integers, but have dtype {ids.dtype}")
    if ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < size):
        return
    bad = (ids < 0) | (ids >= size)
    if ignore is not None:
        bad &= ids != ignore
    if bad.any():
        raise UsageError(f"{name} holds {int(ids[bad][0])}, which is outside 0..{size - 1}")


def check_attention(q: Array, k: Array, v: Array) -> None:
    """Raises UsageError unless q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv) belong together."""
    same_lead = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not (same_lead and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]):
        raise UsageError(
            f"attention needs q (..., Tq, D), k and v (..., Tk, D) with equal leading sizes, "
            f"but got q {q.shape}, k {k.shape}, v {v.shape}"
        )


def keep_threshold(p: float) -> int:
    """The smallest 64-bit hash that dropout keeps: `(hash >> 11) * 2**-53 >= p` as one integer comparison."""
    if not 0.0 <= p <= 1.0:
        raise UsageError(f"dropout probability must be in 0..1, but is {p}")
    return math.ceil(p * 2.0**53) << 11
