"""Seconds of a training step: any model, machine and layout, from counted work and the machine's numbers.

    predict(shape, machine, Layout(dp=2), batch=32).seconds

Computation of each stage is summed over its operations; a pipeline is simulated where it is short and follows
the closed formulas of `parallel.pipeline.formulas` where it is long; gradients are summed while backward goes
on, as far as the machine lets them. A layout takes milliseconds, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import Costs, Timeline, simulate
from minipar.planner.collectives import NOTHING, Cost, axis_groups, collective, message
from minipar.planner.gradient_time import data_parallel, update
from minipar.planner.layout import PRECISIONS, Layout, Precision
from minipar.planner.machine import Machine
from minipar.planner.memory import held_parameters, stage_blocks
from minipar.planner.op_time import Passes, accumulation, passes, together
from minipar.planner.shapes import Block, Shape

SIMULATED = 256  # stages · microbatches · chunks up to which the schedule is simulated action by action
SMALL = 8.0  # bytes of the all-reduces of the loss and of the gradient's norm


@dataclass(frozen=True)
class Step:
    """The predicted step of one layout.

    Attributes:
        seconds: all of it.
        compute: seconds that the busiest rank computes forward and backward, tensor parallelism's sums included.
        tensor_messages: the seconds of those sums.
        exposed: seconds of data-parallel communication that no computation hides; what a pipeline waits for its
            messages is in `bubble`.
        update: clipping and the optimizer's step.
        fixed: seconds that belong to no operation.
        bubble: the part of the pipeline's time in which stages wait, averaged over them; 0 without one.
        timeline: of the pipeline, where it was simulated.
    """

    seconds: float
    compute: float
    tensor_messages: float
    exposed: float
    update: float
    fixed: float
    bubble: float
    timeline: Timeline | None = None


def predict(
    shape: Shape,
    machine: Machine,
    layout: Layout,
    batch: int,
    precision: Precision = PRECISIONS["float32"],
    scattered: bool = False,
) -> Step:
    """Return the predicted step.

    Args:
        batch: samples of the global batch.
        scattered: tensor-parallel ranks send a part each to the next stage, which gathers it ("scatter/gather",
            Narayanan et al. 2021, section 4.1). Megatron-LM does; minipar sends the whole activation.
    """
    samples = -(-batch // (layout.dp * layout.microbatches))
    blocks = shape.blocks(samples, layout.tp, layout.sequence_parallel)
    fixed = 0.0 if machine.measured is None else machine.measured.step
    groups = axis_groups(layout.dp, layout.pp, layout.tp)
    small = sum(
        (collective(machine, "all_reduce", SMALL, groups[axis]) for axis in ("dp", "tp", "pp", "pp")),
        NOTHING,
    )
    fixed += small.total
    if layout.pp == 1:
        parts = passes(blocks, machine, layout, precision, shape.model)
        one = together(parts)
        k = layout.microbatches
        extra = accumulation(sum(b.parameters for b in blocks), machine, precision)
        compute = k * one.total + (k - 1) * extra
        exposed = data_parallel(blocks, parts, machine, layout, precision, overlaps=True)
        tensors = [float(n) for b in blocks for n in b.tensors]
        last = update(tensors, machine, layout, precision)
        return Step(
            compute + exposed + last + fixed, compute, k * one.messages, exposed, last, fixed, 0.0
        )
    return _pipelined(shape.model, blocks, machine, layout, precision, fixed, scattered)


def _pipelined(
    model: str, blocks: Sequence[Block], machine: Machine, layout: Layout, precision: Precision, fixed: float,
    scattered: bool,
) -> Step:  # fmt: skip
    p, v, m = layout.pp, layout.chunks, layout.microbatches
    stages = stage_blocks(blocks, layout)
    found = passes(blocks, machine, layout, precision, model)
    one_of = {id(b): part for b, part in zip(blocks, found)}
    virtual: list[Passes] = []
    for chunk in range(v):
        for stage in range(p):
            here = stages[stage][chunk]
            one = together([one_of[id(b)] for b in here])
            extra = accumulation(sum(b.parameters for b in here), machine, precision) * (m - 1) / m
            virtual.append(Passes(one.forward, one.input, one.weight + extra, one.messages))
    groups = axis_groups(layout.dp, layout.pp, layout.tp)
    bounds = [stages[k % p][k // p][-1].output_bytes(precision) for k in range(p * v - 1)]
    sends = [_boundary(machine, n, layout, scattered) for n in bounds]
    timeline = None
    if p * v * m <= SIMULATED:
        busy = list(virtual)
        for k, send in enumerate(sends):  # what a core does for a message it cannot do for anything else
            busy[k] = Passes(busy[k].forward + send.busy, busy[k].input, busy[k].weight)
            busy[k + 1] = Passes(
                busy[k + 1].forward, busy[k + 1].input + send.busy, busy[k + 1].weight
            )
        costs = Costs(
            [x.forward for x in busy], [x.input for x in busy], [x.weight for x in busy], [s.wire for s in sends]
        )
        timeline = simulate(build_schedule(layout.schedule, p, m, v if v > 1 else None), costs)
        span, bubble = float(timeline.makespan), float(timeline.bubble)
    else:
        span, bubble = long_pipeline(layout, virtual, sends)
    chosen = max(range(p), key=lambda s: sum(virtual[s + p * c].total for c in range(v)))
    compute = m * sum(virtual[chosen + p * c].total for c in range(v))
    messages = m * sum(virtual[chosen + p * c].messages for c in range(v))
    late = last = 0.0
    seen: set[tuple[int, ...]] = set()
    for chunks in stages:
        here = [block for chunk in chunks for block in chunk]
        key = tuple(id(b) for b in here)
        if key in seen:
            continue  # a stage like one before
        seen.add(key)
        parts = [one_of[id(b)] for b in here]
        late = max(late, data_parallel(here, parts, machine, layout, precision, overlaps=False))
        tensors = [float(n) for b in here for n in b.tensors]
        last = max(last, update(tensors, machine, layout, precision))
    borrowed = max((b.borrowed for b in blocks), default=0)
    if borrowed and held_parameters(stages[-1]) > sum(b.parameters for c in stages[-1] for b in c):
        pair = groups["pp"]._replace(ranks=2, stride=groups["pp"].stride * (p - 1))
        late += collective(machine, "all_reduce", borrowed * precision.gradients, pair).total
        if layout.zero:  # summed whole before, see `parallel.pipeline.stage.Stage.sum_tied`
            late += collective(machine, "all_reduce", borrowed * precision.gradients, groups["dp"]).total
    return Step(span + late + last + fixed, compute, messages, late, last, fixed, bubble, timeline)


def _boundary(machine: Machine, n_bytes: float, layout: Layout, scattered: bool) -> Cost:
    """Return the cost of handing an activation to the next stage."""
    groups = axis_groups(layout.dp, layout.pp, layout.tp)
    if not scattered:
        return message(machine, n_bytes, groups["pp"])
    gathered = collective(machine, "all_gather", n_bytes, groups["tp"])
    return message(machine, n_bytes / layout.tp, groups["pp"]) + Cost(gathered.total, 0.0)


def long_pipeline(
    layout: Layout, virtual: Sequence[Passes], sends: Sequence[Cost]
) -> tuple[float, float]:
    """Return (seconds, bubble) of a pipeline by the closed formulas, for stages that need not be equal.

    The slowest stage works on all m microbatches; filling and draining cost the other stages' one microbatch,
    a v-th of it where they hold v chunks (Narayanan et al. 2021, section 2.2). In ZB-H1 the weight gradients
    fill part of that (Qi et al. 2023). Messages that a core or a blocking program has to carry are added to
    the slowest stage's time, those on the wire to filling and draining only.
    """
    p, v, m = layout.pp, layout.chunks, layout.microbatches
    stage = [together([virtual[s + p * c] for c in range(v)]) for s in range(p)]
    slowest = max(x.total for x in stage)
    mean = sum(x.total for x in stage) / p
    busy = 2 * max((s.busy for s in sends), default=0.0) * v
    wire = 2 * max((s.wire for s in sends), default=0.0)
    if layout.schedule == "naive":
        total = m * (sum(x.total for x in stage) + (p - 1) * (wire + busy))
    else:
        fill = mean / v
        if layout.schedule == "zb-h1":
            weight = sum(x.weight for x in stage) / p
            fill = max(0.0, mean - 2 * weight)
        total = m * (slowest + busy) + (p - 1) * (fill + busy / v + wire)
    return total, 1 - m * mean / total
