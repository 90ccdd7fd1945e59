"""A trace file has the form that viewers open, and reads back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minipar import launch, world
from minipar.comm import Clock
from minipar.errors import DataError, UsageError
from minipar.trace import Span, Trace
from minipar.traces.file import ClockedTrace, RunTrace, read, write
from tests.trace.test_traced_communicator import Elsewhere

FACTS = {
    "run": "a run", "clock_error": [0.0, 1e-5], "peak_memory": [5, 6], "gpu_memory": [0, 0], "host": ["a", "a"],
    "process": ["a 1", "a 2"], "cores": [[0], [1]],
}  # fmt: skip
WHERE = {"bytes": 8, "group": "world", "peers": [1], "number": 1}
RANKS = [
    [Span("step", "step 1", 0.0, 1.0, {}), Span("flight", "all_reduce", 0.25, 0.75, WHERE)],
    [Span("step", "step 1", 0.125, 1.0, {}), Span("wait", "all_reduce", 0.25, 0.5, {**WHERE, "peers": [0]})],
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(RunTrace(RANKS, FACTS), tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_what_is_written_reads_back(file: Path) -> None:
    trace = read(file)
    assert trace.ranks == RANKS and trace.facts == FACTS


def test_events_are_those_of_the_format(file: Path) -> None:
    events = json.loads(file.read_text())["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "b", "e"}
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1"]
    (wait,) = [e for e in events if e["ph"] == "X" and e["cat"] == "wait"]
    assert (wait["pid"], wait["ts"], wait["dur"], wait["args"]["bytes"]) == (1, 250_000, 250_000, 8)
    begin, end = (next(e for e in events if e["ph"] == ph) for ph in "be")
    assert (begin["cat"], begin["id"]) == (end["cat"], end["id"]) and end["ts"] - begin["ts"] == 500_000


def test_damage_is_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json does not exist: record one with minipar train"):
        read(tmp_path / "none.json")
    whole = file.read_text()
    for text in (whole[:-30], "[]", "{}", whole.replace('"dur"', '"length"'), whole.replace('"ph": "b"', '"ph": "n"')):
        file.write_text(text)
        with pytest.raises(DataError, match="is no trace of minipar"):
            read(file)
    file.write_text(whole.replace('"pid": 0', '"pid": 2'))
    with pytest.raises(DataError, match="ranks are missing"):
        read(file)


def test_all_ranks_are_put_on_rank_0_s_clock() -> None:
    """Clocks 1000 s apart, virtual time, and a rank that works from its second 1 to its second 3."""

    def rank() -> RunTrace | None:
        comm = Elsewhere(world(), Trace())
        trace = Trace(comm.now)
        clocked = ClockedTrace(trace, comm)
        comm.barrier()
        start = comm.now()
        comm.compute(2.0 if comm.rank else 1.0)
        trace.add("forward", "forward", start, comm.now())
        return clocked.collect({"run": "here"}, held=comm.rank)

    found, *others = launch(rank, 3, clock=Clock(1e-3, 0.0))
    assert others == [None, None] and found is not None
    assert found.facts["run"] == "here" and found.facts["held"] == [0, 1, 2]
    assert found.facts["clock_error"] == pytest.approx([0.0, 1e-3, 1e-3])
    times = [(s.start, s.end) for (s,) in found.ranks]
    assert times == [pytest.approx(pair, abs=1e-6) for pair in [(0.0, 1.0), (0.0, 2.0), (0.0, 2.0)]]


def test_a_collected_trace_takes_no_more() -> None:
    def rank() -> int:
        comm, trace = world(), Trace()
        ClockedTrace(trace, comm).collect({})
        trace.add("forward", "late", 0.0, 1.0)
        return len(trace.spans)

    assert launch(rank, 2) == [0, 0]
