"""How a parameter lies over the ranks of an axis: whole on each, or cut along one dimension.

Initialisation, clipping, printing, verification and checkpoints all read it from here. What ZeRO, stages of
blocks and owners add to that, a strategy says of each of its parameters (`Place`).
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
                ranks do not divide. Names the sizes, or the numbers of ranks, that would do.
        """
        if not 0 <= self.dim < len(shape):
            raise UsageError(f"{name} {shape} has no dimension {self.dim} to cut")
        block, rest = divmod(shape[self.dim], self.groups)
        units, more = divmod(block, self.unit)
        if rest or more:
            size, step = shape[self.dim], self.groups * self.unit
            sizes = [n for n in (size // step * step, -(-size // step) * step) if n]
            groups = [n for n in range(1, size + 1) if size % (n * self.unit) == 0]
            would = " or ".join(map(str, sizes))
            raise UsageError(
                f"{name} {shape}: dimension {self.dim} is not made of {self.groups} equal blocks of units of"
                f" {self.unit}; a size of {would} would be"
                + (f", and {size} of {', '.join(map(str, groups))} blocks" if groups else "")
            )
        if self.unit > 1 and units % ranks:
            fits = ", ".join(str(d) for d in range(1, units + 1) if units % d == 0)
            raise UsageError(f"{name}: {ranks} ranks do not divide {units} heads; {fits} ranks would")

    def __str__(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"Shard({self.dim}{groups})"


@dataclass(frozen=True)
class Flat:
    """Elements start … stop (exclusive), in memory order, of what tensor parallelism leaves this rank: ZeRO's."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"Flat({self.start}:{self.stop})"


@dataclass(frozen=True)
class Stage:
    """On the ranks that run these stages of blocks and on no others; a tied weight has a copy on several."""

    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"Stage({', '.join(map(str, self.numbers))})"


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
        if not isinstance(self.placement, Shard):
            return whole
        parts = [whole[index] for index in self.pieces(whole.shape)]
        return parts[0] if len(parts) == 1 else array_module(whole).concatenate(parts, self.placement.dim)

    def initial(self, initialiser: Initialiser, key: int, shape: tuple[int, ...]) -> Array:
        """Return this rank's part of the serial initialisation, computing nothing else of it."""
        if not isinstance(self.placement, Shard):
            return initialiser.fill(key, shape)
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


def check_place(p: Parameter, name: str, placement: Placement, ranks: int) -> None:
    """Refuse a placement that cannot be; nothing is changed.

    Raises:
        UsageError: the parameter is cut already, or cannot be cut this way.
    """
    if p.layout is not None and is_sharded(p):
        raise UsageError(f"{name} is placed twice, as {p.layout.placement} and as {placement}; place it once")
    if isinstance(placement, Shard):
        placement.check(name, p.global_shape, ranks)


def place(p: Parameter, name: str, placement: Placement, axis: Communicator) -> None:
    """Lay a parameter over the axis: keep this rank's part of its values, or of its initialisation to come.

    Raises:
        UsageError: see `check_place`.
    """
    check_place(p, name, placement, axis.size)
    p.layout = Layout(placement, axis)
    if p.is_materialized:
        p.data = p.layout.local(p.data).copy()
        p.grad = p.grad_buffer = None  # of the whole parameter
        p.version += 1


def is_sharded(p: Parameter) -> bool:
    """Whether this rank holds only a part of the parameter."""
    return p.layout is not None and isinstance(p.layout.placement, Shard)


@dataclass(frozen=True)
class Place:
    """How a parameter lies on the whole mesh, as one rank sees it.

    Attributes:
        placements: the outermost first.
        here: whether this rank is among those that have any of it.
        steps: which part this rank's optimizer steps; "" for all that is here.
        master: bytes of a copy of that part, kept beside the parameter for the optimizer.
    """

    placements: tuple[Replicate | Shard | Flat | Stage, ...]
    here: bool = True
    steps: str = ""
    master: int = 0

    def __str__(self) -> str:
        return " ".join(map(str, self.placements))


def place_of(p: Parameter) -> Place:
    """Return what the parameter's strategy says, or else what a tensor-parallel plan has made of it."""
    if p.place is not None:
        return p.place  # type: ignore[no-any-return]
    return Place((p.layout.placement if p.layout is not None else Replicate(),))


def held_shape(p: Parameter) -> tuple[int, ...] | None:
    """Return the shape in which this rank keeps the parameter between steps; None if it has nothing of it."""
    place = place_of(p)
    if not place.here:
        return None
    last = place.placements[-1]
    if isinstance(last, Flat):
        return (last.stop - last.start,)
    return p.global_shape if p.layout is None else p.layout.local_shape(p.global_shape)


def held_bytes(p: Parameter) -> int:
    """Return the bytes of its values that this rank keeps between steps, an owner's copy included.

    Bytes of what is not materialised yet are those of float32, its default.
    """
    shape = held_shape(p)
    if shape is None:
        return 0
    itemsize = p.dtype.itemsize if p.is_materialized or p.sharded is not None else 4
    return math.prod(shape) * itemsize + place_of(p).master


def placement_table(params: Iterable[tuple[str, Parameter]]) -> str:
    """Return one line a parameter: name, placement, global shape, shape and bytes on this rank, and the total.

    A further column says which part this rank's optimizer steps, where that is not simply all that is here.
    """
    rows = [("parameter", "placement", "global", "local", "stepped here", "bytes")]
    total, partly = 0, False
    for name, p in params:
        place, shape = place_of(p), held_shape(p)
        local = "-" if shape is None else str(shape)
        total, partly = total + held_bytes(p), partly or bool(place.steps)
        steps = place.steps or ("-" if shape is None else "all")
        rows.append((name, str(place), str(p.global_shape), local, steps, f"{held_bytes(p):,}"))
    rows.append(("total", "", "", "", "", f"{total:,}"))
    shown = (0, 1, 2, 3, 4) if partly else (0, 1, 2, 3)
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join(f"{row[i]:<{widths[i]}}" for i in shown) for row in rows]
    return "\n".join(f"{line}  {row[5]:>{widths[5]}}" for line, row in zip(lines, rows))


def describe(model: Module) -> str:
    """Return how a distributed model lies on this rank: `print(describe(model))`; see `placement_table`."""
    return placement_table(model.named_parameters())
