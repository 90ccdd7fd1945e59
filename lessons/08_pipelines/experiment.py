"""The bubble of GPipe on real ranks, beside the formula and the simulator.

    mpirun -n 4 python lessons/08_pipelines/experiment.py

An MLP of equal blocks is cut into one stage a rank and trained with more and more microbatches. For each number
the table shows what a step took, how much of the stages' time was idle, what the simulator predicts from the
actions' measured times, and what the formula says of equal ones. The picture is the measured timeline of one step.

With more ranks than cores the ranks take turns, and actions that overlap lengthen each other.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar import Tensor
from minipar.comm import Communicator
from minipar.data import Batch
from minipar.models import MLP, MLPConfig
from minipar.parallel.pipeline import FORMULAS, Costs, Span, Timeline, build_schedule, simulate, timeline
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.plot import gantt


def build(options: argparse.Namespace, stages: int) -> MLP:
    """Return the model: `options.blocks` blocks a stage, all of one size; the last of them is the head."""
    return MLP(MLPConfig(options.width, options.width, options.width, options.blocks * stages))


def batch_of(options: argparse.Namespace) -> Batch:
    """Return a global batch, the same on every rank."""
    rng, n = np.random.default_rng(0), options.batch
    inputs = rng.standard_normal((n, options.width)).astype("float32")
    return Batch(inputs, rng.integers(0, options.width, n), np.arange(n), 0, n, n)


def one_run(comm: Communicator, microbatches: int, options: argparse.Namespace) -> Timeline:
    """Return the measured timeline of the quickest of several steps; the same on every rank."""
    p, batch = comm.size, batch_of(options)
    model = build(options, p)
    ends = [len(model.blocks) * k // p for k in range(p + 1)]
    stage = Stage(model, comm, [range(a, b) for a, b in pairwise(ends)]).materialize(seed=0)
    executor = Executor(stage, model, comm, build_schedule("gpipe", p, microbatches))
    pieces, found = batch.split(microbatches), []
    for step in range(options.steps + 1):  # the first one warms up
        comm.mark(step=step)
        model.zero_grad()
        comm.barrier()
        executor.run(pieces, batch.count)
        every = comm.all_gather_object([(s.action, s.start, s.end) for s in executor.spans])
        begin = min(spans[0][1] for spans in every)  # all ranks of one machine share its clock
        if step:
            found.append(timeline([[Span(a, s - begin, e - begin) for a, s, e in spans] for spans in every]))
    return min(found, key=lambda t: t.makespan)


def serial_seconds(comm: Communicator, options: argparse.Namespace) -> float:
    """Return what one rank takes for a step of the whole model, the others waiting; the same on every rank."""
    seconds = 0.0
    if comm.rank == 0:
        model, batch = build(options, comm.size).materialize(seed=0), batch_of(options)
        times = []
        for _ in range(options.steps + 1):
            begin = comm.now()
            model.zero_grad()
            (model.loss(model(Tensor(batch.inputs)), batch.targets) / batch.count).backward()
            times.append(comm.now() - begin)
        seconds = min(times[1:])
    return float(comm.broadcast_object(seconds))


def predicted(found: Timeline) -> Timeline:
    """Return the simulated timeline, each stage's forward and backward taking their mean measured time."""
    mean = {
        kind: [
            float(np.mean([s.end - s.start for s in spans if s.action.kind == kind])) for spans in found.spans
        ]
        for kind in "FB"
    }
    p, m, _ = found.sizes
    return simulate(build_schedule("gpipe", p, m), Costs(mean["F"], mean["B"], 0))


def positive(text: str) -> int:
    """Return an option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def main() -> None:
    """Measure each number of microbatches and report on rank 0."""
    parser = argparse.ArgumentParser(description="GPipe's bubble, measured, simulated and by the formula.")
    parser.add_argument("--microbatches", type=positive, nargs="+", default=[1, 2, 4, 8, 16], metavar="M")
    parser.add_argument(
        "--steps", type=positive, default=3, help="steps of each, of which the quickest counts"
    )
    parser.add_argument("--width", type=positive, default=512, help="of every layer")
    parser.add_argument("--blocks", type=positive, default=2, help="layers a stage")
    parser.add_argument("--batch", type=positive, default=512, help="samples")
    parser.add_argument("--draw", type=positive, default=4, help="microbatches of the step in the picture")
    parser.add_argument("--out", type=Path, default=Path("08_pipelines.png"), help="the picture")
    options = parser.parse_args()
    comm = minipar.world()
    screen = Console(quiet=comm.rank > 0)
    if comm.size == 1:
        screen.print("One rank: a pipeline of one stage has no bubble. Start it with mpirun -n 2 or more.\n")
    alone = serial_seconds(comm, options)
    screen.print(
        f"{comm.size} stages, each {options.blocks} layers of width {options.width}; {options.batch} samples a step.\n"
        f"One rank alone takes {1e3 * alone:.1f} ms."
    )
    table = Table()
    for heading in ("microbatches", "ms a step", "speed-up", "bubble", "simulated", "formula"):
        table.add_column(heading, justify="right")
    for m in options.microbatches:
        found = one_run(comm, m, options)
        took, formula = float(found.makespan), FORMULAS["gpipe"].bubble(comm.size, m, 1)
        idle = f"{float(found.bubble):.1%}", f"{float(predicted(found).bubble):.1%}", f"{float(formula):.1%}"
        table.add_row(str(m), f"{1e3 * took:.1f}", f"{alone / took:.2f}", *idle)
    screen.print(table)
    drawn = one_run(comm, options.draw, options)
    if comm.rank == 0:
        title = f"GPipe on {comm.size} ranks, measured: bubble {float(drawn.bubble):.0%}"
        gantt(drawn, options.out, title=title, unit="s")
        screen.print(f"picture: {options.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # ranks that each start a thread a core wait for one another
        main()
