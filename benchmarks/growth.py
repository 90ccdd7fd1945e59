"""How the cost of a GPT step grows with layers, width, sequence, batch and ranks: exponents, and a picture.

A quantity that grows as x^k is a straight line of slope k where both axes are logarithmic; k is fitted by least
squares. Layers, batch and ranks should come out near 1, 1 and below 0; width between 1 and 2, as the matrix
products grow with its square and the rest with the first power; sequence a little above 1 (attention).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from machine import cores
from table import Line
from turns import Program, take_turns

BASE = {"model": "gpt", "batch": 8, "width": 128, "layers": 2, "tokens": 64}
AXES = {
    "layers": (1, 2, 4, 8),
    "width": (64, 128, 256, 512),
    "tokens": (32, 64, 128, 256, 512),
    "batch": (2, 4, 8, 16, 32),
    "ranks": (1, 2, 4),  # that share the batch, as far as there are cores
}


def exponent(xs: list[float], ys: list[float]) -> float:
    """Return k of the power law c·x^k that fits best."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def measure(quick: bool, picture: Path | None = None) -> list[Line]:
    """Return a line for each axis, and draw them into `picture`."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for axis, values in AXES.items():
        values = values[:2] if quick else values
        if axis == "ranks":
            values = tuple(v for v in values if v <= max(2, cores()))
            programs = [Program("minipar", "steps:ours", BASE, ranks=v) for v in values]
        else:
            programs = [Program("minipar", "steps:ours", BASE | {axis: v}) for v in values]
        results = take_turns(programs, 1 if quick else 5)
        curves[axis] = list(values), [r.seconds for r in results]
    if picture is not None:
        draw(curves, picture)
    lines = []
    for axis, (xs, ys) in curves.items():
        told = ", ".join(f"{x}: {y * 1e3:.1f}" for x, y in zip(xs, ys))
        name = "sequence" if axis == "tokens" else axis
        lines.append(Line(f"GPT step over {name}", exponent(xs, ys), "exponent", note=f"ms at {told}"))
    return lines


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """Draw step time over each axis, as multiples of its smallest value."""
    from minipar.plot import COLOURS, new_figure

    figure = new_figure()
    axes = figure.subplots()
    for colour, marker, (name, (xs, ys)) in zip(COLOURS, "os^Dv", curves.items()):
        k = exponent(xs, ys)
        scaled = [x / xs[0] for x in xs]
        label = f"{'sequence' if name == 'tokens' else name} (exponent {k:.2f})"
        axes.loglog(scaled, [y / ys[0] for y in ys], color=colour, marker=marker, label=label, base=2)
    axes.set_xlabel("size, as a multiple of the smallest")
    axes.set_ylabel("step time, as a multiple")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
