"""The communicator: everything a parallel program can say to its other ranks, on two engines.

Read this to know what each operation takes, gives and promises. Arrays go in, arrays come out (NumPy or
CuPy; never a Tensor); names are those of `torch.distributed`. A program written against `Communicator` runs
unchanged on threads (`minipar.launch`), under `mpirun`, and alone.

Four promises hold everywhere:
- A result belongs to its receiver: fresh memory that no later operation writes into. Only the forms whose
  names end in `_` write into the array they are given, which must be C-contiguous.
- A result has the dtype of its input. Reductions run in a fixed order, so they are repeatable, and every
  rank holds bitwise the same result.
- The ranks of a group call its collectives in the same order, with arguments that agree. With checks on
  (threads: always) anything else is a `MismatchError` on every rank before any data moves.
- Empty arrays and groups of one rank are legal in every operation.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from minipar.backend import Array, array_module, is_gpu_array
from minipar.comm.guard import Call, Journal
from minipar.errors import UsageError

OPS = ("sum", "max", "min", "prod")


def balanced(n: int, size: int) -> list[int]:
    """Split n items over `size` ranks: the first n % size ranks get one more than the others."""
    return [n // size + (rank < n % size) for rank in range(size)]


class Work(ABC):
    """An operation under way. The arrays given to it must not be changed before `wait` has returned."""

    @abstractmethod
    def wait(self) -> Any:
        """Block until the operation is complete and return its result; again and again the same one."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether `wait` would return at once, and help the operation along if it needs that."""


