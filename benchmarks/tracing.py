"""What recording a trace costs: a GPT step of two ranks with it and without."""

from __future__ import annotations

from table import Line, faster
from turns import Program, take_turns


def measure(quick: bool) -> list[Line]:
    """Return the line of a step with trace, beside one without."""
    size = {"width": 256}
    programs = [
        Program("minipar", "parallel_steps:ours", {**size, "trace": trace, "zero": 2}, ranks=2) for trace in (True, False)
    ]
    recorded, plain = take_turns(programs, 1 if quick else 12)
    return [faster("GPT width 256, ZeRO 2, trace on", recorded.seconds, plain.seconds, "trace off", 0.98)]
