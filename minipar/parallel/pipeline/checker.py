"""Prove that a schedule can be run, before it is: nothing missing, nothing early, nobody waiting for ever.

    report = check(schedule)
    print(report.problems or f"bubble {report.bubble}, at most {report.peak_live} activations live")

Each problem names its stage, its action and the reason. A schedule may have its sends and receives or not; if
not, the check is of what `with_communication` makes of it, which is what the executor runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minipar.errors import UsageError
from minipar.parallel.pipeline.action import (
    COMPUTE,
    RECEIVES,
    RECV_F,
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
    refuse_too_many,
    sizes,
)
from minipar.parallel.pipeline.communication import replay, sent_after, with_communication
from minipar.parallel.pipeline.simulator import Cost, Costs, Standstill, Wait, held_after, simulate

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
    """What is wrong with one action of one stage; `position` is its index in the stage's list, if there."""

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
    if too_few := _too_few(schedule, size):
        return Report(size, (too_few,))
    refuse_too_many(size)
    problems: list[Problem] = []
    for stage, actions in enumerate(schedule):
        problems += _computations(actions, stage, size)
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
        if buffers is not None:
            problems += _reused_buffers(actions, buffers)
        needed.append(_buffers_needed(actions))
        if bound is not None:
            problems += _too_many_live(actions, bound)
    peak_live, unsafe = simulation.peak_live, tuple(run.must_not_block)
    return Report(size, tuple(problems), simulation.bubble, peak_live, tuple(needed), unsafe)


def checked(
    schedule: Schedule, microbatches: int | None = None, chunks: int | None = None, **limits: Any
) -> Report:
    """Return the report of a schedule without problems; arguments as for `check`.

    Raises UsageError with the first problem of any other.
    """
    report = check(schedule, microbatches, chunks, **limits)
    if report.problems:
        more = f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""
        raise UsageError(f"schedule: {report.problems[0]}{more}")
    return report


def _too_few(schedule: Schedule, size: Sizes) -> Problem | None:
    """Return what is wrong where most actions are missing: said once, not of each of perhaps a billion."""
    longest = max(map(len, schedule))
    if size.microbatches * size.chunks <= longest:
        return None
    placed = ((stage, i, a) for stage, actions in enumerate(schedule) for i, a in enumerate(actions))
    stage, position, action = max(placed, key=lambda at: (at[2].microbatch, at[2].chunk))
    of = f" of {size.chunks} chunks" if size.chunks > 1 else ""
    why = f"{size.microbatches} microbatches{of} need as many forwards, and no stage has more than {longest} actions"
    return Problem("missing", stage, action, why, position)


def _computations(actions: Sequence[Action], stage: int, size: Sizes) -> Iterator[Problem]:
    """Yield what is wrong with the actions of one stage, looked at alone."""
    _, m, chunks = size
    at: dict[tuple[str, int, int], int] = {}
    for position, action in enumerate(actions):
        kind, i, chunk = action[:3]
        why = ""
        if kind not in COMPUTE + SENDS + RECEIVES:
            why = f"there is no action {kind!r}; use F, B, I and W"
        elif action.stage != stage:
            why = f"it belongs to stage {action.stage}"
        elif not 0 <= i < m:
            why = f"there is no microbatch {i}, they are 0 to {m - 1}"
        elif not 0 <= chunk < chunks:
            why = f"there is no chunk {chunk}, they are 0 to {chunks - 1}"
        if why:
            yield Problem("misplaced", stage, action, why, position)
        elif (kind, i, chunk) in at:
            yield Problem("doubled", stage, action, "it is there twice", position)
        else:
            at[kind, i, chunk] = position
    for chunk in range(chunks):
        for i in range(m):
            f, b, gi, gw = (at.get((kind, i, chunk)) for kind in (F, B, I, W))

            def problem(name: ProblemKind, kind: str, why: str, c: int = chunk, i: int = i) -> Problem:
                return Problem(name, stage, Action(kind, i, c, stage), why, at.get((kind, i, c)))  # type: ignore[arg-type]

            if f is None:
                yield problem("missing", F, "it is missing")
            if b is None and gi is None and gw is None:
                yield problem("missing", B, "it is missing, and so are I and W in its place")
            elif b is None and gi is None:
                yield problem("missing", I, f"it is missing, though W{i} is there")
            elif b is None and gw is None:
                yield problem("missing", W, f"it is missing, though I{i} is there")
            for kind, where in ((I, gi), (W, gw)):
                if b is not None and where is not None:
                    yield problem("doubled", kind, f"B{i} is there too, and computes the same")
            first, kind = (b, B) if b is not None else (gi, I)
            if f is not None and first is not None and first < f:
                why = f"it comes before F{i}, which keeps what it needs"
                yield problem("backward before forward", kind, why)
            if gi is not None and gw is not None and gw < gi:
                yield problem("W before I", W, f"it comes before I{i}")


