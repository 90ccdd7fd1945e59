"""Every way to lay a small model over the ranks: predicted by the planner from three numbers, then measured.

    mpirun -n 4 python lessons/12_choosing/experiment.py

The three numbers are the step of a rank that trains the whole batch by itself while the others do the same, which
gives its speed, and α and β of a message, from two all-reduces. The planner predicts each layout from these, and
each is run. All runs take turns, so that a machine that is slower for a while is slower for all. `minipar calibrate`
measures tables of operations instead, and takes longer. A single rank has one layout, with gradients accumulated over
more or fewer microbatches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import minipar
from minipar.comm import Communicator
from minipar.comm.launcher import available_cores
from minipar.config import TrainConfig
from minipar.mesh import factorings
from minipar.planner.explain import step_parts
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link, Machine, Rate
from minipar.planner.memory import Memory
from minipar.planner.plan import Candidate
from minipar.planner.run_layouts import config_of
from minipar.planner.shapes import Shape, shape_of
from minipar.planner.step_time import predict
from minipar.planner.traffic import traffic
from minipar.plot import plan_comparison
from minipar.training import Job, load_data

SMALL, LARGE = 64, 2**22  # bytes of the two all-reduces
NOTHING = Memory(0.0, 0.0, 0.0, 0.0)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="of the MLP's layers")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128, help="samples of the global batch")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each layout")
    parser.add_argument("--out", type=Path, default=Path("12_choosing.png"), help="the picture")
    return parser.parse_args()


def layouts(ranks: int) -> list[Layout]:
    """Return one layout for each way to divide the ranks, and ZeRO 1 beside plain data parallelism."""
    if ranks == 1:
        return [Layout(microbatches=m) for m in (1, 2, 4)]
    found = []
    for dp, pp, tp in factorings(ranks):
        piped: dict[str, Any] = dict(schedule="1f1b", microbatches=2 * pp) if pp > 1 else {}
        found.append(Layout(dp, pp, tp, **piped))
    whole = [Layout(dp=ranks, zero=1), Layout(pp=ranks, schedule="naive", microbatches=1)]
    return found + whole


def training(config: TrainConfig, comm: Communicator, steps: int) -> tuple[Job, Iterator[Any]]:
    """Return a job and its steps, of which the first, which makes the optimizer's state, is done."""
    job = Job(replace(config, steps=steps + 1).resolved(), comm, load_data(config.resolved()))
    run = job.train()
    next(run)
    return job, run


def measure(comm: Communicator, runs: list[Iterator[Any] | None], steps: int) -> tuple[list[float], list[float]]:
    """Return for each run the seconds of its quickest step, and the bytes sent in one, in ring form; they take turns.

    Of both the largest on any rank. Other programs only add time, so the quickest step is nearest to the truth. A
    rank whose run is None waits. The ledger is that of all communicators made from `comm`.
    """
    seconds, sent = np.zeros((steps, len(runs))), np.zeros(len(runs))
    for i in range(steps):
        for k, run in enumerate(runs):
            comm.barrier()
            comm.ledger.reset()
            start = time.perf_counter()
            if run is not None:
                next(run)
            seconds[i, k] = time.perf_counter() - start
            rows = [row for row in comm.ledger.rows() if row.elements]
            total = sum(float(row.ring_elements) * row.bytes / row.elements for row in rows)
            sent[k] = max(sent[k], total)  # an epoch's last batch is smaller
    slowest = np.min(comm.all_reduce(seconds, op="max"), axis=0)
    return slowest.tolist(), comm.all_reduce(sent, op="max").tolist()


