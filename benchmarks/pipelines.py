"""A pipeline of two stages over MPI: against its simulated time (`pipeline.py`), and beside PyTorch's."""

from __future__ import annotations

import re
import subprocess
import sys

from table import Line, close
from turns import HERE, Program, beside, take_turns

WITHIN = 0.10  # of the simulated time, above or below
JUDGED = ("1f1b", "zb-h1")
MISSED = 1  # the exit code with which pipeline.py says that a schedule is outside its limits


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
    memory = f"{ours.peak_mb:.0f} | {peer.peak_mb:.0f} MiB on stage 0" if peer.absent is None else ""
    line = beside("GPT width 256, 2 stages 1f1b", ours, peer, "torch.distributed.pipelining", None, memory)
    return [line, *simulated(repeats=1 if quick else 9)]


def simulated(repeats: int) -> list[Line]:
    """Return measured beside simulated time of each schedule, as `pipeline.py` prints them.

    Raises:
        RuntimeError: it failed, or printed something else.
    """
    command = [sys.executable, str(HERE / "pipeline.py"), "--schedules", *JUDGED, "--repeats", str(repeats)]
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    if job.returncode not in (0, MISSED):
        raise RuntimeError(f"pipeline.py ended with exit code {job.returncode}")
    return [line_of(name, job.stdout) for name in JUDGED]


def line_of(name: str, printed: str) -> Line:
    """Return the line of one schedule from what `pipeline.py` printed."""
    found = re.search(
        rf"^{re.escape(name)}$.*?^predicted +([\d.]+) ms.*?^measured +([\d.]+) ms", printed, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise RuntimeError(f"pipeline.py printed no times of {name}")
    predicted, real = map(float, found.groups())
    return close(f"GPT width 256, 2 stages {name}", real, predicted, "ms", "simulated", WITHIN)
