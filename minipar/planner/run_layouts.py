"""Run some layouts for a few steps each and say how long a step took: what predictions are held against.

    runs = run_layouts(configs, ranks=2)         # starts one MPI job in which they take turns
    runs[0].seconds

The layouts take turns, a few steps at a time, so that a machine that is slower for a while is slower for all;
of each the median step counts. Where the system tells how long a process stood in line for a core, only steps
in which no rank did so for long are looked at, and it is said if there were none.
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import sys
import tempfile
import time
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
from minipar.parallel.pipeline.simulator import Span, Timeline, timeline
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.planner.layout import Layout, Precision
from minipar.training import Job, load_data

ROUNDS, STEPS = 6, 4
CALM = 0.02  # of a step
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
        disturbed: the part of those steps in which a rank stood in line for a core that other programs had.
    """

    seconds: float
    timeline: Timeline | None = None
    disturbed: float = 0.0


def in_line() -> float:
    """Return the seconds that this thread could have run and had no core, since it began; 0 if unknown."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):  # another system, or one that does not count
        return 0.0


def measure(
    comm: Communicator, configs: Sequence[TrainConfig], rounds: int = ROUNDS, steps: int = STEPS
) -> list[Ran]:
    """Run the layouts on the ranks of `comm`, each of which calls it with the same settings. Collective."""
    keep_freed_memory()
    enough = rounds * steps + 2
    data = load_data(configs[0].resolved())
    jobs = [Job(replace(c, steps=enough).resolved(), comm, data) for c in configs]
    runs: list[Any] = [job.train() for job in jobs]
    for run in runs:
        next(run)  # the first step makes the optimizer's state
    seconds: list[list[tuple[float, float]]] = [[] for _ in jobs]
    for _ in range(rounds):
        for run, mine in zip(runs, seconds):
            comm.barrier()
            for _ in range(steps):
                start, waited = time.perf_counter(), in_line()
                next(run)
                mine.append((time.perf_counter() - start, in_line() - waited))
    for run in runs:
        run.close()
    ran = []
    for mine, job in zip(seconds, jobs):
        took, waited = comm.all_reduce(np.array(mine), op="max").T  # of the rank that was disturbed most
        median, disturbed = undisturbed(took.tolist(), waited.tolist())
        ran.append(Ran(median, _timeline(job), disturbed))
    return ran


def undisturbed(seconds: Sequence[float], waited: Sequence[float]) -> tuple[float, float]:
    """Return the median of the steps that were disturbed least, and which part of them was waiting.

    Those disturbed for less than `CALM` of their time; where they are fewer than a quarter, the calmest quarter.
    """
    shares = sorted((w / s, s) for s, w in zip(seconds, waited))
    calm = [(share, s) for share, s in shares if share < CALM]
    chosen = calm if 4 * len(calm) >= len(shares) else shares[: -(-len(shares) // 4)]
    return statistics.median(s for _, s in chosen), statistics.median(share for share, _ in chosen)


def _timeline(job: Job) -> Timeline | None:
    """Return the last step of this rank's pipeline, on a clock that is zero when the step began. Collective."""
    if not isinstance(job.strategy, Pipelined):
        return None
    spans = job.mesh.pp.all_gather_object(job.strategy.executor.spans)
    first = min(stage[0].start for stage in spans)
    return timeline([[Span(s.action, s.start - first, s.end - first) for s in stage] for stage in spans])


def run_layouts(
    configs: Sequence[TrainConfig], ranks: int, latency: str | None = None, bandwidth: str | None = None,
    rounds: int = ROUNDS, steps: int = STEPS,
) -> list[Ran]:  # fmt: skip
    """Measure layouts in an MPI job on this machine.

    Args:
        latency, bandwidth: of an imitated network, as `minipar run` takes them.

    Raises:
        CommunicationError: the job failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "runs.pickle"
        what: dict[str, Any] = {"configs": [c.to_dict() for c in configs], "rounds": rounds, "steps": steps}
        task.write_text(json.dumps(what))
        env = {**os.environ, **network_environment(latency, bandwidth)}
        command = [sys.executable, "-m", "minipar.planner.run_layouts", str(task), str(result)]
        code = run_mpi(command, ranks, timeout=LIMIT, env=env)
        if code or not result.exists():
            raise CommunicationError(f"plan: the job that runs the layouts ended with exit code {code}")
        found: list[Ran] = pickle.loads(result.read_bytes())
        return found


def main(task: str, result: str) -> None:
    """What each rank of that job does."""
    what = json.loads(Path(task).read_text())
    comm = world()
    runs = measure(comm, [TrainConfig(**c) for c in what["configs"]], what["rounds"], what["steps"])
    if comm.rank == 0:
        Path(result).write_bytes(pickle.dumps(runs))


if __name__ == "__main__":
    from minipar.planner import run_layouts as this_module  # under its own name, by which results are pickled

    this_module.main(*sys.argv[1:])
