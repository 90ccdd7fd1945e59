"""Group norm in NumPy: a few samples at a time stay in cache for the whole formula.

Each sample and group is a row of numbers with a mean and a root mean square of its own; weight and bias belong
to channels, of which a row holds several. Sums are products with ones and dot products, as in cpu_norm.
"""

from __future__ import annotations

import numpy as np

from minipar.kernels.common import Array, by_channel, widen
from minipar.kernels.cpu_blocks import blocks, row_block
from minipar.kernels.cpu_norm import inverse_root_mean_square


def group_norm(
    x: Array, groups: int, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """See plain.group_norm."""
    xs, dtype = np.ascontiguousarray(by_channel(widen(x))), widen(x).dtype  # (N, C, S)
    n, channels, size = xs.shape
    y, mean, rstd = np.empty(xs.shape, dtype), np.empty((n, groups), dtype), np.empty((n, groups), dtype)
    row = channels // groups * size
    average = np.full(row, 1 / max(row, 1), dtype)
    scale = None if weight is None else widen(weight).reshape(groups, -1)
    for span in blocks(n, row_block(channels * size, dtype, 2)):
        a, z = (array[span].reshape(-1, groups, row) for array in (xs, y))
        m, r = mean[span], rstd[span]
        np.matmul(a, average, out=m)
        np.subtract(a, m[..., None], out=z)
        inverse_root_mean_square(z, eps, r)
        if scale is None:
            z *= r[..., None]
        else:
            y[span] *= (r[..., None] * scale).reshape(-1, channels, 1)
        if bias is not None:
            y[span] += widen(bias)[:, None]
    return y.reshape(x.shape).astype(x.dtype, copy=False), mean, rstd


def group_norm_backward(
    g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """See plain.group_norm_backward.

    dx = r·w·g - (x - mean)·r²·mean(g·w·xhat) - r·mean(g·w), the means over a sample's group.
    """
    gs, xs = (np.ascontiguousarray(by_channel(widen(a))) for a in (g, x))  # (N, C, S)
    (n, channels, size), groups, dtype = xs.shape, mean.shape[1], xs.dtype
    row = channels // groups * size
    w = np.ones(channels, dtype) if weight is None else widen(weight)
    block = row_block(channels * size, dtype, 3)
    ones, scratch = np.ones(size, dtype), np.empty((min(block, n), channels, size), dtype)
    dx, dweight, dbias = np.empty(xs.shape, dtype), np.zeros(channels, dtype), np.zeros(channels, dtype)
    for span in blocks(n, block):
        grad, d, m, r = gs[span], dx[span], mean[span, :, None], rstd[span, :, None]
        centred = scratch[: len(d)]
        by_group = centred.reshape(-1, groups, row)
        np.subtract(xs[span].reshape(by_group.shape), m, out=by_group)
        of_g = grad @ ones  # sums over a channel: (n, C)
        of_gx = np.vecdot(grad, centred).reshape(len(d), groups, -1) * r  # Σ g·xhat: (n, G, C/G)
        dbias += of_g.sum(0)
        dweight += of_gx.sum(0).reshape(channels)
        share = w.reshape(groups, -1) / max(row, 1)
        mean_g = (of_g.reshape(of_gx.shape) * share).sum(-1, keepdims=True)
        mean_gx = (of_gx * share).sum(-1, keepdims=True)
        by_group *= -r * r * mean_gx
        by_group -= r * mean_g
        np.multiply(grad, (r * w.reshape(groups, -1)).reshape(-1, channels, 1), out=d)
        d += centred
    kind = g.dtype if weight is None else weight.dtype
    dscale = None if weight is None else dweight.astype(kind, copy=False)
    return dx.reshape(x.shape).astype(x.dtype, copy=False), dscale, dbias.astype(kind, copy=False)
