"""A pipeline of two stages over MPI: against its simulated time (`pipeline.py`), and beside PyTorch's."""

from __future__ import annotations

import re
import subprocess
import sys

from table import Line, faster
from turns import HERE, Program, take_turns

WITHIN = 0.10  # of the simulated time


def measure(quick: bool) -> list[Line]:
    """Return the lines of the pipeline."""
    size = {"model": "gpt", "width": 256}
    cut = {"schedule": "1f1b", "microbatches": 8}
    ours, peer = take_turns(
        [
            Program("minipar", "parallel_steps:ours", {**size, **cut, "pp": 2, "tied": False, "trace": False}, ranks=2),
            Program("torch", "torch_pipeline:torchs", {**size, **cut}, ranks=2),
        ],
        1 if quick else 6,
    )
    memory = f"{ours.peak_mb:.0f} | {peer.peak_mb:.0f} MiB on stage 0"
    name = "GPT width 256, 2 stages 1f1b"
    line = faster(name, ours.seconds, peer.seconds, "torch.distributed.pipelining", None, memory)
    return [line, *simulated(repeats=2 if quick else 9)]


def simulated(repeats: int) -> list[Line]:
    """Return measured beside simulated time of each schedule, as `pipeline.py` prints them."""
    command = [sys.executable, str(HERE / "pipeline.py"), "--schedules", "1f1b", "zb-h1", "--repeats", str(repeats)]
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    lines = []
    for name in ("1f1b", "zb-h1"):
        block = job.stdout[job.stdout.index(f"\n{name}\n") :]
        predicted, real = (float(re.search(rf"\n{w} +([\d.]+) ms", block)[1]) for w in ("predicted", "measured"))  # type: ignore[index]
        note = f"{real / predicted - 1:+.1%} of the simulated time, allowed ±{WITHIN:.0%}"
        work, wanted = f"GPT width 256, 2 stages {name}", 1 / (1 + WITHIN)
        lines.append(Line(work, real, "ms", predicted, "simulated", predicted / real, wanted, note))
    return lines
