"""The linear partition problem: cut a row of blocks into contiguous stages so that the slowest is fastest.

    costs    3  1  4  1  5  9  2  6        speeds 1, 1, 1/2
    stages  [3  1  4  1  5][9  2][6]       seconds 14, 11, 12: no other cut of this row does better than 14

A pipeline runs at the pace of its slowest stage, so the largest of cost/speed is what counts. Exact, by
dynamic programming over (stages used, blocks placed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

Fits = Callable[[int, int, int], bool]


def split_stages(
    costs: Sequence[float], speeds: Sequence[float], fits: Fits | None = None
) -> list[range] | None:
    """Return one non-empty range of blocks per stage that minimises max(cost of stage k / speeds[k]).

    O(stages · blocks²). Of several best splits, the one whose last stages are longest.

    Args:
        costs: of each block, in order, not negative.
        speeds: of each stage's device, in order, positive.
        fits: whether stage k can hold the blocks start … stop (exclusive); called as fits(k, start, stop).

    Returns:
        The stages, or None where no split fits (or there are fewer blocks than stages).
    """
    blocks, stages = len(costs), len(speeds)
    before = [0.0, *accumulate(costs)]  # cost of all blocks before this one
    # best[k][j]: the smallest possible slowest stage when the first k stages hold the first j blocks.
    best = [[math.inf] * (blocks + 1) for _ in range(stages + 1)]
    first = [[0] * (blocks + 1) for _ in range(stages + 1)]  # where stage k-1 starts in that split
    best[0][0] = 0.0
    for k, speed in enumerate(speeds):
        for stop in range(k + 1, blocks - (stages - k - 1) + 1):  # leave a block for each stage after it
            for start in range(k, stop):
                slowest = max(best[k][start], (before[stop] - before[start]) / speed)
                if slowest < best[k + 1][stop] and (fits is None or fits(k, start, stop)):
                    best[k + 1][stop], first[k + 1][stop] = slowest, start
    if math.isinf(best[stages][blocks]):
        return None
    bounds = [blocks]
    for k in range(stages, 0, -1):
        bounds.append(first[k][bounds[-1]])
    bounds.reverse()
    return [range(a, b) for a, b in pairwise(bounds)]
