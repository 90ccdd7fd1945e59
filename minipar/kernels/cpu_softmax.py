"""Softmax, log-softmax and cross-entropy in NumPy, a block of rows at a time.

The row sums are products with a vector of ones: BLAS adds several times faster than NumPy's own reduction.
"""

from __future__ import annotations

import numpy as np

from minipar.kernels.common import Array, check_indices, rows, widen
from minipar.kernels.cpu_blocks import blas, blocks, row_block

SAFE_SCORE = 60.0  # exp of ±60 is far from float32's limits, even summed over a row


def is_moderate(x: Array) -> bool:
    """All of x is so small that exp needs no row maximum. False if there is a NaN or nothing at all.

    Two reductions of a whole block take a tenth of the time of one maximum per row.
    """
    return x.size > 0 and bool(x.max() < SAFE_SCORE) and bool(x.min() > -SAFE_SCORE)


def softmax(x: Array, axis: int) -> Array:
    """See plain.softmax."""

    def kernel(a: Array, z: Array) -> None:
        if is_moderate(a):
            np.exp(a, out=z)
        else:
            np.subtract(a, _finite(_row_max(a)), out=z)
            np.exp(z, out=z)
        z *= (1 / _nonzero(z @ np.ones(z.shape[-1], z.dtype)))[:, None]

    return _along(axis, kernel, x)


def softmax_backward(g: Array, y: Array, axis: int) -> Array:
    """See plain.softmax_backward."""

    def kernel(y: Array, g: Array, d: Array) -> None:
        np.subtract(g, np.vecdot(g, y)[:, None], out=d)
        d *= y

    return _along(axis, kernel, y, g)


def log_softmax(x: Array, axis: int) -> Array:
    """See plain.log_softmax."""

    def kernel(a: Array, z: Array) -> None:
        np.subtract(a, _finite(_row_max(a)), out=z)
        total = _nonzero(np.exp(z) @ np.ones(z.shape[-1], z.dtype))
        z -= np.log(total)[:, None]

    return _along(axis, kernel, x)


def log_softmax_backward(g: Array, y: Array, axis: int) -> Array:
    """See plain.log_softmax_backward."""

    def kernel(y: Array, g: Array, d: Array) -> None:
        np.exp(y, out=d)
        d *= (g @ np.ones(g.shape[-1], g.dtype))[:, None]
        np.subtract(g, d, out=d)

    return _along(axis, kernel, y, g)


def cross_entropy(
    logits: Array, targets: Array, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """See plain.cross_entropy."""
    if logits.dtype.itemsize == 2:
        return cross_entropy(widen(logits), targets, ignore_index, label_smoothing)
    check_indices("targets", targets, logits.shape[1], ignore_index)
    (count, width), dtype = logits.shape, logits.dtype
    valid = targets != ignore_index
    columns = np.where(valid, targets, 0)
    losses, saved = np.empty(count, dtype), np.empty((2, count), dtype)
    ones, size = np.ones(width, dtype), row_block(width, dtype, 2)
    scratch = np.empty((min(size, count), width), dtype)
    for span in blocks(count, size):
        z, top, inverse = scratch[: span.stop - span.start], saved[0, span], saved[1, span]
        top[:] = _finite(_row_max(logits[span]))[:, 0]
        np.subtract(logits[span], top[:, None], out=z)
        picked = z[np.arange(len(z)), columns[span]]
        if label_smoothing:
            picked = (1 - label_smoothing) * picked + (label_smoothing / width) * (z @ ones)
        np.exp(z, out=z)
        total = _nonzero(z @ ones)
        np.subtract(np.log(total), picked, out=losses[span])
        np.divide(1, total, out=inverse)
    losses[~valid] = 0
    return losses, saved


def cross_entropy_backward(
    g: Array,
    logits: Array,
    targets: Array,
    saved: Array,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """See plain.cross_entropy_backward. One more exp costs less than fresh memory for kept probabilities."""
    if logits.dtype.itemsize == 2:
        wide = cross_entropy_backward(widen(g), widen(logits), targets, saved, ignore_index, label_smoothing)
        return wide.astype(logits.dtype)
    (count, width), dtype = logits.shape, logits.dtype
    valid = targets != ignore_index
    columns, weights = np.where(valid, targets, 0), np.where(valid, g, 0).astype(dtype, copy=False)
    dlogits = np.empty((count, width), dtype)
    for span in blocks(count, row_block(width, dtype, 2)):
        d, weight = dlogits[span], weights[span]
        np.subtract(logits[span], saved[0, span, None], out=d)
        np.exp(d, out=d)
        d *= (saved[1, span] * weight)[:, None]
        if label_smoothing:
            d -= (label_smoothing / width * weight)[:, None]
        d[np.arange(len(d)), columns[span]] -= (1 - label_smoothing) * weight
    if not valid.all():
        dlogits[~valid] = 0  # not left to the weight of zero: 0 · inf is NaN
    return dlogits


def _along(axis: int, kernel, first: Array, *rest: Array) -> Array:
    """Run `kernel(*blocks, out)` over blocks of rows along `axis` of equally shaped arrays."""
    if first.dtype.itemsize == 2:
        return _along(axis, kernel, *(widen(x) for x in (first, *rest))).astype(first.dtype)
    moved = [np.moveaxis(x, axis, -1) for x in (first, *rest)]
    flat = [blas(rows(x)) for x in moved]
    (count, width), dtype = flat[0].shape, first.dtype
    out = np.empty((count, width), dtype)
    if width:
        for span in blocks(count, row_block(width, dtype, len(flat) + 1)):
            kernel(*(x[span] for x in flat), out[span])
    return np.moveaxis(out.reshape(moved[0].shape), -1, axis)


def _row_max(x: Array) -> Array:
    return x.max(-1, keepdims=True)


def _finite(top: Array) -> Array:
    """Row maxima with 0 for those of rows that hold nothing but -inf: -inf - (-inf) would be NaN."""
    return np.where(top == -np.inf, top.dtype.type(0), top)


def _nonzero(total: Array) -> Array:
    """Row sums with 1 for the 0 of a row that holds nothing but -inf: 0 / 0 would be NaN."""
    return np.where(total == 0, total.dtype.type(1), total)
