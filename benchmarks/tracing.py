"""What recording a trace costs: a GPT step of two ranks with it and without."""

from __future__ import annotations

from table import Line, faster
from turns import Program, take_turns


def measure(quick: bool) -> list[Line]:
    """Return the line of a step with trace, beside one without."""
    size = {"width": 256}
    both = [{**size, "zero": 2, "trace": trace} for trace in (True, False)]
    programs = [Program("minipar", "parallel_steps:ours", arguments, ranks=2) for arguments in both]
    recorded, plain = take_turns(programs, 1 if quick else 24)
    return [faster("GPT width 256, ZeRO 2, trace on", recorded.seconds, plain.seconds, "trace off", 0.98)]
