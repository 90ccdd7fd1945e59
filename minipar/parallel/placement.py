"""How a parameter lies over the ranks of an axis: whole on each, or cut along one dimension.

Initialisation, clipping, printing, verification and checkpoints all read it from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipar.backend import Array, array_module
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import Parameter
from minipar.nn.init import Initialiser


@dataclass(frozen=True)
class Replicate:
    """The whole parameter on every rank, always bitwise the same."""

    def intervals(self, shape: tuple[int, ...], ranks: int) -> list[list[tuple[int, int]]]:
        """Return, for each rank, the intervals of dimension 0 that it holds: all of it."""
        return [[(0, shape[0] if shape else 1)]] * ranks

    @property
    def dim(self) -> int:
        return 0

    def __str__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Shard:
    """Cut along `dim` into contiguous pieces, as equal as whole units allow (the first ranks get one more).

    Args:
        dim: the dimension that is cut.
        groups: the dimension is this many blocks laid one after the other, each of which is cut by itself (3
            for a fused query-key-value weight, so that every rank has its heads of all three).
        unit: indices that stay together (the size of a head).
    """

    dim: int
    groups: int = 1
    unit: int = 1

    def intervals(self, shape: tuple[int, ...], ranks: int) -> list[list[tuple[int, int]]]:
        """Return, for each rank, the intervals [start, stop) of `dim` that it holds, one per group."""
        block = shape[self.dim] // self.groups
        counts = [n * self.unit for n in balanced(block // self.unit, ranks)]
        stops = np.cumsum(counts).tolist()
        return [
            [(g * block + stop - n, g * block + stop) for g in range(self.groups)] for n, stop in zip(counts, stops)
        ]

    def check(self, name: str, shape: tuple[int, ...], ranks: int) -> None:
        """Refuse a shape that cannot be cut this way.

        Raises:
            UsageError: blocks or units that do not divide the dimension; units (heads) that the ranks do not divide.
        """
        if not 0 <= self.dim < len(shape):
            raise UsageError(f"{name} {shape} has no dimension {self.dim} to cut")
        n = shape[self.dim]
        if n % (self.groups * self.unit):
            raise UsageError(f"{name} {shape}: dimension {self.dim} is no {self.groups} blocks of units of {self.unit}")
        units = n // self.groups // self.unit
        if self.unit > 1 and units % ranks:
            fits = [d for d in range(1, units + 1) if units % d == 0]
            raise UsageError(f"{name}: {units} heads cannot be divided among {ranks} ranks; {fits} ranks would do")

    def __str__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"Shard({self.dim}{groups})"


Placement = Replicate | Shard


@dataclass(frozen=True)
class Layout:
    """A parameter's placement as seen by one rank of an axis.

    Attributes:
        axis: the communicator of the axis.
    """

    placement: Placement
    axis: Communicator

    def local(self, whole: Array) -> Array:
        """Return this rank's part of an array in the serial model's shape (a view where possible)."""
        pieces = []
        for start, stop in self.placement.intervals(whole.shape, self.axis.size)[self.axis.rank]:
            index = [slice(None)] * whole.ndim
            if whole.ndim:
                index[self.placement.dim] = slice(start, stop)
            pieces.append(whole[tuple(index)])
        return pieces[0] if len(pieces) == 1 else array_module(whole).concatenate(pieces, axis=self.placement.dim)

    def initial(self, initialiser: Initialiser, key: int, shape: tuple[int, ...]) -> Array:
        """Return this rank's part of the serial initialisation, computing nothing else of it."""
        dim = self.placement.dim
        pieces = []
        for start, stop in self.placement.intervals(shape, self.axis.size)[self.axis.rank]:
            part = [slice(0, n) for n in shape]
            if shape:
                part[dim] = slice(start, stop)
            pieces.append(initialiser.fill(key, shape, tuple(part)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=dim)

    def counts(self, shape: tuple[int, ...]) -> list[int]:
        """Return how many indices of the cut dimension each rank holds."""
        return [sum(stop - start for start, stop in spans) for spans in self.placement.intervals(shape, self.axis.size)]

    def whole(self, local: Array, shape: tuple[int, ...]) -> Array:
        """Return the array in the serial model's shape from all ranks' parts. All ranks of the axis call it."""
        if isinstance(self.placement, Replicate):
            return local
        parts: Sequence[Array] = self.axis.all_gather_object(local)
        out = np.empty(shape, dtype=local.dtype)
        for spans, part in zip(self.placement.intervals(shape, self.axis.size), parts):
            at = 0
            for start, stop in spans:
                index: list[slice] = [slice(None)] * len(shape)
                source = list(index)
                index[self.placement.dim] = slice(start, stop)
                source[self.placement.dim] = slice(at, at + stop - start)
                out[tuple(index)] = part[tuple(source)]
                at += stop - start
        return out


def place(p: Parameter, name: str, placement: Placement, axis: Communicator) -> None:
    """Lay a parameter over the axis: keep this rank's part of its values, or of its initialisation to come.

    Raises:
        UsageError: it is placed already, or cannot be cut this way.
    """
    if p.layout is not None:
        raise UsageError(f"{name} is placed twice: {p.layout.placement} and {placement}; the plan names it twice")
    if isinstance(placement, Shard):
        placement.check(name, p.global_shape, axis.size)
    p.layout = Layout(placement, axis)
    if p.is_materialized:
        p.data = p.layout.local(p.data).copy()
        p.version += 1


def is_sharded(p: Parameter) -> bool:
    """Whether this rank holds only a part of the parameter."""
    return p.layout is not None and isinstance(p.layout.placement, Shard)


def placement_table(params: Sequence[tuple[str, Parameter]]) -> str:
    """Return one line a parameter: name, placement, global and local shape, bytes on this rank."""
    rows = [("parameter", "placement", "global", "local", "bytes")]
    for name, p in params:
        placement = str(p.layout.placement) if p.layout is not None else "Replicate()"
        size = f"{p.data.nbytes:,}" if p.is_materialized else "-"
        rows.append((name, placement, str(p.global_shape), str(p.shape), size))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)