class Communicator(ABC):
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
        self._rows: dict[str, Any] = {}  # this group's ledger rows by operation
        self._number = 0  # of collectives so far
        self._splits = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: rank {self.rank} of {self.size}>"

    # Reductions ---------------------------------------------------------------------------------------

    def all_reduce(self, x: Array, op: str = "sum") -> Array:
        """Return the elementwise sum (max, min, prod) of every rank's `x`; the same shape on all ranks."""
        call, x = self._reduction("all_reduce", x, op)
        out = np.empty_like(x)
        self._collective(call, x, out)
        return out

    def all_reduce_(self, x: Array, op: str = "sum") -> Array:
        """`all_reduce` written into `x`, which is also returned."""
        call, x = self._reduction("all_reduce", x, op, in_place=True)
        self._collective(call, x, x)
        return x

    def all_reduce_async(self, x: Array, op: str = "sum") -> Work:
        """Begin an `all_reduce`; `wait()` returns the result."""
        call, x = self._reduction("all_reduce", x, op, background=True)
        return self._start(call, x, np.empty_like(x))

    def all_reduce_async_(self, x: Array, op: str = "sum") -> Work:
        """Begin an `all_reduce_`; `x` holds the result after `wait()`."""
        call, x = self._reduction("all_reduce", x, op, background=True, in_place=True)
        return self._start(call, x, x)

    def reduce(self, x: Array, root: int = 0, op: str = "sum") -> Array | None:
        """Return the elementwise sum (max, min, prod) of every rank's `x` on `root`, None elsewhere."""
        call, x = self._reduction("reduce", x, op, root=self._check_rank("root", root))
        out = np.empty_like(x) if self.rank == root else None
        self._collective(call, x, out)
        return out

    def reduce_scatter(self, x: Array, counts: Sequence[int] | None = None, op: str = "sum") -> Array:
        """Sum `x` over the ranks and return this rank's chunk of it along axis 0.

        Args:
            x: (n, ...), the same shape on all ranks.
            counts: rows for each rank, n in all; by default `balanced(n, size)`.

        Returns:
            (counts[rank], ...), fresh.
        """
        return self._reduce_scatter(x, counts, op, background=False)

    def reduce_scatter_async(self, x: Array, counts: Sequence[int] | None = None, op: str = "sum") -> Work:
        """Begin a `reduce_scatter`; `wait()` returns the chunk."""
        return self._reduce_scatter(x, counts, op, background=True)

    def _reduce_scatter(self, x: Array, counts: Sequence[int] | None, op: str, background: bool) -> Any:
        counts = self._check_counts("reduce_scatter", x, counts)
        if sum(counts) != len(x):
            raise UsageError(f"reduce_scatter: counts {list(counts)} sum to {sum(counts)}, x has {len(x)} rows")
        call, x = self._reduction("reduce_scatter", x, op, background=background, counts=counts)
        out = array_module(x).empty((counts[self.rank], *x.shape[1:]), x.dtype)
        if background:
            return self._start(call, x, out)
        self._collective(call, x, out)
        return out

    def _reduction(self, operation: str, x: Array, op: str, in_place: bool = False, **rest: Any) -> Any:
        if op not in OPS:
            raise UsageError(f"{operation}: op {op!r} is unknown; use one of {', '.join(OPS)}")
        x = self._checked(operation, x, in_place)
        return self._call(operation, x, x.shape, x.size, op=op, **rest), x

    # Copies -------------------------------------------------------------------------------------------

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """Return a copy of `root`'s array. Every rank passes one of the same shape and dtype."""
        out = self._checked("broadcast", x).copy()
        return self.broadcast_(out, root)

    def broadcast_(self, x: Array, root: int = 0) -> Array:
        """Fill `x` with `root`'s `x`, and return it."""
        call = self._broadcast(x, root, background=False)
        self._collective(call, x, x)
        return x

    def broadcast_async(self, x: Array, root: int = 0) -> Work:
        """Begin a `broadcast`; `wait()` returns the copy."""
        out = self._checked("broadcast", x).copy()
        return self._start(self._broadcast(out, root, background=True), out, out)

    def _broadcast(self, x: Array, root: int, background: bool) -> Call:
        root = self._check_rank("root", root)
        x = self._checked("broadcast", x, in_place=True)
        return self._call("broadcast", x, x.shape, x.size, root=root, background=background)

    def all_gather(self, x: Array, counts: Sequence[int] | None = None) -> Array:
        """Return every rank's `x`, joined along axis 0 in the order of ranks.

        Args:
            x: (counts[rank], ...); trailing axes are the same on all ranks.
            counts: rows of each rank; by default every rank has as many as this one.

        Returns:
            (sum(counts), ...), fresh.
        """
        return self._all_gather(x, counts, background=False)

    def all_gather_async(self, x: Array, counts: Sequence[int] | None = None) -> Work:
        """Begin an `all_gather`; `wait()` returns the joined array."""
        return self._all_gather(x, counts, background=True)

    def _all_gather(self, x: Array, counts: Sequence[int] | None, background: bool) -> Any:
        given = counts is not None
        counts = self._check_counts("all_gather", x, counts if given else [len(x)] * self.size)
        if counts[self.rank] != len(x):
            raise UsageError(
                f"all_gather: counts {list(counts)} give rank {self.rank} {counts[self.rank]} rows, x has {len(x)}"
            )
        x = self._checked("all_gather", x)
        out = array_module(x).empty((sum(counts), *x.shape[1:]), x.dtype)
        agree = x.shape[1:] if given else x.shape
        call = self._call("all_gather", x, agree, out.size, counts=counts, background=background)
        if background:
            return self._start(call, x, out)
        self._collective(call, x, out)
        return out

    # Lists of arrays ----------------------------------------------------------------------------------

    def gather(self, x: Array, root: int = 0) -> list[Array] | None:
        """Return the list of every rank's `x` on `root`, None elsewhere. Shapes may differ, dtypes not."""
        x = self._checked("gather", x)
        root = self._check_rank("root", root)
        return self._gather(self._call("gather", x, None, x.size, root=root), x)

    def scatter(self, parts: Sequence[Array] | None, root: int = 0) -> Array:
        """Return a copy of `root`'s `parts[rank]`. Shapes may differ; other ranks pass None."""
        root = self._check_rank("root", root)
        if self.rank == root:
            parts = self._check_parts("scatter", parts)
        elif parts is not None:
            raise UsageError(f"scatter: only the root (rank {root}) passes parts; rank {self.rank} passes None")
        call = self._call("scatter", None, None, 0, root=root)
        out = self._scatter(call, parts)
        self._add("scatter", 0, out.size, out.nbytes)
        return out

    def all_to_all(self, parts: Sequence[Array]) -> list[Array]:
        """Send `parts[j]` to rank j and return what every rank sent here. Shapes may differ, dtypes not."""
        parts = self._check_parts("all_to_all", parts)
        call = self._call("all_to_all", parts[0], None, sum(part.size for part in parts))
        call.shape = None
        return self._all_to_all(call, parts)

    # Point to point -----------------------------------------------------------------------------------

    def send(self, x: Array, dest: int, tag: int = 0) -> None:
        """Send `x` to `dest`. With checks on it returns when the receive has begun (a synchronous send)."""
        self.isend(x, dest, tag).wait()

    def isend(self, x: Array, dest: int, tag: int = 0) -> Work:
        """Begin a `send`."""
        x = self._checked("send", x)
        dest, tag = self._check_rank("dest", dest), self._check_tag(tag)
        return self._isend(self._call("send", x, None, x.size, peer=dest, tag=tag), x)

    def recv(self, source: int, tag: int = 0, shape: Sequence[int] | None = None, dtype: Any = None) -> Array:
        """Return the next array that `source` sent here with `tag`, in fresh memory.

        Shape and dtype travel with every message, so they need not be given. Where they are (both), the
        receive can begin before the message is announced, and another shape or dtype is a MismatchError.
        """
        return self.irecv(source, tag, shape, dtype).wait()

    def irecv(self, source: int, tag: int = 0, shape: Sequence[int] | None = None, dtype: Any = None) -> Work:
        """Begin a `recv`; `wait()` returns the array."""
        if (shape is None) != (dtype is None):
            raise UsageError("recv: give both shape and dtype, or neither")
        source, tag = self._check_rank("source", source), self._check_tag(tag)
        call = self._call("recv", None, None, 0, peer=source, tag=tag)
        if shape is not None:
            call.shape, call.dtype = tuple(shape), np.dtype(dtype)
        return self._irecv(call, None)

    def recv_(self, out: Array, source: int, tag: int = 0) -> Array:
        """Receive into `out`, whose shape and dtype the message must have, and return it."""
        out = self._checked("recv_", out, in_place=True)
        source, tag = self._check_rank("source", source), self._check_tag(tag)
        call = self._call("recv", out, None, 0, nbytes=0, peer=source, tag=tag)
        return self._irecv(call, out).wait()

    # The group ----------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Return when every rank of the group has called it."""
        self._barrier(self._call("barrier"))

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        """Return a communicator of the ranks that pass the same `color`; None for those that pass None.

        Args:
            color: zero or more, or None to be in no group.
            key: ranks are ordered by (key, rank here).
            name: what the groups are called: "dp" names them "world/dp0", "world/dp1" and so on, by colour.
                By default the how-manieth split it is: "world/1.0".
        """
        if color is not None and not (isinstance(color, int | np.integer) and color >= 0):
            raise UsageError(f"split: color {color!r} must be an integer of zero or more, or None")
        self._splits += 1
        prefix = f"{self.name}/{self._splits}." if name is None else f"{self.name}/{name}"
        return self._split(self._call("split"), color, key, prefix)

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Return a copy of `root`'s object (anything that pickles). For settings and names, not for data."""
        return self._broadcast_object(self._call("broadcast_object", root=self._check_rank("root", root)), obj)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the list of every rank's object (anything that pickles)."""
        return self._all_gather_object(self._call("all_gather_object"), obj)

    def abort(self, reason: str) -> None:
        """End all ranks: this one raises CommunicationError, the others RankFailed; under MPI the job ends."""
        raise NotImplementedError

    # Place and time -----------------------------------------------------------------------------------

    def mark(self, step: int | None = None, phase: str | None = None) -> None:
        """Say where the program is, for error messages and the record of communications.

        What is not given stays, but a new step ends the phase of the step before.
        """
        if step is not None:
            self.journal.step = step
            self.journal.phase = phase
        elif phase is not None:
            self.journal.phase = phase

    def compute(self, seconds: float) -> None:
        """Declare computation of so many seconds of virtual time; in real time it takes its own time."""

    def now(self) -> float:
        """Return seconds: virtual time where `launch` was given a clock, else the real monotonic clock."""
        return time.monotonic()

    # What an engine provides --------------------------------------------------------------------------

    @abstractmethod
    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        """Run all_reduce, reduce, reduce_scatter, all_gather (x to out) or broadcast (x is out)."""

    @abstractmethod
    def _start(self, call: Call, x: Array, out: Array) -> Work:
        """Begin the same; the work's result is `out`."""

    @abstractmethod
    def _gather(self, call: Call, x: Array) -> list[Array] | None: ...

    @abstractmethod
    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array: ...

    @abstractmethod
    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]: ...

    @abstractmethod
    def _isend(self, call: Call, x: Array) -> Work: ...

    @abstractmethod
    def _irecv(self, call: Call, out: Array | None) -> Work: ...

    @abstractmethod
    def _barrier(self, call: Call) -> None: ...

    @abstractmethod
    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None: ...

    @abstractmethod
    def _broadcast_object(self, call: Call, obj: Any) -> Any: ...

    @abstractmethod
    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]: ...

    # Arguments ----------------------------------------------------------------------------------------

    def _call(
        self,
        operation: str,
        x: Array | None = None,
        agree: tuple[int, ...] | None = None,
        elements: int = 0,
        *,
        background: bool = False,
        op: str | None = None,
        root: int | None = None,
        counts: tuple[int, ...] | None = None,
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
            call.number = self._number
        else:
            call.number = 0
        if x is None:
            call.shape = call.dtype = None
        else:
            call.shape = x.shape
            call.dtype = x.dtype
        call.agree = agree
        call.op = op
        call.root = root
        call.counts = counts
        call.peer = peer
        call.tag = tag
        call.step = journal.step
        call.phase = journal.phase
        call.since = time.monotonic()
        journal.entries.append(call)
        if x is not None and nbytes is None:
            nbytes = elements * x.itemsize
        self._add(operation, 1, elements, nbytes or 0)
        return call

    def _add(self, operation: str, calls: int, elements: int, nbytes: int) -> None:
        row = self._rows.get(operation)
        if row is None:
            row = self._rows[operation] = self.ledger.row(operation, self.name, self.size)
        row.calls += calls
        row.elements += elements
        row.bytes += nbytes

    @staticmethod
    def _checked(operation: str, x: Array, in_place: bool = False) -> Array:
        """Return `x` if it is a C-contiguous array, a contiguous copy if that will do."""
        if type(x) is not np.ndarray and not is_gpu_array(x) and not isinstance(x, np.ndarray):
            raise UsageError(f"{operation} needs a NumPy or CuPy array, not {type(x).__name__}")
        if x.dtype.hasobject or not x.dtype.isnative:
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
        if not 0 <= tag < 2**20:
            raise UsageError(f"tag={tag}: use 0 to {2**20 - 1}")
        return tag

    def _check_counts(self, operation: str, x: Array, counts: Sequence[int] | None) -> tuple[int, ...]:
        if np.ndim(x) == 0:
            raise UsageError(f"{operation} works along axis 0 and needs an array of at least one axis")
        counts = tuple(balanced(len(x), self.size) if counts is None else map(int, counts))
        if len(counts) != self.size or min(counts) < 0:
            raise UsageError(f"{operation}: counts {list(counts)} must be {self.size} lengths of zero or more")
        return counts

    def _check_parts(self, operation: str, parts: Sequence[Array] | None) -> list[Array]:
        if parts is None or len(parts) != self.size:
            have = "None" if parts is None else f"{len(parts)} parts"
            raise UsageError(f"{operation} needs one part for each of the {self.size} ranks, not {have}")
        arrays = [self._checked(operation, part) for part in parts]
        if any(part.dtype != arrays[0].dtype for part in arrays):
            raise UsageError(f"{operation}: the parts have dtypes {sorted({str(a.dtype) for a in arrays})}; use one")
        return arrays
