"""Convolution and pooling as plain formulas, for any array module: unfold the windows, multiply, fold back.

`im2col` lays every window out as a column, which turns convolution into a matrix product; `col2im` is its
transpose, and so the backward of everything that unfolds. Both walk over the few taps of the kernel and
move a whole strided image per tap. All sizes are pairs (vertical, horizontal).
"""

from __future__ import annotations

from minipar.backend import array_module
from minipar.kernels.common import Array, Pair, check_conv, check_pool, output_size, tap_dtype, widen


def taps_of(kernel: Pair, stride: Pair, dilation: Pair, size: Pair):
    """(i, j, rows, columns) for each tap: the slices of the padded image that it reads."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + stride[0] * (size[0] - 1) + 1, stride[0])
            columns = slice(left, left + stride[1] * (size[1] - 1) + 1, stride[1])
            yield i, j, rows, columns


def padded(x: Array, padding: Pair, value: float = 0.0) -> Array:
    n, c, h, w = x.shape
    image = array_module(x).full((n, c, h + 2 * padding[0], w + 2 * padding[1]), value, dtype=x.dtype)
    image[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w] = x
    return image


def im2col(x: Array, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Array:
    """x (N, C, H, W) to its windows (N, C·kh·kw, OH·OW), in the order of torch's `unfold`."""
    n, c = x.shape[:2]
    size = output_size(x.shape, kernel, stride, padding, dilation)
    image = padded(x, padding)
    cols = array_module(x).empty((n, c, *kernel, *size), dtype=x.dtype)
    for i, j, rows, columns in taps_of(kernel, stride, dilation, size):
        cols[:, :, i, j] = image[:, :, rows, columns]
    return cols.reshape(n, c * kernel[0] * kernel[1], size[0] * size[1])


def col2im(
    cols: Array, x_shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Array:
    """The transpose of im2col: windows (N, C·kh·kw, OH·OW) summed back to dx (N, C, H, W)."""
    n, c, h, w = x_shape
    size = output_size(x_shape, kernel, stride, padding, dilation)
    windows = widen(cols).reshape(n, c, *kernel, *size)
    image = array_module(cols).zeros((n, c, h + 2 * padding[0], w + 2 * padding[1]), dtype=windows.dtype)
    for i, j, rows, columns in taps_of(kernel, stride, dilation, size):
        image[:, :, rows, columns] += windows[:, :, i, j]
    image = image[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
    return image.astype(cols.dtype)


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """Cross-correlation of x (N, C, H, W) with weight (O, C/groups, kh, kw): y (N, O, OH, OW).

    Backward unfolds x again, which is cheaper than keeping kh·kw copies of it. Raises UsageError for sizes that
    do not belong together.
    """
    check_conv(x.shape, weight.shape, groups)
    (n, _, _, _), (out, _, kh, kw) = x.shape, weight.shape
    size = output_size(x.shape, (kh, kw), stride, padding, dilation)
    cols = im2col(widen(x), (kh, kw), stride, padding, dilation)
    cols = cols.reshape(n, groups, cols.shape[1] // groups, size[0] * size[1])  # (N, G, C/G·kh·kw, OH·OW)
    y = widen(weight).reshape(groups, out // groups, cols.shape[2]) @ cols  # (N, G, O/G, OH·OW)
    y = y.reshape(n, out, *size)
    if bias is not None:
        y = y + widen(bias)[:, None, None]
    return y.astype(x.dtype, copy=False)


def conv2d_backward_input(
    g: Array,
    weight: Array,
    x_shape: tuple[int, int, int, int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """dx (N, C, H, W) from g (N, O, OH, OW)."""
    n, out, oh, ow = g.shape
    _, per_group, kh, kw = weight.shape
    w = widen(weight).reshape(groups, out // groups, per_group * kh * kw)
    cols = w.swapaxes(-1, -2) @ widen(g).reshape(n, groups, out // groups, oh * ow)
    cols = cols.reshape(n, groups * per_group * kh * kw, oh * ow)
    return col2im(cols, x_shape, (kh, kw), stride, padding, dilation).astype(g.dtype, copy=False)


def conv2d_backward_weight(
    g: Array,
    x: Array,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """dweight (O, C/groups, kh, kw) from g (N, O, OH, OW) and x (N, C, H, W)."""
    (n, c), (out, oh, ow) = x.shape[:2], g.shape[1:]
    cols = im2col(widen(x), kernel, stride, padding, dilation)
    cols = cols.reshape(n, groups, cols.shape[1] // groups, oh * ow)
    dw = widen(g).reshape(n, groups, out // groups, oh * ow) @ cols.swapaxes(-1, -2)  # (N, G, O/G, C/G·kh·kw)
    return dw.sum(0).reshape(out, c // groups, *kernel).astype(g.dtype, copy=False)


def conv2d_backward_bias(g: Array) -> Array:
    """dbias (O,): g (N, O, OH, OW) summed over samples and positions."""
    return widen(g).sum((0, 2, 3)).astype(g.dtype, copy=False)


def max_pool2d(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Array, Array]:
    """The largest element of each window: (y (N, C, OH, OW), saved).

    `saved` (N, C, OH, OW) is the number of the tap that won, i·kw + j, the first of equals. A NaN makes its
    window NaN. Padding counts as -inf and is at most half the kernel.
    """
    check_pool(kernel, padding)
    xp = array_module(x)
    size = output_size(x.shape, kernel, stride, padding)
    image = padded(x, padding, -xp.inf)
    taps = [image[:, :, rows, columns] for _, _, rows, columns in taps_of(kernel, stride, (1, 1), size)]
    windows = xp.stack(taps)  # (kh·kw, N, C, OH, OW)
    return windows.max(0), windows.argmax(0).astype(tap_dtype(kernel))


def max_pool2d_backward(
    g: Array, saved: Array, x_shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair
) -> Array:
    """dx (N, C, H, W): each g (N, C, OH, OW) goes to the element that won its window."""
    (n, c, oh, ow), taps = g.shape, kernel[0] * kernel[1]
    won = saved[:, :, None] == array_module(g).arange(taps)[:, None, None]  # (N, C, kh·kw, OH, OW)
    cols = (g[:, :, None] * won).reshape(n, c * taps, oh * ow)
    return col2im(cols, x_shape, kernel, stride, padding, (1, 1))


def avg_pool2d(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """The mean of each window, padding counted as zeros: (N, C, OH, OW)."""
    check_pool(kernel, padding)
    (n, c), taps = x.shape[:2], kernel[0] * kernel[1]
    size = output_size(x.shape, kernel, stride, padding)
    cols = im2col(widen(x), kernel, stride, padding, (1, 1)).reshape(n, c, taps, *size)
    return (cols.sum(2) / taps).astype(x.dtype, copy=False)


def avg_pool2d_backward(
    g: Array, x_shape: tuple[int, int, int, int], kernel: Pair, stride: Pair, padding: Pair
) -> Array:
    """dx (N, C, H, W): each g (N, C, OH, OW) spread evenly over its window."""
    (n, c, oh, ow), taps = g.shape, kernel[0] * kernel[1]
    share = array_module(g).repeat((widen(g) / taps)[:, :, None], taps, axis=2)
    dx = col2im(share.reshape(n, c * taps, oh * ow), x_shape, kernel, stride, padding, (1, 1))
    return dx.astype(g.dtype, copy=False)
