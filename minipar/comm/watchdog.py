"""The watchdog of an MPI job: who waits for what when nothing moves, and who has died.

MPI cannot tell why it waits, so the ranks have a second way to talk: a TCP connection from each to rank 0,
served by a thread that sleeps until something is said. A rank that has waited for `timeout` seconds in one
communication says so; rank 0 then asks all ranks what they are doing (the answer comes from their service
threads, whatever the program itself is stuck in), prints the answers as one line, and ends the job. If rank 0
does not get round to it, the rank that waits does, with what it knows. A connection that breaks without a
farewell is a rank that was killed. A rank that returns from its program says that it has finished and stays
until all have, so that it can still be named.

Limits: the ranks must be able to reach rank 0 by TCP (otherwise one line says which cannot, and a hang names
only what is known); a rank stuck in native code that keeps the interpreter lock "does not answer".
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Any

from minipar.comm.flight import entries, parting
from minipar.comm.guard import Call, Journal, report
from minipar.comm.lines import Line, connect

ANSWER_SECONDS = 2.0  # that a rank has to say what it is doing
MARGIN_SECONDS = 1.0  # that rank 0 has beyond that, to end the job


class Watchdog:
    """The service of one rank.

    Args:
        fail: prints a line and ends the job; it never returns. With `once` a single rank of the host prints.
        lost: ends the job because of the rank whose connection broke; it never returns either.
    """

    def __init__(
        self, journal: Journal, timeout: float, fail: Callable[..., None], lost: Callable[[int], None]
    ) -> None:
        self.journal = journal
        self.timeout = timeout
        self._fail = fail
        self._lost = lost
        self._lines: dict[int, Line] = {}  # rank 0: to every other rank; elsewhere: to rank 0
        self._gone: set[int] = set()  # ranks that said farewell
        self._answers: dict[int, str] = {}
        self._records: dict[int, list[Any]] = {}  # the flight recorders of those who answered
        self._ends: dict[int, str] = {}  # why ranks end, where it is an error
        self._overdue: tuple[Call, float] | None = None  # the wait that rank 0 was told of, and when
        self._asked_at: float | None = None
        self._reason = ""
        self._hangs = True  # what is asked about: a hang, or an abort
        self._all_finished = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="minipar-watchdog", daemon=True)

    def connect(self, comm: Any) -> None:
        """Set up the connections over the MPI communicator `comm` (collective), and begin to watch."""
        self._lines = connect(comm, self.journal.rank, self.journal.size)
        self._thread.start()

    # The service thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        tick = min(0.25, self.timeout / 4)
        while not self._all_finished.is_set():
            if self._lines:
                by_connection = {line.connection: rank for rank, line in self._lines.items()}
                for connection in select.select(list(by_connection), [], [], tick)[0]:
                    self._hear(by_connection[connection])
            else:
                self._all_finished.wait(tick)
            self._look_at_own_wait()
            if self._asked_at is not None:
                self._conclude()

    def _hear(self, rank: int) -> None:
        messages = self._lines[rank].receive()
        if messages is None:
            del self._lines[rank]
            if rank not in self._gone and not self._all_finished.is_set():
                self._lost(rank)
            return
        for message in messages:
            if "ask" in message:
                self._lines[rank].send(state=self.journal.state(), record=entries(self.journal))
            elif "overdue" in message:
                self._ask(message["overdue"])
            elif "abort" in message:
                self._ask(message["abort"], hangs=False)
            elif "ends" in message:
                self._gone.add(rank)
                self._note_end(rank, message["ends"])
            elif "farewell" in message:
                self._gone.add(rank)
                if message["farewell"] == "finished":
                    self._note_answer(rank, message)
                    self._let_go_if_all_finished()
            elif "state" in message:
                self._note_answer(rank, message)
            elif "released" in message:
                self._gone.add(rank)
                self._all_finished.set()

    def _look_at_own_wait(self) -> None:
        call, since = self.journal.waiting, self.journal.waiting_since
        if call is None or time.monotonic() - since < self.timeout or call is not self.journal.waiting:
            return
        reason = f"rank {self.journal.rank} has waited {self.timeout:g} s"
        if self.journal.rank == 0:
            self._ask(reason)
        elif self._lines:
            self._tell_or_fail(call, reason)
        else:
            self._fail(report({self.journal.rank: self.journal.state()}, reason))

    def _tell_or_fail(self, call: Call, reason: str) -> None:
        """Leave the end to rank 0; but it may be stopped, or in native code that keeps the interpreter lock."""
        if self._overdue is None or self._overdue[0] is not call:
            self._overdue = call, time.monotonic()
            self._lines[0].send(overdue=reason)
        elif time.monotonic() - self._overdue[1] > ANSWER_SECONDS + MARGIN_SECONDS:
            states = {0: "does not answer", self.journal.rank: self.journal.state()}
            self._fail("HangError: " + report(states, reason), once=True)

    def _note_answer(self, rank: int, message: dict[str, Any]) -> None:
        self._answers[rank], self._records[rank] = message["state"], message["record"]

    def _ask(self, reason: str, hangs: bool = True) -> None:
        if self._asked_at is None:
            self._reason, self._hangs, self._asked_at = reason, hangs, time.monotonic()
            for line in self._lines.values():
                line.send(ask=True)

    def _conclude(self) -> None:
        """Report once all have answered, or have had their time to."""
        assert self._asked_at is not None
        states = {0: self.journal.state(), **self._answers}
        if len(states) < self.journal.size and time.monotonic() - self._asked_at < ANSWER_SECONDS:
            return
        for rank in range(self.journal.size):
            states.setdefault(rank, "does not answer")
        said = "HangError: " + report(states, self._reason) if self._hangs else self._reason
        self._fail("\n".join(filter(None, [said, parting({0: entries(self.journal), **self._records})])))

    def abort(self, text: str) -> None:
        """End the job for a reason of the program's own, once the ranks have told what they were doing."""
        if self.journal.rank == 0:
            self._ask(text, hangs=False)
        elif self._lines:
            self._lines[0].send(abort=text)
        time.sleep(2 * ANSWER_SECONDS)  # rank 0 ends this process before
        self._fail(text)

    # The end ------------------------------------------------------------------------------------------

    def farewell(self, kind: str) -> None:
        """Tell rank 0 that this rank's end ("finished" or "failed") is its own doing."""
        self._gone.add(0)
        if self.journal.rank != 0 and self._lines:
            self._lines[0].send(farewell=kind, state=self.journal.state(), record=entries(self.journal))

    def all_end_alike(self, text: str, seconds: float) -> bool:
        """Return whether, within so many seconds, every rank ends for the reason that `text` gives."""
        self._gone.add(0)
        if self.journal.rank == 0:
            self._note_end(0, text)
        elif self._lines:
            self._lines[0].send(ends=text)
        return self._all_finished.wait(seconds)

    def _note_end(self, rank: int, text: str) -> None:
        self._ends[rank] = text
        if len(self._ends) == self.journal.size and len(set(self._ends.values())) == 1:
            self._release()

    def wait_for_all(self) -> None:
        """Return when every rank has finished; called at the interpreter's exit."""
        self.journal.finish()
        self.farewell("finished")
        if self.journal.rank == 0:
            self._let_go_if_all_finished()
        self._all_finished.wait(None if self._lines else 0.0)

    def _let_go_if_all_finished(self) -> None:
        if self.journal.rank == 0 and self.journal.finished and set(self._lines) <= self._gone:
            self._release()

    def _release(self) -> None:
        for line in self._lines.values():
            line.send(released=True)
        self._all_finished.set()
