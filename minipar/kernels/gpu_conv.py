"""Convolution for CuPy arrays: the windows of a whole batch side by side, so that each product is a single large one.

`unfold` lays the windows out as (C·kh·kw, N·OH·OW), so that backward's sum over the batch is a part of its product,
added up in float32 and rounded once. The products go to cuBLAS through gpu_blas: two-byte floats on tensor cores.

    y = weight (O, C·kh·kw) @ unfold(x)      and (O, N, OH, OW) to (N, O, OH, OW) while the bias is added
    dx = fold(weightᵀ @ g (O, N·OH·OW))
    dweight = g @ unfold(x)ᵀ
"""

from __future__ import annotations

import math

from minipar.backend import array_module
from minipar.kernels.common import Array, Pair, check_conv, output_size
from minipar.kernels.gpu_blas import matmul
from minipar.kernels.gpu_launch import run


def unfold(x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Array:
    """x (N, C, H, W) to its windows (G, C/G·kh·kw, N·OH·OW); padding is zeros."""
    xp, (n, c) = array_module(x), x.shape[:2]
    size = output_size(x.shape, kernel, stride, padding, dilation)
    windows = xp.empty((c, *kernel, n, *size), x.dtype)
    run("unfold", x, xp.ascontiguousarray(x), *x.shape, *kernel, *stride, *padding, *dilation, *size, windows)
    return windows.reshape(groups, c // groups * math.prod(kernel), n * math.prod(size))


def fold(
    windows: Array, shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Array:
    """The transpose of `unfold`: contiguous windows (G, C/G·kh·kw, N·OH·OW) summed to x of a shape (N, C, H, W)."""
    size = output_size(shape, kernel, stride, padding, dilation)
    x = array_module(windows).empty(shape, windows.dtype)
    run("fold", windows, windows, *shape, *kernel, *stride, *padding, *dilation, *size, x)
    return x


def conv2d(
    x: Array, weight: Array, bias: Array | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Array:
    """See plain.conv2d."""
    check_conv(x.shape, weight.shape, groups)
    n, out, kernel = len(x), len(weight), weight.shape[2:]
    size = output_size(x.shape, kernel, stride, padding, dilation)
    windows = unfold(x, kernel, stride, padding, dilation, groups)
    y = matmul(weight.reshape(groups, out // groups, -1), windows)  # (G, O/G, N·OH·OW)
    y = y.reshape(out, n, *size).swapaxes(0, 1)  # (N, O, OH, OW), not contiguous
    result = array_module(x).empty(y.shape, x.dtype)
    if bias is None:
        result[...] = y
    else:
        run("add", x, y, bias[:, None, None], result)
    return result


def conv2d_backward_input(
    g: Array,
    weight: Array,
    x_shape: tuple[int, int, int, int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """See plain.conv2d_backward_input."""
    kernel = weight.shape[2:]
    windows = matmul(weight.reshape(groups, len(weight) // groups, -1).swapaxes(-1, -2), _by_group(g, groups))
    return fold(windows, x_shape, kernel, stride, padding, dilation).astype(g.dtype, copy=False)


def conv2d_backward_weight(
    g: Array, x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Array:
    """See plain.conv2d_backward_weight."""
    windows = unfold(x, kernel, stride, padding, dilation, groups)
    dweight = matmul(_by_group(g, groups), windows.swapaxes(-1, -2))  # (G, O/G, C/G·kh·kw)
    return dweight.reshape(g.shape[1], x.shape[1] // groups, *kernel).astype(g.dtype, copy=False)


def _by_group(g: Array, groups: int) -> Array:
    """g (N, O, OH, OW) as (G, O/G, N·OH·OW), a copy."""
    return g.swapaxes(0, 1).reshape(groups, g.shape[1] // groups, -1)
