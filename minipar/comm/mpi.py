"""Ranks as processes under `mpirun`: the real engine, from a laptop to a cluster, through mpi4py.

Arrays go to MPI as they are, by the buffer calls; the `_async` forms are MPI's nonblocking collectives. With
checks on, each collective first compares a 64-bit digest of its signature over the group (one small
all-reduce on a communicator of its own), and sends are synchronous. An `_async` collective is checked in the
background: its data moves once every rank has issued the same, and never overtakes an earlier one.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from minipar.backend import Array
from minipar.comm.guard import Call, Journal, mismatch
from minipar.comm.interface import Communicator, Work
from minipar.comm.staging import Staged, stage, unstage
from minipar.errors import CommunicationError, MismatchError, UsageError

OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN, "prod": MPI.PROD}
BOOL_OPS = {"sum": MPI.LOR, "max": MPI.LOR, "min": MPI.LAND, "prod": MPI.LAND}
NATIVE = frozenset("?bBhHiIlLqQefdgFDG")  # dtypes that MPI knows; others travel as bytes
HEADER = 192  # bytes of the message that announces an array: its dtype and shape
EXPLAIN_TAG = 2**15 - 1  # on the side communicator, above the user's tags


class MPICommunicator(Communicator):
    """One rank's communicator in a group of processes; made by `world` and by `split`.

    Attributes:
        checks: whether signatures are compared and sends are synchronous; the same on all ranks.
    """

    def __init__(self, comm: Any, members: Sequence[int], name: str, journal: Journal, checks: bool) -> None:
        super().__init__(comm.Get_rank(), members, name, journal)
        self.checks = checks
        self._mpi = comm
        self._side = comm.Dup()  # signatures and headers, which must not mix with data
        self._queue: deque[MPIWork] = deque()  # collectives whose data has not been started
        self._incoming: dict[tuple[int, int], deque[MPIReceive]] = {}  # receives whose data is not posted

    # Collectives --------------------------------------------------------------------------------------

    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        self.journal.wait_begins(call)
        if self._queue:
            self._start_queued()
        if self.checks:
            self._verify(call)
        if type(x) is not np.ndarray:
            staged = stage(x, out)
            self._run(call, staged.x, staged.out)
            unstage(staged)
        else:
            self._run(call, x, out)
        self.journal.wait_ends()

    def _run(self, call: Call, x: Array, out: Array | None) -> None:
        name, arguments = self._arguments(call, x, out)
        getattr(self._mpi, name)(*arguments)

    def _arguments(self, call: Call, x: Array, out: Array | None) -> tuple[str, tuple[Any, ...]]:
        """Return the name of MPI's blocking call and its arguments."""
        operation = call.operation
        if operation == "all_reduce":
            return "Allreduce", (MPI.IN_PLACE if x is out else x, out, self._op(call))
        if operation == "reduce":
            return "Reduce", (x, out, self._op(call), call.root)
        if operation == "reduce_scatter":
            assert call.counts is not None
            return "Reduce_scatter", (x, out, _elements(x, call.counts), self._op(call))
        if operation == "broadcast":
            return "Bcast", (_wire(x), call.root)
        assert operation == "all_gather" and call.counts is not None and out is not None
        x, out = _wire(x), _wire(out)
        return "Allgatherv", (x, (out, _parts(out, call.counts)))

    def _op(self, call: Call) -> Any:
        if call.dtype.char not in NATIVE:
            raise UsageError(f"{call.operation}: MPI cannot reduce {call.dtype}; convert to float32 first")
        return (BOOL_OPS if call.dtype == bool else OPS)[call.op or "sum"]

    def _start(self, call: Call, x: Array, out: Array) -> Work:
        staged = stage(x, out) if type(x) is not np.ndarray else Staged(x, out, None)
        name, arguments = self._arguments(call, staged.x, staged.out)
        function = getattr(self._mpi, "I" + name.lower())

        def result() -> Array:
            unstage(staged)
            return out

        work = MPIWork(self, call, lambda: function(*arguments), result)
        self._queue.append(work)
        self._progress()
        return work

    # Checks -------------------------------------------------------------------------------------------

    def _verify(self, call: Call) -> None:
        check = self._begin_check(call)
        check[0].Wait()
        self._end_check(call, check)

    def _begin_check(self, call: Call) -> tuple[Any, Array, Array]:
        """Begin the comparison of a call over the group: the maximum of the digest and of its negative."""
        digest = _digest(call.signature)
        mine = np.array((digest, -digest), np.int64)
        all_ = np.empty_like(mine)
        return self._side.Iallreduce(mine, all_, MPI.MAX), all_, mine

    def _end_check(self, call: Call, check: tuple[Any, Array, Array]) -> None:
        highest, negative = check[1].tolist()
        if highest == -negative:  # maximum and minimum are equal
            return
        mine = (call.signature, str(call))
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = [self._side.isend(mine, rank, EXPLAIN_TAG) for rank in others]
        calls = {self.members[rank]: self._side.recv(source=rank, tag=EXPLAIN_TAG) for rank in others}
        MPI.Request.waitall(sends)
        calls[self.members[self.rank]] = mine
        self.journal.wait_ends()
        raise MismatchError(mismatch(calls))

    def _progress(self) -> None:
        """Start the data of every queued collective whose check has come back, in the order of issue."""
        while self._queue and self._queue[0].start(block=False):
            self._queue.popleft()

    def _start_queued(self) -> None:
        while self._queue:
            self._queue[0].start(block=True)
            self._queue.popleft()

    # Lists, objects, groups ---------------------------------------------------------------------------

    def _agree(self, call: Call) -> None:
        """What every operation below does first: start what is queued, compare signatures."""
        self.journal.wait_begins(call)
        self._start_queued()
        if self.checks:
            self._verify(call)

    def _gather(self, call: Call, x: Array) -> list[Array] | None:
        self._agree(call)
        host = stage(x, None).x
        shapes = self._mpi.gather(host.shape, call.root)
        send = _wire(host.reshape(-1))
        parts = None
        if shapes is None:
            self._mpi.Gatherv(send, None, call.root)
        else:
            parts = [np.empty(shape, host.dtype) for shape in shapes]
            flat = np.empty(sum(part.size for part in parts), host.dtype)
            counts = [part.size * (send.itemsize and host.itemsize // send.itemsize) for part in parts]
            self._mpi.Gatherv(send, (_wire(flat), counts), call.root)
            parts = _cut(flat, shapes, like=x)
        self.journal.wait_ends()
        return parts

    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array:
        self._agree(call)
        if parts is None:
            shape, dtype, on_gpu = self._mpi.scatter(None, call.root)
            out = np.empty(shape, dtype)
            self._mpi.Scatterv(None, _wire(out.reshape(-1)), call.root)
        else:
            on_gpu = type(parts[0]) is not np.ndarray
            hosts = [stage(part, None).x for part in parts]
            self._mpi.scatter([(part.shape, part.dtype, on_gpu) for part in hosts], call.root)
            flat = _wire(np.concatenate([part.reshape(-1) for part in hosts]))
            out = np.empty_like(hosts[self.rank])
            counts = [part.nbytes // flat.itemsize for part in hosts]
            self._mpi.Scatterv((flat, counts), _wire(out.reshape(-1)), call.root)
        self.journal.wait_ends()
        return _device(out, on_gpu)

    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]:
        self._agree(call)
        hosts = [stage(part, None).x for part in parts]
        shapes = self._mpi.alltoall([part.shape for part in hosts])
        flat = np.concatenate([part.reshape(-1) for part in hosts])
        out = np.empty(sum(int(np.prod(shape)) for shape in shapes), flat.dtype)
        send, receive = _wire(flat), _wire(out)
        unit = flat.itemsize // send.itemsize
        counts = [int(np.prod(shape)) * unit for shape in shapes]
        self._mpi.Alltoallv((send, [part.size * unit for part in hosts]), (receive, counts))
        self.journal.wait_ends()
        return _cut(out, shapes, like=parts[0])

    def _barrier(self, call: Call) -> None:
        self._agree(call)
        self._mpi.Barrier()
        self.journal.wait_ends()

    def _broadcast_object(self, call: Call, obj: Any) -> Any:
        self._agree(call)
        result = self._mpi.bcast(obj, call.root)
        self.journal.wait_ends()
        return result

    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]:
        self._agree(call)
        result = self._mpi.allgather(obj)
        self.journal.wait_ends()
        return result

    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None:
        self._agree(call)
        comm = self._mpi.Split(MPI.UNDEFINED if color is None else color, key)
        result = None
        if comm != MPI.COMM_NULL:
            members = comm.allgather(self.members[self.rank])
            result = MPICommunicator(comm, members, f"{prefix}{color}", self.journal, self.checks)
        self.journal.wait_ends()
        return result

    def abort(self, reason: str) -> None:
        print(f"minipar: {self.journal.place()}: aborted: {reason}", flush=True)
        MPI.COMM_WORLD.Abort(CommunicationError.exit_code)

    # Point to point -----------------------------------------------------------------------------------

    def _isend(self, call: Call, x: Array) -> Work:
        host = stage(x, None).x
        dest, tag = call.peer or 0, call.tag or 0
        header = _header(x, host is not x)
        requests = [
            self._side.Isend(header, dest, tag),
            (self._mpi.Issend if self.checks else self._mpi.Isend)(_wire(host), dest, tag),
        ]
        return MPISend(self, call, requests, (header, host))

    def _irecv(self, call: Call, out: Array | None) -> Work:
        return MPIReceive(self, call, out)


class MPIWork(Work):
    """A nonblocking collective: first its check, then its data."""

    def __init__(
        self, comm: MPICommunicator, call: Call, function: Callable[[], Any], result: Callable[[], Array]
    ) -> None:
        self._comm = comm
        self._call = call
        self._function = function
        self._check = comm._begin_check(call) if comm.checks else None
        self._request: Any = None
        self._finish: Callable[[], Array] | None = result
        self._result: Any = None

    def start(self, block: bool) -> bool:
        """Start the data if the check has come back (or wait for it); return whether it is started."""
        if self._request is None:
            if self._check is not None:
                if block:
                    self._check[0].Wait()
                elif not self._check[0].Test():
                    return False
                self._comm._end_check(self._call, self._check)
            self._request = self._function()
        return True

    def wait(self) -> Any:
        if self._finish is not None:
            self._comm.journal.wait_begins(self._call)
            while self._request is None:
                self._comm._queue[0].start(block=True)
                self._comm._queue.popleft()
            self._request.Wait()
            self._result = self._finish()
            self._finish = None
            self._comm.journal.wait_ends()
        return self._result

    def done(self) -> bool:
        self._comm._progress()
        if self._request is None:
            return False
        return self._finish is None or self._request.Test()


class MPISend(Work):
    """A send under way."""

    def __init__(self, comm: MPICommunicator, call: Call, requests: list[Any], keep: Any) -> None:
        self._comm = comm
        self._call = call
        self._requests = requests
        self._keep = keep  # buffers that MPI still reads

    def wait(self) -> None:
        self._comm.journal.wait_begins(self._call)
        MPI.Request.Waitall(self._requests)
        self._comm.journal.wait_ends()
        self._keep = None

    def done(self) -> bool:
        return MPI.Request.Testall(self._requests)


class MPIReceive(Work):
    """A receive under way: the header tells dtype and shape, the data follows.

    Messages with the same source and tag keep their order: the data of one is not posted before that of
    those asked for earlier.
    """

    def __init__(self, comm: MPICommunicator, call: Call, out: Array | None) -> None:
        self._comm = comm
        self._call = call
        self._out = out
        self._host: Array | None = None
        self._data: Any = None
        self._complete = False
        self._source, self._tag = call.peer or 0, call.tag or 0
        self._header = bytearray(HEADER)
        self._announced = comm._side.Irecv(self._header, self._source, self._tag)
        self._earlier = comm._incoming.setdefault((self._source, self._tag), deque())
        if call.shape is not None and not self._earlier:
            self._post(call.shape, call.dtype)
        else:
            self._earlier.append(self)

    def _post(self, shape: tuple[int, ...], dtype: Any) -> None:
        out = self._out
        self._host = out if type(out) is np.ndarray else np.empty(shape, dtype)
        self._data = self._comm._mpi.Irecv(_wire(self._host), self._source, self._tag)

    def _post_earlier(self, block: bool) -> bool:
        """Post the data of all receives up to this one whose headers have come; return whether this one is."""
        while self._data is None:
            head = self._earlier[0]
            if block:
                head._announced.Wait()
            elif not head._announced.Test():
                return False
            shape, dtype, _ = _read_header(head._header)
            head._compare(shape, dtype)
            head._post(shape, dtype)
            self._earlier.popleft()
        return True

    def _compare(self, shape: tuple[int, ...], dtype: Any) -> None:
        call, comm = self._call, self._comm
        if call.shape is not None and (call.shape, call.dtype) != (shape, dtype):
            comm.journal.wait_ends()
            raise MismatchError(
                f"rank {comm.members[comm.rank]} called {call}; rank {comm.members[self._source]} sent "
                f"{shape} {dtype}: they differ in shape or dtype"
            )

    def wait(self) -> Array:
        if not self._complete:
            comm = self._comm
            comm.journal.wait_begins(self._call)
            self._post_earlier(block=True)
            self._announced.Wait()
            shape, dtype, on_gpu = _read_header(self._header)
            self._compare(shape, dtype)
            self._data.Wait()
            host = self._host
            assert host is not None
            if self._out is None:
                self._out = _device(host, on_gpu)
            elif self._out is not host:
                self._out.set(host)
            comm._add("recv", 0, host.size, host.nbytes)
            comm.journal.wait_ends()
            self._complete = True
        assert self._out is not None
        return self._out

    def done(self) -> bool:
        return self._complete or (
            self._post_earlier(block=False) and self._announced.Test() and self._data.Test()
        )


# Buffers ----------------------------------------------------------------------------------------------


def _wire(x: Array) -> Array:
    """Return `x` if MPI knows its dtype, else its bytes."""
    return x if x.dtype.char in NATIVE else x.reshape(-1).view(np.uint8)


def _elements(x: Array, rows: Sequence[int]) -> list[int]:
    """Return the elements of so many rows of `x`."""
    width = 1
    for n in x.shape[1:]:
        width *= n
    return [n * width for n in rows]


def _parts(out: Array, rows: Sequence[int]) -> list[int]:
    total = sum(rows)
    return [n * (out.size // total) if total else 0 for n in rows]


def _cut(flat: Array, shapes: Sequence[tuple[int, ...]], like: Array) -> list[Array]:
    """Cut a buffer into arrays that own their memory, on the device of `like`."""
    parts, start = [], 0
    for shape in shapes:
        n = int(np.prod(shape))
        parts.append(_device(flat[start : start + n].reshape(shape).copy(), type(like) is not np.ndarray))
        start += n
    return parts


def _device(host: Array, on_gpu: bool) -> Array:
    if not on_gpu:
        return host
    import cupy

    return cupy.asarray(host)


def _header(x: Array, on_gpu: bool) -> bytes:
    text = f"{x.dtype.name};{int(on_gpu)};{','.join(map(str, x.shape))}".encode()
    if len(text) > HEADER:
        raise UsageError(f"send: the shape {x.shape} has too many axes to announce")
    return text.ljust(HEADER)


def _read_header(header: bytearray) -> tuple[tuple[int, ...], Any, bool]:
    name, on_gpu, shape = header.decode().rstrip().split(";")
    return tuple(map(int, shape.split(","))) if shape else (), np.dtype(name), on_gpu == "1"


_digests: dict[tuple[Any, ...], int] = {}


def _digest(signature: tuple[Any, ...]) -> int:
    """Return 62 bits that are equal on all ranks for equal signatures (Python's own hash is not)."""
    kind = signature[:1] + signature[2:]
    digest = _digests.get(kind)
    if digest is None:
        digest = int.from_bytes(hashlib.blake2b(repr(kind).encode(), digest_size=8).digest()) >> 2
        _digests[kind] = digest
    return digest ^ signature[1]


# The world --------------------------------------------------------------------------------------------

_world: MPICommunicator | None = None


def mpi_world(checks: bool | None = None) -> MPICommunicator:
    """Return the communicator of the whole MPI job, the same object each time.

    Args:
        checks: compare signatures before each collective; by default what MINIPAR_CHECKS says (0 or 1, 1).

    Raises:
        UsageError: the job has another size than the launcher asked for.
    """
    global _world
    if _world is None:
        if checks is None:
            checks = os.environ.get("MINIPAR_CHECKS", "1") != "0"
        comm = MPI.COMM_WORLD
        expected = int(os.environ.get("MINIPAR_WORLD_SIZE", comm.size))
        if expected != comm.size:
            raise UsageError(f"the launcher asked for {expected} ranks, MPI has {comm.size}")
        journal = Journal(comm.rank, comm.size)
        _world = MPICommunicator(comm.Dup(), range(comm.size), "world", journal, checks)
    return _world
