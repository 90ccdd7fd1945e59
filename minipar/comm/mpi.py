"""Ranks as processes under `mpirun`: the real engine, from a laptop to a cluster, through mpi4py.

Arrays go to MPI by its buffer calls; the `_async` forms are MPI's nonblocking collectives. With checks on,
the ranks first compare what each collective asks for (`signatures.py`), and sends are synchronous. An `_async`
collective is compared in the background: its data moves once every rank has issued the same, and never overtakes an
earlier one.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from minipar.backend import Array, is_gpu_array
from minipar.comm import symmetric
from minipar.comm.blas import one_blas_thread_for_good
from minipar.comm.flight import entries, parting
from minipar.comm.guard import Call, Journal, mismatch
from minipar.comm.hooks import Hooks
from minipar.comm.interface import Communicator, Work
from minipar.comm.member import HIGHEST_TAG
from minipar.comm.mpi_work import MPICollective, MPIReceive, MPISend
from minipar.comm.progress import Progress
from minipar.comm.shared_memory import SharedMemory, has_memory_directory
from minipar.comm.signatures import signatures_of
from minipar.comm.wire import (
    Staged,
    as_buffer,
    cut,
    elements,
    joined,
    on_device,
    pack_header,
    reduction,
    stage,
    unstage,
)
from minipar.errors import CommunicationError, MismatchError, UsageError

IN_PLACE = MPI.IN_PLACE
EXPLAIN_TAG = HIGHEST_TAG + 1


class Process(NamedTuple):
    """What all communicators of one process share."""

    journal: Journal
    hooks: Hooks
    memory: SharedMemory
    progress: Progress


class MPICommunicator(Communicator):
    """One rank's communicator in a group of processes; made by `world` and by `split`.

    Attributes:
        checks: whether signatures are compared and sends are synchronous; the same on all ranks.
        mpi, side: the mpi4py communicators of the data, and of signatures and headers.
        incoming: receives whose data is not posted yet, by source and tag.
        signatures: how the ranks compare what they ask for.
        underway: what this rank has begun, in all its groups.
    """

    def __init__(self, comm: Any, members: Sequence[int], name: str, process: Process, checks: bool) -> None:
        super().__init__(comm.Get_rank(), members, name, process.journal)
        self.checks = checks
        self.mpi = comm
        self.side = comm.Dup()
        self.incoming: dict[tuple[int, int], deque[MPIReceive]] = {}
        self.signatures = signatures_of(self.side, process.memory)
        self.underway = process.progress
        self._symmetric_arrays = symmetric.SymmetricArrays()
        self._process = process
        self._queue: deque[MPICollective] = deque()  # whose data is not started yet, in the order of issue

    # Collectives --------------------------------------------------------------------------------------

    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        arrays = self._symmetric_arrays
        stages = arrays.stages(call, x, out, self.mpi.Ibarrier) if arrays.known else None
        self._begin(call)
        try:
            if stages is not None:
                for start in stages:
                    self.underway.wait(start())
            elif type(x) is np.ndarray:
                if call.operation == "all_reduce":  # the most frequent one, without a detour
                    self.mpi.Allreduce(IN_PLACE if x is out else x, out, reduction(call.op, call.dtype))
                else:
                    name, arguments = self._arguments(call, x, out)
                    getattr(self.mpi, name)(*arguments)
            else:
                staged = stage(x, out, call.op)
                name, arguments = self._arguments(call, staged.x, staged.out)
                getattr(self.mpi, name)(*arguments)
                unstage(staged)
        finally:  # also where MPI cannot reduce the dtype, which all have by then: a program may go on from that
            self.journal.waiting = None

    def _start(self, call: Call, x: Array, out: Array) -> Work:
        # Its stages go on only while this rank is in Python. Without checks it may be in a blocking call of another
        # group, inside of MPI, while others wait for it.
        stages = self._symmetric_arrays.stages(call, x, out, self.mpi.Ibarrier) if self.checks else None
        staged = Staged(x, out, None)
        if stages is None:
            staged = stage(x, out, call.op)
            name, arguments = self._arguments(call, staged.x, staged.out)
            function = getattr(self.mpi, "I" + name.lower())
            stages = [lambda: function(*arguments)]

        def finish() -> Array:
            unstage(staged)
            return out

        work = MPICollective(self, call, stages, finish)
        self._queue.append(work)
        self.progress()
        return work

    def _arguments(self, call: Call, x: Array, out: Array | None) -> tuple[str, tuple[Any, ...]]:
        """Return the name of MPI's blocking call and its arguments."""
        operation = call.operation
        if operation == "all_reduce":
            return "Allreduce", (IN_PLACE if x is out else x, out, reduction(call.op, call.dtype))
        if operation == "reduce":
            return "Reduce", (x, out, reduction(call.op, call.dtype), call.root)
        if operation == "broadcast":
            return "Bcast", (as_buffer(x), call.root)
        assert call.counts is not None and out is not None
        if operation == "reduce_scatter":
            return "Reduce_scatter", (x, out, elements(x, call.counts), reduction(call.op, call.dtype))
        assert operation == "all_gather"
        return "Allgatherv", (as_buffer(x), (as_buffer(out), elements(out, call.counts)))

    # Order and checks ---------------------------------------------------------------------------------

    def _begin(self, call: Call) -> None:
        """What comes before the data of every blocking collective: those issued earlier, and the check."""
        journal = self.journal
        journal.waiting_since = call.since  # a moment ago: one look at the clock is enough
        journal.waiting = call
        if self._queue:
            self.start_queued()
        if self.checks and not self.signatures.all_equal(call, self.underway):
            raise self.mismatch(call)

    def progress(self) -> None:
        """Start the data of every queued collective whose comparison has come back, in the order of issue."""
        while self._queue and self._queue[0].compared() and self._queue[0].started():
            self._queue.popleft()
        self._note_queue()

    def start_queued(self, until: MPICollective | None = None) -> None:
        """Wait for the comparisons of the queued collectives up to `until` (of all) and start their data.

        Raises:
            MismatchError: the ranks differ in one of them.
        """
        while self._queue and (until is None or until in self._queue):
            first = self._queue[0]
            if self.underway.until(first.compared):
                self.underway.until(first.started)
            else:
                first.error = self.mismatch(first.call)
            if self._queue and self._queue[0] is first:  # `until` has not gone on to the next by itself
                self._queue.popleft()
                self._note_queue()
            if first.error is not None:
                raise first.error

    def _note_queue(self) -> None:
        if self._queue:
            self.underway.groups[self] = None
        else:
            self.underway.groups.pop(self, None)

    def mismatch(self, call: Call) -> MismatchError:
        """Return the error about signatures that are not equal, with the same text on all ranks. Collective."""
        mine = (call.signature, str(call), entries(self.journal))
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = [self.side.isend(mine, rank, EXPLAIN_TAG) for rank in others]
        told = {self.members[rank]: self.side.recv(source=rank, tag=EXPLAIN_TAG) for rank in others}
        MPI.Request.waitall(sends)
        told[self.members[self.rank]] = mine
        self.journal.wait_ends()
        error = MismatchError(mismatch({rank: (signature, text) for rank, (signature, text, _) in told.items()}))
        error.add_note(parting({rank: record for rank, (_, _, record) in told.items()}) or "no record differs")
        return error

    # Lists, objects, groups ---------------------------------------------------------------------------

    def _gather(self, call: Call, x: Array) -> list[Array] | None:
        self._begin(call)
        host = stage(x).x
        shapes = self.mpi.gather(host.shape, call.root)
        parts = None
        if shapes is None:
            self.mpi.Gatherv(as_buffer(host), None, call.root)
        else:
            flat = np.empty(sum(map(math.prod, shapes)), host.dtype)
            counts = elements(flat, [math.prod(shape) for shape in shapes])
            self.mpi.Gatherv(as_buffer(host), (as_buffer(flat), counts), call.root)
            parts = cut(flat, shapes, is_gpu_array(x))
        self.journal.wait_ends()
        return parts

    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array:
        self._begin(call)
        if parts is None:
            shape, dtype, gpu = self.mpi.scatter(None, call.root)
            out = np.empty(shape, dtype)
            self.mpi.Scatterv(None, as_buffer(out), call.root)
        else:
            gpu = is_gpu_array(parts[0])
            hosts = [stage(part).x for part in parts]
            self.mpi.scatter([(part.shape, part.dtype, gpu) for part in hosts], call.root)
            flat = joined(hosts)
            out = np.empty_like(hosts[self.rank])
            counts = elements(flat, [part.size for part in hosts])
            self.mpi.Scatterv((as_buffer(flat), counts), as_buffer(out), call.root)
        self.journal.wait_ends()
        return on_device(out, gpu)

    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]:
        self._begin(call)
        hosts = [stage(part).x for part in parts]
        shapes = self.mpi.alltoall([part.shape for part in hosts])
        flat = joined(hosts)
        out = np.empty(sum(map(math.prod, shapes)), flat.dtype)
        self.mpi.Alltoallv(
            (as_buffer(flat), elements(flat, [part.size for part in hosts])),
            (as_buffer(out), elements(out, [math.prod(shape) for shape in shapes])),
        )
        self.journal.wait_ends()
        return cut(out, shapes, is_gpu_array(parts[0]))

    def _barrier(self, call: Call) -> None:
        self._begin(call)
        self.mpi.Barrier()
        self.journal.wait_ends()

    def _broadcast_object(self, call: Call, obj: Any) -> Any:
        self._begin(call)
        result = self.mpi.bcast(obj, call.root)
        self.journal.wait_ends()
        return result

    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]:
        self._begin(call)
        result = self.mpi.allgather(obj)
        self.journal.wait_ends()
        return result

    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None:
        self._begin(call)
        result = None
        try:
            comm = self.mpi.Split(MPI.UNDEFINED if color is None else color, key)
            if comm != MPI.COMM_NULL:
                members = comm.allgather(self.members[self.rank])
                name = f"{prefix}{color}"
                result = MPICommunicator(comm, members, name, self._process, self.checks)
        except MPI.Exception as error:
            self.journal.wait_ends()
            raise CommunicationError(
                f"split: MPI makes no more groups ({error}); it has room for some 1,000 at a time: free those that are"
                " no longer needed (`group.free()`, `with comm.scope():`)"
            ) from None
        self.journal.wait_ends()
        return result

    @property
    def has_symmetric_memory(self) -> bool:
        return self.size > 1 and self.signatures.one_host and has_memory_directory()

    def _symmetric(self, call: Call, n: int) -> Array:
        self._begin(call)
        if not n or not self.has_symmetric_memory or n * call.dtype.itemsize < symmetric.SMALLEST:
            self.journal.wait_ends()
            return super()._symmetric(call, n)
        array, wrong = self._symmetric_arrays.make(self.mpi, n, call.dtype)
        self.journal.wait_ends()
        if array is None:
            if self.rank == 0:
                warnings.warn(f"{wrong}: sums of {n} {call.dtype} go through MPI now, which takes longer", stacklevel=3)
            return super()._symmetric(call, n)
        return array

    def _free(self) -> None:
        self.start_queued()
        self.underway.wait(self.side.Ibarrier())  # nobody still reads another's signature
        self.signatures.free()
        self.side.Free()
        self.mpi.Free()

    def abort(self, reason: str) -> None:
        self._process.hooks.watchdog.abort(f"{self.journal.place()}: aborted: {reason}")

    # Point to point -----------------------------------------------------------------------------------

    def _isend(self, call: Call, x: Array) -> Work:
        dest, tag = call.peer or 0, call.tag or 0
        header, host = pack_header(x), stage(x).x
        send = self.mpi.Issend if self.checks else self.mpi.Isend
        requests = [self.side.Isend(header, dest, tag), send(as_buffer(host), dest, tag)]
        return MPISend(self, call, requests, (header, host))

    def _irecv(self, call: Call, out: Array | None) -> Work:
        return MPIReceive(self, call, out)


