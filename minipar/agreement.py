"""An error that a user made is told once, whatever the number of ranks.

Work that can fail on one rank alone (a file that only its host lacks) runs inside `agreed`: the ranks compare
what came of it, and then all of them raise, or none. No rank is left waiting for one that has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from minipar.comm.guard import numbered
from minipar.comm.interface import Communicator
from minipar.errors import MiniparError

T = TypeVar("T")


def on_every_rank(error: MiniparError) -> MiniparError:
    """Mark an error that every rank raises at the same place, so that one of them can speak for all."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def is_on_every_rank(error: MiniparError) -> bool:
    """Whether every rank of the job raises this error."""
    return getattr(error, "on_every_rank", False)


def agreed(comm: Communicator, work: Callable[[], T]) -> T:
    """Return `work()`; if it is a user's error on any rank, raise that on every rank. Collective.

    Args:
        work: must not communicate over `comm`.

    Raises:
        MiniparError: the first failing rank's, which names the ranks unless all have failed.
    """
    result: list[T] = []
    mine: MiniparError | None = None
    try:
        result.append(work())
    except MiniparError as error:
        mine = error
    errors: list[MiniparError | None] = comm.all_gather_object(mine)
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return result[0]
    first = errors[failed[0]]
    assert first is not None
    if len(failed) < comm.size:
        first = type(first)(f"{first} (on {numbered(failed)} of {comm.size})")
    raise on_every_rank(first)
