"""All ways to lay a model over a machine's ranks: which are possible, how long each takes, which is best.

    found = plan(shape, machine, ranks=1024, batch=1536, precision=PRECISIONS["fp16"])
    print(found.best.layout, found.best.step.seconds)

Tried is what `minipar.distribute` offers. For each grid of ranks and ZeRO stage the best variant stands for
the others: schedule, microbatches, and recomputation only where memory asks for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from minipar.errors import UsageError
from minipar.mesh import factorings
from minipar.planner.layout import PRECISIONS, Layout, Precision
from minipar.planner.machine import Machine
from minipar.planner.memory import Memory, memory
from minipar.planner.shapes import Shape
from minipar.planner.step_time import Step, predict
from minipar.planner.traffic import traffic

SCHEDULES = ("1f1b", "gpipe", "zb-h1", "interleaved")
PIECES = (1, 2, 4, 8, 16)  # samples of a microbatch that are tried
TRIES = 4  # numbers of ranks that are looked at for what would be possible instead
SMALL = 16  # ranks up to which every variant is looked at


@dataclass(frozen=True)
class Candidate:
    """A possible layout: its step, the memory of its fullest rank, and the bytes a rank sends, by axis."""

    layout: Layout
    step: Step
    memory: Memory
    traffic: dict[str, float]


@dataclass
class Plan:
    """What came of it.

    Attributes:
        candidates: the possible layouts, the fastest first; one for each grid and ZeRO stage.
        refused: {reason: layouts that it rules out, in words}.
        closest: of the layouts that only memory rules out, the one that needs least.
    """

    shape: Shape
    machine: Machine
    ranks: int
    batch: int
    limit: float
    precision: Precision
    candidates: list[Candidate] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    closest: tuple[Layout, Memory] | None = None

    @property
    def best(self) -> Candidate:
        """The fastest.

        Raises:
            UsageError: there is none; says what would change that.
        """
        if not self.candidates:
            raise UsageError(self.remedy())
        return self.candidates[0]

    def remedy(self) -> str:
        """Return why nothing is possible and the smallest change that would help."""
        gib = 2**30
        if self.closest is None:
            what = f"plan: no layout of {self.shape.model} on {self.ranks} ranks is possible"
            return f"{what}: {'; '.join(self.refused)}. {self._nearest()}"
        what = f"plan: no layout of {self.shape.model} fits {self.ranks} ranks of {self.limit / gib:.3g} GiB"
        layout, need = self.closest
        text = f"{what}; the smallest need is {need.total / gib:.3g} GiB a rank ({layout}), so give"
        text += f" --memory {_round_up(need.total / gib)}GiB"
        for factor in (2, 4, 8, 16, 32):
            more = plan(
                self.shape, self.machine, self.ranks * factor, self.batch, self.precision, self.limit
            )
            if more.candidates:
                return f"{text}, or --ranks {self.ranks * factor}"
        return text


    def _nearest(self) -> str:
        """Return the numbers of ranks next to this one, and the batch, with which some layout is possible and fits."""
        most = self.batch * math.prod(_cuts(self.shape))  # ranks that a layout can have

        def first(ranks: Iterable[int]) -> int | None:
            possible = (n for n in ranks if _has_grid(self.shape, n, self.batch))
            return next((n for n in itertools.islice(possible, TRIES) if self._fits(n, self.batch)), None)

        fewer = first(range(min(self.ranks - 1, most), 0, -1))
        more = first(range(self.ranks + 1, min(2 * self.ranks, most) + 1))
        near = sorted((n for n in (fewer, more) if n is not None), key=lambda n: abs(n - self.ranks))
        words = [f"--ranks {n}" for n in near]
        batches = range(self.batch + 1, self.ranks + 1)
        possible = (b for b in batches if self.ranks % b == 0 and _has_grid(self.shape, self.ranks, b))
        batch = next((b for b in possible if self._fits(self.ranks, b)), None)
        words += [] if batch is None else [f"--batch {batch}"]
        return f"Give {', or '.join(words)}" if words else "Give fewer --ranks and more --memory"

    def _fits(self, ranks: int, batch: int) -> bool:
        return bool(plan(self.shape, self.machine, ranks, batch, self.precision, self.limit).candidates)


def _cuts(shape: Shape) -> tuple[int, int]:
    """Return into how many parts a model can be cut: its blocks, and each layer."""
    return len(shape.blocks(1)), shape.tp_limit()[0]


def _has_grid(shape: Shape, ranks: int, batch: int) -> bool:
    """Whether so many ranks can be a grid that this batch and the model's cuts have parts enough for."""
    blocks, parts = _cuts(shape)
    stages = 1 if getattr(shape.config, "norm", "") == "batch" else blocks
    return any(
        ranks % (pp * tp) == 0 and ranks // (pp * tp) <= batch
        for pp in range(1, stages + 1) for tp in range(1, parts + 1)
    )  # fmt: skip


