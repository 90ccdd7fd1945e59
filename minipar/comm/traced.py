"""A communicator that leaves a span of every collective, message and wait in a rank's trace.

    trace = Trace(comm.now)
    comm = TracedCommunicator(comm, trace)  # on every rank; use it, and what it splits into, from here on

It wraps any other communicator, so those pay nothing for being traceable. `clock_offset` makes the clocks of
ranks on several machines comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minipar.backend import Array
from minipar.comm.guard import Call
from minipar.comm.interface import Communicator, Work
from minipar.comm.ledger import vector_bytes
from minipar.trace import COLLECTIVE, FLIGHT, WAIT, Trace

EXCHANGES = 20  # of the ping-pong that compares two clocks; the quickest is believed
HELP = 5e-5  # seconds from which a look at an operation (`done`) counts as work for it: this rank copied or added up


class TracedCommunicator(Communicator):
    """`inner`, with spans. All ranks of a group wrap it at the same point of the program.

    A blocking collective is one span of kind COLLECTIVE. Anything begun in the background leaves a FLIGHT from
    its beginning to where its end was noticed (by `wait` or `done`, so it may have ended earlier), and a WAIT
    for the time that `wait` took, and one for each `done` that did a part of it. Of a receive there is one WAIT only,
    by `wait`: the sender knows when data is under way.
    """

    def __init__(self, inner: Communicator, trace: Trace) -> None:
        super().__init__(inner.rank, inner.members, inner.name, inner.journal)
        self.inner, self.trace = inner, trace
        self._number = inner._number  # calls are numbered here from now on

    def _facts(self, call: Call, nbytes: int) -> dict[str, Any]:
        others = [m for r, m in enumerate(self.members) if r != self.rank]
        return {
            "bytes": nbytes,
            "group": self.name,
            "peers": others if call.peer is None else [self.members[call.peer]],
            "number": call.number,
        }

    def _blocking(self, call: Call, nbytes: int, operation: Any, *arguments: Any) -> Any:
        trace = self.trace
        if not trace.on:
            return operation(call, *arguments)
        start = trace.now()
        result = operation(call, *arguments)
        trace.add(COLLECTIVE, call.operation, start, trace.now(), **self._facts(call, nbytes))
        return result

    # Collectives --------------------------------------------------------------------------------------

    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        self._blocking(call, vector_bytes(call.operation, x, out), self.inner._collective, x, out)

    def _start(self, call: Call, x: Array, out: Array) -> Work:
        if not self.trace.on:
            return self.inner._start(call, x, out)
        start = self.trace.now()
        return TracedWork(self, self.inner._start(call, x, out), call, vector_bytes(call.operation, x, out), start)

    def _gather(self, call: Call, x: Array) -> list[Array] | None:
        parts: list[Array] | None = self._blocking(call, x.nbytes, self.inner._gather, x)
        return parts

    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array:
        nbytes = sum(part.nbytes for part in parts or ())
        return self._blocking(call, nbytes, self.inner._scatter, parts)

    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]:
        nbytes = sum(part.nbytes for part in parts)
        received: list[Array] = self._blocking(call, nbytes, self.inner._all_to_all, parts)
        return received

    def _barrier(self, call: Call) -> None:
        self._blocking(call, 0, self.inner._barrier)

    def _broadcast_object(self, call: Call, obj: Any) -> Any:
        return self._blocking(call, 0, self.inner._broadcast_object, obj)

    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]:
        objects: list[Any] = self._blocking(call, 0, self.inner._all_gather_object, obj)
        return objects

    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None:
        part = self._blocking(call, 0, self.inner._split, color, key, prefix)
        alone = part is None or part.size == 1  # nothing to see there
        return part if alone else TracedCommunicator(part, self.trace)

    @property
    def has_symmetric_memory(self) -> bool:
        return self.inner.has_symmetric_memory

    def _symmetric(self, call: Call, n: int) -> Array:
        array: Array = self._blocking(call, 0, self.inner._symmetric, n)
        return array

    def _free(self) -> None:
        self.inner._release()

    # Messages -----------------------------------------------------------------------------------------

    def _isend(self, call: Call, x: Array) -> Work:
        if not self.trace.on:
            return self.inner._isend(call, x)
        start = self.trace.now()
        return TracedWork(self, self.inner._isend(call, x), call, x.nbytes, start)

    def _irecv(self, call: Call, out: Array | None) -> Work:
        work = self.inner._irecv(call, out)
        return TracedWork(self, work, call, 0, None) if self.trace.on else work

    # Place and time -----------------------------------------------------------------------------------

    def abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def compute(self, seconds: float) -> None:
        self.inner.compute(seconds)

    def now(self) -> float:
        return self.inner.now()


class TracedWork(Work):
    """Work whose flight and whose waiting leave spans; `start` is None where there is no flight."""

    def __init__(
        self, comm: TracedCommunicator, work: Work, call: Call, nbytes: int, start: float | None
    ) -> None:
        self._comm, self._work, self._call = comm, work, call
        self._nbytes, self._start, self._waited = nbytes, start, False

    def wait(self) -> Any:
        if self._waited:
            return self._work.wait()
        trace, start = self._comm.trace, self._comm.trace.now()
        result = self._work.wait()
        end, self._waited = trace.now(), True
        if self._call.operation == "recv":
            self._nbytes = result.nbytes
        trace.add(WAIT, self._call.operation, start, end, **self._comm._facts(self._call, self._nbytes))
        self._land(end)
        return result

    def done(self) -> bool:
        trace = self._comm.trace
        start = trace.now()
        done = self._work.done()
        end = trace.now()
        if end - start > HELP and self._start is not None:  # what has no flight is counted by its WAIT
            trace.add(WAIT, self._call.operation, start, end, **self._comm._facts(self._call, self._nbytes))
        if done:
            self._land(end)
        return done

    def _land(self, end: float) -> None:
        if self._start is not None:
            facts = self._comm._facts(self._call, self._nbytes)
            self._comm.trace.add(FLIGHT, self._call.operation, self._start, end, **facts)
            self._start = None


def clock_offset(comm: Communicator, exchanges: int = EXCHANGES) -> tuple[float, float]:
    """Return (how far this rank's clock is ahead of rank 0's, how wrong that may be), in seconds. Collective.

    Rank 0 sends to each rank in turn, which answers with its time. The answer lies between rank 0's times of
    sending and of receiving, so their middle is wrong by half of the round trip at most (F. Cristian,
    "Probabilistic clock synchronization", 1989); the quickest of several exchanges is taken. An offset that
    is within this error is 0: the ranks may as well share one clock, as on one machine they do.
    """
    ping, answer = np.zeros(1), np.zeros(2)
    if comm.rank != 0:
        for _ in range(exchanges):
            comm.recv(0)
            comm.send(np.array([comm.now()]), 0)
        answer = comm.recv(0)
        return float(answer[0]), float(answer[1])
    for rank in range(1, comm.size):
        best = (np.inf, 0.0)  # (half of the round trip, offset)
        for _ in range(exchanges):
            start = comm.now()
            comm.send(ping, rank)
            theirs = float(comm.recv(rank)[0])
            end = comm.now()
            best = min(best, ((end - start) / 2, theirs - (start + end) / 2))
        error, offset = best
        comm.send(np.array([offset if abs(offset) > error else 0.0, error]), rank)
    return 0.0, 0.0
