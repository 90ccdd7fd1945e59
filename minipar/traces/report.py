"""What a trace says: where each rank's time goes, how much communication is hidden, what holds the run back.

Every moment of a rank belongs to one of six shares (`SHARES`), so they add up to the whole time:

    work        in forward, backward, a pipeline's actions or the optimizer, communication within them left out
    data        making batches
    others      in a collective that another rank has not reached yet: somebody works longer
    transfer    in a collective that all have reached: the price of the communication itself
    stages      waiting for a message of a neighbouring stage: a pipeline's bubble
    rest        none of these: Python between the spans, printing, checkpoints

Communication in `others`, `transfer` and `stages` is exposed. What was under way while the rank did something else
is hidden; that figure is an upper bound, as the end of a transfer is noticed only when somebody asks.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from minipar.trace import ACTION, COLLECTIVE, DATA, FLIGHT, STEP, WAIT, WORK, Span
from minipar.traces.file import RunTrace

SHARES = ("work", "data", "others", "transfer", "stages", "rest")
Interval = tuple[float, float]
Collective = tuple[str, int]  # (group, how-manieth)


@dataclass
class RankTimes:
    """Seconds of one rank, over all steps that are looked at; see the module for the shares.

    Attributes:
        bubble: share of its pipeline's time in which the rank does nothing, as in `TraceReport`.
    """

    work: float = 0.0
    data: float = 0.0
    others: float = 0.0
    transfer: float = 0.0
    stages: float = 0.0
    rest: float = 0.0
    hidden: float = 0.0
    bubble: float | None = None

    @property
    def exposed(self) -> float:
        """Seconds in which the rank communicates or waits, and does nothing else."""
        return self.others + self.transfer + self.stages


@dataclass
class Traffic:
    """One operation in one kind of group: calls, bytes and seconds over all ranks and steps looked at."""

    calls: int = 0
    bytes: int = 0
    exposed: float = 0.0
    transfer: float = 0.0  # of `exposed`; of a message it is not known


@dataclass
class TraceReport:
    """What `examine` found.

    Attributes:
        steps: how many steps were looked at, without the first, in which memory is still being warmed up.
        seconds: from the start of the first of them to the end of the last.
        ranks: each rank's times.
        traffic: by (operation, `axis_of` the group).
        bubble: share of a pipeline's time, from its first to its last action in a step, in which a stage does
            nothing; mean over stages and steps, None without a pipeline.
    """

    steps: int
    seconds: float
    ranks: list[RankTimes]
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    bubble: float | None = None

    def share(self, name: str, rank: int | None = None) -> float:
        """Return the share of the time (0 to 1) of one rank, or the mean over ranks."""
        ranks = self.ranks if rank is None else [self.ranks[rank]]
        return statistics.fmean(getattr(times, name) for times in ranks) / self.seconds

    def excess(self, rank: int) -> float:
        """Return by how much a rank's work exceeds the mean, as a share of the mean; below 0 where it is less."""
        mean = statistics.fmean(times.work for times in self.ranks)
        return self.ranks[rank].work / mean - 1 if mean else 0.0

    @property
    def imbalance(self) -> float:
        """By how much the rank with the most work exceeds the mean, as a share of the mean."""
        return self.excess(self.busiest)

    @property
    def busiest(self) -> int:
        """The rank with the most work."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].work)


def steps_of(trace: RunTrace) -> list[tuple[str, float, float]]:
    """Return (name, start, end) of each recorded step: from the first rank's batch to the last rank's end."""
    found: dict[str, list[Interval]] = {}
    for spans in trace.ranks:
        batch: float | None = None  # when the rank began to make the batch of the step to come
        for s in spans:
            if s.kind == DATA:
                batch = s.start
            elif s.kind == STEP:
                found.setdefault(s.name, []).append((s.start if batch is None else batch, s.end))
                batch = None
    return [(name, min(a for a, _ in times), max(b for _, b in times)) for name, times in found.items()]


def examine(trace: RunTrace) -> TraceReport | None:
    """Return what the trace says, None if no step was recorded."""
    steps = steps_of(trace)
    steps = steps[1:] or steps
    if not steps:
        return None
    window = steps[0][1], steps[-1][2]
    reached = last_to_reach(trace.ranks)
    report = TraceReport(len(steps), window[1] - window[0], [])
    for spans in trace.ranks:
        report.ranks.append(_times(spans, window, reached, report.traffic))
    bubbles = list(_bubbles(trace, steps))
    if bubbles:
        for times, its in zip(report.ranks, zip(*bubbles)):
            times.bubble = statistics.fmean(its)
        report.bubble = statistics.fmean(itertools.chain(*bubbles))
    return report


def last_to_reach(ranks: Sequence[Sequence[Span]]) -> dict[Collective, float]:
    """Return when the last rank reached each collective; background ones are reached when they are begun."""
    reached: dict[Collective, float] = {}
    for spans in ranks:
        for s in spans:
            if s.kind in (COLLECTIVE, FLIGHT) and s.facts.get("number"):
                key = (s.facts["group"], s.facts["number"])
                reached[key] = max(reached.get(key, s.start), s.start)
    return reached


def _times(
    spans: Sequence[Span],
    window: Interval,
    reached: dict[Collective, float],
    traffic: dict[tuple[str, str], Traffic],
) -> RankTimes:
    times = RankTimes()
    inside = [s for s in spans if s.end > window[0] and s.start < window[1]]
    exposed: list[Interval] = []
    for s, own in own_times([s for s in inside if s.kind != FLIGHT], window):
        if s.kind in WORK:
            times.work += own
        elif s.kind == DATA:
            times.data += own
        elif s.kind in (COLLECTIVE, WAIT):
            exposed.append((max(s.start, window[0]), min(s.end, window[1])))
            row = traffic.setdefault((s.name, axis_of(s.facts["group"])), Traffic())
            row.exposed += own
            if s.facts["number"]:
                last = reached.get((s.facts["group"], s.facts["number"]), s.start)
                waited = min(max(last - s.start, 0.0), own)
                times.others += waited
                times.transfer += own - waited
                row.transfer += own - waited
            else:
                times.stages += own
    for s in inside:
        if s.kind in (COLLECTIVE, FLIGHT) or s.name == "recv":  # what is begun and waited for counts once
            row = traffic.setdefault((s.name, axis_of(s.facts["group"])), Traffic())
            row.calls += 1
            row.bytes += s.facts["bytes"]
    accounted = sum(getattr(times, name) for name in SHARES)
    times.rest = window[1] - window[0] - accounted
    flights = [(max(s.start, window[0]), min(s.end, window[1])) for s in inside if s.kind == FLIGHT]
    times.hidden = length_of([*flights, *exposed]) - length_of(exposed)
    return times


def axis_of(group: str) -> str:
    """Return a group's name without numbers: "dp" for each of "world/dp0", "world/dp1", and so on."""
    named = [part.rstrip("0123456789.") or part for part in group.split("/")]
    return "/".join(named[1:] or named)


