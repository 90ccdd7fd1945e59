"""Bytes that one rank holds: parameters, gradients, optimizer state, activations.

    memory(shape, Layout(dp=4, zero=2), batch=32, PRECISIONS["float32"])[0].total

The formulas are the papers'; for minipar's own runs the sum agrees with what `planner.fullest` counts in the arrays
that are alive. Each kind counts at the moment of a step when there is most of it: activations at the end of forward
(or of a pipeline's warm-up), gradients at the end of backward. Gradients of the step before are not counted beside
them: they are gone by then, or their memory is used again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from minipar.parallel.memory import zero_parts
from minipar.parallel.partition.stage_split import split_stages
from minipar.planner.layout import Layout, Precision
from minipar.planner.shapes import Block, Shape

KINDS = ("parameters", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def zero_bytes(parameters: float, ranks: int, stage: int, precision: Precision) -> dict[str, float]:
    """Return the bytes of a model's state on one of `ranks` ranks, by kind.

    Rajbhandari et al. 2020, section 5 and figure 1: with 2, 2 and K = 12 bytes a parameter (`mixed`) that is
    16Ψ for plain data parallelism, 4Ψ + 12Ψ/N in stage 1, 2Ψ + 14Ψ/N in stage 2 and 16Ψ/N in stage 3. Copies of
    the weights in another precision count as parameters; in stage 3 they come and go with the gathered ones.
    """
    each = {
        "parameters": precision.weights + (precision.copies if stage < 3 else 0),
        "gradients": precision.gradients,
        "optimizer": precision.state,
    }
    return {kind: each[kind] * parameters * float(part) for kind, part in zero_parts(ranks, stage).items()}


def transformer_activations(
    samples: int, seq_len: int, width: int, heads: int, tp: int = 1,
    sequence_parallel: bool = False, recompute: str = "none",
) -> float:  # fmt: skip
    """Return the bytes that a transformer layer keeps with 2-byte activations and 1-byte dropout masks.

    Korthikanti et al. 2022, table 2: sbh(10 + 24/t + 5as/(ht)); with sequence parallelism sbh/t (34 + 5as/h);
    with selective recomputation the term in as/h falls away; with full recomputation 2sbh is left.

    Args:
        recompute: none, selective or full.
    """
    sbh = float(seq_len * samples * width)
    scores = 0.0 if recompute == "selective" else 5.0 * heads * seq_len / width
    if recompute == "full":
        return 2 * sbh / (tp if sequence_parallel else 1)
    if sequence_parallel:
        return sbh / tp * (34 + scores)
    return sbh * (10 + 24 / tp + scores / tp)


@functools.lru_cache(maxsize=1024)
def _cuts(costs: tuple[float, ...], stages: int) -> tuple[range, ...] | None:
    found = split_stages(costs, [1.0] * stages)
    return None if found is None else tuple(found)


def cuts(blocks: Sequence[Block], stages: int) -> tuple[range, ...] | None:
    """Return the blocks of each virtual stage as `minipar train` cuts them, by parameters; None if too few.

    The costs are those of `partition.policies.block_costs`: a tied parameter counts where it is used.
    """
    return _cuts(tuple(float(b.parameters + b.borrowed) for b in blocks), stages)


def stage_blocks(blocks: Sequence[Block], layout: Layout) -> list[list[list[Block]]]:
    """Return the blocks of each rank's chunks: [stage][chunk] → blocks."""
    if layout.pp == 1:
        return [[list(blocks)]]
    found = cuts(blocks, layout.pp * layout.chunks)
    assert found is not None, "the layout was checked before"
    stages = range(layout.pp)
    return [
        [list(blocks[cut.start : cut.stop]) for cut in found[stage :: layout.pp]] for stage in stages
    ]


def held_parameters(chunks: Sequence[Sequence[Block]]) -> int:
    """Return the parameters that a rank holds, its copies of tied ones included."""
    here = [block for chunk in chunks for block in chunk]
    own = sum(block.parameters for block in here)
    borrows = [block for block in here if block.borrowed]
    lender_is_here = any(block.name == "embedding" for block in here)
    return own + sum(0 if lender_is_here else block.borrowed for block in borrows)


def activations(
    chunks: Sequence[Sequence[Block]], layout: Layout, stage: int, precision: Precision
) -> float:
    """Return the bytes that a rank keeps for backward at its fullest moment.

    Each live microbatch keeps what its operations save; with recomputation only the blocks' inputs and what the loss
    keeps. A recomputed block's activations come back while its backward runs, when the blocks behind it are through
    (Chen et al. 2016).
    """
    live = layout.live(stage) / len(chunks)  # interleaved schedules count chunks
    here = [block for chunk in chunks for block in chunk]
    if not layout.recompute:
        return live * sum(block.kept_bytes(precision) for block in here)
    whole = sum(block.input_bytes(precision) + block.loss_bytes(precision) for block in here)
    inputs = itertools.accumulate(block.input_bytes(precision) for block in here)
    replay = max(held + block.replayed_bytes(precision) for held, block in zip(inputs, here))
    return max(live * whole, (live - 1) * whole + replay)


def memory(shape: Shape, layout: Layout, batch: int, precision: Precision) -> list[Memory]:
    """Return what a rank of each pipeline stage holds."""
    samples = -(-batch // (layout.dp * layout.microbatches))
    blocks = shape.blocks(samples, layout.tp, layout.sequence_parallel)
    out = []
    for stage, chunks in enumerate(stage_blocks(blocks, layout)):
        state = zero_bytes(held_parameters(chunks), layout.dp, layout.zero, precision)
        kept = activations(chunks, layout, stage, precision)
        out.append(Memory(state["parameters"], state["gradients"], state["optimizer"], kept))
    return out
