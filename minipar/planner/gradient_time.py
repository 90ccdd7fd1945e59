"""Seconds of what follows backward: summing gradients over ranks, as far as nothing hides it, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from minipar.parallel.buckets import BUCKET_MB
from minipar.planner.collectives import SYMMETRIC, Cost, axis_groups, collective
from minipar.planner.layout import Layout, Precision
from minipar.planner.machine import Machine
from minipar.planner.op_time import Passes
from minipar.planner.shapes import Block

BUCKET = BUCKET_MB * 2**20  # bytes: `DataParallel`'s default


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
    (Rajbhandari et al. 2020, section 7). Sums go on during backward of the last microbatch, bucket by bucket; in
    stage 1, and under a pipeline, they follow it.

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
    operation = SYMMETRIC if layout.zero == 0 else "reduce_scatter"  # as `Bucket` lays them
    if layout.zero:  # units of one block each, summed as soon as the block's backward is over
        ends = accumulate(reversed(backward))
        buckets = [
            (float(b.parameters * precision.gradients), end) for b, end in zip(reversed(blocks), ends) if b.parameters
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
    if overlaps and layout.zero != 1:
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

    From a data sheet: the bytes moved by the memory's rate, since a parameter costs a dozen operations only. Counted
    in the algorithms: Adam (Kingma and Ba 2015, algorithm 1) reads weight, gradient and both moments, and writes all
    but the gradient, 7 moves; clipping by the global norm (Pascanu et al. 2013, algorithm 1) reads the gradient for
    the norm, and reads and writes it to scale it, 3 moves. A machine that was calibrated has a table of both.
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
