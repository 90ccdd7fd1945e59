"""The planner's predictions beside runs: starts `planner.py`, which calibrates first, and reads what it prints.

It takes minutes, and needs the quiet machine more than any other group.
"""

from __future__ import annotations

import re
import subprocess
import sys

from peers import Missing
from table import Line
from turns import HERE

# What `planner.py` prints for a model, and how far each figure may be from 0 (its own docstring says so).
SUMMARY = re.compile(r"median ([\d.]+) %, worst ([\d.]+) %, chosen ([\d.]+) % above the fastest")
LIMITS = {"median error of 5 layouts": 0.15, "worst error": 0.25, "chosen layout over the fastest": 0.05}
MEMORY = 0.10
NETWORK = 0.15
PLACE = re.compile(r"^(\w+) (?:\{|behind)")
LAYOUT = re.compile(r"^ +(.*?) +predicted .*? measured .*? ([+-][\d.]+) %(.*)$")
HELD = re.compile(r"held .*? ([+-][\d.]+) %")


def measure(quick: bool) -> list[Line]:
    """Run the planner's benchmark and return a line for each of its figures.

    Raises:
        Missing: with `quick`, since nothing of it is quick.
        RuntimeError: it failed, or printed something else.
    """
    if quick:
        raise Missing("it calibrates and runs 17 layouts, which takes minutes: left out of --quick")
    command = [sys.executable, str(HERE / "planner.py")]
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=3600)
    if job.returncode:
        raise RuntimeError(f"planner.py ended with exit code {job.returncode}")
    print(job.stdout, flush=True)
    lines = lines_of(job.stdout)
    if not lines:
        raise RuntimeError("planner.py printed no figures that could be read")
    return lines


def lines_of(printed: str) -> list[Line]:
    """Return the lines of what `planner.py` printed."""
    lines: list[Line] = []
    model, memory = "", [0.0]
    for text in printed.splitlines():
        if place := PLACE.match(text):
            model, memory = place[1], []
        elif layout := LAYOUT.match(text):
            if held := HELD.search(layout[3]):
                memory.append(abs(float(held[1])))
            else:
                lines.append(off(f"planner, {model} behind a network, {layout[1]}", abs(float(layout[2])), NETWORK))
        elif summary := SUMMARY.search(text):
            figures = map(float, summary.groups())
            lines += [off(f"planner, {model}: {what}", x, LIMITS[what]) for what, x in zip(LIMITS, figures)]
            lines.append(off(f"planner, {model}: worst error of memory", max(memory), MEMORY))
    return lines


def off(work: str, percent: float, limit: float) -> Line:
    """Return the line of an error that should be small."""
    note = f"at most {limit:.0%}"
    return Line(work, percent, "%", None, "runs on 2 ranks", 1 - percent / 100, 1 - limit, note)
