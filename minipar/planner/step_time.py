"""Seconds of a training step: any model, machine and layout, from counted work and the machine's numbers.

    predict(shape, machine, Layout(dp=2), batch=32).seconds

Computation of each stage is summed over its operations; a pipeline is simulated where it is short and follows
the closed formulas of `parallel.pipeline.formulas` where it is long; gradients are summed while backward goes
on, as far as the machine lets them. A layout takes milliseconds, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import Costs, Timeline, simulate
from minipar.planner.collectives import NOTHING, Cost, axis_groups, collective, message
from minipar.planner.layout import PRECISIONS, Layout, Precision
from minipar.planner.machine import Machine, Rate
from minipar.planner.memory import held_parameters, stage_blocks
from minipar.planner.shapes import Block, Shape
from minipar.planner.work import Matmul, Op

BUCKET = 4 * 2**20  # bytes: `DataParallel`'s default
SIMULATED = 256  # stages · microbatches · chunks up to which the schedule is simulated action by action
SMALL = 8.0  # bytes of the all-reduces of the loss and of the gradient's norm


@dataclass(frozen=True)
class Step:
    """The predicted step of one layout.

    Attributes:
        seconds: all of it.
        compute: seconds that the busiest rank computes forward and backward, tensor parallelism's sums included.
        tensor_messages: the seconds of those sums.
        exposed: seconds of data-parallel communication and pipeline messages that no computation hides.
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


