"""Spans of time: what one rank did, and when. Use it to see where the time of a step goes.

    trace = Trace()
    with recording(trace):
        with span("forward"):
            ...
    trace.spans  # [Span("forward", "forward", 0.013, 0.245, {})]

Code that takes time says `span(kind)` around it and does not care who listens. Unless a trace is being recorded
here, that costs a look into a ContextVar and nothing is kept. Rank-threads have each their own trace.
Communication is recorded by `comm.traced`, which wraps a communicator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

STEP = "step"  # one whole step, around all others
DATA = "data"  # making the batch
FORWARD, BACKWARD, ACTION, OPTIMIZER = "forward", "backward", "action", "optimizer"
WORK = (FORWARD, BACKWARD, ACTION, OPTIMIZER)  # an action is a pipeline's: the F, B, I or W of a microbatch
COLLECTIVE = "collective"  # a blocking one, from the call to its return
WAIT = "wait"  # for something begun earlier
FLIGHT = "flight"  # under way in the background, from its beginning to where its end was noticed


class Span(NamedTuple):
    """Something that took time.

    Attributes:
        kind: one of the words above.
        name: what is written on it: "forward", "B3", "all_reduce".
        start, end: in seconds of the rank's clock.
        facts: whatever else is known. Communication has `bytes`, `group`, `peers` (ranks of the world) and
            `number` (the how-manieth collective of the group; 0 for a message).
    """

    kind: str
    name: str
    start: float
    end: float
    facts: dict[str, Any]


class Trace:
    """One rank's spans, in the order in which they ended.

    Args:
        now: the clock, in seconds; a communicator's `now` where its virtual time is to be traced.

    Attributes:
        on: whether spans are added; set it to False to stop.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.now = now
        self.on = True
        self.spans: list[Span] = []

    def add(self, kind: str, name: str, start: float, end: float, **facts: Any) -> None:
        """Add a span whose times are known."""
        if self.on:
            self.spans.append(Span(kind, name, start, end, facts))


class _Open:
    """A span that has begun."""

    __slots__ = ("facts", "kind", "name", "start", "trace")

    def __init__(self, trace: Trace, kind: str, name: str, facts: dict[str, Any]):
        self.trace, self.kind, self.name, self.facts = trace, kind, name, facts

    def __enter__(self) -> None:
        self.start = self.trace.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.trace.on:
            self.trace.spans.append(Span(self.kind, self.name, self.start, self.trace.now(), self.facts))


_current: ContextVar[Trace | None] = ContextVar("minipar_trace", default=None)
_nothing: AbstractContextManager[None] = contextlib.nullcontext()


@contextlib.contextmanager
def recording(trace: Trace | None) -> Iterator[None]:
    """Inside, this rank's spans go to `trace`; None for nowhere."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def is_recording() -> bool:
    """Whether this rank records: then it is worth waiting for a GPU, so that a span ends when its work does."""
    trace = _current.get()
    return trace is not None and trace.on


def span(kind: str, name: str = "", **facts: Any) -> AbstractContextManager[None]:
    """Return a context whose time is recorded, if this rank records; its name is by default its kind."""
    trace = _current.get()
    return _nothing if trace is None else _Open(trace, kind, name or kind, facts)


def add_span(kind: str, name: str, start: float, end: float, **facts: Any) -> None:
    """Add a span whose times were taken anyway, if this rank records."""
    trace = _current.get()
    if trace is not None:
        trace.add(kind, name, start, end, **facts)


def timed(kind: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, with a span around the making of each."""
    iterator = iter(items)
    while True:
        with span(kind):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
