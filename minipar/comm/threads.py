"""Ranks as threads of one process: the embedded engine of notebooks, tests and graders.

A collective is a meeting. Each rank brings its arrays to the `Round` of that number; the last to arrive
compares what everyone called; then each does its share (`rounds.py`), and nobody leaves before all have
finished reading. A message is a meeting of two: the later one copies.

Checks are always on, sends are synchronous, and reductions add in the order of ranks.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minipar.backend import Array, synchronize
from minipar.comm.fabric import THREAD_PREFIX, Fabric, Gate, fresh
from minipar.comm.guard import Call, mismatch
from minipar.comm.interface import Communicator, Work
from minipar.comm.rounds import Group, Message, Round, share
from minipar.errors import CommunicationError, MismatchError

SMALL = 65536  # bytes over all ranks up to which the last to arrive does all shares: one meeting, not two


class ThreadCommunicator(Communicator):
    """One rank's communicator in a group of rank-threads; made by `launch` and by `split`.

    Attributes:
        fabric: what the ranks of the launch share.
    """

    def __init__(self, fabric: Fabric, group: Group, rank: int, name: str) -> None:
        super().__init__(rank, group.members, name, fabric.journals[group.members[rank]])
        self.fabric = fabric
        self._group = group
        self._world_rank = group.members[rank]

    # Collectives --------------------------------------------------------------------------------------

    def _collective(self, call: Call, x: Array, out: Array | None) -> None:
        synchronize(x)
        nbytes = max(x.nbytes, 0 if out is None else out.nbytes)
        step, last = self._arrive(call, x, out, nbytes)
        if last and step.error is None:
            step.small = nbytes * self.size <= SMALL
            if step.small:
                for rank in range(self.size):
                    share(call, rank, step.given, step.outs)
        self._pass(step.ready, step, call, last)
        if not step.small:
            share(call, self.rank, step.given, step.outs)
            with self.fabric.lock:
                step.working -= 1
                if step.working == 0:
                    self.fabric.open(step.end)
            self._pass(step.end, step, call)
        self._advance(step.finish)

    def _start(self, call: Call, x: Array, out: Array) -> Work:
        synchronize(x)
        step, last = self._arrive(call, x, out, max(x.nbytes, out.nbytes))
        if last and step.error is None and self.size > 1:
            with self.fabric.lock:
                self.fabric.helping += 1
                if self._group.helper is None:
                    self._group.helper = ThreadPoolExecutor(1, f"{THREAD_PREFIX}{self.name}")
            self._group.helper.submit(self._help, call, step)
        elif last:
            if step.error is None:
                share(call, 0, step.given, step.outs)
            with self.fabric.lock:
                self.fabric.open(step.end)

        def complete() -> Array:
            self._pass(step.end, step, call)
            self._advance(step.finish)
            return out

        return ThreadWork(self.fabric, step.end, complete)

    def _help(self, call: Call, step: Round) -> None:
        """Run a whole collective in the helper thread, which is nobody's rank."""
        try:
            for rank in range(self.size):
                share(call, rank, step.given, step.outs)
        except Exception as error:
            step.error = error
        with self.fabric.lock:
            self.fabric.helping -= 1
            self.fabric.open(step.end)

    def _exchange(
        self, call: Call, given: Any, nbytes: int, combine: Callable[[list[Any]], Sequence[Any]]
    ) -> Any:
        """Bring `given` to a meeting where the last to arrive makes everyone's result from what all gave."""
        step, last = self._arrive(call, given, None, nbytes)
        if last and step.error is None:
            step.outs = list(combine(step.given))
        self._pass(step.ready, step, call, last)
        self._advance(step.finish)
        return step.outs[self.rank]

    def _arrive(self, call: Call, x: Any, out: Any, nbytes: int) -> tuple[Round, bool]:
        """Bring `x` to the round of this call's number; the last to arrive compares the calls."""
        fabric, group = self.fabric, self._group
        with fabric.lock:
            fabric.raise_failure()
            step = group.rounds.get(call.number)
            if step is None:
                step = group.rounds[call.number] = Round(self.size)
            step.calls[self.rank], step.given[self.rank], step.outs[self.rank] = call, x, out
            step.nbytes = max(step.nbytes, nbytes)
            step.start = max(step.start, fabric.times[self._world_rank])
            step.missing -= 1
            if step.missing:
                return step, False
            del group.rounds[call.number]
            signature = call.signature
            if any(other.signature != signature for other in step.calls):
                calls = {self.members[r]: (other.signature, str(other)) for r, other in enumerate(step.calls)}
                step.error = fabric.with_parting(MismatchError(mismatch(calls)))
                fabric.open(step.ready)
                fabric.open(step.end)
            elif fabric.clock is not None:
                cost = fabric.clock.collective(call.operation, step.nbytes, self.size)
                step.finish = group.busy_until = max(step.start, group.busy_until) + cost
            return step, True

    def _pass(self, gate: Gate, step: Round, call: Call, opens: bool = False) -> None:
        if opens:
            with self.fabric.lock:
                self.fabric.open(gate)
        else:
            self.fabric.wait(gate, self._world_rank, call)
        if step.error is not None:
            raise fresh(step.error)

    # Lists, objects, groups ---------------------------------------------------------------------------

    def _gather(self, call: Call, x: Array) -> list[Array] | None:
        def combine(given: list[Array]) -> list[Any]:
            return [[x.copy() for x in given] if rank == call.root else None for rank in range(self.size)]

        return self._exchange(call, x, x.nbytes, combine)

    def _scatter(self, call: Call, parts: Sequence[Array] | None) -> Array:
        nbytes = max((part.nbytes for part in parts or ()), default=0)
        return self._exchange(
            call, parts, nbytes, lambda given: [part.copy() for part in given[call.root or 0]]
        )

    def _all_to_all(self, call: Call, parts: Sequence[Array]) -> list[Array]:
        nbytes = sum(part.nbytes for part in parts)
        return self._exchange(
            call, parts, nbytes, lambda given: [[p[rank].copy() for p in given] for rank in range(self.size)]
        )

    def _barrier(self, call: Call) -> None:
        self._exchange(call, None, 0, lambda given: given)

    def _symmetric(self, call: Call, n: int) -> Array:
        self._barrier(call)  # it is collective here, too
        return super()._symmetric(call, n)

    def _broadcast_object(self, call: Call, obj: Any) -> Any:
        data = pickle.dumps(obj) if self.rank == call.root else None
        return pickle.loads(self._exchange(call, data, 0, lambda given: [given[call.root or 0]] * self.size))

    def _all_gather_object(self, call: Call, obj: Any) -> list[Any]:
        given = self._exchange(call, pickle.dumps(obj), 0, lambda given: [given] * self.size)
        return [pickle.loads(data) for data in given]

    def _split(self, call: Call, color: int | None, key: int, prefix: str) -> Communicator | None:
        def combine(given: list[tuple[int | None, int]]) -> list[Any]:
            results: list[Any] = [None] * self.size
            for value in sorted({c for c, _ in given if c is not None}):
                ranks = sorted((k, r) for r, (c, k) in enumerate(given) if c == value)
                group = Group([self.members[r] for _, r in ranks])
                for new_rank, (_, r) in enumerate(ranks):
                    results[r] = (group, new_rank)
            return results

        result = self._exchange(call, (color, key), 0, combine)
        if result is None:
            return None
        group, rank = result
        return ThreadCommunicator(self.fabric, group, rank, f"{prefix}{color}")

    def abort(self, reason: str) -> None:
        self.fabric.fail(self._world_rank, f"aborted: {reason}")
        error = CommunicationError(f"{self.journal.place()}: aborted: {reason}")
        raise self.fabric.with_parting(error)

    # Point to point -----------------------------------------------------------------------------------

    def _isend(self, call: Call, x: Array) -> Work:
        synchronize(x)
        sent = Message(call, x, self.fabric.times[self._world_rank])
        received = self._post(sent, (self.rank, call.peer or 0, call.tag or 0), side=0)
        if received is not None:
            self._deliver(sent, received)

        def complete() -> None:
            self.fabric.wait(sent.gate, self._world_rank, call)
            self._finish(sent)

        return ThreadWork(self.fabric, sent.gate, complete)

    def _irecv(self, call: Call, out: Array | None) -> Work:
        received = Message(call, out, 0.0)
        sent = self._post(received, (call.peer or 0, self.rank, call.tag or 0), side=1)
        if sent is not None:
            self._deliver(sent, received)

        def complete() -> Array:
            self.fabric.wait(received.gate, self._world_rank, call)
            self._finish(received)
            array = received.array
            assert array is not None
            self._add("recv", 0, array.size, array.nbytes)
            return array

        return ThreadWork(self.fabric, received.gate, complete)

    def _post(self, message: Message, key: tuple[int, int, int], side: int) -> Message | None:
        """Take the oldest message of the other side off the mailbox, or leave `message` there."""
        with self.fabric.lock:
            self.fabric.raise_failure()
            box = self._group.mail.setdefault(key, (deque(), deque()))
            if box[1 - side]:
                return box[1 - side].popleft()
            box[side].append(message)
            return None

    def _deliver(self, sent: Message, received: Message) -> None:
        """Copy what is sent to where it is received, and let both ranks go on."""
        x, out, call = sent.array, received.array, received.call
        assert x is not None
        if call.shape is not None and (call.shape, call.dtype) != (x.shape, x.dtype):
            text = (
                f"rank {self.members[sent.call.peer or 0]} called {call}; "
                f"rank {self.members[call.peer or 0]} called {sent.call}: they differ in shape or dtype"
            )
            sent.error = received.error = text
        elif out is None:
            received.array = x.copy()
        else:
            out[...] = x
        synchronize(x)
        clock = self.fabric.clock
        if clock is not None:
            sent.time += clock.message(x.nbytes)
        received.time = sent.time
        with self.fabric.lock:
            self.fabric.open(sent.gate)
            self.fabric.open(received.gate)

    def _finish(self, message: Message) -> None:
        if message.error is not None:
            raise MismatchError(message.error)
        self._advance(message.time)

    # Virtual time -------------------------------------------------------------------------------------

    def _advance(self, time: float) -> None:
        """Move this rank's virtual time on to `time`, if that is later."""
        times = self.fabric.times
        times[self._world_rank] = max(times[self._world_rank], time)

    def compute(self, seconds: float) -> None:
        self.fabric.times[self._world_rank] += seconds

    def now(self) -> float:
        return super().now() if self.fabric.clock is None else self.fabric.times[self._world_rank]


class ThreadWork(Work):
    """Work that ends when a gate opens; `complete` waits for that and gives the result."""

    def __init__(self, fabric: Fabric, gate: Gate, complete: Callable[[], Any]) -> None:
        self._fabric = fabric
        self._gate = gate
        self._complete: Callable[[], Any] | None = complete
        self._result: Any = None

    def wait(self) -> Any:
        if self._complete is not None:
            self._result = self._complete()
            self._complete = None
        return self._result

    def done(self) -> bool:
        if not self._gate.opened:
            self._fabric.raise_failure()
        return self._gate.opened
