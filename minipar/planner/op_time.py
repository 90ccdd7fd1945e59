"""Seconds of single operations, and of the blocks that are made of them, on one rank.

From data sheets a roofline; on a calibrated machine its tables of measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipar.planner.collectives import axis_groups, collective
from minipar.planner.layout import Layout, Precision
from minipar.planner.machine import Machine, Rate
from minipar.planner.shapes import Block
from minipar.planner.work import Matmul, Op


def matmul_seconds(product: Matmul, rate: Rate, bandwidth: float, itemsize: int) -> float:
    """Return the seconds of a matrix product: the longer of computing it and of moving its matrices.

    The roofline of Williams, Waterman and Patterson 2009; sizes are rounded up to whole tiles, and a tile
    has to be started and ended ("tile quantization" in NVIDIA's guide to matrix multiplication performance).
    """
    m, k, n, times = product
    whole = [-(-size // rate.tile) * rate.tile for size in (m, k, n)]
    flops = 2.0 * whole[0] * whole[1] * whole[2] * times * (1 + rate.ramp / k)
    moved = itemsize * times * (m * k + k * n + m * n)
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
    return sum(
        collective(machine, m.operation, m.bytes(precision), group).total
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
