"""One rank's membership in a group: who it is, and what every call does before anything is sent.

A call is checked for what one rank can see by itself, recorded in the journal, and counted in the ledger.
The operations themselves are in `interface.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from minipar.backend import Array, is_gpu_array
from minipar.comm.guard import Call, Journal
from minipar.comm.ledger import Row
from minipar.errors import UsageError

UFUNCS = {"sum": "add", "max": "maximum", "min": "minimum", "prod": "multiply"}  # by op
HIGHEST_TAG = 2**15 - 2  # what every MPI allows, less one for the library's own use


def balanced(n: int, size: int) -> list[int]:
    """Split n items over `size` ranks: the first n % size ranks get one more than the others."""
    return [n // size + (rank < n % size) for rank in range(size)]


class Member:
    """A group of ranks, seen by one of them.

    Attributes:
        rank: this rank's number in the group, 0 to size - 1.
        size: how many ranks the group has.
        name: "world", or e.g. "world/dp0" after `split`.
        members: the group's ranks as numbered in the world, in the order of their rank here.
        ledger: counts of calls, elements and bytes, shared with the communicators split from this one.
    """

    def __init__(self, rank: int, members: Sequence[int], name: str, journal: Journal) -> None:
        self.rank = rank
        self.size = len(members)
        self.members = tuple(members)
        self.name = name
        self.journal = journal
        self.ledger = journal.ledger
        self._rows: dict[str, Row] = {}  # this group's ledger rows by operation
        self._number = 0  # of collectives so far
        self._splits = 0
        self._parent: Any = None  # what this one was split from; None for the world
        self._groups: list[Any] = []  # split from this one and not freed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: rank {self.rank} of {self.size}>"

    def _reduction(
        self,
        operation: str,
        x: Array,
        op: str,
        in_place: bool = False,
        background: bool = False,
        root: int | None = None,
        counts: tuple[int, ...] | None = None,
    ) -> Any:
        if op not in UFUNCS:
            raise UsageError(f"{operation}: op {op!r} is unknown; use one of {', '.join(UFUNCS)}")
        x = self._checked(operation, x, in_place)
        return self._call(operation, x, x.shape, x.size, background, op, root, counts), x

    def _call(
        self,
        operation: str,
        x: Array | None = None,
        agree: tuple[int, ...] | None = None,
        elements: int = 0,
        background: bool = False,
        op: str | None = None,
        root: int | None = None,
        counts: tuple[int, ...] | None = None,
        *,
        peer: int | None = None,
        tag: int | None = None,
        nbytes: int | None = None,
    ) -> Call:
        """Make the record of a call, enter it in the journal and count it in the ledger."""
        journal = self.journal
        call = Call()
        call.operation = operation
        call.background = background
        call.group = self.name
        if peer is None:
            self._number += 1
            call.number = journal.numbers[self.name] = self._number
        else:
            call.number = 0
        if x is None:
            call.shape = call.dtype = None
        else:
            call.shape = x.shape
            call.dtype = x.dtype
        call.agree = agree
        call.symmetric = 0
        call.op = op
        call.root = root
        call.counts = counts
        call.peer = peer
        call.tag = tag
        call.step = journal.step
        call.phase = journal.phase
        call.since = time.monotonic()
        journal.entries.append(call)
        if nbytes is None:
            nbytes = 0 if x is None else elements * x.itemsize
        row = self._rows.get(operation) or self._row(operation)
        row.calls += 1
        row.elements += elements
        row.bytes += nbytes
        return call

    def _row(self, operation: str) -> Row:
        """Return this group's ledger row of an operation, which is found once."""
        row = self._rows[operation] = self.ledger.row(operation, self.name, self.size)
        return row

    def _add(self, operation: str, calls: int, elements: int, nbytes: int) -> None:
        row = self._rows.get(operation) or self._row(operation)
        row.calls += calls
        row.elements += elements
        row.bytes += nbytes

    @staticmethod
    def _checked(operation: str, x: Array, in_place: bool = False) -> Array:
        """Return `x` if it is a C-contiguous array, a contiguous copy if that will do."""
        if type(x) is not np.ndarray and not is_gpu_array(x) and not isinstance(x, np.ndarray):
            raise UsageError(f"{operation} needs a NumPy or CuPy array, not {type(x).__name__}")
        dtype = x.dtype
        if dtype.hasobject or not dtype.isnative:
            raise UsageError(f"{operation}: dtype {x.dtype} cannot be communicated; use a plain native dtype")
        if x.flags.c_contiguous:
            return x
        if in_place:
            raise UsageError(f"{operation} works in place and needs a C-contiguous array; pass a copy")
        return x.copy(order="C")

    def _check_rank(self, name: str, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise UsageError(f"{name}={rank}: the ranks of {self.name} are 0 to {self.size - 1}")
        return rank

    @staticmethod
    def _check_tag(tag: int) -> int:
        if not 0 <= tag <= HIGHEST_TAG:
            raise UsageError(f"tag={tag}: use 0 to {HIGHEST_TAG}")
        return tag

    def _check_counts(
        self, operation: str, x: Array, counts: Sequence[int] | None, balance: bool = True
    ) -> tuple[int, ...]:
        """Return `counts` as a tuple; by default x's rows shared out (`balance`), or as many on each rank."""
        if np.ndim(x) == 0:
            raise UsageError(f"{operation} works along axis 0 and needs an array of at least one axis")
        if counts is None:
            return tuple(balanced(len(x), self.size) if balance else [len(x)] * self.size)
        counts = tuple(int(count) for count in counts)
        if len(counts) != self.size or min(counts) < 0:
            raise UsageError(f"{operation}: counts {list(counts)} must be {self.size} lengths of at least 0")
        return counts

    def _check_parts(self, operation: str, parts: Sequence[Array] | None) -> list[Array]:
        if parts is None or len(parts) != self.size:
            have = "None" if parts is None else f"{len(parts)} parts"
            raise UsageError(f"{operation} needs one part for each of the {self.size} ranks, not {have}")
        arrays = [self._checked(operation, part) for part in parts]
        if any(part.dtype != arrays[0].dtype for part in arrays):
            dtypes = sorted({str(part.dtype) for part in arrays})
            raise UsageError(f"{operation}: the parts have dtypes {', '.join(dtypes)}; use one")
        return arrays
