"""Prove that a schedule can be run, before it is: nothing missing, nothing too early, nobody waiting for ever.

    report = check(schedule)
    print(report.problems or f"bubble {report.bubble}, at most {report.peak_live} activations live")

Each problem names its stage, its action and the reason. A schedule may have its sends and receives or not; if
not, the check is of what `with_communication` makes of it, which is what the executor runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from minipar.errors import UsageError
from minipar.parallel.pipeline.action import (
    COMPUTE,
    RECEIVES,
    RECV_F,
    SEND_F,
    SENDS,
    Action,
    B,
    F,
    I,
    Message,
    Schedule,
    Sizes,
    W,
    has_communication,
    message,
    sizes,
)
from minipar.parallel.pipeline.communication import received_before, replay, sent_after, with_communication
from minipar.parallel.pipeline.simulator import Cost, Costs, Wait, held_after, simulate

ProblemKind = Literal[
    "missing",
    "doubled",
    "misplaced",
    "backward before forward",
    "W before I",
    "never sent",
    "never received",
    "sent before computed",
    "received too late",
    "deadlock",
    "buffer reused",
    "too many live",
]


@dataclass(frozen=True)
class Problem:
    """What is wrong with one action of one stage; `position` is its place in the stage's list, if it has one."""

    kind: ProblemKind
    stage: int
    action: Action
    reason: str
    position: int | None = None

    def __str__(self) -> str:
        return f"stage {self.stage}, {self.action}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """The outcome of a check. Bubble and peaks are None if the schedule cannot be carried out."""

    sizes: Sizes
    problems: tuple[Problem, ...]
    bubble: Cost | None = None
    peak_live: tuple[int, ...] | None = None  # activations at once, by stage
    receive_buffers: tuple[int, ...] | None = None  # a chunk and direction that would be enough, by stage
    must_not_block: tuple[Action, ...] = ()  # sends that would deadlock if they blocked

    @property
    def ok(self) -> bool:
        return not self.problems


def check(
    schedule: Schedule,
    microbatches: int | None = None,
    chunks: int | None = None,
    *,
    receive_buffers: int | Sequence[int] | None = None,
    max_live: int | Sequence[int] | None = None,
    blocking_sends: bool = True,
    costs: Costs | None = None,
) -> Report:
    """Return what is wrong with a schedule, and if it can be carried out its bubble and memory.

    Args:
        schedule: the actions of each stage, with or without communication.
        microbatches, chunks: how many there should be; the largest in the schedule plus one if not given.
        receive_buffers: of each chunk and direction, for all stages or each: microbatch i is received into
            buffer i mod n, which must be free by then. None: each receive has memory of its own.
        max_live: bound on the activations that a stage holds at once, for all stages or each.
        blocking_sends: whether it must end even if each send waits for its receive.
        costs: for the bubble; all 1 and free messages if not given.
    """
    found = sizes(schedule)
    size = Sizes(found.stages, microbatches or found.microbatches, chunks or found.chunks)
    if not (size.stages and size.microbatches and size.chunks):
        raise UsageError("the schedule has no actions to check")
    problems = [problem for stage in range(size.stages) for problem in _computations(schedule[stage], stage, size)]
    communicates = has_communication(schedule)
    if not problems and communicates:
        problems = list(_messages(schedule, size))
    if problems:
        return Report(size, tuple(problems))
    try:
        simulation = simulate(schedule, costs)
    except Standstill as standstill:
        return Report(size, (_deadlock(standstill.ring),))
    complete = schedule if communicates else with_communication(schedule)
    run = replay(complete)
    if run.stuck or (run.must_not_block and blocking_sends):
        problems.append(_deadlock(run.first_ring, blocking=not run.stuck))
    needed = []
    for stage, actions in enumerate(complete):
        buffers, bound = _of_stage(receive_buffers, stage, size), _of_stage(max_live, stage, size)
        problems += _reused_buffers(actions, buffers)
        needed.append(_buffers_needed(actions))
        if bound is not None:
            problems += _too_many_live(actions, bound)
    return Report(
        size, tuple(problems), simulation.bubble, simulation.peak_live, tuple(needed), tuple(run.must_not_block)
    )


def checked(schedule: Schedule, microbatches: int | None = None, chunks: int | None = None, **limits: object) -> Report:
    """Return the report of a schedule without problems; arguments as for `check`.

    Raises UsageError with the first problem of any other.
    """
    report = check(schedule, microbatches, chunks, **limits)  # type: ignore[arg-type]
    if report.problems:
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise UsageError(f"schedule: {report.problems[0]}{more}")
    return report
