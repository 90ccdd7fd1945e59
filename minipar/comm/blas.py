"""One BLAS thread a rank: the ranks themselves use the cores.

Two BLAS threads on each of two ranks on two cores were measured 60 times slower than one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController

# How a user says how many threads the BLAS libraries may use.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_lock = threading.Lock()
_users = 0
_keeper: _Keeper | None = None


class _Keeper(threading.Thread):
    """Holds the limit from its start to its `release`.

    A thread of its own, because a limit of the whole process must be lifted by the thread that set it, and
    of several launches the last to end need not be the first to have begun.
    """

    def __init__(self, controller: ThreadpoolController) -> None:
        super().__init__(name="minipar-blas", daemon=True)
        self.controller = controller
        self._limited = threading.Event()
        self._released = threading.Event()
        self.start()
        self._limited.wait()

    def run(self) -> None:
        with self.controller.limit(limits=1, user_api="blas"):
            self._limited.set()
            self._released.wait()

    def release(self) -> None:
        self._released.set()
        self.join()


@contextmanager
def one_blas_thread() -> Iterator[ThreadpoolController]:
    """Limit BLAS to one thread in this process until all who have asked for that have left.

    Yields:
        What each rank's thread must use for libraries that keep the limit by thread (`in_this_thread`).
    """
    global _users, _keeper
    with _lock:
        if _keeper is None:
            _keeper = _Keeper(ThreadpoolController())
        _users += 1
        controller = _keeper.controller
    try:
        yield controller
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _keeper.release()
                _keeper = None


def one_blas_thread_for_good() -> None:
    """Limit BLAS to one thread for as long as this process lives, unless a variable says how many it may use.

    For the ranks of a plain `mpirun`, which sets no such variable; `minipar run` sets them all.
    """
    if not any(name in os.environ for name in THREAD_VARIABLES):
        ThreadpoolController().limit(limits=1, user_api="blas")


@contextmanager
def in_this_thread(controller: ThreadpoolController) -> Iterator[None]:
    """Limit BLAS to one thread where the library keeps that limit by thread (OpenBLAS on OpenMP)."""
    with controller.limit(limits=1, user_api="blas"):
        yield