def _round_up(x: float) -> str:
    for digits in (3, 4, 5, 6):
        if float(f"{x:.{digits}g}") >= x:
            return f"{x:.{digits}g}"
    return f"{x * 1.0001:.6g}"


def plan(
    shape: Shape,
    machine: Machine,
    ranks: int,
    batch: int,
    precision: Precision = PRECISIONS["float32"],
    limit: float | None = None,
) -> Plan:
    """Return all layouts on `ranks` ranks, ranked.

    Args:
        batch: samples of the global batch.
        limit: bytes that a rank may hold; by default the machine's memory.

    Raises:
        UsageError: ranks or batch below 1.
    """
    if ranks < 1 or batch < 1:
        raise UsageError(f"plan: {ranks} ranks and a batch of {batch} cannot be; give at least 1 of each")
    out = Plan(shape, machine, ranks, batch, machine.memory if limit is None else limit, precision)
    for dp, pp, tp in factorings(ranks):
        grid = f"dp {dp} × pp {pp} × tp {tp}"
        reason = _impossible(out, dp, pp, tp)
        if reason is not None:
            out.refused.setdefault(reason, []).append(grid)
            continue
        for zero in range(4 if dp > 1 else 1):
            if zero > 1 and pp > 1:
                reason = "ZeRO 2 and 3 with a pipeline: every microbatch would reduce or gather every unit again"
                out.refused.setdefault(reason, []).append(grid)
                break
            best = _best_variant(out, dp, pp, tp, zero)
            if best is not None:
                out.candidates.append(best)
    out.candidates.sort(key=lambda c: c.step.seconds)
    return out


def _impossible(p: Plan, dp: int, pp: int, tp: int) -> str | None:
    """Return why this grid cannot be, or None."""
    if dp > p.batch:
        return f"dp above {p.batch}: the batch has no sample for each rank"
    limit, what = p.shape.tp_limit()
    if tp > limit:
        return f"tp above {limit}: {what} cannot be cut into more"
    blocks = len(p.shape.blocks(1))
    if pp > blocks:
        return f"pp above {blocks}: the model has {blocks} blocks, and each stage needs one"
    if getattr(p.shape.config, "norm", "") == "batch" and pp > 1:
        return "pp above 1: batch norm mixes the samples that microbatches part"
    return None


def _variants(p: Plan, dp: int, pp: int, tp: int, zero: int) -> Iterator[list[Layout]]:
    """Yield groups of layouts; of each group the first that fits in memory is looked at and the rest is not."""
    mine = -(-p.batch // dp)  # samples of a rank
    sequence = tp > 1 and p.shape.model == "gpt"
    base = Layout(dp, pp, tp, zero)
    bases = [base, replace(base, sequence_parallel=True)] if sequence and p.ranks <= SMALL else [base]
    if sequence and p.ranks > SMALL:  # it costs nothing and saves memory
        bases = [replace(base, sequence_parallel=True)]
    for base in bases:
        if pp == 1:
            pieces = sorted({1, *(-(-mine // b) for b in PIECES if b < mine)})
            if getattr(p.shape.config, "norm", "") == "batch":
                pieces = [1]
            yield [
                replace(base, microbatches=m, recompute=again) for again in (False, True) for m in pieces
            ]
            continue
        few = {m for m in (pp, 2 * pp, 4 * pp) if m <= mine} if p.ranks <= SMALL else set()
        counts = sorted({-(-mine // b) for b in PIECES[:3]} | few)
        for schedule in SCHEDULES:
            if schedule == "gpipe" and p.ranks > SMALL:
                continue  # as long as 1f1b, with more memory
            chunks = 2 if schedule == "interleaved" else 1
            if pp * chunks > len(p.shape.blocks(1)):
                continue
            for m in counts:
                if m < min(pp, mine) or (schedule == "interleaved" and m % pp):
                    continue
                one = replace(base, schedule=schedule, microbatches=m, chunks=chunks)
                yield [one, replace(one, recompute=True)]


def _best_variant(p: Plan, dp: int, pp: int, tp: int, zero: int) -> Candidate | None:
    best: Candidate | None = None
    least: tuple[Layout, Memory] | None = None
    for group in _variants(p, dp, pp, tp, zero):
        for layout in group:
            held = max(memory(p.shape, layout, p.batch, p.precision), key=lambda m: m.total)
            if least is None or held.total < least[1].total:
                least = layout, held
            if held.total > p.limit:
                continue
            step = predict(p.shape, p.machine, layout, p.batch, p.precision)
            if best is None or step.seconds < best.step.seconds:
                best = Candidate(layout, step, held, {})
            break
    if best is None:
        assert least is not None
        reason = f"memory: every variant needs more than {p.limit / 2**30:.3g} GiB a rank"
        need = f"{least[0]} needs {least[1].total / 2**30:.3g} GiB"
        p.refused.setdefault(reason, []).append(need)
        if p.closest is None or least[1].total < p.closest[1].total:
            p.closest = least
        return None
    return replace(best, traffic=traffic(p.shape, best.layout, p.batch, p.precision))

