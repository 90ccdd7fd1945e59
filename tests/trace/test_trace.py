"""Spans are kept by the rank that records, and by nobody else."""

from __future__ import annotations

import pytest

from minipar import launch, world
from minipar.trace import Span, Trace, add_span, recording, span, timed


class Ticks:
    """A clock that moves on by a second each time it is read."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        self.time += 1.0
        return self.time


def test_a_span_has_kind_name_times_and_facts() -> None:
    trace = Trace(Ticks())
    with recording(trace), span("outer"), span("inner", "a name", size=3):
        pass
    assert trace.spans == [Span("inner", "a name", 2.0, 3.0, {"size": 3}), Span("outer", "outer", 1.0, 4.0, {})]


def test_nothing_is_kept_where_nothing_is_recorded() -> None:
    trace = Trace(Ticks())
    with span("before"):
        pass
    with recording(trace), recording(None), span("within"):
        add_span("within", "", 0.0, 1.0)
    with span("after"):
        pass
    assert trace.spans == [] and trace.now() == 1.0  # the clock was never read


def test_a_stopped_trace_takes_no_more() -> None:
    trace = Trace(Ticks())
    with recording(trace):
        with span("kept"):
            pass
        trace.on = False
        with span("not kept"):
            add_span("nor", "this", 0.0, 1.0)
    assert [s.kind for s in trace.spans] == ["kept"]


def test_a_span_that_an_error_ends_is_kept() -> None:
    trace = Trace(Ticks())
    with pytest.raises(ZeroDivisionError), recording(trace), span("breaks"):
        raise ZeroDivisionError
    assert [s.kind for s in trace.spans] == ["breaks"]


def test_timed_measures_the_making_of_each_item_only() -> None:
    trace, clock = Trace(Ticks()), []

    def items():
        for i in range(2):
            trace.now()  # a second of work
            yield i

    with recording(trace):
        for item in timed("data", items()):
            clock.append(item)
            trace.now()
    spans = [s for s in trace.spans if s.kind == "data"]
    assert clock == [0, 1]
    assert [s.end - s.start for s in spans[:2]] == [2.0, 2.0]


def test_rank_threads_record_apart() -> None:
    def rank() -> list[str]:
        comm, trace = world(), Trace()
        with recording(trace if comm.rank != 1 else None):
            comm.barrier()
            with span("work", f"of rank {comm.rank}"):
                comm.barrier()
        return [s.name for s in trace.spans]

    assert launch(rank, 3) == [["of rank 0"], [], ["of rank 2"]]
