"""The real executor on the virtual clock takes exactly the time that the simulator predicts, action by action."""

from __future__ import annotations

from fractions import Fraction

import pytest

import minipar
from minipar.comm import Clock
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.parallel.pipeline.action import Action, virtual_stage
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import Costs, Span, Timeline, simulate, timeline
from minipar.training import Job, load_data

WIDTH = 2
MESSAGE = WIDTH * 8  # bytes: one sample of float64
FREE = Clock()


def run_virtually(schedule: str, p: int, m: int, chunks: int | None, costs: Costs, clock: Clock) -> Timeline:
    """Run one step of a small model on p rank-threads with declared costs; return what took place."""
    blocks = p * (chunks or 1)
    config = TrainConfig(
        model="mlp", pp=p, schedule=schedule, microbatches=m, chunks=chunks, layers=blocks, width=WIDTH, batch=m,
        optimizer="sgd", dtype="float64", device="cpu", steps=1,
    ).resolved(VERIFY_DEFAULTS)  # fmt: skip
    table = costs.table(blocks)

    data = load_data(config)

    def seconds(action: Action) -> float:
        k = virtual_stage(action, p)
        parts = {"F": ("forward",), "B": ("input", "weight"), "I": ("input",), "W": ("weight",)}
        return float(sum(table[part][k] for part in parts[action.kind]))

    def run() -> list[tuple[Action, float, float]]:
        comm = minipar.world()
        job = Job(config, comm, data)
        executor = job.strategy.executor  # type: ignore[attr-defined]
        executor.declare = seconds
        batch = next(iter(job.loader))
        comm.barrier()  # set-up has cost some virtual time, on some ranks more than on others
        began = comm.now()
        executor.run(batch.split(m), batch.count)
        return [(span.action, span.start - began, span.end - began) for span in executor.spans]

    stages = minipar.launch(run, p, timeout=60, clock=clock)
    return timeline([[Span(*span) for span in stage] for stage in stages])


def equal(measured: Timeline, predicted: Timeline) -> None:
    """Every action starts and ends when it was to, on every stage; and so the bubble is the predicted one."""
    assert measured.spans == predicted.spans
    assert measured.makespan == predicted.makespan and measured.peak_live == predicted.peak_live
    assert float(measured.bubble) == pytest.approx(float(predicted.bubble), rel=1e-15)


@pytest.mark.parametrize(
    "schedule, p, m, chunks",
    [("naive", 3, 4, None), ("gpipe", 4, 8, None), ("1f1b", 4, 8, None), ("1f1b", 32, 32, None),
     ("gpipe", 32, 4, None), ("interleaved", 4, 8, 2), ("interleaved", 8, 8, 2), ("zb-h1", 4, 8, None),
     ("zb-h1", 32, 32, None)],
)  # fmt: skip
def test_equals_simulator_and_formula(schedule: str, p: int, m: int, chunks: int | None) -> None:
    measured = run_virtually(schedule, p, m, chunks, Costs(), FREE)
    equal(measured, simulate(build_schedule(schedule, p, m, chunks)))
    work = Fraction(3 * m * (chunks or 1))
    assert 1 - work / Fraction(measured.makespan) == FORMULAS[schedule].bubble(p, m, chunks or 1)


# Binary fractions, so that sums of them are exact in floating point too.
ALPHA, BETA = 0.25, 1 / 64
UNEQUAL = dict(forward=1.5, input=1.25, weight=0.75)


@pytest.mark.parametrize(
    "schedule, p, m, chunks",
    [("naive", 3, 4, None), ("gpipe", 4, 8, None), ("1f1b", 4, 8, None), ("1f1b", 64, 8, None),
     ("interleaved", 4, 8, 2), ("interleaved", 16, 16, 2), ("zb-h1", 4, 8, None), ("zb-h1", 64, 6, None)],
)  # fmt: skip
def test_messages_take_alpha_and_beta(schedule: str, p: int, m: int, chunks: int | None) -> None:
    """Up to 64 ranks, with messages of alpha + beta n seconds and F, I and W that differ."""
    costs = Costs(**UNEQUAL, message=ALPHA + BETA * MESSAGE)  # type: ignore[arg-type]
    predicted = simulate(build_schedule(schedule, p, m, chunks), costs)
    free = simulate(build_schedule(schedule, p, m, chunks), Costs(**UNEQUAL))  # type: ignore[arg-type]
    assert predicted.makespan > free.makespan, "messages cost something here"
    equal(run_virtually(schedule, p, m, chunks, costs, Clock(ALPHA, BETA)), predicted)


def test_stages_that_cost_differently() -> None:
    costs = Costs(forward=[1.0, 3.0, 0.5], input=[2.0, 1.0, 0.25], weight=[0.5, 2.0, 1.0], message=ALPHA)
    for schedule in ("gpipe", "1f1b", "zb-h1"):
        equal(
            run_virtually(schedule, 3, 5, None, costs, Clock(ALPHA)),
            simulate(build_schedule(schedule, 3, 5), costs),
        )
