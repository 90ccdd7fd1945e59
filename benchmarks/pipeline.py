"""A pipeline of two stages on two MPI ranks, measured against the simulator's prediction from measured costs.

    python benchmarks/pipeline.py                      # 1F1B, GPipe and ZB-H1 with 8 microbatches
    python benchmarks/pipeline.py --width 512 --out .  # writes pipeline_1f1b.png and the others there

What each stage's F, B, I and W cost is measured on that stage alone: the same executor carries out the same list
of actions, but with a stub in place of its neighbours, which has every message ready. Both ranks do that at the
same time, since they share the machine's memory in the pipeline too. What a message costs is measured by
sending one to and fro. From these numbers the simulator predicts the step, and the pipeline is then run and
looked at: costs and runs take turns, and the turn with the median error is shown. The blocks are spread over
the stages by a profile of them. One BLAS thread a rank, float32, clocks of one machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import minipar
from minipar.backend import keep_freed_memory
from minipar.comm.interface import Communicator
from minipar.comm.launch import ranks_in_environment
from minipar.comm.launcher import run_mpi
from minipar.commands.report import console
from minipar.data import Batch
from minipar.models import GPT, GPTConfig
from minipar.parallel.partition.policies import by_cost, items_of
from minipar.parallel.partition.profile import agreed_costs
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.simulator import Costs, Span, Timeline, simulate, timeline
from minipar.parallel.pipeline.stage import Stage
from minipar.plot import gantt
from minipar.timeline import legend, timeline_text

VOCABULARY, TOKENS, HEADS = 96, 128, 4
SCHEDULES = ("1f1b", "gpipe", "zb-h1")
STAGES = 2


class Ready:
    """A receive whose message is there, or a send that has left."""

    def __init__(self, array: Any = None):
        self.array = array

    def wait(self) -> Any:
        return self.array

    def done(self) -> bool:
        return True


class NoNeighbours:
    """In place of a pipeline's communicator: every array is there as soon as it is asked for, and none leaves."""

    def __init__(self, pp: Communicator, shape: tuple[int, ...]):
        self.rank, self.size = pp.rank, pp.size
        self.array = np.random.default_rng(pp.rank).standard_normal(shape).astype(np.float32)

    def irecv(self, source: int, tag: int, shape: Any = None, dtype: Any = None) -> Ready:
        return Ready(self.array.copy())

    def isend(self, array: Any, dest: int, tag: int) -> Ready:
        return Ready()

    def mark(self, **where: Any) -> None: ...

    def now(self) -> float:
        return time.monotonic()


@dataclass
class Measured:
    """The repeats of one schedule: predictions, runs, and how many microbatches were held."""

    costs: list[dict[str, list[float]]] = field(default_factory=list)  # kind: seconds by stage
    runs: list[list[list[Span]]] = field(default_factory=list)  # spans by stage
    peak: list[int] = field(default_factory=list)


def costs_alone(executor: Executor, pieces: list[Batch], count: int, pp: Communicator) -> dict[str, list[float]]:
    """Return the mean seconds of each kind of action, by stage, from a run without neighbours.

    The mean, because a step is made of sums: what disturbs one action in ten here does so in the pipeline, too.
    """
    pp.barrier()
    executor.run(pieces, count)
    seconds: dict[str, list[float]] = {}
    for span in executor.spans:
        seconds.setdefault(span.action.kind, []).append(span.end - span.start)
    means = {kind: statistics.fmean(times) for kind, times in seconds.items()}
    stages = pp.all_gather_object(means)
    return {kind: [stage[kind] for stage in stages] for kind in means}


def run_once(executor: Executor, pieces: list[Batch], count: int, pp: Communicator) -> list[list[Span]]:
    """Run the pipeline once; return every stage's spans, in seconds since all were ready to begin."""
    pp.barrier()
    began = max(pp.all_gather_object(time.monotonic()))
    executor.run(pieces, count)
    mine = [Span(span.action, span.start - began, span.end - began) for span in executor.spans]
    stages: list[list[Span]] = pp.all_gather_object(mine)
    return stages


def message_seconds(pp: Communicator, shape: tuple[int, ...], repeats: int = 20) -> float:
    """Return how long an activation takes from one rank to the other: half of the median round trip."""
    array, times = np.zeros(shape, np.float32), []
    for _ in range(repeats):
        pp.barrier()
        start = time.monotonic()
        if pp.rank == 0:
            pp.send(array, 1)
            pp.recv(1)
        elif pp.rank == 1:
            pp.send(pp.recv(0), 0)
        times.append((time.monotonic() - start) / 2)
    median: float = pp.broadcast_object(statistics.median(times))
    return median


def predicted_from(costs: dict[str, list[float]], message: float, m: int, name: str) -> Timeline:
    """Return the simulator's timeline at measured costs."""
    whole = "B" in costs  # a full backward is one action, of which W is no part of its own
    prices = Costs(
        forward=costs["F"], input=costs["B" if whole else "I"], weight=0 if whole else costs["W"], message=message
    )
    return simulate(build_schedule(name, len(costs["F"]), m), prices)


