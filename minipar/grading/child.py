"""In a submission's process: load it, call probes beside it, and tell what came of each.

Nothing here is trusted by the grader: it reads plain values from a socket, whoever wrote them there.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import random
import resource
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np

from minipar.comm.launch import launch_timeout
from minipar.errors import HangError, MismatchError
from minipar.grading.lesson import Lesson, Wrong, wrong
from minipar.grading.manifest import import_grader
from minipar.grading.names import forbidden_use
from minipar.grading.values import NotPlain, pack, unpack

MEMORY = 2 * 2**30  # bytes that a submission may take beyond what minipar has taken
CPU_SECONDS = 120  # of one process, should nobody be left to end it
FILE_BYTES = 64 * 2**20
TEXT = 3000  # characters of a message
FRAME = struct.Struct("!Q")


def send_frame(end: socket.socket, value: Any) -> None:
    """Send a plain value."""
    data = pack(value)
    end.sendall(FRAME.pack(len(data)) + data)


def receive_frame(end: socket.socket) -> Any:
    """Return the next plain value, or None if the other end is gone."""
    head = end.recv(FRAME.size, socket.MSG_WAITALL)
    if len(head) < FRAME.size:
        return None
    return unpack(end.recv(FRAME.unpack(head)[0], socket.MSG_WAITALL))


def limit_resources() -> None:
    """Cap memory, processor time and file sizes of this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere the cap on addresses is not kept by the system
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_child(answers: socket.socket, output: int, folder: str) -> None:
    """Serve one submission in this process, a fresh fork, and end it. Does not return.

    Args:
        answers: where requests come from and replies go to.
        output: file descriptor of what the submission prints.
        folder: an empty directory, the current one from here on.
    """
    try:
        os.setsid()  # a process group of its own, out of reach of the terminal
        os.chdir(folder)
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.register_at_fork(after_in_child=answers.close)  # its children cannot answer for it
        limit_resources()
        Child(answers).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class Child:
    """One submission, loaded, and the probes of its lesson."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers
        self._sending = threading.Lock()
        self._answered = True
        self._files: dict[str, str] = {}  # the submission's sources: name shown by path
        self._lesson: Lesson
        self._submission: ModuleType

    def serve(self) -> None:
        """Answer requests until the grader closes the socket."""
        while (request := receive_frame(self._answers)) is not None:
            self._answered = False
            with self._time_limit(request["seconds"]):
                self._answer(self._outcome(request))

    def _outcome(self, request: Any) -> Any:
        """Return {"value": …} or {"error": …, "ends": …}: what came of a request."""
        work = self._load if "sources" in request else self._call
        try:
            with launch_timeout(max(request["seconds"] / 3, 1.0)):
                value = work(request)
                pack(value)  # now, so that what cannot travel is told like any other mistake
            return {"value": value}
        except BaseException as error:
            return {"error": self._describe(error), "ends": isinstance(error, MemoryError)}

    def _answer(self, reply: Any) -> None:
        with self._sending:
            if not self._answered:
                self._answered = True
                send_frame(self._answers, reply)

    @contextlib.contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        """Tell after so many seconds what the submission is doing still."""
        timer = threading.Timer(seconds, lambda: self._answer({"late": self._whereabouts()}))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # What is asked for --------------------------------------------------------------------------------

    def _load(self, request: Any) -> None:
        """Load the grader's probes, then run the submission's sources as one module.

        Raises:
            Wrong: a source uses a name that the lesson forbids; it has not run then.
        """
        self._lesson = import_grader(Path(request["grader"]))
        self._submission = module = ModuleType("exercise")
        sys.modules["exercise"] = module
        for path, source in request["sources"]:
            self._files[path] = Path(path).name
            linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
            module.__file__ = path
            tree = ast.parse(source, path)
            if used := forbidden_use(tree, self._lesson.forbidden):
                name, line = used
                where = self._spot(path, line, "<module>")
                wrong(f"{name} is not to be used in this exercise: write it yourself\nat {where}")
            exec(compile(tree, path, "exec"), module.__dict__)

    def _call(self, request: Any) -> Any:
        probe: Callable[..., Any] = self._lesson.probes[request["probe"]]
        random.seed(0)
        np.random.seed(0)
        return probe(self._submission, *request["args"], **request["kwargs"])

    # What came of it, in words ------------------------------------------------------------------------

    def _describe(self, error: BaseException) -> str:
        """Return one message about an exception: what a learner can do with it, not a traceback."""
        place, kind = self._place(error), type(error).__name__
        text = str(error).strip()
        if isinstance(error, NotImplementedError):
            return f"not written yet: {text or place}"[:TEXT]
        if isinstance(error, NotPlain | Wrong):
            return text[:TEXT]
        if isinstance(error, AttributeError) and error.obj is getattr(self, "_submission", None):
            return f"the submission has no {error.name!r}: keep the names that the exercise gives"
        if isinstance(error, MemoryError):
            what = f"more memory was asked for than the {MEMORY / 2**30:g} GiB that grading allows"
        elif isinstance(error, RecursionError):
            what = "calls itself without end: which case ends the recursion?"
        elif isinstance(error, SystemExit):
            what = "sys.exit was called: return the result instead"
        elif isinstance(error, HangError):
            what = f"the ranks wait for each other without end: {text}"
        elif isinstance(error, MismatchError):
            what = f"the ranks do not call the same operations: {text}"
        elif isinstance(error, SyntaxError) and error.filename in self._files:
            what = f"does not load: {error.msg}, {self._files[error.filename]} line {error.lineno}"
        else:
            what = f"raised {kind}: {text}" if text else f"raised {kind}"
            ranks = [note for note in getattr(error, "__notes__", []) if note.startswith("raised on ")]
            what += f" ({ranks[0].removeprefix('raised ')})" if ranks else ""
        return (what[:TEXT] + (f"\nat {place}" if place else ""))[: 2 * TEXT]

    def _place(self, error: BaseException) -> str:
        """Return where in the submission an exception arose, or "" if nowhere there."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in self._files]
        if not frames:
            return ""
        last = frames[-1]
        return self._spot(last.filename, last.lineno or 0, last.name)

    def _spot(self, path: str, line: int, function: str) -> str:
        inside = "" if function == "<module>" else f", in {function}"
        return f"{self._files[path]} line {line}{inside}: {linecache.getline(path, line).strip()}"

    def _whereabouts(self) -> str:
        """Return the line of the submission that each thread is at."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        places = []
        for ident, frame in sys._current_frames().items():
            inner: FrameType | None = frame
            while inner is not None and inner.f_code.co_filename not in self._files:
                inner = inner.f_back
            if inner is not None:
                code = inner.f_code
                who = names.get(ident, "").removeprefix("minipar-").replace("rank-", "rank ")
                prefix = f"{who}: " if who.startswith("rank ") else ""
                places.append(prefix + self._spot(code.co_filename, inner.f_lineno, code.co_name))
        return "\n".join(sorted(places))[:TEXT]
