"""The closed formulas of the papers: bubble and peak live activations of each schedule, and when they hold.

p is the number of stages, m of microbatches, v of chunks a stage, s a stage counted from 0. "Bubble" is the
idle part of all stages' time (some papers divide by the useful time instead, which gives (p−1)/m for
GPipe). All stages cost the same, and messages nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Formula:
    """The closed forms of one schedule, as functions of (p, m, v) and of (s, p, m, v)."""

    bubble_text: str
    bubble: Callable[[int, int, int], Fraction]
    live_text: str
    live: Callable[[int, int, int, int], int]
    condition: str = ""
    holds: Callable[[int, int, int], bool] = lambda p, m, v: True
    needs_equal_costs: bool = False  # whether F = I = W is a condition of the bubble's formula


FORMULAS: dict[str, Formula] = {
    # Each microbatch has the p stages for itself: one works, p−1 wait.
    "naive": Formula("(p−1)/p", lambda p, m, v: Fraction(p - 1, p), "1", lambda s, p, m, v: 1),
    # Filling and draining cost p−1 turns of F + B beside the m useful ones.
    "gpipe": Formula(
        "(p−1)/(m+p−1)", lambda p, m, v: Fraction(p - 1, m + p - 1), "m", lambda s, p, m, v: m
    ),
    "1f1b": Formula(
        "(p−1)/(m+p−1)", lambda p, m, v: Fraction(p - 1, m + p - 1),
        "min(m, p−s)", lambda s, p, m, v: min(m, p - s),
    ),
    # The turns are those of a chunk, v times shorter.
    "interleaved": Formula(
        "(p−1)/(vm+p−1)", lambda p, m, v: Fraction(p - 1, v * m + p - 1),
        "min(vm, 2(p−s−1)+(v−1)p+1)", lambda s, p, m, v: min(v * m, 2 * (p - s - 1) + (v - 1) * p + 1),
    ),
    # The idle time of a stage is (p−1)(F + I − W) while W ≤ F and W ≤ I, which is p−1 at F = I = W = 1.
    "zb-h1": Formula(
        "(p−1)/(3m+p−1)", lambda p, m, v: Fraction(p - 1, 3 * m + p - 1),
        "min(m, p)", lambda s, p, m, v: min(m, p),
        "m ≥ p", lambda p, m, v: m >= p, needs_equal_costs=True,
    ),
}  # fmt: skip
