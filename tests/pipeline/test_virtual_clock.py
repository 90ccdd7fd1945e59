"""The real executor on the virtual clock takes exactly the time that the simulator predicts."""

from __future__ import annotations

from fractions import Fraction

import pytest

import minipar
from minipar.comm import Clock
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.parallel.pipeline.action import Action
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import simulate
from minipar.training import Job

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def makespan(schedule: str, p: int, m: int, chunks: int | None, alpha: float = 0.0) -> float:
    """Run one step of a small model on p ranks; return the virtual seconds from first to last action."""
    blocks = p * (chunks or 1)
    config = TrainConfig(
        model="mlp", pp=p, schedule=schedule, microbatches=m, chunks=chunks, layers=blocks, width=2, batch=m,
        optimizer="sgd", dtype="float64", device="cpu", steps=1,
    ).resolved(VERIFY_DEFAULTS)  # fmt: skip

    def run() -> tuple[float, float]:
        comm = minipar.world()
        job = Job(config, comm)
        executor = job.strategy.executor  # type: ignore[attr-defined]
        executor.declare = lambda action: SECONDS[action.kind]
        batch = next(iter(job.loader))
        comm.barrier()
        executor.run(batch.split(m), batch.count)
        return executor.spans[0].start, executor.spans[-1].end

    spans = minipar.launch(run, p, timeout=60, clock=Clock(alpha))
    return max(end for _, end in spans) - min(start for start, _ in spans)


@pytest.mark.parametrize(
    "schedule, p, m, chunks",
    [("naive", 3, 4, None), ("gpipe", 4, 8, None), ("1f1b", 4, 8, None), ("1f1b", 32, 32, None),
     ("interleaved", 4, 8, 2), ("zb-h1", 4, 8, None), ("zb-h1", 16, 16, None)],
)  # fmt: skip
def test_equals_simulator_and_formula(schedule: str, p: int, m: int, chunks: int | None) -> None:
    measured = makespan(schedule, p, m, chunks)
    predicted = simulate(build_schedule(schedule, p, m, chunks))
    assert measured == float(predicted.makespan)
    work = Fraction(3 * m * (chunks or 1))
    assert 1 - work / Fraction(measured) == FORMULAS[schedule].bubble(p, m, chunks or 1)


def test_action_costs_are_those_declared() -> None:
    assert SECONDS[Action("B", 0).kind] == SECONDS["I"] + SECONDS["W"]
