"""Convolution in NumPy: matrix products over flat images, unfolded along columns and folded along rows.

Unfolding all kh·kw taps copies the input kh·kw times. Here the columns' taps are unfolded before the
product and the rows' taps are summed after it, each tap a shift of the flat image (see cpu_conv_layout):

    U[c, j] = image[c] shifted by tap column j                      kw copies of the input
    Z[i, o] = sum over c, j of weight[o, c, i, j] · U[c, j]         one matrix product
    y[o]    = sum over i of Z[i, o] shifted by tap row i            kh additions of the output

The gradients are its transposes: g is unfolded along rows into S[i, o], then Uᵀ's gradient is weightᵀ S and
the weight's is S Uᵀ. A block of samples at a time, so that U and Z stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minipar.kernels.common import Array, Pair, check_conv, output_size, widen
from minipar.kernels.cpu_blocks import blocks
from minipar.kernels.cpu_conv_layout import Layout, layout_of

BLOCK_BYTES = 2 * 1024 * 1024  # what U and Z of one block of samples may take


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """See plain.conv2d."""
    check_conv(x.shape, weight.shape, groups)
    size = output_size(x.shape, weight.shape[2:], stride, padding, dilation)
    xs, w = widen(x), widen(weight)
    y = np.empty((len(x), len(weight), *size), xs.dtype)
    start = np.zeros(len(weight), xs.dtype) if bias is None else widen(bias)
    if _is_pointwise(weight.shape[2:], stride, padding):
        np.matmul(_by_group(w, groups), _pixels(xs, groups), out=_pixels(y, groups))
        if bias is not None:
            y += start[:, None, None]
        return y.astype(x.dtype, copy=False)
    layout = layout_of(x.shape[1:], weight.shape[2:], size, stride, padding, dilation)
    stacked = [_stack(w, rows, groups) for rows in layout.row_taps]
    for span, block in _blocks(layout, len(x), len(weight), groups, xs.dtype):
        block.fill(xs[span])
        for phase, kernel in enumerate(stacked):
            np.matmul(kernel, block.unfold_columns(phase), out=block.products(phase))
        block.fold_rows(start)
        y[span] = block.outputs()
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
    """See plain.conv2d_backward_input."""
    gs, w = widen(g), widen(weight)
    dx = np.zeros(x_shape, gs.dtype)
    if _is_pointwise(weight.shape[2:], stride, padding):
        np.matmul(_by_group(w, groups).swapaxes(1, 2), _pixels(gs, groups), out=_pixels(dx, groups))
        return dx.astype(g.dtype, copy=False)
    layout = layout_of(x_shape[1:], weight.shape[2:], g.shape[2:], stride, padding, dilation)
    stacked = [_stack(w, rows, groups).swapaxes(1, 2) for rows in layout.row_taps]
    for span, block in _blocks(layout, len(g), len(weight), groups, gs.dtype):
        block.outputs()[...] = gs[span]
        block.images[...] = 0
        for phase, kernel in enumerate(stacked):
            np.matmul(kernel, block.unfold_rows(phase), out=block.columns)
            block.fold_columns(phase)
        block.extract(dx[span])
    return dx.astype(g.dtype, copy=False)


def conv2d_backward_weight(
    g: Array,
    x: Array,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Array:
    """See plain.conv2d_backward_weight."""
    gs, xs, out, per_group = widen(g), widen(x), g.shape[1], x.shape[1] // groups
    layout = layout_of(x.shape[1:], kernel, g.shape[2:], stride, padding, dilation)
    height, width = out // groups, per_group * kernel[1]
    stacked = [np.zeros((groups, len(rows) * height, width), gs.dtype) for rows in layout.row_taps]
    for span, block in _blocks(layout, len(g), out, groups, gs.dtype):
        block.fill(xs[span])
        block.outputs()[...] = gs[span]
        for phase, dw in enumerate(stacked):
            dw += block.unfold_rows(phase) @ block.unfold_columns(phase).swapaxes(1, 2)
    dweight = np.empty((out, per_group, *kernel), gs.dtype)
    for rows, dw in zip(layout.row_taps, stacked):
        taps = dw.reshape(groups, len(rows), out // groups, per_group, kernel[1]).transpose(0, 2, 3, 1, 4)
        dweight[:, :, [i for i, _ in rows]] = taps.reshape(out, per_group, len(rows), kernel[1])
    return dweight.astype(g.dtype, copy=False)


def conv2d_backward_bias(g: Array) -> Array:
    """See plain.conv2d_backward_bias."""
    gs = np.ascontiguousarray(widen(g))
    pixels = gs.reshape(*gs.shape[:2], gs.shape[2] * gs.shape[3])
    return (pixels @ np.ones(pixels.shape[2], gs.dtype)).sum(0).astype(g.dtype, copy=False)


class Block:
    """The scratch memory of one block of samples, and the steps between image, U, Z and outputs.

    images (phases, C, ·), columns U (G, C/G·kw, ·) and flat outputs (G, O/G, positions) are laid out by
    `layout`. What is never written stays zero: the padding in `images`, and in `flat` and Z the positions
    that are no outputs.
    """

    def __init__(self, layout: Layout, samples: int, out: int, groups: int, dtype: np.dtype):
        self.layout, self.groups, self.positions = layout, groups, samples * layout.area
        self.extended = self.positions + layout.row_reach  # U reaches as far as the last tap row shifts
        self.images = np.zeros((*layout.phases, layout.channels, layout.length(samples)), dtype)
        self.columns = np.empty(
            (groups, layout.channels // groups * len(layout.column_taps), self.extended), dtype
        )
        self.flat = np.zeros((groups, out // groups, self.positions), dtype)
        self.stacks = [
            np.zeros((groups, len(rows) * (out // groups), self.extended), dtype) for rows in layout.row_taps
        ]

    def fill(self, x: Array) -> None:
        for inside, image in self.layout.views(self.images, x):
            inside[...] = image

    def extract(self, x: Array) -> None:
        for inside, image in self.layout.views(self.images, x):
            image[...] = inside

    def outputs(self) -> Array:
        """A view (samples, O, OH, OW) of the flat positions that are outputs."""
        return self.layout.outputs(self.flat.reshape(-1, self.positions))

    def products(self, phase: int) -> Array:
        """Z of the tap rows that read this row phase: (G, rows · O/G, extended)."""
        return self.stacks[phase]

    def _shifted_columns(self, phase: int) -> Iterator[tuple[Array, Array]]:
        """For each tap column: (its part of U, the image that it reads), both (C, extended)."""
        taps = self.columns.reshape(self.layout.channels, -1, self.extended)
        for j, (column_phase, shift) in enumerate(self.layout.column_taps):
            yield taps[:, j], self.images[phase, column_phase, :, shift : shift + self.extended]

    def _shifted_rows(self, phase: int) -> Iterator[Array]:
        """For each tap row of this phase: its part of Z, where outputs read it (G, O/G, positions)."""
        rows = self.layout.row_taps[phase]
        taps = self.stacks[phase].reshape(self.groups, len(rows), -1, self.extended)
        for at, (_, shift) in enumerate(rows):
            yield taps[:, at, :, shift : shift + self.positions]

    def unfold_columns(self, phase: int) -> Array:
        for part, image in self._shifted_columns(phase):
            part[...] = image
        return self.columns

    def fold_columns(self, phase: int) -> None:
        for part, image in self._shifted_columns(phase):
            image += part

    def unfold_rows(self, phase: int) -> Array:
        for part in self._shifted_rows(phase):
            part[...] = self.flat
        return self.stacks[phase]

    def fold_rows(self, start: Array) -> None:
        """The tap rows of all phases summed to the outputs, on top of `start` (O,)."""
        total = start.reshape(*self.flat.shape[:2], 1)
        for phase in range(len(self.stacks)):
            for part in self._shifted_rows(phase):
                np.add(part, total, out=self.flat)
                total = self.flat


def _blocks(
    layout: Layout, total: int, out: int, groups: int, dtype: np.dtype
) -> Iterator[tuple[slice, Block]]:
    """(which samples, scratch for them): the same scratch again and again, save for a shorter last block."""
    width = layout.channels * len(layout.column_taps) + out * sum(len(rows) for rows in layout.row_taps)
    count = max(1, BLOCK_BYTES // max(1, width * layout.area * dtype.itemsize))
    block = None
    for span in blocks(total, count):
        if block is None or block.positions != (span.stop - span.start) * layout.area:
            block = Block(layout, span.stop - span.start, out, groups, dtype)
        yield span, block


def _is_pointwise(kernel: tuple[int, ...], stride: Pair, padding: Pair) -> bool:
    """A 1x1 convolution is a matrix product over the pixels as they lie."""
    return tuple(kernel) == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)


def _stack(weight: Array, rows: tuple[tuple[int, int], ...], groups: int) -> Array:
    """weight (O, C/G, kh, kw) as (G, rows · O/G, C/G · kw) for some of its tap rows."""
    out, per_group, _, kw = weight.shape
    taps = weight[:, :, [i for i, _ in rows]].reshape(groups, out // groups, per_group, len(rows), kw)
    return taps.transpose(0, 3, 1, 2, 4).reshape(groups, len(rows) * (out // groups), per_group * kw)


def _by_group(weight: Array, groups: int) -> Array:
    """weight (O, C/G, 1, 1) as (G, O/G, C/G)."""
    return weight.reshape(groups, len(weight) // groups, weight.shape[1])


def _pixels(x: Array, groups: int) -> Array:
    """(N, C, H, W) as (N, G, C/G, H·W)."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h * w)
