"""Run a function on several ranks at once, in this process; and find the communicator of where code runs."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from minipar.comm.blas import in_this_thread, one_blas_thread
from minipar.comm.clock import Clock
from minipar.comm.fabric import THREAD_PREFIX, Fabric
from minipar.comm.interface import Communicator
from minipar.comm.rounds import Group
from minipar.comm.slow import as_environment_says
from minipar.comm.threads import ThreadCommunicator
from minipar.errors import RankFailed, UsageError

TIMEOUT = 60.0  # seconds
INTERRUPT_SECONDS = 1.5  # that rank-threads have to end after Ctrl-C
FAILURE_SECONDS = 1.5  # that they have to notice that another has failed

_current: ContextVar[Communicator | None] = ContextVar("minipar_world", default=None)
_timeout: ContextVar[float] = ContextVar("minipar_timeout", default=TIMEOUT)


def launch(
    fn: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float | None = None,
    clock: Clock | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `ranks` threads and return the list of what they return.

    Inside, `world()` is the thread's own communicator. Each rank has a copy of the caller's context
    variables, and BLAS runs with one thread a rank meanwhile.

    Args:
        timeout: seconds that one wait may take before it is a hang; 60 unless `launch_timeout` says otherwise.
        clock: keep virtual time, see `Clock`.

    Raises:
        HangError, MismatchError: see `Communicator`.
        Exception: what the first failing rank raised, with a note that names its rank, step and phase.
        KeyboardInterrupt: Ctrl-C came; all ranks have been ended.
    """
    if ranks < 1:
        raise UsageError(f"launch: ranks={ranks} must be one or more")
    outer = _current.get()
    parent = outer.fabric if isinstance(outer, ThreadCommunicator) else None
    fabric = Fabric(ranks, _timeout.get() if timeout is None else timeout, clock, parent)
    group = Group(range(ranks))
    results: list[Any] = [None] * ranks
    first: list[BaseException] = []

    def run(rank: int) -> None:
        _current.set(ThreadCommunicator(fabric, group, rank, "world"))
        try:
            with in_this_thread(controller):
                results[rank] = fn(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                pass  # sys.exit() or sys.exit(0) ends this rank like a return
            else:
                with fabric.lock:
                    first.append(error)
                place = fabric.journals[rank].place()
                error.add_note(f"raised on {place} (of {ranks} ranks)")
                if isinstance(error, SystemExit):  # Python ends without a word about it
                    print(f"[{place}] sys.exit({error.code!r})", file=sys.stderr)
                fabric.fail(rank, f"{type(error).__name__}: {error}")
        fabric.finish(rank)

    def thread_of(rank: int, ended: threading.Event) -> None:
        try:
            if fabric.failure is None:  # else the launch was interrupted while it started its ranks
                run(rank)
        except KeyboardInterrupt:  # `interrupt` struck when the rank was about to end by itself
            return
        finally:
            ended.set()

    threads: dict[threading.Thread, threading.Event] = {}
    with one_blas_thread() as controller, fabric.launched():
        try:
            for rank in range(ranks):
                ended = threading.Event()
                thread = threading.Thread(
                    target=copy_context().run, args=(thread_of, rank, ended), name=f"{THREAD_PREFIX}rank-{rank}",
                    daemon=True,
                )  # fmt: skip
                threads[thread] = ended  # before the start, during which Ctrl-C may come
                thread.start()
            wait(threads, fabric)
        except BaseException as error:  # Ctrl-C, for one: it comes to the thread that launched
            error.add_note(f"at {fabric.journals[0].place()} (of {ranks} ranks)")
            fabric.end(f"{type(error).__name__} in the thread that launched the ranks")
            interrupt(threads, fabric)
            raise
    if first:  # one that only heard of another's failure may be the first to have ended
        raise next((error for error in first if not isinstance(error, RankFailed)), first[0])
    return results


@contextmanager
def launch_timeout(seconds: float) -> Iterator[None]:
    """Inside, a `launch` that states no timeout allows so many seconds a wait (a grader's are few)."""
    token = _timeout.set(seconds)
    try:
        yield
    finally:
        _timeout.reset(token)


def wait(threads: dict[threading.Thread, threading.Event], fabric: Fabric) -> None:
    """Wait until all ranks have ended, but not for ever once one has failed."""
    deadline = None
    for thread, ended in threads.items():
        while not ended.wait(0.05):
            if fabric.parent is not None:
                fabric.parent.raise_failure()
            if fabric.failure is not None:
                deadline = deadline or time.monotonic() + FAILURE_SECONDS
                if time.monotonic() > deadline:
                    return interrupt(threads, fabric)
        thread.join()


def interrupt(threads: dict[threading.Thread, threading.Event], fabric: Fabric) -> None:
    """See rank-threads end whose waits have been ended; raise KeyboardInterrupt in those that compute.

    A rank that has launched others itself notices, and ends these first.
    One that stays in native code longer than INTERRUPT_SECONDS is left there; it ends when it comes out of it,
    or with the process.
    """
    deadline = time.monotonic() + INTERRUPT_SECONDS
    for thread, ended in threads.items():
        while not ended.wait(0.1) and thread.ident is not None and time.monotonic() < deadline:
            if thread.ident not in fabric.launching:  # more than once: what a destructor raises is swallowed
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
                )
        if ended.is_set():
            thread.join()


