"""A small training step of each kind of model, which every rank takes by itself, all ranks at once.

It says two things that single operations do not: how much longer operations take one after another within a
step (`calibrate`), and how fast the machine is just now. The second changes: a laptop slows down when it is
warm, a virtual machine when its neighbours work. So `run_layouts` lets the reference step take turns with the
layouts, and predictions are held against them at the pace of that moment (`Machine.paced`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.planner.shapes import Shape, shape_of
from minipar.training import Job, StepRecord, load_data

SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"width": 256, "layers": 4, "batch": 256},
    "convnet": {"batch": 64},
    "gpt": {"batch": 8},
}
TINY: dict[str, Any] = {
    "model": "mlp",
    "width": 32,
    "layers": 2,
    "batch": 16,
}  # where nothing but Python counts
CALM = 0.02  # of a step
ENDLESS = 10**9  # steps of a job that is told when it is enough

Steps = list[tuple[float, float]]


def reference_config(model: str, dtype: str) -> TrainConfig:
    """Return the settings of a kind of model's reference step; a name without one gets the MLP's."""
    kind = model if model in SIZES else "mlp"
    return TrainConfig(model=kind, steps=ENDLESS, dtype=dtype, device="cpu", **SIZES[kind]).resolved()


class Alone:
    """A training job that each rank runs by itself; it is advanced by `timed_steps`. Collective.

    Attributes:
        shape: of its model.
        run: its steps; the first, which makes the optimizer's state, has been taken.
    """

    def __init__(self, comm: Communicator, config: TrainConfig):
        alone = comm.split(comm.rank)
        assert alone is not None
        job = Job(config, alone, load_data(config))
        model: Any = job.model
        self.shape: Shape = shape_of(config.model, model.config)
        self.run: Generator[StepRecord, None, None] = job.train()
        next(self.run)


def in_line() -> float:
    """Return the seconds that this thread could have run and had no core, since it began; 0 if unknown."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):  # another system, or one that does not count
        return 0.0


def timed_steps(comm: Communicator, run: Iterator[StepRecord], steps: int) -> Steps:
    """Take steps; return of each the seconds, and those of them in which this rank stood in line for a core."""
    found: Steps = []
    comm.barrier()
    for _ in range(steps):
        start, waited = time.perf_counter(), in_line()
        next(run)
        found.append((time.perf_counter() - start, in_line() - waited))
    return found


def steps_in(comm: Communicator, run: Iterator[StepRecord], seconds: float) -> int:
    """Return how many steps take about so long, the same number on every rank. Takes two of them. Collective."""
    found = [taken for taken, _ in timed_steps(comm, run, 2)]
    return max(1, round(seconds / float(comm.all_reduce(np.array([min(found)]), op="max")[0])))


def agreed_median(comm: Communicator, steps: Steps) -> tuple[float, float]:
    """Return `undisturbed` of the steps, each as long as on the rank where it took longest. Collective."""
    took, waited = comm.all_reduce(np.array(steps), op="max").T
    return undisturbed(took.tolist(), waited.tolist())


def undisturbed(seconds: Sequence[float], waited: Sequence[float]) -> tuple[float, float]:
    """Return the median of the steps that were disturbed least, and which part of them was waiting.

    Those disturbed for less than `CALM` of their time; where they are fewer than a quarter, the calmest quarter.
    """
    shares = sorted((w / s, s) for s, w in zip(seconds, waited))
    calm = [(share, s) for share, s in shares if share < CALM]
    chosen = calm if 4 * len(calm) >= len(shares) else shares[: -(-len(shares) // 4)]
    return statistics.median(s for _, s in chosen), statistics.median(share for share, _ in chosen)
