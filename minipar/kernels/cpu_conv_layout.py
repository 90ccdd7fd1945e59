"""The flat layout in which a convolution's taps are shifts: samples behind each other, zeros between rows.

With 3 columns and a padding of 1, one channel of a block of samples lies as

    0 ... 0 | x0 x1 x2 0 | x3 x4 x5 0 | x6 x7 x8 0 | 0 0 0 0 | next sample ...        (pitch 4)

One zero serves the end of a row and the start of the next. An output position and the element that a tap
reads there lie a constant distance apart, so a tap is one shift of everything and is copied in long runs.
The positions that fall on the zeros are computed and thrown away. A stride of s cuts the padded image into
s·s phases (even and odd rows and columns, for 2) first, each of which is read with stride 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from minipar.kernels.common import Array, Pair

Pair3 = tuple[int, int, int]  # (C, H, W)


class Axis:
    """One axis (rows or columns) of an image in the layout.

    Attributes:
        taps: (phase, offset) of each tap: output position o reads element o + offset of that phase.
        first: the phase element at which the data of any phase starts.
        pitch: elements from one row (or sample) to the next.
    """

    def __init__(self, size: int, count: int, kernel: int, stride: int, padding: int, dilation: int):
        self.size, self.count, self.stride, self.padding = size, count, stride, padding
        self.taps = [(t * dilation % stride, t * dilation // stride) for t in range(kernel)]
        self.seen = count + self.taps[-1][1]  # of each phase, elements 0..seen-1 are read
        self.phases = sorted({phase for phase, _ in self.taps})
        starts, stops = zip(*(self._range(phase) for phase in self.phases))
        self.first, last = min(starts), max(stops)
        margin = max(self.first, self.seen - last)  # zeros before the data and after it are the same ones
        self.pitch = max(last - self.first + margin, count)

    def _range(self, phase: int) -> tuple[int, int]:
        """First and last-plus-one element of a phase that is read and is not padding."""
        start = max(0, -((phase - self.padding) // self.stride))  # rounded up
        stop = min(self.seen, -((phase - self.padding - self.size) // self.stride))
        return start, max(start, stop)

    def data(self, phase: int) -> tuple[slice, slice]:
        """(where a phase's data lies within a pitch, which elements of the image it is)."""
        start, stop = self._range(phase)
        origin = start * self.stride + phase - self.padding
        end = origin + max(0, (stop - start - 1) * self.stride + 1) if stop > start else origin
        return slice(start - self.first, stop - self.first), slice(origin, end, self.stride)


@functools.lru_cache(maxsize=256)
def layout_of(image: Pair3, kernel: Pair, size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Layout:
    """Return the layout for images (C, H, W); it never changes, so calls and ranks share it."""
    return Layout(image, kernel, size, stride, padding, dilation)


class Layout:
    """Where the elements of (N, C, H, W) images lie for one convolution.

    Attributes:
        channels: C. phases: how many row and column phases are read.
        area: positions from one sample to the next.
        row_taps: for each row phase, (tap row, shift) of the tap rows that read it.
        column_taps: (column phase, shift) of each tap column. row_reach: the largest shift of a tap row.
    """

    def __init__(self, image: Pair3, kernel: Pair, size: Pair, stride: Pair, padding: Pair, dilation: Pair):
        self.rows, self.columns = (
            Axis(image[1 + i], size[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)
        )
        rows, columns = self.rows, self.columns
        self.channels, self.area = image[0], rows.pitch * columns.pitch
        self.phases = len(rows.phases), len(columns.phases)
        self.row_taps = [
            tuple((i, offset * columns.pitch) for i, (phase, offset) in enumerate(rows.taps) if phase == here)
            for here in rows.phases
        ]
        self.column_taps = [(columns.phases.index(phase), offset) for phase, offset in columns.taps]
        self.row_reach = rows.taps[-1][1] * columns.pitch
        self.base = rows.first * columns.pitch + columns.first  # zeros before the first sample
        self.parts = [
            (r, c, rows.data(row_phase), columns.data(column_phase))
            for r, row_phase in enumerate(rows.phases)
            for c, column_phase in enumerate(columns.phases)
        ]

    def length(self, samples: int) -> int:
        """Elements of one channel of some samples, with all that the furthest tap reads."""
        return self.base + samples * self.area + self.row_reach + self.columns.taps[-1][1]

    def views(self, images: Array, x: Array) -> Iterator[tuple[Array, Array]]:
        """For each phase of images (row phases, column phases, C, length) and x (n, C, H, W):
        (its data in the layout, the same elements of x), both (C, n, rows, columns)."""
        inside = images[..., self.base : self.base + len(x) * self.area]
        inside = inside.reshape(*inside.shape[:3], len(x), self.rows.pitch, self.columns.pitch)
        for r, c, (lay_r, img_r), (lay_c, img_c) in self.parts:
            yield inside[r, c][..., lay_r, lay_c], x.swapaxes(0, 1)[..., img_r, img_c]

    def outputs(self, flat: Array) -> Array:
        """The outputs among flat positions (O, n · area), as a view (n, O, OH, OW)."""
        grid = flat.reshape(len(flat), -1, self.rows.pitch, self.columns.pitch)
        return grid[:, :, : self.rows.count, : self.columns.count].swapaxes(0, 1)
