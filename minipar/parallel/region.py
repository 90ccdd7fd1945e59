"""Where an array of one rank lies in the serial model's tensor, as boxes of indices.

Every way in which minipar cuts a tensor (by rows, by heads, into ZeRO's flat ranges, or all of these at once)
leaves a rank with a few boxes of it. So a checkpoint stores boxes, and going from one layout to another is
intersecting boxes:

        elements 4 … 17 of a (4, 5) weight          box             shape
        ·  ·  ·  ·  x                               rows 0-1, 4-5   (1, 1)
        x  x  x  x  x                               rows 1-3, 0-5   (2, 5)
        x  x  x  x  x
        x  x  ·  ·  ·                               rows 3-4, 0-2   (1, 2)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minipar.backend import Array
from minipar.parallel.partition.assignment import Part
from minipar.parallel.placement import Layout, Shard

Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@dataclass(frozen=True)
class Region:
    """One rank's part of a tensor.

    Attributes:
        shape: of the tensor in the serial model.
        layout: how a tensor-parallel plan cuts it, if it does.
        start: this rank has consecutive elements from this one on, of what the layout leaves it; None for all.
        part: the piece that a partition policy gave this rank, if one did.
    """

    shape: tuple[int, ...]
    layout: Layout | None = None
    start: int | None = None
    part: Part | None = None

    def boxes(self, array: Array) -> list[tuple[Box, Array]]:
        """Return (box of the serial tensor, view of `array` with its values) for each box with elements.

        Args:
            array: this rank's part: the weight itself, or optimizer state of its shape.
        """
        local = self.layout.local_shape(self.shape) if self.layout else self.shape
        start, part = self.start, self.part
        if part is not None and part.axis is None:
            start = part.start
        if start is not None:
            held, at = [], 0
            for box in boxes_of_range(local, start, start + array.size):
                held.append((box, array.reshape(-1)[at : at + volume(box)].reshape(extents(box))))
                at += volume(box)
        elif part is not None:
            cut = {part.axis: (part.start, part.stop)}
            held = [(tuple(cut.get(axis, (0, n)) for axis, n in enumerate(local)), array)]
        else:
            held = [(whole(local), array)]
        return [(box, view) for pair in held for box, view in self._in_serial_tensor(*pair) if view.size]

    def _in_serial_tensor(self, box: Box, view: Array) -> Iterator[tuple[Box, Array]]:
        """Move a box of the local array to where it lies in the serial tensor: a box for each group."""
        if self.layout is None or not isinstance(self.layout.placement, Shard):
            yield box, view
            return
        dim, at = self.layout.placement.dim, 0  # `at`: where a span begins in the local array
        for piece in self.layout.pieces(self.shape):
            begin, length = piece[dim].start, piece[dim].stop - piece[dim].start
            low, high = max(box[dim][0], at), min(box[dim][1], at + length)
            if low < high:
                index = (slice(None),) * dim + (slice(low - box[dim][0], high - box[dim][0]),)
                yield (*box[:dim], (low - at + begin, high - at + begin), *box[dim + 1 :]), view[index]
            at += length


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole tensor."""
    return tuple((0, n) for n in shape)


def extents(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Return the number of elements in a box."""
    return math.prod(extents(box))


def intersection(a: Box, b: Box) -> Box | None:
    """Return what two boxes have in common; None for nothing."""
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return common if all(start < stop for start, stop in common) else None


def slices(box: Box, inside: Box) -> tuple[slice, ...]:
    """Return the index of `box` in an array that holds `inside`."""
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, inside))


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return the elements start … stop, in memory order, as boxes in that order: at most two an axis."""
    if start >= stop:
        return []
    if not shape:
        return [()]
    row, rest = math.prod(shape[1:]), shape[1:]  # elements of a row
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        return [
            ((first, first + 1), *box)
            for box in boxes_of_range(rest, start - first * row, stop - first * row)
        ]
    found: list[Box] = []
    if start > first * row:
        found += [((first, first + 1), *box) for box in boxes_of_range(rest, start - first * row, row)]
        first += 1
    full = stop // row
    if first < full:
        found.append(((first, full), *whole(rest)))
    if full * row < stop:
        found += [((full, full + 1), *box) for box in boxes_of_range(rest, 0, stop - full * row)]
    return found
