"""The grader's end of a submission's process: starts it, asks it, limits it, and words what it died of.

Whatever a submission does (an endless loop, a deadlock, `sys.exit`, prints without end, huge arrays, forks)
ends in a `Wrong` with a message, never in a hang, and the next question goes to a fresh process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import minipar
from minipar.comm.blas import THREAD_VARIABLES
from minipar.grading.child import FRAME, send_frame
from minipar.grading.lesson import Wrong
from minipar.grading.values import MOST_BYTES, Unreadable, unpack

NOT_READABLE = "the submission's answer could not be read: did it write to files it had not opened?"
CROWDED = "started processes without end: one process is enough here, ranks are threads"
PRINTED_BYTES = 2**20  # after which a submission is ended
SHOWN_BYTES = 4096  # of what it printed
LOAD_SECONDS = 10.0
GRACE_SECONDS = 1.0  # after its time, for a submission to tell where it is
START_SECONDS = 60.0  # for minipar's import on a busy machine


class Nursery:
    """The process that submissions are forked from; started when first needed, ended by `close`.

    One serves any number of submissions, one after the other.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._folder = ""  # of the submission that runs

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and the submission in it if there is one."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(GRACE_SECONDS * 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._control = None

    def start(self) -> tuple[int, socket.socket, int]:
        """Fork a process; return its id, the socket to ask it by, and the end to read what it prints from."""
        if self._process is None or self._process.poll() is not None:
            self._launch()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        printed, output = os.pipe()
        socket.send_fds(self._control, [b"start"], [theirs.fileno(), output])
        theirs.close()
        os.close(output)
        pid, self._folder = json.loads(self._control.recv(4096))
        return pid, ours, printed

    def end(self, pid: int, gone: bool = False) -> dict[str, Any]:
        """End the process that `start` forked; return {"status": exit status, "crowded": bool}.

        Args:
            gone: it seems to have ended by itself.
        """
        assert self._control is not None
        try:
            self._control.sendall(b"gone" if gone else b"end")
            report = json.loads(self._control.recv(256))
        except (OSError, ValueError):  # the submission has ended the nursery itself
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
            self.close()
            report = {"status": None, "crowded": False}
        return report

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(START_SECONDS)
        job_variables = ("MINIPAR", "PMI", "PMIX", "OMPI", "SLURM")  # a submission is no rank of a job
        environment = {k: v for k, v in os.environ.items() if not k.startswith(job_variables)}
        environment |= dict.fromkeys(THREAD_VARIABLES, "1")
        environment |= {"MALLOC_ARENA_MAX": "2", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "minipar.grading.nursery", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment | {"PYTHONPATH": str(Path(minipar.__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._control = ours


class Submission:
    """A submission under grading: its sources, and the process they run in while one lives.

    Attributes:
        printed: the first few KiB of what it printed.
    """

    def __init__(self, nursery: Nursery, grader: Path, sources: Sequence[tuple[str, str]]) -> None:
        """Args:
        grader: the lesson's grade.py, whose probes are called.
        sources: (path, text) pairs that run one after the other as one module.
        """
        self._nursery = nursery
        self._grader = grader
        self._sources = list(sources)
        self._pid = 0
        self._answers: socket.socket | None = None
        self._pipe = -1
        self._broken: Wrong | None = None  # why it does not load
        self._printed = bytearray()
        self._printed_bytes = 0

    @property
    def printed(self) -> str:
        """What it printed, cut to a few KiB."""
        text = bytes(self._printed).decode(errors="replace")
        cut = self._printed_bytes > len(self._printed)
        return text + ("\n… (cut)" if cut else "")

    def close(self) -> None:
        """End its process, if one lives."""
        self._end()

    def run(self, probe: Callable[..., Any], *args: Any, seconds: float = 10.0, **kwargs: Any) -> Any:
        """Call a probe beside the submission; see `Run`."""
        if self._broken is not None:
            raise self._broken
        if self._answers is None:
            try:
                self._start()
            except Wrong as failure:
                self._broken = failure
                self._end()
                raise
        return self._ask({"probe": probe.__name__, "args": args, "kwargs": kwargs, "seconds": seconds})

    def _start(self) -> None:
        self._pid, self._answers, self._pipe = self._nursery.start()
        os.set_blocking(self._pipe, False)
        self._ask({"grader": str(self._grader), "sources": self._sources, "seconds": LOAD_SECONDS})

    def _end(self, gone: bool = False) -> dict[str, Any]:
        if self._answers is None:
            return {}
        report = self._nursery.end(self._pid, gone)
        self._read_output()
        self._answers.close()
        os.close(self._pipe)
        self._answers = None
        return report

    def _ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the value of its reply, or raise Wrong."""
        assert self._answers is not None
        self._answers.settimeout(GRACE_SECONDS)
        try:
            send_frame(self._answers, request)
        except OSError:
            raise Wrong(self._cause_of_death()) from None
        reply = self._reply(time.monotonic() + request["seconds"] + GRACE_SECONDS, request["seconds"])
        if "value" in reply:
            return reply["value"]
        if "late" in reply:
            raise Wrong(self._overdue(request["seconds"], str(reply["late"])))
        if reply.get("ends"):
            self._end()
        raise Wrong(str(reply.get("error", NOT_READABLE)))

    def _overdue(self, seconds: float, places: str = "") -> str:
        if self._end().get("crowded"):
            return CROWDED
        where = f" It was at\n{places}" if places else ""
        return f"still running after {seconds:g} s: a loop or a wait that never ends?{where}"

    def _reply(self, deadline: float, seconds: float) -> dict[str, Any]:
        """Return the next reply; read meanwhile what is printed."""
        assert self._answers is not None
        data, length = bytearray(), -1
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                remaining = deadline - time.monotonic()
                events = selector.select(max(remaining, 0))
                if remaining <= 0:
                    raise Wrong(self._overdue(seconds))
                for key, _ in events:
                    if key.fileobj is self._answers:
                        continue
                    if not self._read_output():
                        selector.unregister(self._pipe)
                    if self._printed_bytes > PRINTED_BYTES:
                        self._end()
                        raise Wrong(
                            f"printed more than {PRINTED_BYTES >> 20} MiB: a print in an endless loop?"
                        )
                if not any(key.fileobj is self._answers for key, _ in events):
                    continue
                try:
                    part = self._answers.recv(1 << 20)
                except OSError:
                    part = b""
                if not part:
                    raise Wrong(self._cause_of_death())
                data += part
                if length < 0 and len(data) >= FRAME.size:
                    length = FRAME.unpack_from(data)[0]
                if length > 2 * MOST_BYTES:  # `pack` makes nothing as long as that
                    self._end()
                    raise Wrong(NOT_READABLE)
                if 0 <= length <= len(data) - FRAME.size:
                    return self._read_reply(bytes(data[FRAME.size :]))

    def _read_reply(self, data: bytes) -> dict[str, Any]:
        try:
            reply = unpack(data)
        except Unreadable:
            reply = None
        if not isinstance(reply, dict):
            self._end()
            raise Wrong(NOT_READABLE)
        return reply

    def _read_output(self) -> bool:
        """Take over what was printed; return False once nothing more can come."""
        while True:
            try:
                part = os.read(self._pipe, 65536)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._printed_bytes += len(part)
            self._printed += part[: max(SHOWN_BYTES - len(self._printed), 0)]
            if self._printed_bytes > PRINTED_BYTES:
                return True

    def _cause_of_death(self) -> str:
        report = self._end(gone=True)
        status = report.get("status")
        if report.get("crowded"):
            return CROWDED
        if status is None:
            return "ended the process that grades it: does it kill processes that are not its own?"
        if status == -signal.SIGKILL:
            return "its process was killed, or closed the files by which it answers"
        if status < 0:
            name = signal.Signals(-status).name
            hint = {"SIGSEGV": ": a recursion that never ends?", "SIGXCPU": ": an endless loop?"}.get(
                name, ""
            )
            return f"its process was ended by {name}{hint}"
        return (
            f"its process ended with exit code {status} and no answer: was os._exit called, "
            "or were files closed that it had not opened?"
        )
