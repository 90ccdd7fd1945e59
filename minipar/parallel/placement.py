"""How a parameter lies over the ranks of an axis: whole on each, or cut along one dimension.

Initialisation, clipping, printing, verification and checkpoints all read it from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minipar.backend import Array, array_module
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import Module, Parameter
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

    def __post_init__(self) -> None:
        if self.groups < 1 or self.unit < 1:
            raise UsageError(f"Shard: groups {self.groups} and unit {self.unit} must be at least 1")

    def intervals(self, shape: tuple[int, ...], ranks: int) -> list[list[tuple[int, int]]]:
        """Return, for each rank, the intervals [start, stop) of `dim` that it holds, one per group."""
        block = shape[self.dim] // self.groups
        counts = [n * self.unit for n in balanced(block // self.unit, ranks)]
        bounds = [(sum(counts[:r]), sum(counts[: r + 1])) for r in range(ranks)]
        return [[(g * block + start, g * block + stop) for g in range(self.groups)] for start, stop in bounds]

    def check(self, name: str, shape: tuple[int, ...], ranks: int) -> None:
        """Refuse a shape that cannot be cut this way.

        Raises:
            UsageError: no such dimension; blocks or units that do not divide it; units (heads) that the
                ranks do not divide, naming the numbers of ranks that would.
        """
        if not 0 <= self.dim < len(shape):
            raise UsageError(f"{name} {shape} has no dimension {self.dim} to cut")
        block, rest = divmod(shape[self.dim], self.groups)
        units, more = divmod(block, self.unit)
        if rest or more:
            raise UsageError(
                f"{name} {shape}: dimension {self.dim} is not made of"
                f" {self.groups} equal blocks of units of {self.unit}"
            )
        if self.unit > 1 and units % ranks:
            fits = ", ".join(str(d) for d in range(1, units + 1) if units % d == 0)
            raise UsageError(f"{name}: {ranks} ranks do not divide {units} heads; {fits} ranks would")

    def __str__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"Shard({self.dim}{groups})"


Placement = Replicate | Shard
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """A parameter's placement as seen by one rank of an axis.

    Attributes:
        axis: the communicator of the axis.
    """

    placement: Placement
    axis: Communicator

    def pieces(self, shape: tuple[int, ...]) -> list[Slices]:
        """Return where this rank's part lies in the serial model's array, one contiguous index per group."""
        everything = tuple(slice(0, n) for n in shape)
        if not isinstance(self.placement, Shard):
            return [everything]
        dim, mine = self.placement.dim, self.placement.intervals(shape, self.axis.size)[self.axis.rank]
        return [everything[:dim] + (slice(*span),) + everything[dim + 1 :] for span in mine]

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this rank's part of an array in the serial model's shape."""
        if not isinstance(self.placement, Shard):
            return shape
        dim = self.placement.dim
        return shape[:dim] + (self.counts(shape)[self.axis.rank],) + shape[dim + 1 :]

    def local(self, whole: Array) -> Array:
        """Return this rank's part of an array in the serial model's shape (a view where possible)."""
        parts = [whole[index] for index in self.pieces(whole.shape)]
        return parts[0] if len(parts) == 1 else array_module(whole).concatenate(parts, self.placement.dim)

    def initial(self, initialiser: Initialiser, key: int, shape: tuple[int, ...]) -> Array:
        """Return this rank's part of the serial initialisation, computing nothing else of it."""
        parts = [initialiser.fill(key, shape, index) for index in self.pieces(shape)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.placement.dim)

    def counts(self, shape: tuple[int, ...]) -> list[int]:
        """Return how many indices of the cut dimension each rank holds."""
        spans = self.placement.intervals(shape, self.axis.size)
        return [sum(stop - start for start, stop in mine) for mine in spans]

    def whole(self, local: Array, shape: tuple[int, ...]) -> Array:
        """Return the array in the serial model's shape from all ranks' parts. Collective over the axis."""
        if not isinstance(self.placement, Shard):
            return local
        xp, dim = array_module(local), self.placement.dim
        rows = xp.ascontiguousarray(xp.moveaxis(local, dim, 0))
        gathered = self.axis.all_gather(rows, self.counts(shape))  # (shape[dim], ...), rank after rank
        spans = self.placement.intervals(shape, self.axis.size)
        order = xp.asarray([i for mine in spans for span in mine for i in range(*span)], dtype="int64")
        out = xp.empty(shape, dtype=local.dtype)
        xp.moveaxis(out, dim, 0)[order] = gathered
        return out


def place(p: Parameter, name: str, placement: Placement, axis: Communicator) -> None:
    """Lay a parameter over the axis: keep this rank's part of its values, or of its initialisation to come.

    Raises:
        UsageError: it is placed already, or cannot be cut this way.
    """
    if p.layout is not None:
        raise UsageError(f"{name} is placed twice, as {p.layout.placement} and as {placement}; place it once")
    if isinstance(placement, Shard):
        placement.check(name, p.global_shape, axis.size)
    p.layout = Layout(placement, axis)
    if p.is_materialized:
        p.data = p.layout.local(p.data).copy()
        p.grad = p.grad_buffer = None  # of the whole parameter
        p.version += 1


def is_sharded(p: Parameter) -> bool:
    """Whether this rank holds only a part of the parameter."""
    return p.layout is not None and isinstance(p.layout.placement, Shard)


def placement_table(params: Iterable[tuple[str, Parameter]]) -> str:
    """Return one line a parameter: name, placement, global and local shape, bytes on this rank.

    Bytes of what is not materialised yet are those of float32, its default.
    """
    rows = [("parameter", "placement", "global", "local", "bytes")]
    total = 0
    for name, p in params:
        placement = str(p.layout.placement) if p.layout is not None else "Replicate()"
        local = p.shape if p.layout is None else p.layout.local_shape(p.global_shape)
        size = math.prod(local) * (p.dtype.itemsize if p.is_materialized else 4)
        total += size
        rows.append((name, placement, str(p.global_shape), str(local), f"{size:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row[:4], widths)) for row in rows]
    return "\n".join(f"{line}  {row[4]:>{widths[4]}}" for line, row in zip(lines, rows))


def describe(model: Module) -> str:
    """Return how a distributed model lies on this rank: `print(describe(model))`; see `placement_table`."""
    return placement_table(model.named_parameters())
