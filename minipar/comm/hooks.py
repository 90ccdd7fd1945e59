"""One rank's failure ends the whole MPI job, and says which rank it was.

Under plain `mpirun python script.py` a rank that raises waits in MPI_Finalize for ranks that wait for it.
`Hooks` make every way of ending badly end the job at once, with the error's exit code: an exception in
the program or in one of its threads, a non-zero `sys.exit`, and what the watchdog finds.

Limit: `raise SystemExit(3)` cannot be seen from Python as `sys.exit(3)` can; a rank that ends so counts as
finished, and is named as that when the others have waited for the time-out.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import stat
import sys
import termios
import threading
import time
import traceback
from array import array
from types import TracebackType
from typing import Any

from minipar.comm.guard import Journal
from minipar.comm.monitor import DIED, Monitor
from minipar.comm.signals import PATIENCE, TEXTS, Signals
from minipar.comm.watchdog import Watchdog
from minipar.errors import MiniparError

ALIKE_SECONDS = 0.5  # that the ranks have to find out that all end for the same reason
ABORT_SECONDS = 5.0  # that MPI has to end the job before this process ends by itself
READ_SECONDS = 2.0  # that the launcher has to read what a rank printed last
WORD_SECONDS = 2.0  # that the monitor of a dead rank, and then mpirun, have to end the job


class Hooks:
    """What one process does at its end; made once, by the first `world()` of an MPI job."""

    def __init__(self, mpi: Any, journal: Journal, timeout: float) -> None:
        self._mpi = mpi
        self._journal = journal
        self.watchdog = Watchdog(journal, timeout, self.fail, self._rank_died)
        self.monitor: Monitor | None = None
        self._exit_code: Any = 0
        self._exit_after: Any = None  # the last communication before sys.exit was called
        self._exit = sys.exit
        sys.excepthook = self._uncaught
        threading.excepthook = self._uncaught_in_thread
        sys.exit = self._exiting  # type: ignore[assignment]
        atexit.register(self._at_exit)

    def connect(self) -> None:
        """Set up what watches over the ranks. Collective."""
        self.watchdog.connect(self._mpi.COMM_WORLD)
        self.monitor = Monitor(self._mpi.COMM_WORLD)
        self._journal.on_move = self.monitor.note
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            Signals(lambda: self._journal.waiting is not None, self._end_by_signal)

    def end_job(self, code: int) -> None:
        """End every rank with this exit code. Does not return."""
        self.watchdog.farewell("failed")
        self._has_word()  # mpirun is about to kill the others, of which nobody need be told
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            wait_until_read(descriptor, READ_SECONDS)  # MPICH's mpirun drops what it has not read by then
        # MPI_Abort needs locks that a stuck rank may hold; mpirun ends the others when this process ends.
        last_resort = threading.Timer(ABORT_SECONDS, os._exit, [code])
        last_resort.daemon = True
        try:
            last_resort.start()
        except RuntimeError:  # no memory for a thread is left; the system's alarm clock needs none
            signal.alarm(int(ABORT_SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the reason is said; MPICH would add that we aborted
        self._mpi.COMM_WORLD.Abort(code)

    def fail(self, text: str, once: bool = False) -> None:
        """Print a line about the whole job and end it. With `once` only the first of a host's ranks does so."""
        if once and not self._has_word():
            time.sleep(ABORT_SECONDS)  # the other ends this process before
        else:
            print(f"minipar: {text}", file=sys.stderr)
        self.end_job(MiniparError.exit_code)

    def _rank_died(self, rank: int) -> None:
        """End the job because a rank has gone; say so if its own monitor does not."""
        place = self.monitor.place_of(rank) if self.monitor is not None else ""
        time.sleep(WORD_SECONDS)  # once the monitor has spoken mpirun ends this process
        if self._has_word():
            died = " ".join(filter(None, [f"rank {rank} died", place]))
            print(f"minipar: {died} ({DIED}); seen by {self._journal.place()}", file=sys.stderr)
        self.end_job(MiniparError.exit_code)

    def _end_after(self, reason: str, text: str, code: int, text_if_alike: str) -> None:
        """Print a text and end the job. If all ranks end for the same reason, rank 0 does it for all."""
        if self.watchdog.all_end_alike(reason, ALIKE_SECONDS):
            text = text_if_alike
            if self._journal.rank != 0:
                time.sleep(ABORT_SECONDS)  # rank 0 ends this process before
        sys.stdout.flush()
        sys.stderr.write(text)
        self.end_job(code)

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None, thread: str = ""
    ) -> None:
        code = 1
        if isinstance(error, MiniparError):
            text = "\n".join([f"{kind.__name__}: {error}", *getattr(error, "__notes__", [])])
            code = error.exit_code
        elif kind in TEXTS:
            self._end_by_signal(kind)
        else:
            text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        text = self._prefixed(text, thread)
        self._end_after(f"{kind.__name__}: {error}", text, code, text)

    def _end_by_signal(self, kind: type[BaseException]) -> None:
        """End the job because of a signal, which mpirun sends to all ranks: one of a host says so."""
        text, code = TEXTS[kind]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # pressed again, it shall not cut this short
                signal.signal(number, signal.SIG_IGN)
        alike = self.watchdog.all_end_alike(text, PATIENCE + ALIKE_SECONDS)  # others may be stuck inside MPI
        if self._journal.rank != 0 if alike else not self._has_word():
            time.sleep(ABORT_SECONDS)  # the other ends this process before
        sys.stderr.write(self._prefixed(text))
        self.end_job(code)

    def _has_word(self) -> bool:
        return self.monitor is None or self.monitor.take_word()

    def _prefixed(self, text: str, thread: str = "") -> str:
        place = self._journal.place() + thread
        return "".join(f"[{place}] {line}\n" for line in text.splitlines())

    def _uncaught_in_thread(self, arguments: Any) -> None:
        if arguments.exc_type is not SystemExit:
            name = arguments.thread.name if arguments.thread else "unknown"
            self._uncaught(
                arguments.exc_type, arguments.exc_value, arguments.exc_traceback, f", thread {name}"
            )

    def _exiting(self, code: Any = 0, /) -> None:
        self._exit_code = code
        self._exit_after = self._journal.entries[-1] if self._journal.entries else None
        self._exit(code)

    def _at_exit(self) -> None:
        code, entries = self._exit_code, self._journal.entries
        ended_by_exit = self._exit_after is (entries[-1] if entries else None)
        if code not in (None, 0) and ended_by_exit:  # else it was caught, and the program went on
            reason = f"sys.exit({code!r})"
            self._end_after(reason, self._prefixed(reason), code if isinstance(code, int) else 1, "")
        self.watchdog.wait_for_all()
        if self.monitor is not None:
            self.monitor.finish()


def wait_until_read(descriptor: int, seconds: float) -> None:
    """Return when the other end of a pipe has read all that was written to it, or after so many seconds."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    unread, deadline = array("i", [0]), time.monotonic() + seconds
    while time.monotonic() < deadline:
        fcntl.ioctl(descriptor, termios.FIONREAD, unread)
        if unread[0] == 0:
            return
        time.sleep(0.001)
