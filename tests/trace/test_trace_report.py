"""The shares of hand-made traces are what was put into them; the words name the right cause."""

from __future__ import annotations

from typing import Any

import pytest

from minipar.commands.trace import losses_table, ranks_table
from minipar.parallel.pipeline import SCHEDULES, simulate
from minipar.trace import Span
from minipar.traces.advice import advice, crowded
from minipar.traces.file import RunTrace
from minipar.traces.report import axis_of, examine, length_of, own_times, steps_of


def made(kind: str, start: float, end: float, name: str = "", **facts: Any) -> Span:
    if kind in ("collective", "wait", "flight"):
        facts = {"bytes": 100, "group": "world/dp0", "peers": [], "number": 0, **facts}
    return Span(kind, name or kind, start, end, facts)


def step(start: float, end: float, number: int = 1) -> Span:
    return made("step", start, end, f"step {number}")


def run(*ranks: list[Span], **facts: Any) -> RunTrace:
    each = {"clock_error": 0.0, "peak_memory": 2**20, "gpu_memory": 0, "host": "a", "process": "a", "cores": [0, 1]}
    return RunTrace(ranks, {**{key: [value] * len(ranks) for key, value in each.items()}, **facts})


def shares(trace: RunTrace, rank: int = 0) -> dict[str, float]:
    report = examine(trace)
    assert report is not None
    names = ("work", "data", "others", "transfer", "stages", "rest", "hidden")
    return {name: round(report.share(name, rank), 9) for name in names if report.share(name, rank) > 1e-12}


def test_communication_within_work_is_not_work() -> None:
    spans = [step(0, 10), made("forward", 0, 6), made("collective", 1, 3, number=1), made("backward", 6, 9)]
    assert shares(run(spans)) == {"work": 0.7, "transfer": 0.2, "rest": 0.1}


def test_waiting_for_the_last_rank_is_not_transfer() -> None:
    early = [step(0, 10), made("forward", 0, 2), made("collective", 2, 10, number=1)]
    late = [step(0, 10), made("forward", 0, 7), made("collective", 7, 10, number=1)]
    assert shares(run(early, late), 0) == {"work": 0.2, "others": 0.5, "transfer": 0.3}
    assert shares(run(early, late), 1) == {"work": 0.7, "transfer": 0.3}


def test_a_collective_of_another_group_or_number_is_another_one() -> None:
    early = [step(0, 10), made("collective", 2, 10, number=1)]
    late = [
        step(0, 10),
        made("collective", 7, 8, number=2),
        made("collective", 9, 10, number=1, group="world/dp1"),
    ]
    assert shares(run(early, late), 0) == {"transfer": 0.8, "rest": 0.2}


def test_a_background_collective_is_reached_when_it_is_begun() -> None:
    ready = [step(0, 10), made("flight", 0, 10, number=1), made("wait", 4, 10, number=1)]
    late = [step(0, 10), made("backward", 0, 6), made("flight", 6, 10, number=1), made("wait", 6, 10, number=1)]
    assert shares(run(ready, late), 0) == {"others": 0.2, "transfer": 0.4, "rest": 0.4, "hidden": 0.4}


def test_hidden_is_what_no_wait_covers() -> None:
    spans = [
        step(0, 10), made("backward", 0, 6), made("flight", 1, 8, number=1), made("flight", 2, 9, number=2),
        made("wait", 6, 8, number=1), made("wait", 8, 9, number=2),
    ]  # fmt: skip
    assert shares(run(spans)) == {"work": 0.6, "transfer": 0.3, "rest": 0.1, "hidden": 0.5}


def test_messages_are_waits_for_stages() -> None:
    spans = [step(0, 10), made("wait", 0, 4, "recv"), made("action", 4, 9, "F0")]
    assert shares(run(spans)) == {"stages": 0.4, "work": 0.5, "rest": 0.1}


def test_the_first_step_is_left_out_and_the_batch_belongs_to_its_step() -> None:
    spans = [
        made("data", 0, 1), step(1, 50, 1), made("data", 51, 53), step(53, 60, 2), made("optimizer", 53, 60),
        made("data", 61, 62), step(62, 71, 3), made("optimizer", 62, 71), made("data", 71, 90),
    ]  # fmt: skip
    trace = run(spans)
    assert steps_of(trace) == [("step 1", 0, 50), ("step 2", 51, 60), ("step 3", 61, 71)]
    report = examine(trace)
    assert report is not None and (report.steps, report.seconds) == (2, 20)
    assert shares(trace) == {"work": 0.8, "data": 0.15, "rest": 0.05}


