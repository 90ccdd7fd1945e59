"""What the rank-threads of one launch share: who waits for what, who has finished, what has failed.

Ranks wait only for `Gate`s. Whoever completes something opens its gate, and from that moment (not from the
later one when the waiting thread runs again) those who wait count as running. So the fabric knows at every
instant how many ranks can still act: when none can, that is a proven deadlock and is reported at once; a
hang that cannot be proven ends at the time-out. One rank's failure ends the waits of all others.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TypeVar

from minipar.comm.clock import Clock
from minipar.comm.flight import entries, parting
from minipar.comm.guard import Call, Journal, report
from minipar.errors import CommunicationError, HangError, RankFailed

E = TypeVar("E", bound=BaseException)

THREAD_PREFIX = "minipar-"  # names of the ranks' own threads, and of their helpers


def fresh(error: E) -> E:
    """Return an equal exception for another rank: each carries a traceback, and notes, of its own."""
    copy = type(error)(*error.args)
    for note in getattr(error, "__notes__", ()):
        copy.add_note(note)
    return copy


class Gate:
    """Something that ranks may wait for; it opens once."""

    __slots__ = ("condition", "opened", "waiters")

    def __init__(self) -> None:
        self.opened = False
        self.waiters = 0
        self.condition: threading.Condition | None = None  # made by the first who waits


class Fabric:
    """The common ground of `size` ranks in one process.

    Attributes:
        lock: guards everything here and in the groups' rounds and mailboxes.
        times: each rank's virtual time in seconds, where there is a clock.
        failure: the error that every wait now raises, or None.
    """

    def __init__(
        self, size: int, timeout: float, clock: Clock | None = None, parent: Fabric | None = None
    ) -> None:
        self.size = size
        self.parent = parent  # of the rank that launched these
        self.launching: set[int] = set()  # threads of ranks inside a launch of their own
        self.timeout = timeout
        self.clock = clock
        self.lock = threading.Lock()
        self.journals = [Journal(rank, size) for rank in range(size)]
        self.times = [0.0] * size
        self.failure: CommunicationError | None = None
        self.live = size  # ranks that have not finished
        self.blocked = 0  # of these, how many wait at a closed gate
        self.helping = 0  # helper threads at work on something that will open a gate
        self._bystanders = weakref.WeakSet(threading.enumerate())  # threads that will not communicate here
        self._waits: dict[int, Gate] = {}  # by thread

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """Inside, the calling thread is known to be the one that launched these ranks."""
        launching = self.parent.launching if self.parent is not None else set()
        launching.add(threading.get_ident())
        try:
            yield
        finally:
            launching.discard(threading.get_ident())

    def wait(self, gate: Gate, rank: int, call: Call) -> None:
        """Block the calling thread, which acts for `rank`, until `gate` is open.

        Raises:
            HangError: no rank can go on, or the time-out has passed.
            RankFailed: another rank failed.
        """
        if gate.opened:
            return
        thread, journal = threading.get_ident(), self.journals[rank]
        with self.lock:
            if gate.opened:
                return
            self.raise_failure()
            if gate.condition is None:
                gate.condition = threading.Condition(self.lock)
            gate.waiters += 1
            self.blocked += 1
            self._waits[thread] = gate
            journal.wait_begins(call)
            deadline = time.monotonic() + self.timeout
            try:
                self._detect_deadlock()
                while not gate.opened:
                    self.raise_failure()
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        self._hang(f"rank {rank} has waited {self.timeout:g} s")
                    gate.condition.wait(remaining)
            finally:
                journal.wait_ends()
                del self._waits[thread]
                if not gate.opened:
                    gate.waiters -= 1
                    self.blocked -= 1

    def open(self, gate: Gate) -> None:
        """Let everyone through who waits at `gate`. The caller holds the lock."""
        gate.opened = True
        self.blocked -= gate.waiters
        gate.waiters = 0
        if gate.condition is not None:
            gate.condition.notify_all()

    def finish(self, rank: int) -> None:
        """Note that `rank` has returned from its program."""
        with self.lock:
            self.journals[rank].finished = True
            self.live -= 1
            self._detect_deadlock(raising=False)

    def fail(self, rank: int, what: str) -> None:
        """End every other rank's waits, now and later, with RankFailed naming `rank`."""
        with self.lock:
            if self.failure is None:
                self._set_failure(RankFailed(f"{self.journals[rank].place()}: {what}"))

    def end(self, why: str) -> None:
        """End every rank's waits, now and later, for a reason that is none of the ranks'."""
        with self.lock:
            if self.failure is None:
                self._set_failure(CommunicationError(why))

    def raise_failure(self) -> None:
        """Raise what has failed, if anything has. A fresh exception for each rank: they carry tracebacks."""
        if self.failure is not None:
            raise fresh(self.failure)

    def _set_failure(self, failure: CommunicationError) -> None:
        self.failure = failure
        for gate in self._waits.values():
            if gate.condition is not None:
                gate.condition.notify_all()

    def _hang(self, reason: str) -> None:
        states = {journal.rank: journal.state() for journal in self.journals}
        self._set_failure(self.with_parting(HangError(report(states, reason))))

    def with_parting(self, error: E) -> E:
        """Return the error with a note of what the flight recorder shows, if it shows anything."""
        note = parting({journal.rank: entries(journal) for journal in self.journals})
        if note:
            error.add_note(note)
        return error

    def _detect_deadlock(self, raising: bool = True) -> None:
        stuck = self.live > 0 and self.blocked >= self.live and self.helping == 0
        if not stuck or self.failure is not None or self._helped_by_others():
            return
        self._hang("deadlock, no rank can go on")
        if raising:
            self.raise_failure()

    def _helped_by_others(self) -> bool:
        """Return whether a thread that the program has started may still communicate for a rank."""
        return any(
            thread not in self._bystanders and not thread.name.startswith(THREAD_PREFIX)
            for thread in threading.enumerate()
        )
