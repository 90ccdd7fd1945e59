"""SIGTERM asks a training run to stop after the step it is in: what a cluster sends some seconds before it kills.

    with StopRequest() as stop:
        for record in job.train():
            if stop.agreed(comm):
                break

A signal finds the ranks in different steps, so they agree on the step after which they stop: once a step, an
all-reduce of one byte (some microseconds on one machine). A second SIGTERM is no
request, it ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import numpy as np

from minipar.comm.interface import Communicator


class StopRequest:
    """Listens to SIGTERM while it is entered; one for all rank-threads of a process.

    Outside the main thread, which alone may set a handler, only setting `asked` asks to stop.

    Attributes:
        asked: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True

    def agreed(self, comm: Communicator) -> bool:
        """Return whether any rank was asked to stop; the same on all ranks. Collective, once a step."""
        mine = np.array([self.asked], np.int8)
        return bool((mine if comm.size == 1 else comm.all_reduce(mine, "max"))[0])
