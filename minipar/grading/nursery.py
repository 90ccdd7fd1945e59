"""The process that submissions are forked from: `python -m minipar.grading.nursery FD`.

It imports minipar once, so that a fork for a submission costs milliseconds. It forks when asked, watches that
a submission does not start processes without end, and when asked to end it kills it and everything that came
of it: on Linux also what has left its process group or lost its parent, since orphans become its children.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import minipar
from minipar.grading.child import run_child

PROCESSES = 64  # that a submission may have at a time
LOOK_SECONDS = 0.05  # between two looks at how many it has
STATUS_SECONDS = 1.0  # for the exit status of a process that has closed its answers
END_SECONDS = 10.0  # to end all of them
PROC = Path("/proc/self/task")


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own (Linux)."""
    if sys.platform == "linux":
        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants, ended ones that nobody waited for included (Linux)."""
    found, todo = [], [pid]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                children = [int(word) for word in task.read_text().split()]
                found += children
                todo += children
    return found


class Nursery:
    """Forks one submission's process at a time."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._child = 0
        self._status: int | None = None  # of the child, once it has ended
        self._crowded = False
        self._folder = ""

    def serve(self) -> None:
        """Answer "start" (which brings two file descriptors), "end" and "gone" until the grader is gone.

        "gone" ends the submission as "end" does, but for one that seems to have ended by itself: its exit status
        is waited for a little.
        """
        while True:
            if not select.select([self._control], [], [], LOOK_SECONDS if self._child else None)[0]:
                self._look()
                continue
            request, files, _, _ = socket.recv_fds(self._control, 16, 2)
            if request == b"start":
                self._start(files)
                self._control.sendall(json.dumps([self._child, self._folder]).encode())
            else:
                if request == b"gone":
                    self._let_end()
                self._end()
                if not request:
                    return
                report = {"status": self._status, "crowded": self._crowded}
                self._control.sendall(json.dumps(report).encode())

    def _start(self, files: list[int]) -> None:
        self._folder = tempfile.mkdtemp(prefix="minipar-grade-")
        self._status, self._crowded = None, False
        self._child = os.fork()
        if self._child == 0:
            self._control.close()
            run_child(socket.socket(fileno=files[0]), files[1], self._folder)
        for file in files:
            os.close(file)

    def _look(self) -> None:
        if PROC.exists() and len(descendants(os.getpid())) > PROCESSES:
            self._reap()  # those that have ended do not count
            if len(descendants(os.getpid())) > PROCESSES:
                self._crowded = True
                self._kill()

    def _let_end(self) -> None:
        deadline = time.monotonic() + STATUS_SECONDS
        while self._status is None and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.001)

    def _end(self) -> None:
        if self._child:
            self._look()  # on a busy machine the last look may be long ago
            self._kill()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._child = 0

    def _kill(self) -> None:
        """Kill the submission's process and all that came of it."""
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._status is None:
                    os.killpg(self._child, signal.SIGKILL)
            found = descendants(os.getpid()) or [self._child][: self._status is None]
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none forks meanwhile
                for pid in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            self._reap()
            if self._status is not None and not descendants(os.getpid()):
                return
            time.sleep(0.001)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # none is left
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._child:
                    self._status = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    assert minipar.world is not None  # imported here, once for all submissions
    adopt_orphans()
    Nursery(socket.socket(fileno=int(sys.argv[1]))).serve()