def own_times(spans: Sequence[Span], window: Interval) -> Iterator[tuple[Span, float]]:
    """Yield each span with the time within the window in which it was the innermost one.

    Args:
        spans: of one rank, sorted by start, outer ones before those within them.
    """
    stack: list[tuple[Span, list[Interval]]] = []  # those that are open, each with what lies within it

    def clipped(s: Span) -> float:
        return max(0.0, min(s.end, window[1]) - max(s.start, window[0]))

    def close() -> tuple[Span, float]:
        s, within = stack.pop()
        inner = sum(max(0.0, min(b, window[1]) - max(a, window[0])) for a, b in within)
        return s, max(0.0, clipped(s) - inner)

    for s in spans:
        while stack and stack[-1][0].end <= s.start:
            yield close()
        if stack:
            stack[-1][1].append((s.start, min(s.end, stack[-1][0].end)))
        stack.append((s, []))
    while stack:
        yield close()


def length_of(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of some intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def _bubbles(trace: RunTrace, steps: Sequence[tuple[str, float, float]]) -> Iterator[list[float]]:
    """Yield, for each step of a pipeline, the share of its time in which each rank does nothing."""
    for _, start, end in steps:
        actions = [
            [(s.start, s.end) for s in spans if s.kind == ACTION and start <= s.start < end]
            for spans in trace.ranks
        ]
        every = [interval for rank in actions for interval in rank]
        if every:
            whole = max(b for _, b in every) - min(a for a, _ in every)
            yield [1 - length_of(rank) / whole for rank in actions]