def test_a_trace_without_a_step_says_nothing() -> None:
    assert examine(run([made("forward", 0, 1)])) is None


def test_shares_add_up_to_everything() -> None:
    spans = [
        made("data", 0, 1), step(1, 9), made("forward", 1, 4), made("collective", 2, 3, number=1),
        made("flight", 3, 8, number=2), made("backward", 4, 7), made("wait", 6, 6.5, number=2), made("optimizer", 7, 9),
    ]  # fmt: skip
    report = examine(run(spans, spans))
    assert report is not None
    names = ("work", "data", "others", "transfer", "stages", "rest")
    assert sum(report.share(name) for name in names) == pytest.approx(1)


def test_own_times_within_a_window() -> None:
    spans = [made("a", 0, 10), made("b", 2, 6), made("c", 3, 4), made("d", 8, 12)]
    found = {s.kind: own for s, own in own_times(spans, (1, 9))}
    assert found == {"a": 3, "b": 3, "c": 1, "d": 1}


def test_the_length_of_a_union() -> None:
    assert length_of([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4 and length_of([]) == 0


def test_traffic_counts_what_was_begun_and_adds_what_was_waited() -> None:
    spans = [
        step(0, 10), made("collective", 0, 2, "all_reduce", number=1),
        made("flight", 2, 6, "all_reduce", number=2), made("wait", 5, 6, "all_reduce", number=2),
        made("flight", 6, 7, "send"), made("wait", 8, 10, "recv", bytes=50, group="world/pp1"),
    ]  # fmt: skip
    report = examine(run(spans))
    assert report is not None
    rows = {key: (row.calls, row.bytes, row.exposed) for key, row in report.traffic.items()}
    assert rows == {("all_reduce", "dp"): (2, 200, 3), ("send", "dp"): (1, 100, 0), ("recv", "pp"): (1, 50, 2)}


@pytest.mark.parametrize(
    ("group", "axis"), [("world", "world"), ("world/dp12", "dp"), ("world/pp0/tied1", "pp/tied"), ("world/1.0", "1.0")]
)
def test_groups_of_an_axis_go_by_one_name(group: str, axis: str) -> None:
    assert axis_of(group) == axis


@pytest.mark.parametrize(("name", "stages", "microbatches"), [("gpipe", 4, 8), ("1f1b", 4, 8), ("zb-h1", 3, 6)])
def test_the_bubble_of_a_simulated_schedule_is_the_formula_s(name: str, stages: int, microbatches: int) -> None:
    timeline = simulate(SCHEDULES[name](stages, microbatches))
    ranks = [
        [step(0, 1000)] + [made("action", float(s.start), float(s.end), f"{s.action.kind}0") for s in spans]
        for spans in timeline.spans
    ]
    report = examine(run(*ranks))
    assert report is not None and report.bubble == pytest.approx(float(timeline.bubble))
    assert [times.bubble for times in report.ranks] == pytest.approx([float(1 - u) for u in timeline.utilisation])


def test_the_tables_have_exposed_bubble_imbalance_and_gpu_memory_of_each_rank() -> None:
    one = [step(0, 10), made("action", 0, 4, "F0"), made("wait", 4, 6, "recv"), made("action", 6, 10, "B0")]
    two = [step(0, 10), made("wait", 0, 4, "recv"), made("action", 4, 6, "F0"), made("collective", 6, 8, number=1)]
    trace = run(one, two, gpu_memory=[3 * 2**20, 2**20], process=["a", "b"])
    report = examine(trace)
    assert report is not None
    shares = [column(ranks_table(report), k)[0] for k in range(7)]
    assert shares == ["0", "80.0%", "0.0%", "0.0%", "0.0%", "20.0%", "0.0%"]
    found = [column(losses_table(report, trace), k) for k in range(7)]
    assert found == [
        ["0", "1"], ["20.0%", "60.0%"], ["0.0%", "0.0%"], ["+60.0%", "-60.0%"], ["20.0%", "80.0%"],
        ["1 MiB", "1 MiB"], ["3 MiB", "1 MiB"],
    ]  # fmt: skip
    on_cpu = losses_table(report, run(one, two))
    assert len(on_cpu.columns) == 6 and column(on_cpu, 5) == ["1 MiB", "shared"]


def column(table: Any, number: int) -> list[str]:
    return list(table.columns[number].cells)


def told(*ranks: list[Span], **facts: Any) -> str:
    report = examine(run(*ranks))
    assert report is not None
    return " ".join(advice(report, facts))


def test_words_for_work_alone() -> None:
    assert "nothing holds this run back" in told([step(0, 100), made("forward", 0, 99)])


def test_words_for_imbalance() -> None:
    quick = [step(0, 10), made("forward", 0, 5), made("collective", 5, 10, number=1)]
    slow = [step(0, 10), made("forward", 0, 10), made("collective", 10, 10, number=1)]
    text = told(quick, slow)
    assert "wait for each other 25%" in text and "rank 1 works 33% longer" in text
    assert "the 2 of them share 1 cores and take turns" in told(quick, slow, host=["a", "a"], cores=[[0], [0]])


def test_ranks_are_counted_host_by_host_against_all_cores_that_those_may_use() -> None:
    assert crowded({}) is None
    assert crowded({"host": ["a", "a"], "cores": [[0], [1]]}) is None  # bound to a core each
    assert crowded({"host": ["a", "b"], "cores": [[0], [0]]}) is None  # rank 0's cores are not all there are
    assert crowded({"host": ["a", "b", "b"], "cores": [[0, 1], [0, 1], [0, 1]]}) is None
    assert crowded({"host": ["a", "b", "b", "b"], "cores": [[0, 1]] * 4}) == ("b", 3, 2)


def test_words_for_a_machine_that_is_not_quiet() -> None:
    first = [step(0, 10), made("forward", 0, 4), made("collective", 4, 6, number=1), made("backward", 6, 10)]
    second = [step(0, 10), made("forward", 0, 6), made("collective", 6, 6, number=1), made("backward", 6, 8)]
    assert "disturbed at different moments" in told(first, second)


def test_words_for_communication() -> None:
    def communicating(size: int) -> list[Span]:
        calls = [made("collective", 5, 8, "all_reduce", number=1, bytes=size), made("wait", 8, 9, "recv")]
        return [step(0, 10), made("forward", 0, 5), *calls]

    assert "all_reduce in dp, 1 KiB a call; the messages are small" in told(communicating(1024))
    assert "all_reduce in dp, 16 MiB a call; the bytes cost most" in told(communicating(2**24))


def test_buckets_are_named_where_there_are_any() -> None:
    def summing(group: str) -> str:
        call = made("collective", 5, 8, "all_reduce", number=1, bytes=8, group=group)
        return told([step(0, 10), made("forward", 0, 5), call])

    assert "larger ones (larger buckets)" in summing("world/dp0")
    assert "larger ones" in summing("world/pp0") and "buckets" not in summing("world/pp0")


def test_words_for_communication_that_was_begun_before() -> None:
    """Waited for in the steps that are looked at, begun before them: there is no call to speak of."""
    begun, waited = made("flight", 0, 10.5, "all_gather", number=1), made("wait", 11, 19, "all_gather", number=1)
    spans = [step(0, 10, 1), begun, step(11, 21, 2), waited]
    assert "Most of it is all_gather in dp." in told(spans)


def test_words_for_a_bubble() -> None:
    spans = [step(0, 10), made("action", 0, 4, "F0"), made("wait", 4, 6, "recv"), made("action", 6, 10, "B0")]
    assert "More microbatches (now 4) shrink the bubble, and so does schedule zb-h1" in told(spans, microbatches=4)
    assert "zb-h1" not in told(spans, microbatches=4, schedule="zb-h1")
    assert "one stage works at a time, however many microbatches" in told(spans, microbatches=4, schedule="naive")
    assert "only one rank works at a time" in told(spans)
    less = [step(0, 10), made("action", 0, 2, "F0"), made("wait", 2, 10, "recv")]
    assert "rank 0 works 60% longer than the mean" in told(spans, less, microbatches=4)


def test_words_for_data_and_python() -> None:
    spans = [made("data", 0, 3), step(3, 10), made("forward", 3, 6)]
    text = told(spans)
    assert "Making batches takes 30%" in text and "Outside of all this passes 40%" in text
    assert text.index("Outside") < text.index("Making")  # the largest loss first
