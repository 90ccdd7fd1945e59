"""Bytes that one rank sends in a step, by axis: what each kind of parallelism costs the network.

All collectives are counted as rings (Patarasuk and Yuan 2009): an all-reduce of n bytes over N ranks sends
2n(N−1)/N, a reduce-scatter or an all-gather half of that. The communicator's ledger counts the same.
"""

from __future__ import annotations

from fractions import Fraction

from minipar.comm.ledger import ring_factor
from minipar.planner.layout import Layout, Precision
from minipar.planner.memory import held_parameters, stage_blocks
from minipar.planner.shapes import Shape


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
    """Return {"dp": …, "pp": …, "tp": …}: bytes that the rank which sends most sends in a step."""
    samples = -(-batch // (layout.dp * layout.microbatches))
    blocks = shape.blocks(samples, layout.tp, layout.sequence_parallel)
    stages = stage_blocks(blocks, layout)
    m, size = layout.microbatches, precision.activations
    held = max(held_parameters(chunks) for chunks in stages)
    sent = {"dp": data_parallel_bytes(held, layout, precision), "pp": 0.0, "tp": 0.0}
    for chunks in stages:
        here = [block for chunk in chunks for block in chunk]
        elements = 0.0
        for message in (x for block in here for x in block.messages):
            again = 2 if layout.recompute and message.when == "forward" else 1
            elements += again * message.elements * float(ring_factor(message.operation, layout.tp))
        sent["tp"] = max(sent["tp"], m * size * elements)
        if layout.pp > 1:  # forward an activation, back a gradient of the same size, at each boundary
            ends = [chunk[-1].output for chunk in chunks] + [chunk[0].input for chunk in chunks]
            inner = 2 * layout.chunks if stages[0] is not chunks and stages[-1] is not chunks else 2 * layout.chunks - 1
            sent["pp"] = max(sent["pp"], m * size * max(ends) * inner / 1.0)
    return sent