def _messages(schedule: Schedule, size: Sizes) -> Iterator[Problem]:
    """Yield sends and receives that are missing, of no use, or on the wrong side of their computation."""
    p = size.stages
    found: dict[tuple[bool, Message], tuple[Action, int]] = {}
    computed: dict[tuple[int, str, int, int], int] = {}  # where each forward and backward stands
    for stage, actions in enumerate(schedule):
        for position, a in enumerate(actions):
            if a.kind not in COMPUTE:
                found[a.kind in SENDS, message(a, p)] = a, position
            elif a.kind != W:
                computed[stage, "F" if a.kind == F else "B", a.microbatch, a.chunk] = position
    for actions in schedule:
        for producer in actions:
            pair = sent_after(producer, size) if producer.kind in COMPUTE else None
            if pair is None:
                continue
            send, receive = pair
            name = message(send, p)
            sent, received = found.pop((True, name), None), found.pop((False, name), None)
            for expected, there in ((send, sent), (receive, received)):
                if there and there[0].peer != expected.peer:
                    why = f"it is with stage {there[0].peer}, and its message is with stage {expected.peer}"
                    yield Problem("misplaced", expected.stage, there[0], why, there[1])
            direction = name.kind
            if sent is None and received is None:
                why = f"it is missing, and so is {send} on stage {send.stage}"
                yield Problem("missing", receive.stage, receive, why)
            elif sent is None and received is not None:
                why = f"its message is never sent: stage {send.stage} has no {send}"
                yield Problem("never sent", receive.stage, receive, why, received[1])
            elif received is None and sent is not None:
                why = f"its message is never received: stage {receive.stage} has no {receive}"
                yield Problem("never received", send.stage, send, why, sent[1])
            if sent and sent[1] < computed[send.stage, direction, send.microbatch, send.chunk]:
                why = f"it comes before {producer}, which makes what it sends"
                yield Problem("sent before computed", send.stage, send, why, sent[1])
            use = computed[receive.stage, direction, receive.microbatch, receive.chunk]
            if received and use < received[1]:
                why = f"it comes after {schedule[receive.stage][use]}, which needs it"
                yield Problem("received too late", receive.stage, receive, why, received[1])
    for action, position in found.values():
        why = "there is nothing for it to send or receive: it is at an end of the model, or with its own rank"
        yield Problem("misplaced", action.stage, action, why, position)


def _deadlock(ring: Sequence[Wait], blocking: bool = False) -> Problem:
    cycle = "; ".join(map(str, ring))
    ended = "with sends that block, stages wait for each other" if blocking else "stages wait for each other"
    if len(ring) == 1:
        ended = "it waits for ever"
    return Problem("deadlock", ring[0].stage, ring[0].action, f"{ended}: {cycle}", ring[0].position)


def _of_stage(limit: int | Sequence[int] | None, stage: int, size: Sizes) -> int | None:
    if limit is None:
        return None
    if isinstance(limit, int):
        limit = [limit] * size.stages
    if min(limit, default=1) < 1:
        raise UsageError(f"check: a limit is {min(limit)}; give 1 or more")
    if len(limit) != size.stages:
        raise UsageError(f"check: {len(limit)} limits for {size.stages} stages; give one for each")
    return limit[stage]


def _held_in_buffers(actions: Sequence[Action]) -> Iterator[tuple[int, Action, list[int]]]:
    """Yield each receive with its position and the earlier microbatches whose buffers backward still needs.

    The input of a chunk, and the gradient of its output, are needed until B or W of the microbatch.
    """
    held: dict[tuple[str, int], list[int]] = {}
    for position, a in enumerate(actions):
        if a.kind in RECEIVES:
            mine = held.setdefault((a.kind, a.chunk), [])
            yield position, a, mine
            mine.append(a.microbatch)
        elif a.kind in (B, W):
            for (_, chunk), mine in held.items():
                if chunk == a.chunk and a.microbatch in mine:
                    mine.remove(a.microbatch)


def _reused_buffers(actions: Sequence[Action], buffers: int) -> Iterator[Problem]:
    for position, a, held in _held_in_buffers(actions):
        for i in held:
            if (i - a.microbatch) % buffers == 0:
                what = "input" if a.kind == RECV_F else "gradient"
                why = f"it overwrites the {what} of microbatch {i}, which backward still needs"
                why += f"; with {_buffers_needed(actions)} receive buffers instead of {buffers} it would not"
                yield Problem("buffer reused", a.stage, a, why, position)


def _buffers_needed(actions: Sequence[Action]) -> int:
    """Return how many buffers are enough: the widest range of microbatches held at once."""
    ranges = ((a.microbatch, *held) for _, a, held in _held_in_buffers(actions))
    return max((max(held) - min(held) + 1 for held in ranges), default=0)


def _too_many_live(actions: Sequence[Action], bound: int) -> Iterator[Problem]:
    computations = [(position, a) for position, a in enumerate(actions) if a.kind in (F, B, W)]
    live = held_after([a for _, a in computations])
    for (position, a), n in zip(computations, live):
        if a.kind == F and n > bound:
            why = f"with it {n} activations are live, and the bound is {bound}"
            yield Problem("too many live", a.stage, a, why, position)
