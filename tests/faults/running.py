"""Start a job, wait until it says that it is where the fault shall strike, and see how it ends.

Every process of a job, its monitors included, carries a mark in its environment, so that one which outlives
the job is found wherever it has gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment

MARK = "MINIPAR_TEST_JOB"
READY = "ready"  # what a program prints when the fault may strike
GONE_SECONDS = 5.0  # that the last process of an ended job may take to disappear
SLACK = 5.0  # seconds that a job may outlive its fault by, beyond the time-out: these tests run one job at a time
ROOT = Path(__file__).parents[2]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        seconds: from the fault (or, if none was waited for, the start) to the end, or to the line `over`.
        orphans: command lines of processes that were still there afterwards.
    """

    code: int
    out: str
    err: str
    seconds: float
    orphans: list[str]

    def lines(self) -> list[str]:
        """Return what was said on standard error, mpirun's own words about Ctrl-C left out."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("[mpiexec@")]


def with_mark(mark: str) -> dict[int, str]:
    """Return the command lines of the running processes that carry a job's mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def kill(mark: str) -> None:
    """Kill every process that carries a job's mark."""
    for pid in with_mark(mark):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)


def left_of(mark: str) -> list[str]:
    """Return what is left of a job after it has had time to end; and end that."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := with_mark(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(mark)
    return list(left.values())


def run(
    command: Sequence[str],
    number: int | None = None,
    limit: float = 60.0,
    ready: str = READY,
    group: bool = False,
    over: str | None = None,
    **settings: str,
) -> Outcome:
    """Run a command; where a signal's `number` is given, send that to it once it has printed `ready`.

    It runs where this checkout is, so that the tests' own modules are found.

    Args:
        limit: seconds after which all processes of the job are killed.
        group: send the signal to the command's process group, as a terminal does.
        over: a line that the command prints when the job has ended, but not the command.
        settings: environment variables.
    """
    mark = uuid.uuid4().hex
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("PMI", "MINIPAR", "OMPI"))}
    inherited["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = "1"  # a job may have more ranks than there are cores
    start = time.monotonic()
    job = subprocess.Popen(
        command, cwd=ROOT, env={**inherited, **settings, MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert job.stdout is not None and job.stderr is not None
    said: list[str] = []
    err: list[str] = []
    reader = threading.Thread(target=lambda: err.append(job.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    killer = threading.Timer(limit, kill, [mark])
    killer.start()
    struck, ended = False, None
    for line in job.stdout:
        said.append(line)
        if line.strip() == over:
            ended = time.monotonic()
        if ready in line and not struck:
            start, struck = time.monotonic(), True
            if number is not None:
                os.killpg(job.pid, number) if group else job.send_signal(number)
    reader.join()
    code = job.wait()
    seconds = (ended or time.monotonic()) - start
    killer.cancel()
    return Outcome(code, ANSI.sub("", "".join(said)), ANSI.sub("", "".join(err)), seconds, left_of(mark))


def mpirun(ranks: int, module: str, *words: str, **options: object) -> Outcome:
    """`mpirun -n ranks python -m module words`, plainly; `options` are those of `run`."""
    program = find_mpirun()
    if is_open_mpi(program):  # which needs its settings to run as root and crowded
        options = {**job_environment(ranks, True, {}), **options}
    return run([program, "-n", str(ranks), sys.executable, "-m", module, *words], **options)  # type: ignore[arg-type]


def python_command(module: str, *words: object) -> list[str]:
    """Return `python -m module words`."""
    return [sys.executable, "-m", module, *map(str, words)]


def python(module: str, *words: object, **options: object) -> Outcome:
    """`python -m module words`."""
    return run(python_command(module, *words), **options)  # type: ignore[arg-type]


def minipar(*words: object, **options: object) -> Outcome:
    """`minipar words`, as a process of its own."""
    return python("minipar", *words, **options)


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for orphans in /proc")
