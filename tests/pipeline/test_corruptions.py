"""The checker accepts every built-in schedule and names every kind of planted corruption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar.parallel.pipeline.action import Action
from minipar.parallel.pipeline.checker import check
from minipar.parallel.pipeline.communication import with_communication
from minipar.parallel.pipeline.schedules import SCHEDULES, build_schedule
from minipar.parallel.pipeline.simulator import Costs, simulate
from minipar.parallel.pipeline.text import read_csv, write_csv

Lists = list[list[Action]]


@st.composite
def schedules(draw: Any) -> Lists:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    p = draw(st.integers(2, 5))
    m = draw(st.integers(1, 4)) * p if name == "interleaved" else draw(st.integers(1, 9))
    chunks = draw(st.integers(2, 3)) if name == "interleaved" else None
    return build_schedule(name, p, m, chunks)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 5))
def test_built_in_schedules_hold_at_any_cost(schedule: Lists, costs: tuple[int, int, int], wire: int) -> None:
    report = check(schedule, costs=Costs(*costs, wire), blocking_sends=False)
    assert report.ok, report.problems
    timeline = simulate(schedule, Costs(*costs, wire))
    assert sum(len(s) for s in timeline.spans) == sum(len(a) for a in schedule)
    assert 0 <= timeline.bubble < 1
    assert report.peak_live == timeline.peak_live


def index(actions: list[Action], *kinds: str) -> int:
    return next(i for i, a in enumerate(actions) if a.kind in kinds)


def drop_a_forward(s: Lists) -> None:
    del s[0][index(s[0], "F")]


def double_a_backward(s: Lists) -> None:
    s[1].append(s[1][index(s[1], "B", "I")])


def backward_first(s: Lists) -> None:
    last = s[-1]
    i = index(last, "B", "I")
    last.insert(0, last.pop(i))


def wrong_stage(s: Lists) -> None:
    s[0][0] = s[0][0]._replace(stage=1)


def microbatch_too_many(s: Lists) -> None:
    s[0].append(s[0][0]._replace(microbatch=99))


def drop_a_backward(s: Lists) -> None:
    del s[1][index(s[1], "B", "I")]


def lose_a_send(s: Lists) -> None:
    del s[0][index(s[0], "SEND_F")]


def lose_a_receive(s: Lists) -> None:
    del s[0][index(s[0], "RECV_B")]


def send_too_early(s: Lists) -> None:
    s[0].insert(0, s[0].pop(index(s[0], "SEND_F")))


def receive_too_late(s: Lists) -> None:
    """The first forward of the last stage has nothing to work on."""
    last = s[-1]
    i = index(last, "RECV_F")
    last.insert(index(last, "F"), last.pop(i))


def send_to_another(s: Lists) -> None:
    i = index(s[0], "SEND_F")
    s[0][i] = s[0][i]._replace(peer=0)


def circle(s: Lists) -> None:
    """The first stage wants a backward before the forward that the last stage needs for it."""
    first = s[0]
    last_forward = max(i for i, a in enumerate(first) if a.kind == "F")
    first.append(first.pop(last_forward))


Corruption = tuple[Callable[[Lists], None], set[str]]
CORRUPTIONS: list[Corruption] = [
    (drop_a_forward, {"missing", "backward before forward"}),
    (drop_a_backward, {"missing"}),
    (double_a_backward, {"doubled"}),
    (backward_first, {"backward before forward"}),
    (wrong_stage, {"misplaced", "missing"}),
    (microbatch_too_many, {"misplaced"}),
    (circle, {"backward before forward", "deadlock"}),
]
IN_MESSAGES: list[Corruption] = [
    (lose_a_send, {"never sent"}),
    (lose_a_receive, {"never received"}),
    (send_too_early, {"sent before computed"}),
    (receive_too_late, {"received too late"}),
    (send_to_another, {"misplaced"}),
]


def found_in(schedule: Lists, spoil: Callable[[Lists], None], spoiled: Lists) -> set[str]:
    """Spoil a copy and return the kinds of problems found, each naming its action, stage and reason."""
    sizes = check(schedule, blocking_sends=False).sizes
    spoil(spoiled)
    problems = check(spoiled, sizes.microbatches, sizes.chunks, blocking_sends=False).problems
    assert all(f"stage {p.stage}, {p.action}: " in str(p) and p.reason for p in problems)
    return {problem.kind for problem in problems}


@settings(max_examples=25, deadline=None)
@given(schedules())
@pytest.mark.parametrize("spoil, kinds", CORRUPTIONS, ids=[c.__name__ for c, _ in CORRUPTIONS])
def test_a_corrupted_schedule_is_named(
    spoil: Callable[[Lists], None], kinds: set[str], schedule: Lists
) -> None:
    assert found_in(schedule, spoil, [list(actions) for actions in schedule]) & kinds


@settings(max_examples=25, deadline=None)
@given(schedules())
@pytest.mark.parametrize("spoil, kinds", IN_MESSAGES, ids=[c.__name__ for c, _ in IN_MESSAGES])
def test_a_corrupted_message_is_named(
    spoil: Callable[[Lists], None], kinds: set[str], schedule: Lists
) -> None:
    assert found_in(schedule, spoil, with_communication(schedule)) & kinds


def test_weights_before_input_gradient_is_named() -> None:
    spoiled = [list(a) for a in build_schedule("zb-h1", 3, 4)]
    i, w = index(spoiled[2], "I"), index(spoiled[2], "W")
    spoiled[2][i], spoiled[2][w] = spoiled[2][w], spoiled[2][i]
    assert "W before I" in {p.kind for p in check(spoiled).problems}


def test_too_few_buffers_and_too_many_live_are_named() -> None:
    schedule = build_schedule("gpipe", 3, 4)
    assert "buffer reused" in {p.kind for p in check(schedule, receive_buffers=2).problems}
    assert "too many live" in {p.kind for p in check(schedule, max_live=3).problems}
    assert check(schedule, receive_buffers=4, max_live=4).ok


@settings(max_examples=20, deadline=None)
@given(schedules())
def test_text_form_round_trip(tmp_path_factory: pytest.TempPathFactory, schedule: Lists) -> None:
    path = tmp_path_factory.mktemp("csv") / "schedule.csv"
    write_csv(schedule, path)
    assert read_csv(path) == [list(actions) for actions in schedule]
