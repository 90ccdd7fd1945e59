"""Ctrl-C and SIGTERM in an MPI job: one line and an exit code, even for a rank that is stuck inside MPI.

Python runs a signal's handler between two of its own instructions, and a rank that waits in MPI executes none.
But a signal also writes its number into a pipe at once; a thread reads that, and ends the job where the main
thread has not come round to it within a second. A program that handles a signal itself, as `minipar train` does
with SIGTERM, keeps its handler.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

PATIENCE = 1.0  # seconds that the main thread has to notice
INTERRUPTED, TERMINATED = 130, 143  # exit codes, as a shell gives them


class Terminated(BaseException):
    """SIGTERM has come: what KeyboardInterrupt is to Ctrl-C."""


TEXTS: dict[type[BaseException], tuple[str, int]] = {  # what is said, and the job's exit code
    KeyboardInterrupt: ("interrupted", INTERRUPTED),
    Terminated: ("ended by SIGTERM", TERMINATED),
}


class Signals:
    """Handlers of one process; to be made in its main thread.

    Args:
        stuck: whether the main thread waits inside MPI.
        end: ends the job as this exception does when nobody catches it; never returns.
    """

    def __init__(self, stuck: Callable[[], bool], end: Callable[[type[BaseException]], None]) -> None:
        self._stuck = stuck
        self._end = end
        self._unhandled: set[int] = set()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)
        self._told, told = os.pipe()
        os.set_blocking(told, False)
        before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        if before != -1:  # an event loop of the program's own listens there
            signal.set_wakeup_fd(before)
            return
        threading.Thread(target=self._listen, name="minipar-signals", daemon=True).start()

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._unhandled.discard(number)
        signal.default_int_handler(number, frame)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._unhandled.discard(number)
        raise Terminated

    def _listen(self) -> None:
        while True:
            for number in os.read(self._told, 64):
                ours = signal.getsignal(number) in (self._interrupted, self._terminated)
                if ours and number not in self._unhandled:
                    self._unhandled.add(number)
                    threading.Thread(target=self._see_to, args=(number,), daemon=True).start()

    def _see_to(self, number: int) -> None:
        """End the job if the main thread is stuck, and does not handle the signal."""
        while number in self._unhandled:
            threading.Event().wait(PATIENCE)
            if number in self._unhandled and self._stuck():
                self._end(KeyboardInterrupt if number == signal.SIGINT else Terminated)