@functools.cache
def _alone() -> Communicator:
    return ThreadCommunicator(Fabric(1, TIMEOUT), Group([0]), 0, "world")


def world(checks: bool | None = None) -> Communicator:
    """Return the communicator of where this runs: a launch's thread, an MPI job, or a single rank.

    Args:
        checks: MPI only, the threads always check: compare what the ranks call before any data moves, and
            send synchronously. By default as before, at first as MINIPAR_CHECKS says (0 or 1; 1). The same
            on all ranks; communicators that were split off before keep theirs.

    The first call in an MPI job is collective. A wait ends after MINIPAR_TIMEOUT seconds (60) there. A
    single rank outside any launcher does not import mpi4py.

    Raises:
        UsageError: the MPI job has another size than the launcher asked for, or a setting is malformed.
    """
    current = _current.get()
    if current is not None:
        return current
    launched = ranks_in_environment()
    if launched is None:
        return _alone()
    refuse_foreign_launcher()
    from minipar.comm.mpi import mpi_world

    return as_environment_says(mpi_world(launched, checks, default_checks(), mpi_timeout()))


def ranks_in_environment() -> tuple[int, str] | None:
    """Return how many ranks an MPI launcher says it started, and the variable that says so.

    SLURM_NTASKS is not among them: in an allocation it is set for programs that are not ranks, too.
    """
    for variable in ("MINIPAR_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable]), variable
    return None


def refuse_foreign_launcher() -> None:
    """Raise UsageError under Open MPI's mpirun if mpi4py will load the MPICH that pip installed.

    That MPICH would end the process while mpi4py is imported, with a message about PMI versions. Other
    wrong pairs start N worlds of one rank, which `mpi_world` notices.
    """
    told = {"MPI4PY_LIBMPI", "MPI4PY_MPIABI"} & os.environ.keys()  # mpi4py loads what these say
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_SIZE" not in os.environ and not told:
        installed = {name for name in ("mpich", "openmpi") if _installed(name)}
        if installed == {"mpich"}:
            raise UsageError(
                "this mpirun is Open MPI's, but mpi4py uses MPICH here: start the job with "
                "`minipar run -n N SCRIPT`, or with the mpirun beside this Python"
            )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def default_checks() -> bool:
    """Return what MINIPAR_CHECKS says: 1 (the default) or 0."""
    text = os.environ.get("MINIPAR_CHECKS", "1")
    if text not in ("0", "1"):
        raise UsageError(f"MINIPAR_CHECKS={text!r} must be 0 or 1")
    return text == "1"


def mpi_timeout() -> float:
    """Return the seconds that MINIPAR_TIMEOUT allows one wait under MPI; 60 by default."""
    text = os.environ.get("MINIPAR_TIMEOUT", str(TIMEOUT))
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0.0
    if not timeout > 0:
        raise UsageError(f"MINIPAR_TIMEOUT={text!r} must be a number of seconds above zero")
    return timeout
