"""What a rank communicated: calls, elements and bytes by operation and group.

Read this to see how tests state traffic exactly ("two all-reduces of 1,000 elements, nothing else"), and
how the volume formulas of the papers are checked against what a program really asked for.

What is counted is this rank's own calls. `elements` is the size n of the whole vector that an operation is
about, as cost formulas use it:

    all_reduce, reduce, broadcast    the array passed in
    reduce_scatter                   the array passed in (all chunks)
    all_gather                       the array that comes out (all chunks)
    gather, send                     what this rank gives
    scatter, recv                    what this rank gets
    all_to_all                       the parts passed in, the rank's own one included
    barrier, split, symmetric,       calls only
    objects

`ring_elements` is the number of elements that one rank sends when the operation runs as a ring over N ranks
(Patarasuk and Yuan 2009; for the others the average over ranks, exact for equal parts).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from minipar.backend import Array


def vector_bytes(operation: str, x: Array, out: Array | None) -> int:
    """Return the bytes of the whole vector that a reduction, broadcast or all-gather is about."""
    return out.nbytes if operation == "all_gather" and out is not None else x.nbytes


def ring_factor(operation: str, ranks: int) -> Fraction:
    """Return the elements a rank sends in the ring form of `operation`, as a multiple of its n."""
    if operation == "all_reduce":
        return Fraction(2 * (ranks - 1), ranks)
    if operation == "send":
        return Fraction(1)
    if operation == "recv":  # counted where it is sent
        return Fraction(0)
    return Fraction(ranks - 1, ranks)


class Row:
    """The running totals of one operation in one group.

    Two grids cut from the same ranks name their groups alike ("world/tp0" of 4 ranks, then of 2), and a ring over
    4 sends more than one over 2: so groups of one name and different sizes have a row each.
    """

    __slots__ = ("bytes", "calls", "elements", "group", "operation", "ranks")

    def __init__(self, operation: str, group: str, ranks: int) -> None:
        self.operation = operation
        self.group = group
        self.ranks = ranks
        self.calls = 0
        self.elements = 0
        self.bytes = 0

    @property
    def ring_elements(self) -> Fraction:
        """Elements sent by this rank if the operation runs as a ring: exact, so a fraction."""
        return self.elements * ring_factor(self.operation, self.ranks)


class Total:
    """A sum of rows: `calls`, `elements`, `bytes` (ints) and `ring_elements` (an exact Fraction)."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.calls = self.elements = self.bytes = 0
        self.ring_elements = Fraction(0)
        for row in rows:
            self.calls += row.calls
            self.elements += row.elements
            self.bytes += row.bytes
            self.ring_elements += row.ring_elements

    def __repr__(self) -> str:
        return (
            f"Total(calls={self.calls}, elements={self.elements}, bytes={self.bytes}, "
            f"ring_elements={float(self.ring_elements):g})"
        )


class Ledger:
    """One rank's counts. A communicator and everything split from it write into the same ledger."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, int], Row] = {}

    def row(self, operation: str, group: str, ranks: int) -> Row:
        """Return the row of a group of so many ranks to add to, a new one of zeros on first use."""
        key = (operation, group, ranks)
        if key not in self._rows:
            self._rows[key] = Row(operation, group, ranks)
        return self._rows[key]

    def rows(self, operation: str | None = None, group: str | None = None) -> Iterator[Row]:
        """Yield the rows with any calls, of one operation and one group where these are given."""
        for row in list(self._rows.values()):
            if row.calls and operation in (None, row.operation) and group in (None, row.group):
                yield row

    def total(self, operation: str | None = None, group: str | None = None) -> Total:
        """Return the sums over the matching rows (all of them by default)."""
        return Total(self.rows(operation, group))

    def calls(self, operation: str | None = None, group: str | None = None) -> int:
        """Return how many calls were made."""
        return self.total(operation, group).calls

    def elements(self, operation: str | None = None, group: str | None = None) -> int:
        """Return how many elements they were about."""
        return self.total(operation, group).elements

    def bytes(self, operation: str | None = None, group: str | None = None) -> int:
        """Return the same in bytes."""
        return self.total(operation, group).bytes

    def ring_elements(self, operation: str | None = None, group: str | None = None) -> Fraction:
        """Return the elements this rank sends when every operation runs as a ring."""
        return self.total(operation, group).ring_elements

    def reset(self) -> None:
        """Set every count to zero."""
        for row in self._rows.values():
            row.calls = row.elements = row.bytes = 0

    def as_dict(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """Return {(operation, group): (calls, elements, bytes)}: what a test compares with `==`."""
        return {key: (t.calls, t.elements, t.bytes) for key, t in self._by_name().items()}

    def _by_name(self) -> dict[tuple[str, str], Total]:
        """Return the sums by operation and group, groups of one name and different sizes together."""
        names = dict.fromkeys((row.operation, row.group) for row in self.rows())
        return {(operation, group): self.total(operation, group) for operation, group in names}

    def table(self) -> str:
        """Return the counts as aligned text, one line an operation and group."""
        head = ("operation", "group", "calls", "elements", "bytes", "ring elements")
        body = [
            (*key, str(t.calls), str(t.elements), str(t.bytes), f"{float(t.ring_elements):g}")
            for key, t in self._by_name().items()
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = []
        for line in [head, *body]:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    __str__ = table
