"""Predict what a schedule costs before anything runs: when each action starts and ends, bubble, memory.

    simulate(one_f_one_b(4, 8)).bubble                     # Fraction(3, 11)
    simulate(gpipe(4, 8), Costs(forward=[0.8, 1, 1, 1.3]), activation_bytes=1 << 20).peak_bytes

Each rank carries out its list in order, an action starting when its rank is free and what it needs has
arrived. Messages travel while the ranks compute (the executor's sends and receives do not block), each
arriving a fixed time after the action that made it ended; two messages do not slow each other. These are
the rules of the threads engine's virtual clock too. Whole numbers and fractions are computed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite, lcm
from typing import Any, NamedTuple, TypeAlias

from minipar.errors import UsageError
from minipar.parallel.pipeline.action import (
    Action,
    B,
    F,
    Schedule,
    Sizes,
    W,
    compute_only,
    sizes,
    virtual_stage,
)

Cost: TypeAlias = int | float | Fraction
PerStage: TypeAlias = Cost | Sequence[Cost]


@dataclass(frozen=True)
class Costs:
    """What one microbatch costs, in any unit of time: one number for all virtual stages, or one for each.

    A full backward B costs `input` + `weight`. `message` is the time from the end of the action that makes an
    array to its arrival, alpha + beta n of an array of n bytes; if it is a list, its k-th number is for the
    boundary between virtual stages k and k + 1, in both directions. Between chunks of one rank it is free.
    """

    forward: PerStage = 1
    input: PerStage = 1
    weight: PerStage = 1
    message: PerStage = 0

    def table(self, virtual_stages: int) -> dict[str, list[Cost]]:
        """Return each cost as a list, one number a virtual stage (or boundary); refuse what is no cost."""
        lists: dict[str, list[Cost]] = {}
        for name in ("forward", "input", "weight", "message"):
            given, n, places = getattr(self, name), virtual_stages, "virtual stages"
            if name == "message":
                n, places = n - 1, "boundaries between virtual stages"
            lists[name] = per_stage(f"costs: {name}", given, n, places)
            bad = [c for c in lists[name] if not (isfinite(c) and c >= 0)]
            if bad:
                raise UsageError(f"costs: a {name} cost is {bad[0]}; give zero or more")
        return lists


def per_stage(name: str, given: PerStage, n: int, places: str = "virtual stages") -> list[Cost]:
    """Return n numbers: those given, or the one given for all."""
    numbers = list(given) if isinstance(given, Sequence) else [given] * n
    if len(numbers) != n:
        raise UsageError(f"{name}: {len(numbers)} numbers for {n} {places}; give one for each or one for all")
    return numbers


class Span(NamedTuple):
    """An action and when it took place, in the unit of the costs."""

    action: Action
    start: Cost
    end: Cost


class Wait(NamedTuple):
    """A stage that goes no further: its next action needs something of stage `on`."""

    stage: int
    position: int  # of the action in its stage's list
    action: Action
    on: int
    needs: str

    def __str__(self) -> str:
        return f"stage {self.stage} at {self.action} waits for {self.needs} of stage {self.on}"


class Standstill(UsageError):
    """A schedule that cannot be carried out: the stages in `ring` wait for each other, or one for itself."""

    def __init__(self, ring: Sequence[Wait]) -> None:
        super().__init__(f"the schedule cannot be carried out: {'; '.join(map(str, ring))}")
        self.ring = list(ring)


@dataclass(frozen=True)
class Timeline:
    """A schedule in time, predicted or measured. Predicted times are exact unless a cost was a float."""

    sizes: Sizes
    spans: list[list[Span]]  # by stage, in the order of time
    makespan: Cost
    utilisation: tuple[Cost, ...]  # by stage: the part of the makespan in which it computes
    bubble: Cost  # the part of all stages' time in which they do not
    peak_live: tuple[int, ...]  # by stage: most activations (of a chunk and a microbatch) held at once
    peak_bytes: tuple[Cost, ...]  # by stage


def simulate(schedule: Schedule, costs: Costs | None = None, activation_bytes: PerStage = 1) -> Timeline:
    """Return the schedule in time; its sends and receives are left out, since they take none of the ranks'.

    Args:
        schedule: with or without communication.
        costs: of each action; 1 for F, I and W and nothing for a message if not given.
        activation_bytes: held from F to the end of backward (B or W), a number or one for each virtual stage.

    Raises UsageError for costs that do not fit, and Standstill, which is one too, for a schedule that cannot
    be carried out to its end.
    """
    size, actions = sizes(schedule), compute_only(schedule)
    spans, unit, waits = _run(actions, size, costs or Costs())
    if waits:
        raise Standstill(waiting_cycle(waits))
    predicted = timeline(spans, activation_bytes)
    if unit == 1:
        return predicted
    # Back to fractions, the last thing because they are slow.
    exact = {t: Fraction(t) / unit for stage in spans for span in stage for t in span[1:]}
    spans = [[Span(a, exact[start], exact[end]) for a, start, end in stage] for stage in spans]
    return replace(predicted, spans=spans, makespan=exact.get(predicted.makespan, 0))


def timeline(spans: Sequence[Sequence[Span]], activation_bytes: PerStage = 1) -> Timeline:
    """Return what follows from when each action took place: the measures of a predicted or a measured run.

    Args:
        spans: of the computing actions, by stage, in order, on a clock that is zero when the step begins.
        activation_bytes: as for `simulate`.
    """
    size = sizes([[span.action for span in stage] for stage in spans])
    makespan = max((stage[-1].end for stage in spans if stage), default=0)
    busy = [sum(span.end - span.start for span in stage) for stage in spans]
    utilisation = tuple(_ratio(b, makespan) for b in busy)
    bubble = 1 - _ratio(sum(busy), makespan * size.stages)
    each = per_stage("activation_bytes", activation_bytes, size.stages * size.chunks)
    live, in_bytes = [], []
    for stage in spans:
        actions = [span.action for span in stage]
        live.append(max(held_after(actions), default=0))
        in_bytes.append(max(held_after(actions, each, size.stages), default=0))
    return Timeline(
        size, [list(stage) for stage in spans], makespan, utilisation, bubble, tuple(live), tuple(in_bytes)
    )


def held_after(actions: Sequence[Action], each: Sequence[Cost] | None = None, stages: int = 1) -> list[Any]:
    """Return what a stage holds after each action: its activations, or their bytes (`each` by virtual stage).

    An activation is live from F until B or W has ended: both need the input that F kept.
    """
    held: Any = 0
    out = []
    for action in actions:
        if action.kind == F:
            held += each[virtual_stage(action, stages)] if each else 1
            out.append(held)
        elif action.kind in (B, W):
            out.append(held)
            held -= each[virtual_stage(action, stages)] if each else 1
    return out


def waiting_cycle(waits: dict[int, Wait]) -> list[Wait]:
    """Return stages that wait for each other in a ring; or a single one, that waits for what never comes."""
    stage, path = min(waits), []
    while stage in waits and stage not in path:
        path.append(stage)
        stage = waits[stage].on
    if stage in path:  # what led to the ring is no part of it
        return [waits[s] for s in path[path.index(stage) :]]
    return [waits[path[-1]]]


def _ratio(a: Any, b: Any) -> Cost:
    if b == 0:
        return 1  # nothing took any time, so nobody was idle
    return a / b if isinstance(a, float) or isinstance(b, float) else Fraction(a, b)


def _run(
    actions: list[list[Action]], size: Sizes, costs: Costs
) -> tuple[list[list[Span]], int, dict[int, Wait]]:
    """Return the spans of all stages, how many of their units of time are one of the costs', and, if it came
    to a standstill, what each stage waits for.
    """
    p, m, chunks = size
    table = costs.table(max(p * chunks, 1))
    # One common denominator makes fractions whole numbers, which are exact and fast.
    every = [c for numbers in table.values() for c in numbers]
    unit = 1 if any(isinstance(c, float) for c in every) else lcm(*(Fraction(c).denominator for c in every))
    whole = (lambda c: int(c * unit)) if unit > 1 else (lambda c: c)
    f, i, w, wire = ([whole(c) for c in numbers] for numbers in table.values())
    if p == 1:
        wire = [0] * len(wire)
    last = p * chunks - 1

    # When each result was there, by (virtual stage, microbatch): of F, of B or I, of W.
    forward: list[Any] = [None] * (p * chunks * m)
    backward: list[Any] = [None] * (p * chunks * m)
    free: list[Any] = [0] * p  # when each stage ended its last action
    done: list[list[Span]] = [[] for _ in range(p)]
    asleep: dict[tuple[int, int], int] = {}  # stage to wake by a result: (0 forward, 1 backward; its index)
    awake = list(range(p))
    while awake:
        s = awake.pop()
        spans, now, mine = done[s], free[s], actions[s]
        while len(spans) < len(mine):
            action = mine[len(spans)]
            kind, microbatch, chunk, _, _ = action
            k = chunk * p + s
            at = k * m + microbatch
            if kind == F:
                if k:
                    arrival = forward[at - m]
                    if arrival is None:
                        asleep[0, at - m] = s
                        break
                    arrival += wire[k - 1]
                    now = arrival if arrival > now else now
                end = now + f[k]
                forward[at] = end
                if (0, at) in asleep:
                    awake.append(asleep.pop((0, at)))
            elif kind == W:
                if backward[at] is None:
                    break
                end = now + w[k]
            else:
                if forward[at] is None:
                    break
                if k < last:
                    arrival = backward[at + m]
                    if arrival is None:
                        asleep[1, at + m] = s
                        break
                    arrival += wire[k]
                    now = arrival if arrival > now else now
                end = now + i[k] + (w[k] if kind == B else 0)
                backward[at] = end
                if (1, at) in asleep:
                    awake.append(asleep.pop((1, at)))
            spans.append(Span(action, now, end))
            now = end
        free[s] = now
    stuck = [s for s in range(p) if len(done[s]) < len(actions[s])]
    return done, unit, {s: _wait(actions[s][len(done[s])], len(done[s]), size, forward) for s in stuck}


def _wait(action: Action, position: int, size: Sizes, forward: list[Any]) -> Wait:
    """Return what an action that cannot start is waiting for."""
    p, m, _ = size
    k = virtual_stage(action, p)
    here = forward[k * m + action.microbatch]
    if action.kind == F:
        before, on = k - 1, (k - 1) % p
        needs = f"F{action.microbatch}" + (f" of chunk {before // p}" if before >= p else "")
    elif action.kind == W or here is None:
        on, needs = action.stage, "I" if action.kind == W else "F"
        needs += f"{action.microbatch}" + (f" of chunk {action.chunk}" if action.chunk else "")
    else:
        on = (k + 1) % p
        needs = f"B{action.microbatch}" + (f" of chunk {(k + 1) // p}" if k + 1 >= p else "")
    return Wait(action.stage, position, action, on, needs)