def matmul_seconds(product: Matmul, rate: Rate, bandwidth: float, itemsize: int) -> float:
    """Return the seconds of a matrix product: the longer of computing it and of moving its matrices.

    The roofline of Williams, Waterman and Patterson 2009; sizes are rounded up to whole tiles, and a tile
    has to be started and ended ("tile quantization" in NVIDIA's guide to matrix multiplication performance).
    """
    m, k, n, count = product
    whole = [-(-size // rate.tile) * rate.tile for size in (m, k, n)]
    flops = 2.0 * whole[0] * whole[1] * whole[2] * count * (1 + rate.ramp / k)
    moved = itemsize * count * (m * k + k * n + m * n)
    return max(flops / (rate.peak * rate.efficiency), moved / bandwidth)


def op_seconds(op: Op, work: str, machine: Machine, precision: Precision) -> float:
    """Return the seconds of one pass ("forward", "input" or "weight") of an operation on one rank."""
    table = machine.measured.ops.get(op.kind) if machine.measured is not None else None
    if table is not None:
        if work == "forward":
            return table.seconds(op.size, "forward")
        return _part_of_backward(op, work) * table.seconds(op.size, "backward")
    products, rate = op.matmuls(work), machine.rate(precision.compute)
    moved = dict(zip(("forward", "input", "weight"), op.moved))[work]
    if not products and not moved:
        return 0.0
    seconds = sum(matmul_seconds(p, rate, machine.bandwidth, precision.activations) for p in products)
    return seconds + moved * precision.activations / machine.bandwidth + machine.overhead


def _part_of_backward(op: Op, work: str) -> float:
    """Return which part of an operation's measured backward belongs to its gradient of the input or weight.

    A table is measured with both gradients. Where the operation multiplies, time goes with the products.
    """
    input, weight = op.flops("input"), op.flops("weight")
    if op.forward and op.weight:
        return (input if work == "input" else weight) / (2 * op.flops("forward"))
    if op.kind == "embedding":
        return float(work == "weight")
    return float(work == "input")


def tensor_messages(
    block: Block, when: str, machine: Machine, layout: Layout, precision: Precision
) -> float:
    """Return the seconds of a block's tensor-parallel collectives in forward or backward: nothing hides them."""
    group = axis_groups(layout.dp, layout.pp, layout.tp)["tp"]
    size = precision.activations
    return sum(
        collective(machine, m.operation, m.elements * size, group).total
        for m in block.messages
        if m.when == when
    )


@dataclass(frozen=True)
class Passes:
    """Seconds of a virtual stage for one microbatch: forward, gradient of inputs, gradient of weights."""

    forward: float
    input: float
    weight: float
    messages: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.input + self.weight


def passes(
    blocks: Sequence[Block], machine: Machine, layout: Layout, precision: Precision, model: str = ""
) -> list[Passes]:
    """Return the passes of each block, tensor-parallel sums included; alike blocks are looked at once.

    Recomputation runs a block's forward again before its backward, its sums as well.

    Args:
        model: whose blocks they are, for what a measured machine knows of it.
    """
    longer = 1.0 if machine.measured is None else machine.measured.context.get(model, 1.0)
    known: dict[int, Passes] = {}
    for block in blocks:
        if id(block) in known:
            continue
        f, i, w = (
            longer * sum(op_seconds(op, work, machine, precision) for op in block.ops)
            for work in ("forward", "input", "weight")
        )
        ahead = tensor_messages(block, "forward", machine, layout, precision)
        back = tensor_messages(block, "backward", machine, layout, precision)
        again = f + ahead if layout.recompute else 0.0
        sums = ahead * (2 if layout.recompute else 1) + back
        known[id(block)] = Passes(f + ahead, i + back + again, w, sums)
    return [known[id(block)] for block in blocks]


def together(parts: Sequence[Passes]) -> Passes:
    """Return the sum of blocks that run one after the other."""
    return Passes(
        sum(p.forward for p in parts), sum(p.input for p in parts), sum(p.weight for p in parts),
        sum(p.messages for p in parts),
    )  # fmt: skip


def accumulation(parameters: float, machine: Machine, precision: Precision) -> float:
    """Return the seconds of adding a microbatch's weight gradients to those before: two reads and a write."""
    table = machine.measured.ops.get("accumulate") if machine.measured is not None else None
    if table is not None:
        return table.seconds((parameters,), "forward")
    return 3 * precision.gradients * parameters / machine.bandwidth


def hidden_behind(durations: Sequence[float], ready: Sequence[float], busy_until: float) -> float:
    """Return how long after `busy_until` the last of some transfers ends, which share one way and keep order.

    Args:
        durations: of each transfer.
        ready: when each can start at the earliest.
    """
    end = 0.0
    for duration, start in zip(durations, ready):
        end = max(end, start) + duration
    return max(0.0, end - busy_until)


def gradient_buckets(
    blocks: Sequence[Block], backward: Sequence[float], precision: Precision
) -> list[tuple[float, float]]:
    """Return (bytes, when it is full) of each bucket, in seconds since backward began.

    Backward runs the blocks in reverse. Buckets are filled up to `BUCKET` bytes; a larger tensor has one to
    itself (`parallel.buckets.make_buckets`).
    """
    out: list[tuple[float, float]] = []
    size, now = 0.0, 0.0
    full_at = 0.0
    for block, seconds in zip(reversed(blocks), reversed(backward)):
        now += seconds
        for elements in reversed(block.tensors):
            n = float(elements * precision.gradients)
            if size and size + n > BUCKET:
                out.append((size, full_at))
                size = 0.0
            size += n
            full_at = now
    if size:
        out.append((size, full_at))
    return out


def data_parallel(
    blocks: Sequence[Block], parts: Sequence[Passes], machine: Machine, layout: Layout, precision: Precision,
    overlaps: bool,
) -> float:  # fmt: skip
    """Return the seconds that a step becomes longer by summing gradients and spreading parameters.

    With Ψ parameters and k microbatches: stage 0 all-reduces Ψ; stages 1 and 2 reduce-scatter Ψ (k times in
    stage 2) and all-gather Ψ after the step; stage 3 gathers Ψ twice and reduce-scatters it a microbatch
    (Rajbhandari et al. 2020, section 7). Sums go on during backward of the last microbatch, bucket by bucket;
    under a pipeline they follow it.

    Args:
        parts: the passes of each of `blocks`.
        overlaps: whether this rank's program lets them run during backward.
    """
    group = axis_groups(layout.dp, layout.pp, layout.tp)["dp"]
    if group.ranks == 1:
        return 0.0
    k = layout.microbatches
    backward = [p.input + p.weight for p in parts]
    buckets = gradient_buckets(blocks, backward, precision)
    units = [float(b.parameters * precision.weights) for b in blocks if b.parameters]
    operation = "all_reduce" if layout.zero == 0 else "reduce_scatter"
    if layout.zero:  # units of one block each, summed as soon as the block's backward is over
        ends = list(accumulate(reversed(backward)))[::-1]
        buckets = [
            (float(b.parameters * precision.gradients), end)
            for b, end in zip(reversed(blocks), reversed(ends))
            if b.parameters
        ]
    known: dict[tuple[str, float], Cost] = {}  # many buckets and units are of one size

    def cost(operation: str, n_bytes: float) -> Cost:
        key = operation, n_bytes
        if key not in known:
            known[key] = collective(machine, operation, n_bytes, group)
        return known[key]

    sums = [cost(operation, n) for n, _ in buckets]
    gathers = [cost("all_gather", n) for n in units] if layout.zero else []
    spread = sum((g.total for g in gathers), 0.0)
    busy = sum(s.busy for s in sums)
    if overlaps:
        late = hidden_behind([s.wire for s in sums], [t for _, t in buckets], sum(backward))
    else:
        late = sum(s.wire for s in sums)
    once = busy + late
    if layout.zero == 0:
        return once
    if layout.zero == 1:
        return once + spread
    if layout.zero == 2:
        return k * once + spread
    # Stage 3 gathers a unit while the one before computes, in forward and again in backward.
    ahead = sum(g.busy for g in gathers)
    forward = sum(p.forward for p in parts)
    wire = sum(g.wire for g in gathers)
    return k * (once + 2 * ahead + max(0.0, wire - forward) + max(0.0, wire - sum(backward)))


def update(
    tensors: Sequence[float], machine: Machine, layout: Layout, precision: Precision
) -> float:
    """Return the seconds of clipping and of AdamW's step on what this rank updates.

    Adam reads weight, gradient and both moments, and writes all but the gradient: 7 moves; the norm reads the
    gradient once and scaling it reads and writes it.
    """
    part = layout.dp if layout.zero else 1
    measured = machine.measured
    if measured is not None and "adamw" in measured.ops:
        adam, clip = measured.ops["adamw"], measured.ops.get("clip")
        seconds = 0.0
        for n in tensors:
            seconds += adam.seconds((n / part,), "forward")
            seconds += clip.seconds((n / part,), "forward") if clip is not None else 0.0
        return seconds
    moved = 2 * precision.weights + 4 * precision.gradients + 2 * precision.state
    return sum(tensors) / part * moved / machine.bandwidth


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
    bounds = [stages[k % p][k // p][-1].output * precision.activations for k in range(p * v - 1)]
    sends = [_boundary(machine, n, layout, scattered) for n in bounds]
    timeline = None
    if p * v * m <= SIMULATED:
        busy = [Passes(x.forward, x.input, x.weight, x.messages) for x in virtual]
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
    exposed = late + max(0.0, span * (1 - bubble) - compute) if timeline is None else late
    return Step(
        span + late + last + fixed, compute, messages, exposed, last, fixed, bubble, timeline
    )


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
