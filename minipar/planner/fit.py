"""A machine's numbers from runs that somebody measured: the other way round from `calibrate`.

    machine = fitted(preset("a100-80gb"), "float16", [(run_a, 137e12), (run_b, 163e12)])

Two numbers of a data sheet that programs never quite reach are free: how efficient matrix products are, and
how fast memory really is. Everything else stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from minipar.planner.machine import Machine

Observation = tuple[Callable[[Machine], float], float]


def with_rates(machine: Machine, precision: str, efficiency: float, bandwidth: float) -> Machine:
    """Return the machine with another efficiency of matrix products and another memory bandwidth."""
    rates = {**machine.matmul, precision: replace(machine.rate(precision), efficiency=efficiency)}
    return replace(machine, matmul=rates, bandwidth=bandwidth)


def fitted(machine: Machine, precision: str, observations: Sequence[Observation]) -> Machine:
    """Return the machine that fits best, by least squares of the relative errors.

    Args:
        precision: of the matrix products, a key of `machine.matmul`.
        observations: (what the model predicts on a machine, what was measured), in any one unit each; at least
            two, since two numbers are to be found.

    Raises:
        ValueError: fewer than two observations.
    """
    if len(observations) < 2:
        raise ValueError(f"fitted: {len(observations)} observations cannot fix two numbers; give two or more")

    def errors(x: np.ndarray) -> list[float]:
        candidate = with_rates(machine, precision, float(x[0]), float(x[1]) * machine.bandwidth)
        return [predicted(candidate) / measured - 1 for predicted, measured in observations]

    start = [machine.rate(precision).efficiency, 1.0]
    found = least_squares(errors, start, bounds=([0.05, 0.05], [1.0, 3.0])).x
    return with_rates(machine, precision, float(found[0]), float(found[1]) * machine.bandwidth)