def benchmark(options: argparse.Namespace) -> int:
    """Measure on this MPI job's ranks; rank 0 prints. Returns the exit code."""
    keep_freed_memory()
    pp, m = minipar.world(checks=False), options.microbatches
    model = GPT(GPTConfig(VOCABULARY, TOKENS, options.width, options.layers, HEADS))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, TOKENS + 1))
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.arange(len(ids)), 0, len(ids), len(ids) * TOKENS)
    pieces = batch.split(m)
    profile = agreed_costs(model, pieces[0].inputs, pp)
    cuts = by_cost(items_of(model), pp.size, profile).stages
    assert cuts is not None
    stage = Stage(model, pp, cuts).materialize(seed=0)
    shape = (options.batch // m, TOKENS, options.width)
    alone: Any = NoNeighbours(pp, shape)
    found = {name: Measured() for name in options.schedules}
    message = message_seconds(pp, shape)
    for repeat in range(options.repeats + 1):
        for name, measured in found.items():
            schedule = build_schedule(name, pp.size, m)
            costs = costs_alone(Executor(stage, model, alone, schedule), pieces, batch.count, pp)
            executor = Executor(stage, model, pp, schedule)
            run = run_once(executor, pieces, batch.count, pp)
            model.zero_grad()
            if repeat:  # the first of each warms up
                measured.costs.append(costs)
                measured.runs.append(run)
                measured.peak = pp.all_gather_object(executor.peak_live)
    if pp.rank:
        return 0
    names = " | ".join(f"{cut.start}–{cut.stop - 1}" for cut in cuts)
    seconds = ", ".join(f"{1000 * sum(profile[k] for k in cut):.1f} ms" for cut in cuts)
    print(f"GPT of {options.layers} blocks, width {options.width}, {TOKENS} tokens; batch {options.batch} in {m}")
    print(f"microbatches; blocks by profile: {names} ({seconds} each microbatch)")
    print(f"message of {4 * np.prod(shape) // 1024} KiB: {1000 * message:.2f} ms\n")
    within = [report(name, measured, message, m, options) for name, measured in found.items()]
    print(f"{sum(within)} passed, {len(within) - sum(within)} failed")
    return 0 if all(within) else 1


def report(name: str, measured: Measured, message: float, m: int, options: argparse.Namespace) -> bool:
    """Print what was measured beside what was predicted, draw both; return whether the error is within 10 %."""
    turns = [
        (predicted_from(costs, message, m, name), timeline(run), costs)
        for costs, run in zip(measured.costs, measured.runs)
    ]
    # Each run against the costs of its own turn: a machine that is slower for a while is slower in both.
    turns.sort(key=lambda turn: float(turn[1].makespan) / float(turn[0].makespan))
    predicted, real, costs = turns[len(turns) // 2]
    error = float(real.makespan) / float(predicted.makespan) - 1
    bound = [FORMULAS[name].live(s, STAGES, m, 1) for s in range(STAGES)]
    screen = console()
    screen.print(f"[bold]{name}[/]")
    prices = "; ".join(f"{k} {', '.join(f'{1000 * s:.1f}' for s in seconds)}" for k, seconds in costs.items())
    screen.print(f"alone, ms by stage: {prices}")
    table = Table(box=None, pad_edge=False)
    for heading in ("", "step", "bubble", "live by stage"):
        table.add_column(heading, justify="left" if not heading else "right")
    for what, line in (("predicted", predicted), ("measured", real)):
        live = predicted.peak_live if line is predicted else measured.peak
        table.add_row(
            what, f"{1000 * float(line.makespan):.1f} ms", f"{100 * float(line.bubble):.1f} %",
            ", ".join(map(str, live)),
        )  # fmt: skip
    screen.print(table)
    low, high = (100 * (float(turns[i][1].makespan) / float(turns[i][0].makespan) - 1) for i in (0, -1))
    screen.print(f"error {100 * error:+.1f} %, the median of {len(turns)} turns: {low:+.1f} to {high:+.1f} %")
    for what, line in (("predicted", predicted), ("measured", real)):
        screen.print(f"\n{what} (seconds)")
        screen.print(timeline_text(line, screen.width))
        if options.out is not None:
            title = f"{name}, {what}: {1000 * float(line.makespan):.1f} ms, bubble {100 * float(line.bubble):.1f} %"
            gantt(line, options.out / f"pipeline_{name}_{what}.png", title=title, unit="s")
    screen.print(legend({span.action.kind for spans in real.spans for span in spans}))
    fits = all(live <= most for live, most in zip(measured.peak, bound))
    if not fits:
        screen.print(f"more live microbatches than {bound}")
    screen.print()
    return abs(error) <= 0.1 and fits


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--batch", type=int, default=16, help="samples in all, a multiple of the microbatches")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--out", type=Path, help="directory for the pictures")
    options = parser.parse_args(words)
    if options.batch % options.microbatches:
        parser.error(f"{options.microbatches} microbatches do not divide a batch of {options.batch}")
    if ranks_in_environment() is None:
        return run_mpi([sys.executable, __file__, *words], STAGES, timeout=600)
    if minipar.world().size != STAGES:
        parser.error(f"it runs on {STAGES} ranks, not {minipar.world().size}")
    return benchmark(options)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
