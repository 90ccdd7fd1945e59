"""A traced communicator gives what the plain one gives, and a span of everything; virtual time makes it exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.comm import Clock
from minipar.comm import traced as traced_communicator
from minipar.comm.interface import Communicator
from minipar.comm.traced import TracedCommunicator, clock_offset
from minipar.trace import Span, Trace

ALPHA, BETA = 1.0, 0.001


def traced(program: Any, ranks: int, clock: Clock | None = None) -> list[tuple[Any, list[Span]]]:
    """Return (what the program returned, spans) of each rank."""

    def rank() -> tuple[Any, list[Span]]:
        comm = world()
        trace = Trace(comm.now)
        return program(TracedCommunicator(comm, trace), trace), trace.spans

    return launch(rank, ranks, clock=clock)


def every_operation(comm: Communicator, trace: Any = None) -> list[Any]:
    """Return the results of every operation on this rank."""
    x, n, r = np.arange(8.0) + comm.rank, comm.size, comm.rank
    part = comm.split(r % 2, name="half")
    assert part is not None
    sending = comm.isend(x, (r + 1) % n, tag=3)
    received = comm.recv((r - 1) % n, tag=3)
    sending.wait()
    return [
        comm.all_reduce(x), comm.all_reduce_(x.copy(), op="max"), comm.all_reduce_async(x).wait(),
        comm.reduce(x, root=1), comm.reduce_scatter(x), comm.reduce_scatter_async(x).wait(),
        comm.broadcast(x, root=1), comm.broadcast_async(x).wait(), comm.all_gather(x),
        comm.all_gather_async(x).wait(), comm.gather(x), comm.scatter([x] * n if r == 0 else None),
        comm.all_to_all([x[: r + 1]] * n), comm.barrier(), comm.broadcast_object("said", root=1),
        comm.all_gather_object(r), part.all_reduce(x), part.name, part.size, received,
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", (1, 3, 4))
def test_results_and_ledger_are_those_of_the_plain_communicator(ranks: int) -> None:
    def rank() -> tuple[Any, Any]:
        comm = world()
        if ranks == 1:
            comm = TracedCommunicator(comm, Trace())
            return comm.all_reduce(np.ones(2)), comm.all_gather(np.ones(2))
        plain, counted = every_operation(comm), comm.ledger.as_dict()
        comm.ledger.reset()
        wrapped = every_operation(TracedCommunicator(comm, Trace()))
        np.testing.assert_equal(wrapped, plain)
        assert comm.ledger.as_dict() == counted
        return None, None

    launch(rank, ranks)


def test_every_operation_leaves_its_span() -> None:
    (_, spans), *_ = traced(every_operation, 4)
    blocking = [s.name for s in spans if s.kind == "collective"]
    assert blocking == [
        "split", "all_reduce", "all_reduce", "reduce", "reduce_scatter", "broadcast", "all_gather", "gather",
        "scatter", "all_to_all", "barrier", "broadcast_object", "all_gather_object", "all_reduce",
    ]  # fmt: skip
    background = ["all_reduce", "reduce_scatter", "broadcast", "all_gather"]
    assert [s.name for s in spans if s.kind == "flight"] == ["send", *background]
    assert [s.name for s in spans if s.kind == "wait"] == ["recv", "send", *background]
    assert all(s.start <= s.end for s in spans)


def test_facts_are_bytes_group_peers_and_number() -> None:
    def program(comm: Communicator, trace: Trace) -> None:
        part = comm.split(comm.rank // 2, name="pair")
        assert part is not None
        comm.all_gather(np.zeros(5, np.float32))  # 4 ranks × 20 bytes
        part.all_reduce(np.zeros(3))
        if comm.rank < 2:
            work = part.irecv(1) if part.rank == 0 else part.isend(np.zeros(7), 0)
            work.wait()

    found = [{s.name: s.facts for s in spans if s.kind != "flight"} for _, spans in traced(program, 4)]
    assert found[2]["all_gather"] == {"bytes": 80, "group": "world", "peers": [0, 1, 3], "number": 2}
    assert found[3]["all_reduce"] == {"bytes": 24, "group": "world/pair1", "peers": [2], "number": 1}
    assert found[0]["recv"] == {"bytes": 56, "group": "world/pair0", "peers": [1], "number": 0}
    assert found[1]["send"] == {"bytes": 56, "group": "world/pair0", "peers": [0], "number": 0}


def test_times_are_the_communicator_s() -> None:
    """Rank 1 works 10 s longer; a barrier costs alpha, and an all-reduce of 1000 bytes over two 2 alpha + n beta."""

    def program(comm: Communicator, trace: Trace) -> None:
        comm.compute(10.0 * comm.rank)
        comm.barrier()
        work = comm.all_reduce_async(np.zeros(125))
        comm.compute(1.0)
        work.wait()

    (_, first), (_, second) = traced(program, 2, Clock(ALPHA, BETA))
    times = [[(s.kind, s.start, s.end) for s in spans] for spans in (first, second)]
    assert times[0] == [("collective", 0.0, 11.0), ("wait", 12.0, 14.0), ("flight", 11.0, 14.0)]
    assert times[1] == [("collective", 10.0, 11.0), ("wait", 12.0, 14.0), ("flight", 11.0, 14.0)]


@pytest.mark.parametrize("help_", [float("inf"), -1.0], ids=["looks take no time", "looks help along"])
def test_a_flight_ends_where_done_first_says_so(help_: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_communicator, "HELP", help_)

    def program(comm: Communicator, trace: Trace) -> float:
        work = comm.all_reduce_async(np.zeros(1))
        while not work.done():
            pass
        seen = trace.now()
        work.wait()
        work.wait()
        return seen

    for seen, spans in traced(program, 2):
        (flight,) = [s for s in spans if s.kind == "flight"]
        *looks, wait = [s for s in spans if s.kind == "wait"]
        assert flight.end <= seen <= wait.start
        assert bool(looks) == (help_ < 0)
        assert all(flight.start <= s.start <= s.end <= flight.end and s.facts == wait.facts for s in looks)


def test_a_look_at_a_receive_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each span of one is a receive to the report."""
    monkeypatch.setattr(traced_communicator, "HELP", -1.0)

    def program(comm: Communicator, trace: Trace) -> None:
        if comm.rank == 0:
            comm.send(np.zeros(1), 1)
            return
        work = comm.irecv(0)
        while not work.done():
            pass
        work.wait()

    (_, _), (_, spans) = traced(program, 2)
    assert [(s.kind, s.name) for s in spans] == [("wait", "recv")]


def test_a_stopped_trace_lets_everything_through() -> None:
    def program(comm: Communicator, trace: Trace) -> None:
        trace.on = False
        every_operation(comm)

    assert all(spans == [] for _, spans in traced(program, 4))


class Elsewhere(TracedCommunicator):
    """A rank whose clock is on another machine: 1000 s ahead for each rank."""

    def now(self) -> float:
        return super().now() + 1000.0 * self.rank


def test_offsets_of_clocks_are_found() -> None:
    def rank() -> tuple[float, float]:
        return clock_offset(Elsewhere(world(), Trace()), exchanges=3)

    assert launch(rank, 3, clock=Clock(ALPHA, 0.0)) == [(0.0, 0.0), (1000.0, ALPHA), (2000.0, ALPHA)]


def test_clocks_that_may_as_well_be_one_are_one() -> None:
    assert [offset for offset, _ in launch(lambda: clock_offset(world()), 3)] == [0.0, 0.0, 0.0]
