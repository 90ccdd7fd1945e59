"""What a machine file lacks, and which of its numbers cannot be: found all at once, and named as they stand there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # which imports this file to read its own
    from minipar.planner.machine import Machine, Measured

REQUIRED: dict[str, tuple[str, ...]] = {
    "": ("name", "memory", "bandwidth", "overhead", "matmul", "node_ranks", "node", "cluster"),
    "node": ("alpha", "beta"),
    "cluster": ("alpha", "beta"),
}
OF_A_TABLE = ("axes", "forward", "backward")


def missing_keys(found: dict[str, Any], measured: tuple[str, ...]) -> list[str]:
    """Return the keys that a machine file's object lacks, as "node.alpha".

    Args:
        measured: the keys of its part "measured", where it has one.
    """
    missing = [key for key in REQUIRED[""] if key not in found]
    for part in ("node", "cluster"):
        if isinstance(found.get(part), dict):
            missing += [f"{part}.{key}" for key in REQUIRED[part] if key not in found[part]]
    rates = found.get("matmul")
    if isinstance(rates, dict):
        missing += [f"matmul.{name}.peak" for name, r in rates.items() if not (isinstance(r, dict) and "peak" in r)]
        missing += [] if rates else ["matmul.float32"]
    there = found.get("measured")
    if isinstance(there, dict):
        missing += [f"measured.{key}" for key in measured if key not in there]
        tables = there.get("ops")
        if isinstance(tables, dict):
            missing += [
                f"measured.ops.{kind}.{key}"
                for kind, table in tables.items() for key in OF_A_TABLE
                if not (isinstance(table, dict) and key in table)
            ]  # fmt: skip
    return missing


def impossible_values(machine: Machine) -> list[str]:
    """Return the numbers that cannot be, as "memory = -1": below zero, or zero where something is divided by it."""
    above: dict[str, float] = {
        "memory": machine.memory, "bandwidth": machine.bandwidth, "node_ranks": machine.node_ranks,
    }  # fmt: skip
    for name, rate in machine.matmul.items():
        above |= {f"matmul.{name}.peak": rate.peak, f"matmul.{name}.efficiency": rate.efficiency}
        above |= {f"matmul.{name}.tile": rate.tile}
    least = {"overhead": machine.overhead}
    least |= {f"matmul.{name}.ramp": rate.ramp for name, rate in machine.matmul.items()}
    for level, link in (("node", machine.node), ("cluster", machine.cluster)):
        least |= {f"{level}.alpha": link.alpha, f"{level}.beta": link.beta, f"{level}.overlap": link.overlap}
    bad = [f"{key} = {value:g}" for key, value in above.items() if not value > 0]
    bad += [f"{key} = {value:g}" for key, value in least.items() if not value >= 0]
    return bad if machine.measured is None else bad + list(_impossible_measurements(machine.measured))


def _impossible_measurements(m: Measured) -> Iterator[str]:
    if m.ranks < 1:
        yield f"measured.ranks = {m.ranks}"
    if not m.step >= 0:
        yield f"measured.step = {m.step:g}"
    for name in ("context", "reference"):
        for model, value in getattr(m, name).items():
            if not value > 0:
                yield f"measured.{name}.{model} = {value:g}"
    for kind, table in m.ops.items():
        grid = tuple(len(axis) for axis in table.axes)
        for work in ("forward", "backward"):
            seconds = np.asarray(getattr(table, work), dtype=float)
            if seconds.shape != grid:
                yield f"measured.ops.{kind}.{work} of shape {seconds.shape} over axes of {grid}"
            elif not (seconds > 0).all():
                yield f"measured.ops.{kind}.{work} = {seconds[~(seconds > 0)][0]:g}"
        for axis in table.axes:
            if not (np.diff(axis) > 0).all() or not min(axis) > 0:
                yield f"measured.ops.{kind}.axes = {list(axis)}, which do not increase from above zero"
    for operation, rows in m.fits.items():
        for ranks, pair in rows.items():
            if not min(pair) >= 0:
                yield f"measured.fits.{operation}.{ranks} = {pair[0]:g}, {pair[1]:g}"
    for operation, found in m.samples.items():
        for ranks, points in found.items():
            if not all(n > 0 and seconds > 0 for n, seconds in points):
                yield f"measured.samples.{operation}.{ranks} with a size or a time of 0 or less"
