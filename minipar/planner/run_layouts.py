"""Run some layouts for a few steps each and say how long a step took: what predictions are held against.

    runs = run_layouts(configs, ranks=2)         # starts MPI jobs in which they take turns
    runs.layouts[0].seconds, runs.reference

The layouts and the reference step of their model (`planner.reference`) take turns, a fraction of a second at
a time, so that a machine that is slower for a while is slower for all; of each the median step counts. Where
the system tells how long a process stood in line for a core, only steps in which no rank did so for long are
looked at, and it is said if there were none. The whole is done several times over, since where a process's
arrays happen to lie changes its speed by some 5 %.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minipar.backend import keep_freed_memory
from minipar.comm import world
from minipar.comm.interface import Communicator
from minipar.comm.launcher import run_mpi
from minipar.comm.slow import network_environment
from minipar.config import TrainConfig
from minipar.errors import CommunicationError
from minipar.parallel.pipeline.simulator import Timeline, timeline
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.planner.fullest import fullest, whole_batch
from minipar.planner.layout import Layout, Precision
from minipar.planner.machine import Machine
from minipar.planner.reference import (
    ENDLESS,
    Alone,
    Steps,
    agreed_median,
    reference_config,
    steps_in,
    timed_steps,
)
from minipar.training import Job, load_data

JOBS, TURNS, TURN = 3, 8, 0.15  # one job after the other, turns in each, seconds of one
LIMIT = 600.0  # seconds after which the job is killed


def config_of(config: TrainConfig, layout: Layout, precision: Precision | None = None) -> TrainConfig:
    """Return the settings of `minipar train` that run a layout."""
    piped = layout.pp > 1
    if precision is not None:
        amp = precision.name == "fp16"
        config = replace(config, amp="fp16" if amp else "off", dtype="float32" if amp else precision.name)
    return replace(
        config, dp=layout.dp, pp=layout.pp, tp=layout.tp, zero=layout.zero, recompute=layout.recompute,
        sequence_parallel=layout.sequence_parallel, schedule=layout.schedule if piped else None,
        microbatches=layout.microbatches if piped else None, accumulate=1 if piped else layout.microbatches,
        chunks=layout.chunks if layout.chunks > 1 else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What came of one layout.

    Attributes:
        seconds: of the median step.
        timeline: of a pipeline's last step.
        held: bytes of the rank that holds most, by `fullest`.
        disturbed: the part of those steps in which a rank stood in line for a core that other programs had.
    """

    seconds: float
    held: float
    timeline: Timeline | None = None
    disturbed: float = 0.0


@dataclass(frozen=True)
class Runs:
    """What came of all layouts.

    Attributes:
        layouts: in their order.
        reference: seconds of the reference step, taken in turn with them.
        disturbed: as in `Ran`, of the reference step.
    """

    layouts: list[Ran]
    reference: float
    disturbed: float

    def pace(self, machine: Machine, model: str) -> float:
        """Return how much longer everything took than when the machine was calibrated: 1.0 is as long."""
        assert machine.measured is not None
        return self.reference / machine.measured.reference[model]


def measure(
    comm: Communicator, configs: Sequence[TrainConfig], turns: int = TURNS, turn: float = TURN
) -> Runs:
    """Run the layouts on the ranks of `comm`, each of which calls it with the same settings. Collective.

    Args:
        turns: how often each is run. turn: seconds that it may take each time, or one step if that is longer.
    """
    keep_freed_memory()
    with comm.scope():
        data = load_data(configs[0].resolved())
        jobs = [Job(replace(c, steps=ENDLESS).resolved(), comm, data) for c in configs]
        runs: list[Any] = [job.train() for job in jobs]
        for run in runs:
            next(run)  # the first step makes the optimizer's state
        runs.append(Alone(comm, reference_config(configs[0].model, str(configs[0].dtype))).run)
        counts = [steps_in(comm, run, turn) for run in runs]
        found: list[Steps] = [[] for _ in runs]
        for _ in range(turns):
            for run, count, mine in zip(runs, counts, found):
                mine += timed_steps(comm, run, count)
        for run in runs:
            run.close()
        *medians, reference = [agreed_median(comm, mine) for mine in found]
        ran = [
            Ran(seconds, _held(job), _timeline(job), disturbed)
            for (seconds, disturbed), job in zip(medians, jobs)
        ]
        return Runs(ran, *reference)


def _held(job: Job) -> float:
    """Return the bytes of the rank that holds most. Collective."""
    total = float(fullest(job, whole_batch(job)).total)
    return float(job.comm.all_reduce(np.array([total]), op="max")[0])


def _timeline(job: Job) -> Timeline | None:
    """Return the last step of this rank's pipeline, on a clock that is zero when the step began. Collective."""
    if not isinstance(job.strategy, Pipelined):
        return None
    spans = job.mesh.pp.all_gather_object(job.strategy.executor.spans)
    first = min(stage[0].start for stage in spans)
    return timeline([[s._replace(start=s.start - first, end=s.end - first) for s in stage] for stage in spans])


def run_layouts(
    configs: Sequence[TrainConfig], ranks: int, latency: str | None = None, bandwidth: str | None = None
) -> Runs:
    """Measure layouts in MPI jobs on this machine.

    Args:
        latency, bandwidth: of an imitated network, as `minipar run` takes them.

    Raises:
        CommunicationError: the job failed; it has said why.
    """
    return middle([_one_job(configs, ranks, latency, bandwidth) for _ in range(JOBS)])


def middle(found: Sequence[Runs]) -> Runs:
    """Return the median of several jobs' runs; memory and timelines are the last one's."""
    layouts = [
        replace(
            same[-1],
            seconds=statistics.median(ran.seconds for ran in same),
            disturbed=max(ran.disturbed for ran in same),
        )
        for same in zip(*(runs.layouts for runs in found))
    ]
    reference = statistics.median(runs.reference for runs in found)
    return Runs(layouts, reference, max(runs.disturbed for runs in found))


def _one_job(configs: Sequence[TrainConfig], ranks: int, latency: str | None, bandwidth: str | None) -> Runs:
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "runs.pickle"
        what = [c.to_dict() for c in configs]
        task.write_text(json.dumps(what))
        env = {**os.environ, **network_environment(latency, bandwidth)}
        command = [sys.executable, "-m", "minipar.planner.run_layouts", str(task), str(result)]
        code = run_mpi(command, ranks, timeout=LIMIT, env=env)
        if code or not result.exists():
            raise CommunicationError(f"plan: the job that runs the layouts ended with exit code {code}")
        found: Runs = pickle.loads(result.read_bytes())
        return found


def main(task: str, result: str) -> None:
    """What each rank of that job does."""
    what = json.loads(Path(task).read_text())
    comm = world()
    runs = measure(comm, [TrainConfig(**c) for c in what])
    if comm.rank == 0:
        Path(result).write_bytes(pickle.dumps(runs))


if __name__ == "__main__":
    from minipar.planner import run_layouts as this_module  # under its own name, by which results are pickled

    this_module.main(*sys.argv[1:])
