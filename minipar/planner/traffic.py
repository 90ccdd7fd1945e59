"""Bytes that one rank sends in a step, by axis: what each kind of parallelism costs the network.

All collectives are counted as rings (Patarasuk and Yuan 2009): an all-reduce of n bytes over N ranks sends
2n(N−1)/N, a reduce-scatter or an all-gather half of that. The communicator's ledger counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from minipar.comm.ledger import ring_factor
from minipar.planner.layout import Layout, Precision
from minipar.planner.memory import held_parameters, stage_blocks
from minipar.planner.shapes import Block, Shape


def data_parallel_bytes(parameters: float, layout: Layout, precision: Precision) -> float:
    """Return the bytes that the data-parallel axis moves for Ψ parameters, k microbatches and N ranks.

    Times (N−1)/N: 2Ψ without ZeRO and in stage 1, (k+1)Ψ in stage 2, 3kΨ in stage 3 (Rajbhandari et al.
    2020, section 7; for one microbatch 2Ψ, 2Ψ, 3Ψ).
    """
    n, k = layout.dp, layout.microbatches
    g, w = precision.gradients, precision.weights
    per_parameter = {0: 2 * g, 1: g + w, 2: k * g + w, 3: k * (g + 2 * w)}[layout.zero]
    return parameters * per_parameter * float(Fraction(n - 1, n))


def traffic(shape: Shape, layout: Layout, batch: int, precision: Precision) -> dict[str, float]:
    """Return {"dp": …, "pp": …, "tp": …}: bytes of the rank that sends most along each axis in a step."""
    samples = -(-batch // (layout.dp * layout.microbatches))
    blocks = shape.blocks(samples, layout.tp, layout.sequence_parallel)
    stages = stage_blocks(blocks, layout)
    m = layout.microbatches
    sent = {"dp": 0.0, "pp": 0.0, "tp": 0.0}
    for stage, chunks in enumerate(stages):
        here = [block for chunk in chunks for block in chunk]
        copied = tied_copy(stages, stage) * precision.gradients
        data = data_parallel_bytes(held_parameters(chunks), layout, precision)
        if layout.zero:  # a copy's gradient is summed whole, before the ranges of each stage are cut
            data += copied * float(ring_factor("all_reduce", layout.dp))
        within = 0.0
        for message in (x for block in here for x in block.messages):
            again = 2 if layout.recompute and message.when == "forward" else 1
            within += again * message.bytes(precision) * float(ring_factor(message.operation, layout.tp))
        here_sent = {
            "dp": data,
            "pp": m * boundary_bytes(stages, stage, precision) + copied * float(ring_factor("all_reduce", 2)),
            "tp": m * within,
        }
        sent = {axis: max(sent[axis], here_sent[axis]) for axis in sent}
    return sent


def boundary_bytes(stages: Sequence[Sequence[Sequence[Block]]], stage: int, precision: Precision) -> float:
    """Return the bytes that a pipeline stage sends to its neighbours for one microbatch.

    Each of its chunks hands its output on, and hands back the gradient of its input, which is as large as the
    output of the chunk before. The first chunk of all has data for its input, the last one gives the loss.
    """
    p, v = len(stages), len(stages[0])
    outputs = [stages[k % p][k // p][-1].output_bytes(precision) for k in range(p * v - 1)]
    mine = range(stage, p * v, p)
    return sum(outputs[k] for k in mine if k < p * v - 1) + sum(outputs[k - 1] for k in mine if k)


def tied_copy(stages: Sequence[Sequence[Sequence[Block]]], stage: int) -> int:
    """Return the elements of a tied weight of which this stage and another hold a copy each; 0 without one.

    The two sum its gradient once a step, when all microbatches are through.
    """
    borrowed = max(block.borrowed for chunks in stages for chunk in chunks for block in chunk)
    return borrowed if len(stages) > 1 and stage in (0, len(stages) - 1) else 0
