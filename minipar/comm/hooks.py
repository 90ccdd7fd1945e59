"""One rank's failure ends the whole MPI job, and says which rank it was.

Under plain `mpirun python script.py` a rank that raises waits in MPI_Finalize for ranks that wait for it.
`install` makes every way of ending badly end the job at once, with the error's exit code: an exception in
the program or in one of its threads, a non-zero `sys.exit`, and what the watchdog finds.

Limit: `raise SystemExit(3)` cannot be seen from Python as `sys.exit(3)` can; a rank that ends so counts as
finished, and is named as that when the others have waited for the time-out.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

from minipar.comm.guard import Journal
from minipar.comm.watchdog import Watchdog
from minipar.errors import MiniparError

ALIKE_SECONDS = 0.5  # that the ranks have to find out that all end for the same reason
ABORT_SECONDS = 5.0  # that MPI has to end the job before this process ends by itself


class Hooks:
    """What one process does at its end; made once, by the first `world()` of an MPI job."""

    def __init__(self, mpi: Any, journal: Journal, timeout: float) -> None:
        self._mpi = mpi
        self._journal = journal
        self.watchdog = Watchdog(journal, timeout, self.fail)
        self._exit_code: Any = 0
        self._exit_after: Any = None  # the last communication before sys.exit was called
        self._exit = sys.exit
        sys.excepthook = self._uncaught
        threading.excepthook = self._uncaught_in_thread
        sys.exit = self._exiting  # type: ignore[assignment]
        atexit.register(self._at_exit)

    def end_job(self, code: int) -> None:
        """End every rank with this exit code. Does not return."""
        self.watchdog.farewell("failed")
        sys.stdout.flush()
        sys.stderr.flush()
        # MPI_Abort needs locks that a stuck rank may hold; mpirun ends the others when this process ends.
        last_resort = threading.Timer(ABORT_SECONDS, os._exit, [code])
        last_resort.daemon = True
        try:
            last_resort.start()
        except RuntimeError:  # no memory for a thread is left; the system's alarm clock needs none
            signal.alarm(int(ABORT_SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the reason is said; MPICH would add that we aborted
        self._mpi.COMM_WORLD.Abort(code)

    def fail(self, text: str) -> None:
        """Print a line about the whole job and end it."""
        print(f"minipar: {text}", file=sys.stderr)
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
            text, code = f"{kind.__name__}: {error}", error.exit_code
        elif issubclass(kind, KeyboardInterrupt):
            text, code = "interrupted", 130
        else:
            text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        text = self._prefixed(text, thread)
        self._end_after(f"{kind.__name__}: {error}", text, code, text)

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