_world: MPICommunicator | None = None


def mpi_world(
    launched: tuple[int, str], checks: bool | None, default: bool, timeout: float
) -> MPICommunicator:
    """Return the communicator of the whole MPI job, the same object each time.

    The first call is collective. It also installs what ends the job when one rank fails or hangs, and leaves
    each of several ranks one BLAS thread.

    Args:
        launched: how many ranks the launcher says it started, and the variable that says so.
        checks: compare signatures before each collective and send synchronously; None for no change.
        default: what `checks` is at first.
        timeout: seconds that one wait may take before the job is ended as hanging.

    Raises:
        UsageError: MPI has another number of ranks, so the job belongs to another MPI's launcher.
    """
    global _world
    if _world is None:
        comm = MPI.COMM_WORLD
        journal = Journal(comm.rank, comm.size)
        hooks = Hooks(MPI, journal, timeout)
        ranks, variable = launched
        if ranks != comm.size:
            library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
            raise UsageError(
                f"{variable} says {ranks} ranks, but MPI has {comm.size}: the job's mpirun is not that of "
                f"mpi4py's library ({library}); start it with `minipar run -n {ranks} SCRIPT`"
            )
        if comm.size > 1:
            one_blas_thread_for_good()
        hooks.connect()
        process = Process(journal, hooks, SharedMemory(comm, MPI.COMM_TYPE_SHARED), Progress())
        _world = MPICommunicator(comm.Dup(), range(comm.size), "world", process, default)
    if checks is not None:
        _world.checks = checks
    return _world
