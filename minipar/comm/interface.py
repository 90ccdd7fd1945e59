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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minipar.backend import Array, array_module
from minipar.comm.guard import Call
from minipar.comm.member import Member, balanced
from minipar.errors import UsageError

__all__ = ["Communicator", "Work", "balanced"]


class Work(ABC):
    """An operation under way. The arrays given to it must not be changed before `wait` has returned."""

    @abstractmethod
    def wait(self) -> Any:
        """Block until the operation is complete and return its result; again and again the same one."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether `wait` would return at once, and help the operation along if it needs that."""


class Communicator(Member, ABC):
    """A group of ranks, seen by one of them. For its attributes see `Member`."""

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

    def symmetric(self, n: int, dtype: Any) -> Array:
        """Return zeros (n,) of the host, laid where `all_reduce_` and `all_reduce_async_` of all of it are quickest.

        Where ranks of MPI share a host and the array is not small, that is memory which all of them read and write
        (`symmetric.py`), elsewhere memory like any other. Without checks the `_async` form takes it like any other,
        too. Collective. To sum it, every rank passes what it has from the same call of this.
        """
        call = self._call("symmetric", None, (n,))
        call.shape, call.dtype = (n,), np.dtype(dtype)
        return self._symmetric(call, n)

    @property
    def has_symmetric_memory(self) -> bool:
        """Whether `symmetric` gives the group's ranks memory that all of them read and write."""
        return False

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
            raise UsageError(f"reduce_scatter: counts {list(counts)} are not {len(x)} rows in all")
        call, x = self._reduction("reduce_scatter", x, op, background=background, counts=counts)
        out = array_module(x).empty((counts[self.rank], *x.shape[1:]), x.dtype)
        if background:
            return self._start(call, x, out)
        self._collective(call, x, out)
        return out

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
        counts = self._check_counts("all_gather", x, counts, balance=False)
        if counts[self.rank] != len(x):
            raise UsageError(f"all_gather: counts {list(counts)}, but rank {self.rank} has {len(x)} rows")
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
            raise UsageError(f"scatter: only root {root} passes parts; rank {self.rank} passes None")
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

        Raises:
            CommunicationError: MPI has no room for another group; it has for some 1,000 that were not freed.
        """
        if color is not None and not (isinstance(color, int | np.integer) and color >= 0):
            raise UsageError(f"split: color {color!r} must be an integer of zero or more, or None")
        self._splits += 1
        prefix = f"{self.name}/{self._splits}." if name is None else f"{self.name}/{name}"
        group = self._split(self._call("split"), color, key, prefix)
        if group is not None:
            group._parent = self
            self._groups.append(group)
        return group

    def free(self) -> None:
        """Give up this group and all that were split from it; using one of them is an error from then on.

        Collective over the group. Only programs that go on making groups need it, see `scope`.
        """
        if self._parent is None:
            raise UsageError("free: the world lasts as long as the program; free what was split from it")
        if self not in self._parent._groups:
            self._refuse("free")
        self._parent._groups.remove(self)
        self._release()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Free, at the end of a `with` block, the groups that were split from this one inside it. Collective.

        For what makes groups again and again, each time to be done with. After an error nothing is freed: ranks may
        have got to different places.
        """
        before = list(self._groups)
        yield
        for group in [group for group in self._groups if group not in before]:
            group.free()

    def _release(self) -> None:
        for group in self._groups:  # in the order of their making, which is the same on all of their ranks
            group._release()
        self._groups.clear()
        self._free()
        self._call = self._refuse  # type: ignore[method-assign]  # which costs groups in use nothing

    def _refuse(self, operation: str, *_: Any, **__: Any) -> Call:
        raise UsageError(f"{operation}: the group {self.name} was freed")

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Return a copy of `root`'s object (anything that pickles). For settings and names, not for data."""
        call = self._call("broadcast_object", root=self._check_rank("root", root))
        return self._broadcast_object(call, obj)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the list of every rank's object (anything that pickles)."""
        return self._all_gather_object(self._call("all_gather_object"), obj)

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End all ranks: this one raises CommunicationError, the others RankFailed; an MPI job ends."""

    # Place and time -----------------------------------------------------------------------------------

    def mark(self, step: int | None = None, phase: str | None = None) -> None:
        """Say where the program is, for error messages and the record of communications.

        What is not given stays, but a new step ends the phase of the step before.
        """
        self.journal.move(step, phase)

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

    def _symmetric(self, call: Call, n: int) -> Array:
        """Return zeros (n,) of the call's dtype: memory of its own, unless the engine can do better."""
        return np.zeros(n, call.dtype)

    def _free(self) -> None:
        """Release what the engine holds for this group."""

    @abstractmethod
    def _broadcast_object(self, call: Call, obj: Any) -> Any: ...

    @abstractmethod
    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]: ...
