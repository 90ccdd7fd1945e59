"""Every schedule on real ranks: the bubble as measured, beside the one that the simulator predicts.

    mpirun -n 4 python lessons/09_schedules/experiment.py

Each rank holds a stage of a small GPT. The simulator is given what F, B, I and W took on each stage in this very
run, so what is left between its bubble and the measured one is messages, and ranks that wait for a core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar.comm import Communicator
from minipar.comm.launcher import available_cores
from minipar.data import Batch
from minipar.errors import UsageError
from minipar.models import GPT, GPTConfig
from minipar.parallel.pipeline import FORMULAS, Costs, Span, Timeline, build_schedule, simulate, timeline
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.plot import new_figure
from minipar.timeline import KIND_COLOURS, KIND_NAMES

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", type=int, help="pieces of the batch [default: 4 a rank]")
    parser.add_argument("--samples", type=int, default=2, help="sequences in a microbatch")
    parser.add_argument("--width", type=int, default=128, help="channels of the GPT")
    parser.add_argument("--blocks", type=int, default=1, help="transformer blocks of each half of a stage")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each schedule")
    parser.add_argument("--out", type=Path, default=Path("09_schedules.png"), help="the picture")
    return parser.parse_args()


def run(comm: Communicator, name: str, chunks: int, args: argparse.Namespace) -> tuple[list[list[Span]], int]:
    """Run the schedule some times; return this rank's spans of each step, and its most live activations."""
    p, m = comm.size, args.microbatches
    config = GPTConfig(vocab=64, seq_len=64, width=args.width, layers=2 * p * args.blocks, heads=4)
    model, last = GPT(config), 2 * p * args.blocks + 1
    # Blocks 0 and `last` are embedding and head; every virtual stage gets as many of those between.
    inner = [1 + k * (last - 1) // (p * chunks) for k in range(p * chunks + 1)]
    bounds = [0, *inner[1:-1], last + 1]
    stage = Stage(model, comm, [range(a, b) for a, b in pairwise(bounds)]).materialize(seed=0)
    executor = Executor(stage, model, comm, build_schedule(name, p, m, chunks))
    ids = np.random.default_rng(0).integers(0, 64, (m * args.samples, 65))
    batch = Batch(ids[:, :-1], ids[:, 1:], np.arange(len(ids)), 0, len(ids), ids[:, 1:].size)
    steps = []
    for step in range(args.steps + 1):
        comm.barrier()
        begin = comm.now()
        executor.run(batch.split(m), batch.count)
        if step:  # the first one warms up
            steps.append([Span(s.action, s.start - begin, s.end - begin) for s in executor.spans])
        for q in stage.parameters():
            q.grad = None
    return steps, executor.peak_live


def costs_of(steps: list[Timeline], chunks: int) -> Costs:
    """Return what each kind of work took on each virtual stage, medians in seconds; B counts as I alone."""
    p = steps[0].sizes.stages
    found: dict[str, list[float]] = {}
    for kind in "FBIW":
        for k in range(p * chunks):
            took = [
                span.end - span.start
                for t in steps
                for span in t.spans[k % p]
                if span.action.kind == kind and span.action.chunk == k // p
            ]
            found.setdefault(kind, []).append(float(statistics.median(took)) if took else 0.0)
    back = [b + i for b, i in zip(found["B"], found["I"])]
    return Costs(found["F"], back, found["W"])


def draw(timelines: dict[str, Timeline], path: Path) -> None:
    """Draw one measured step of each schedule on a common time axis; save the picture."""
    figure = new_figure(10.0, 1.0 + sum(0.35 + 0.3 * t.sizes.stages for t in timelines.values()))
    rows = figure.subplots(len(timelines), 1, sharex=True)
    for axes, (name, t) in zip(rows, timelines.items()):
        for s, spans in enumerate(t.spans):
            for a, start, end in spans:
                bar = [(1000 * float(start), 1000 * float(end - start))]
                axes.broken_barh(bar, (s - 0.4, 0.8), facecolor=KIND_COLOURS[a.kind], edgecolor="white", linewidth=0.4)
        axes.set_ylim(t.sizes.stages - 0.5, -0.5)
        axes.set_yticks(range(t.sizes.stages), [f"stage {s}" for s in range(t.sizes.stages)])
        axes.set_title(f"{name}: bubble {100 * float(t.bubble):.0f} %", loc="left", fontsize=10)
        axes.spines[:].set_visible(False)
    rows[-1].set_xlabel("time (ms)")
    key = [Patch(color=KIND_COLOURS[kind], label=KIND_NAMES[kind]) for kind in KIND_COLOURS]
    figure.legend(handles=key, frameon=False, ncols=len(key), loc="outside lower center")
    figure.savefig(path, dpi=150)


def main() -> None:
    args, comm = options(), minipar.world()
    if comm.size == 1:
        print("A pipeline needs two ranks or more: mpirun -n 4 python lessons/09_schedules/experiment.py")
        sys.exit(2)
    args.microbatches = args.microbatches or 4 * comm.size
    if args.microbatches % comm.size:
        raise UsageError(f"--microbatches {args.microbatches}: interleaved needs a multiple of the {comm.size} ranks")
    table = Table(title=f"{comm.size} stages, {args.microbatches} microbatches of {args.samples} sequences")
    for heading in ("schedule", "step (ms)", "bubble", "predicted", "formula", "live by stage"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    drawn = {}
    for name, chunks in SCHEDULES:
        mine, live = run(comm, name, chunks, args)
        everyone = comm.all_gather_object((mine, live))
        if comm.rank == 0:
            steps = [timeline([spans[i] for spans, _ in everyone]) for i in range(args.steps)]
            median = sorted(steps, key=lambda t: t.makespan)[len(steps) // 2]
            schedule = build_schedule(name, comm.size, args.microbatches, chunks)
            predicted = simulate(schedule, costs_of(steps, chunks)).bubble
            formula = FORMULAS[name].bubble(comm.size, args.microbatches, chunks)
            shares = [f"{100 * float(x):.0f} %" for x in (median.bubble, predicted, formula)]
            counts = " ".join(str(n) for _, n in everyone)
            table.add_row(name, f"{1000 * float(median.makespan):.0f}", *shares, counts)
            drawn[name] = median
    if comm.rank == 0:
        Console().print(table)
        print("bubble     measured, of the median step")
        print("predicted  simulated with what F, B, I and W took in this run")
        print("formula    all stages equal, F = I = W, messages free")
        print("live       activations at once; interleaved counts those of its chunks, which are half a stage")
        if comm.size > available_cores():
            print(f"{comm.size} ranks share {available_cores()} cores: actions take as long as they wait for one, too")
        draw(drawn, args.out)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # the ranks themselves use the cores
        main()
