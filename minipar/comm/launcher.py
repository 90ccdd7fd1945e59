"""Start a command on several MPI ranks with the mpirun of this very environment.

`minipar run` and `make train` end up here. It takes care of what is easily got wrong: another MPI's mpirun
(which silently starts N single ranks), BLAS threads (two a rank on two cores were measured 60 times slower
than one), jobs that outlive their time, and processes that outlive their job.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from minipar.comm.blas import THREAD_VARIABLES
from minipar.comm.guard import grouped
from minipar.comm.monitor import JOB, places
from minipar.errors import CommunicationError, UsageError

GRACE_SECONDS = 3.0  # between asking a job to end and killing it
TIMED_OUT = 124  # exit code, as of timeout(1)
LAST_LINES = 30  # of what a failed job said
# What the launcher passes on. A closed terminal asks the job to end in order; mpirun itself would just drop it.
PASSED_ON = {
    signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGQUIT: signal.SIGQUIT,
    signal.SIGHUP: signal.SIGTERM,
}  # fmt: skip
# A child of the launcher that waits at a pipe: when that just closes it ends the job, $1 its process group, as
# `end_job` does, with GRACE_SECONDS in between.
GUARD = """
IFS= read -r said
[ "$said" = over ] && exit
kill -s TERM -- "-$1" 2>/dev/null
for second in 1 2 3; do
    sleep 1
    kill -s 0 -- "-$1" 2>/dev/null || exit
done
kill -s KILL -- "-$1" 2>/dev/null
"""


def find_mpirun() -> str:
    """Return the path of mpirun: the one beside this Python, else the first on PATH.

    Raises:
        UsageError: there is none.
    """
    beside = Path(sys.executable).parent / "mpirun"
    if beside.exists():
        return str(beside)
    found = shutil.which("mpirun")
    if found is None:
        raise UsageError("no mpirun was found: pip install mpich, or load your MPI module")
    return found


def is_open_mpi(mpirun: str) -> bool:
    """Return whether this mpirun is Open MPI's."""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30)
    return "open" in version.stdout.lower() and "mpich" not in version.stdout.lower()


def job_environment(ranks: int, open_mpi: bool, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a job: `base` (by default this process's) and what minipar adds to it."""
    environment = dict(os.environ if base is None else base)
    environment["MINIPAR_WORLD_SIZE"] = str(ranks)
    for variable in THREAD_VARIABLES:
        environment[variable] = "1"
    crowded = ranks > available_cores()
    if open_mpi:
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
        environment["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    elif crowded:
        environment.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    return environment


def core_numbers() -> list[int]:
    """Return the numbers of the cores that this process may run on: a launcher may have bound it to some."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Return how many cores this process may run on."""
    return len(core_numbers())


def run_mpi(
    command: Sequence[str],
    ranks: int,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    hostfile: str | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> int:
    """Run `command` on `ranks` MPI ranks and return the job's exit code.

    Args:
        command: program and arguments, e.g. [sys.executable, "train.py"].
        timeout: seconds after which the whole job is killed and 124 returned; None for no limit.
        env: the environment to start from, by default this process's.
        hostfile: passed on to mpirun, for more than one host.
        stdout, stderr: files that the job writes to, by default this process's.

    Interrupts, SIGTERM, SIGQUIT and a closed terminal are passed on to the job. No process of it is left when
    this returns, nor some seconds after this process has been killed.

    Raises:
        UsageError: no mpirun, or fewer than one rank.
    """
    if ranks < 1:
        raise UsageError(f"ranks={ranks} must be one or more")
    mpirun = find_mpirun()
    open_mpi = is_open_mpi(mpirun)
    hosts = [] if hostfile is None else ["--hostfile" if open_mpi else "-f", hostfile]
    name = secrets.token_hex(8)
    job = subprocess.Popen(
        [mpirun, *hosts, "-n", str(ranks), *command],
        env={**job_environment(ranks, open_mpi, env), JOB: name},
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # a process group of its own, so that all of it can be signalled
    )

    def forward(number: int, frame: FrameType | None) -> None:
        signal_job(job, PASSED_ON[signal.Signals(number)])

    forwarded = {}
    with guarded(job):
        if threading.current_thread() is threading.main_thread():
            heard = [s for s in PASSED_ON if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
            forwarded = {s: signal.signal(s, forward) for s in heard}
        try:
            code = job.wait(timeout)
        except subprocess.TimeoutExpired:
            print(f"minipar: the job was killed after {timeout:g} s: {where(name, ranks)}; it ran "
                  f"{' '.join(command)}", file=sys.stderr)  # fmt: skip
            code = TIMED_OUT
        finally:
            end_job(job)
            for number, handler in forwarded.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def where(job: str, ranks: int) -> str:
    """Return where the ranks of a job are, as far as they have said so on this host."""
    told = places(job)
    words = {rank: f"was {place}" if place else "has told no step" for rank, place in told.items()}
    silent = [rank for rank in range(ranks) if rank not in told]
    return grouped(words | dict.fromkeys(silent, "has told nothing here"))


def run_script(script: str | Path, ranks: int, *arguments: object, timeout: float = 120.0) -> str:
    """Run a Python script on `ranks` MPI ranks and return what it printed; for notebooks.

    Unlike `!mpirun …` in a cell, a job that fails makes the cell fail.

    Raises:
        CommunicationError: the job ended with another code than 0, or after `timeout` seconds; the message has
            the last lines that it said.
        UsageError: no such script, no mpirun, or fewer than one rank.
    """
    if not Path(script).is_file():
        raise UsageError(f"run_script: {script} is not a file")
    command = [sys.executable, str(script), *map(str, arguments)]
    # A notebook's kernel asks all programs for colours; what is returned here is plain text.
    env = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = run_mpi(command, ranks, timeout, env, stdout=out, stderr=err)
        out.seek(0)
        err.seek(0)
        printed, said = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if code:
        how = f"was ended after {timeout:g} s" if code == TIMED_OUT else f"ended with code {code}"
        last = "\n".join((said or printed).splitlines()[-LAST_LINES:])
        raise CommunicationError(f"{script} on {ranks} ranks {how}:\n{last}")
    return printed


@contextlib.contextmanager
def guarded(job: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, the job ends even if this process is killed and cannot see to it."""
    read, write = os.pipe()
    guard = subprocess.Popen(
        ["/bin/sh", "-c", GUARD, "minipar-guard", str(job.pid)],
        stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(read)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):  # the guard was killed: there is nobody to tell
            os.write(write, b"over\n")
        os.close(write)
        guard.wait()


def signal_job(job: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to every process of the job."""
    try:
        os.killpg(job.pid, number)
    except ProcessLookupError:  # all of them have ended
        return


def end_job(job: subprocess.Popen[bytes]) -> None:
    """Ask what is left of the job to end, then kill it."""
    if job.poll() is None:
        signal_job(job, signal.SIGTERM)
        try:
            job.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            signal_job(job, signal.SIGKILL)
            job.wait()
    signal_job(job, signal.SIGKILL)
