"""Pooling in NumPy: one pass over the windows per tap of the kernel, each a strided view of the image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minipar.kernels.common import Array, Pair, check_pool, output_size, tap_dtype, widen, work_dtype
from minipar.kernels.cpu_blocks import block_length, blocks
from minipar.kernels.plain_conv import padded, taps_of


def max_pool2d(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Array, Array]:
    """See plain.max_pool2d."""
    check_pool(kernel, padding)
    size = output_size(x.shape, kernel, stride, padding)
    image = padded(x, padding, -np.inf) if any(padding) else x
    y, saved = np.empty((*x.shape[:2], *size), x.dtype), np.zeros((*x.shape[:2], *size), tap_dtype(kernel))
    per_sample = y[:1].size
    for span in blocks(len(x), max(1, block_length(np.dtype(np.float32), 4) // max(1, per_sample))):
        best, winner = y[span], saved[span]
        # NumPy compares dense arrays several times faster than strided ones, so each tap is copied first.
        dense, larger, number = np.empty_like(best), np.empty(best.shape, bool), np.empty_like(winner)
        for at, tap in enumerate(_views(image[span], kernel, stride, size)):
            if at == 0:
                np.copyto(best, tap)
                continue
            np.copyto(dense, tap)
            np.greater(dense, best, out=larger)
            np.maximum(dense, best, out=best)
            np.multiply(larger, saved.dtype.type(at), out=number)
            np.maximum(winner, number, out=winner)  # taps are numbered upwards, so the latest winner counts
    return y, saved


def max_pool2d_backward(
    g: Array, saved: Array, x_shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair
) -> Array:
    """See plain.max_pool2d_backward."""
    won, part = np.empty(g.shape, bool), np.empty(g.shape, g.dtype)
    apart = _are_apart(kernel, stride)
    image = _zeros(x_shape, padding, g.dtype if apart else work_dtype(g.dtype))
    for number, tap in enumerate(_views(image, kernel, stride, g.shape[2:])):
        np.equal(saved, number, out=won)
        if apart:
            np.multiply(g, won, out=tap)
        else:
            tap += np.multiply(g, won, out=part)
    return _inside(image, x_shape, padding).astype(g.dtype, copy=False)


def avg_pool2d(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """See plain.avg_pool2d."""
    check_pool(kernel, padding)
    size = output_size(x.shape, kernel, stride, padding)
    image = padded(x, padding) if any(padding) else x
    y = np.zeros((*x.shape[:2], *size), work_dtype(x.dtype))
    for tap in _views(image, kernel, stride, size):
        y += tap
    y *= 1 / (kernel[0] * kernel[1])
    return y.astype(x.dtype, copy=False)


def avg_pool2d_backward(
    g: Array, x_shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair
) -> Array:
    """See plain.avg_pool2d_backward."""
    share = widen(g) * (1 / (kernel[0] * kernel[1]))
    image, apart = _zeros(x_shape, padding, share.dtype), _are_apart(kernel, stride)
    for tap in _views(image, kernel, stride, g.shape[2:]):
        if apart:
            np.copyto(tap, share)
        else:
            tap += share
    return _inside(image, x_shape, padding).astype(g.dtype, copy=False)


def _views(image: Array, kernel: Pair, stride: Pair, size: tuple[int, ...]) -> Iterator[Array]:
    """For each tap, the elements of the padded image that it reads: (N, C, OH, OW)."""
    for _, _, rows, columns in taps_of(kernel, stride, (1, 1), (size[0], size[1])):
        yield image[:, :, rows, columns]


def _are_apart(kernel: Pair, stride: Pair) -> bool:
    """No element is in two windows, so that a tap's gradient may be written instead of added."""
    return kernel[0] <= stride[0] and kernel[1] <= stride[1]


def _zeros(x_shape: tuple[int, int, int, int], padding: Pair, dtype) -> Array:
    n, c, h, w = x_shape
    return np.zeros((n, c, h + 2 * padding[0], w + 2 * padding[1]), dtype)


def _inside(image: Array, x_shape: tuple[int, int, int, int], padding: Pair) -> Array:
    """A padded image without its padding."""
    (top, left), (h, w) = padding, x_shape[2:]
    return np.ascontiguousarray(image[:, :, top : top + h, left : left + w])