def link(comm: Communicator) -> Link:
    """Return α and β such that the ring formula meets a small and a large all-reduce; nothing overlaps here."""
    n = comm.size
    if n == 1:
        return Link(0.0, 0.0, 0.0)
    times = []
    for n_bytes in (SMALL, LARGE):
        x, found = np.ones(n_bytes // 4, np.float32), []
        for _ in range(12):
            comm.barrier()
            start = time.perf_counter()
            comm.all_reduce(x)
            found.append(time.perf_counter() - start)
        times.append(float(np.min(comm.all_reduce(np.array(found), op="max"))))
    beta = max(0.0, (times[1] - times[0]) / (LARGE - SMALL) * n / (2 * (n - 1)))
    alpha = max(0.0, times[0] / (2 * (n - 1)) - beta * SMALL / n)
    return Link(alpha, beta, 0.0)


def machine_from(seconds: float, shape: Shape, batch: int, between: Link, ranks: int) -> Machine:
    """Return the machine on which the planner predicts just these seconds for a rank by itself."""
    machine = Machine("here", "this run", 2.0**40, 1e10, 1e-5, {"float32": Rate(1e10)}, ranks, between, between)
    slow, fast = (
        predict(shape, replace(machine, matmul={"float32": Rate(peak)}), Layout(), batch).seconds
        for peak in (1e9, 1e12)
    )
    products = (slow - fast) / (1 / 1e9 - 1 / 1e12)  # operations of all matrix products
    rest = slow - products / 1e9
    return replace(machine, matmul={"float32": Rate(products / max(seconds - rest, 0.1 * seconds))})


def show(
    shape: Shape, machine: Machine, chosen: list[Layout], seconds: list[float], sent: list[float],
    alone: tuple[float, float], args: argparse.Namespace, ranks: int,
) -> None:  # fmt: skip
    """Print predicted beside measured, and draw what the predicted steps are made of."""
    busy, serial = alone
    table = Table(title=f"MLP, {shape.parameters:,} parameters, batch {args.batch}, {ranks} rank{'s' * (ranks > 1)}")
    table.add_column("layout")
    for heading in ("predicted (ms)", "measured (ms)", "error", "speed-up", "to send (KiB)", "sent (KiB)"):
        table.add_column(heading, justify="right")
    steps = [predict(shape, machine, layout, args.batch) for layout in chosen]
    for layout, step, took, counted in zip(chosen, steps, seconds, sent):
        planned = sum(traffic(shape, layout, args.batch, PRECISIONS["float32"]).values())
        cells = [f"{1e3 * step.seconds:.1f}", f"{1e3 * took:.1f}", f"{100 * (step.seconds / took - 1):+.0f} %"]
        cells += [f"{serial / took:.2f}", f"{planned / 1024:.0f}", f"{counted / 1024:.0f}"]
        table.add_row(str(layout), *cells)
    Console(width=118).print(table)
    rate, node = machine.matmul["float32"], machine.node
    print(f"from: all ranks by themselves {1e3 * busy:.1f} ms, so {rate.peak / 1e9:.0f} GFLOP/s;", end=" ")
    print(f"α {1e6 * node.alpha:.0f} µs, 1/β {1e-9 / node.beta if node.beta else float('inf'):.2f} GB/s")
    planned_best, best = (min(range(len(chosen)), key=lambda k: list_[k]) for list_ in (
        [step.seconds for step in steps], seconds))  # fmt: skip
    print(f"the planner's choice: {chosen[planned_best]}; the fastest measured: {chosen[best]};", end=" ")
    print(f"the choice takes {seconds[planned_best] / seconds[best]:.2f} times as long")
    print(f"speed-up  over one rank that trains by itself while the others wait, {1e3 * serial:.1f} ms")
    print("sent      the most by any rank in a step: in the plan, and by the ledger with its small sums of losses")
    if ranks > available_cores():
        print(f"cores     {available_cores()} for {ranks} ranks: who waits leaves a core to others, so", end=" ")
        print("layouts that wait look better than they are,\n          and the planner, with a core a rank, errs")
    if ranks == 1:
        print("one rank has one layout; four have eight: mpirun -n 4 python lessons/12_choosing/experiment.py")
    parts = {str(x): step_parts(Candidate(x, step, NOTHING, {})) for x, step in zip(chosen, steps)}
    measured = {str(x): took for x, took in zip(chosen, seconds)}
    title = f"predicted (bars) and measured, {ranks} rank{'s' * (ranks > 1)}"
    plan_comparison(parts, args.out, measured=measured, title=title)
    print(f"picture: {args.out}")


def main() -> None:
    args, comm = options(), minipar.world()
    config = TrainConfig(model="mlp", width=args.width, layers=args.layers, batch=args.batch, device="cpu")
    alone = comm.split(comm.rank)
    assert alone is not None
    job, run = training(config, alone, args.steps)
    shape = shape_of("mlp", job.model.config)  # type: ignore[attr-defined]
    _, only = training(config, alone, args.steps)
    between, chosen = link(comm), layouts(comm.size)
    runs: list[Any] = [training(config_of(config, layout), comm, args.steps)[1] for layout in chosen]
    seconds, sent = measure(comm, [run, only if comm.rank == 0 else None, *runs], args.steps)
    if comm.rank == 0:
        machine = machine_from(seconds[0], shape, args.batch, between, comm.size)
        show(shape, machine, chosen, seconds[2:], sent[2:], (seconds[0], seconds[1]), args, comm.size)


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):  # the ranks themselves use the cores
        main()
