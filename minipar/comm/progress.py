"""What a rank does while it waits: it goes on with what it has begun in the background, in every group.

The data of an `_async` collective is started by the rank that began it, once all ranks have asked for the same. So a
rank that just waited, for a message say, could wait for a rank that waits for that data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from mpi4py import MPI

T = TypeVar("T")

LOOKS = 100  # in a row, some 20 µs; then others may run in between, if there are more ranks than cores


class Group(Protocol):
    """A group that has collectives in its queue."""

    def progress(self) -> None:
        """Start the data of those whose comparison is there."""


class Progress:
    """The groups of this rank that have collectives whose data is not started; one object for all of them."""

    def __init__(self) -> None:
        self.groups: dict[Group, None] = {}

    def wait(self, *requests: Any) -> None:
        """Return when MPI's requests are complete."""
        if not self.groups:
            MPI.Request.Waitall(requests)
        else:
            self.until(lambda: MPI.Request.Testall(requests) or None)

    def until(self, look: Callable[[], T | None]) -> T:
        """Return the first result of `look` that is not None."""
        looks = 0
        while (found := look()) is None:
            looks += 1
            if looks > LOOKS:
                for group in list(self.groups):
                    group.progress()
                MPI.COMM_WORLD.Iprobe()  # MPI moves messages along only while it is called
                os.sched_yield()
        return found
