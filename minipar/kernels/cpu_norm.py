"""Layer norm and RMS norm in NumPy, a block of rows at a time.

Sums over a row are products with a constant vector and dot products of rows, because BLAS computes those
several times faster than NumPy's own reductions; so are the sums over rows that give dweight and dbias.
"""

from __future__ import annotations

import numpy as np

from minipar.kernels.common import Array, rows, widen
from minipar.kernels.cpu_blocks import blas, blocks, row_block


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """See plain.layer_norm. The variance is of the centred rows, so a large mean costs no precision."""
    if x.dtype.itemsize == 2:
        y, mean, rstd = layer_norm(widen(x), _widened(weight), _widened(bias), eps)
        return y.astype(x.dtype), mean, rstd
    xs = blas(rows(x))
    (count, width), dtype = xs.shape, x.dtype
    y, mean, rstd = np.empty((count, width), dtype), np.empty((count, 1), dtype), np.empty((count, 1), dtype)
    average = np.full(width, 1 / width, dtype)
    for span in blocks(count, row_block(width, dtype, 2)):
        a, z, m, r = xs[span], y[span], mean[span], rstd[span]
        np.matmul(a, average, out=m[:, 0])
        np.subtract(a, m, out=z)
        inverse_root_mean_square(z, eps, r[:, 0])
        z *= r
        if weight is not None:
            z *= weight
        if bias is not None:
            z += bias
    lead = (*x.shape[:-1], 1)
    return y.reshape(x.shape), mean.reshape(lead), rstd.reshape(lead)


def layer_norm_backward(
    g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """See plain.layer_norm_backward."""
    if x.dtype.itemsize == 2:
        dx, dweight, dbias = layer_norm_backward(widen(g), widen(x), mean, rstd, _widened(weight))
        return dx.astype(x.dtype), _rounded(dweight, weight), _rounded(dbias, g if weight is None else weight)
    return _backward(g, x, mean, rstd, weight)


def rms_norm(x: Array, weight: Array | None, eps: float) -> tuple[Array, Array]:
    """See plain.rms_norm."""
    if x.dtype.itemsize == 2:
        y, rstd = rms_norm(widen(x), _widened(weight), eps)
        return y.astype(x.dtype), rstd
    xs = blas(rows(x))
    (count, width), dtype = xs.shape, x.dtype
    y, rstd = np.empty((count, width), dtype), np.empty((count, 1), dtype)
    for span in blocks(count, row_block(width, dtype, 2)):
        a, z, r = xs[span], y[span], rstd[span]
        inverse_root_mean_square(a, eps, r[:, 0])
        np.multiply(a, r, out=z)
        if weight is not None:
            z *= weight
    return y.reshape(x.shape), rstd.reshape(*x.shape[:-1], 1)


def rms_norm_backward(g: Array, x: Array, rstd: Array, weight: Array | None) -> tuple[Array, Array | None]:
    """See plain.rms_norm_backward."""
    if x.dtype.itemsize == 2:
        dx, dweight = rms_norm_backward(widen(g), widen(x), rstd, _widened(weight))
        return dx.astype(x.dtype), _rounded(dweight, weight)
    dx, dweight, _ = _backward(g, x, None, rstd, weight)
    return dx, dweight


def _backward(
    g: Array, x: Array, mean: Array | None, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """(dx, dweight, dbias) of a layer norm or, without a mean, of an RMS norm.

    dx = rstd · (g · weight - mean(g · weight) - c · rstd² · mean(g · weight · c)), c = x - mean.
    """
    gs, xs, rs = blas(rows(g)), rows(x), rows(rstd)
    ms = None if mean is None else rows(mean)
    (count, width), dtype = xs.shape, x.dtype
    average = np.full(width, 1 / width, dtype)  # g @ average is the row mean of g · weight
    if weight is not None:
        average *= weight
    size = row_block(width, dtype, 4)
    ones = np.ones(min(size, count), dtype)
    scratch = np.empty((2, min(size, count), width), dtype)
    dx, dscale, dbias = np.empty((count, width), dtype), np.zeros(width, dtype), np.zeros(width, dtype)
    for span in blocks(count, size):
        grad, d, r = gs[span], dx[span], rs[span]
        centred, product = scratch[:, : len(d)]
        if ms is None:
            np.copyto(centred, xs[span])
        else:
            np.subtract(xs[span], ms[span], out=centred)
        np.multiply(grad, centred, out=product)
        dscale += r[:, 0] @ product
        centred *= (product @ average)[:, None] * (r * r)
        if weight is None:
            np.subtract(grad, centred, out=d)
        else:
            np.multiply(grad, weight, out=d)
            d -= centred
        if ms is not None:
            d -= (grad @ average)[:, None]
            dbias += ones[: len(d)] @ grad
        d *= r
    if weight is None:
        return dx.reshape(x.shape), None, dbias
    dscale, dbias = dscale.astype(weight.dtype, copy=False), dbias.astype(weight.dtype, copy=False)
    return dx.reshape(x.shape), dscale, dbias


def inverse_root_mean_square(z: Array, eps: float, out: Array) -> None:
    """out (...) = 1 / sqrt(mean(z²) + eps) for each row of z (..., C)."""
    np.vecdot(z, z, out=out)
    out /= z.shape[-1]
    out += eps
    np.sqrt(out, out=out)
    np.divide(1, out, out=out)


def _widened(x: Array | None) -> Array | None:
    return None if x is None else widen(x)


def _rounded(x: Array | None, like: Array | None) -> Array | None:
    return None if x is None or like is None else x.astype(like.dtype, copy=False)
