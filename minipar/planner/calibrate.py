"""Measure this machine: single operations, memory, messages and collectives, on all ranks at once.

    minipar calibrate --ranks 2 --out machine.json

`calibrate` runs on every rank of a communicator and returns the same machine on each. The collectives'
times are fitted by α + βn, the sum of squared relative errors being least; `machine.json` keeps the points and
the largest error of each fit.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from minipar.backend import float_dtype, keep_freed_memory
from minipar.comm.interface import Communicator
from minipar.planner.collectives import SYMMETRIC
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link, Machine, Measured, Rate, Table
from minipar.planner.measure_ops import (
    REPEATS,
    SPREAD,
    kinds,
    measure_bandwidth,
    measure_kind,
    measure_updates,
)
from minipar.planner.reference import SIZES as MODELS
from minipar.planner.reference import (
    TINY,
    Alone,
    Steps,
    agreed_median,
    reference_config,
    steps_in,
    timed_steps,
)
from minipar.planner.step_time import predict

SIZES = (8, 4096, 65_536, 524_288, 4_194_304)  # bytes of the whole vector
BUILDS, TURNS, TURN = 3, 4, 0.2  # of the jobs that take whole steps: how often made anew; seconds of a turn
ROUNDS = 20  # of a collective
OPERATIONS = ("all_reduce", SYMMETRIC, "reduce_scatter", "all_gather", "broadcast", "send")

Points = list[tuple[float, float]]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return (α, β, largest relative error) of seconds = α + β·bytes, both zero or more.

    Least squares of the relative errors, so that small messages count as much as large ones.
    """
    n, seconds = np.array(points, dtype=float).T
    (alpha, beta), _ = nnls(np.stack([1 / seconds, n / seconds], axis=1), np.ones_like(seconds))
    error = float(np.max(np.abs((alpha + beta * n) / seconds - 1)))
    return float(alpha), float(beta), error


def measure_collective(comm: Communicator, operation: str, sizes: Sequence[int] = SIZES) -> Points:
    """Return (bytes, seconds) of one operation on a communicator: the median round's slowest rank.

    Each repetition takes other arrays, as training does: what one left in the caches is of no use to the next.
    """
    points: Points = []
    for size in sizes:
        n = max(size // (8 * (comm.size if operation == "all_gather" else 1)), 1)
        make: Callable[[], Any] = functools.partial(np.ones, n)
        if operation == "send":
            run: Callable[[Any], Any] = functools.partial(_ping_pong, comm)
        elif operation == SYMMETRIC:
            make, run = functools.partial(comm.symmetric, n, np.float64), comm.all_reduce_
        else:
            run = getattr(comm, operation)
        arrays = itertools.cycle([make() for _ in range(min(10, max(2, SPREAD // size)))])
        count = 10 if size <= 65_536 else 4
        seconds = []
        for _ in range(ROUNDS):
            comm.barrier()
            start = time.perf_counter()
            for _ in range(count):
                run(next(arrays))
            slowest = comm.all_reduce(np.array([time.perf_counter() - start]), op="max")
            seconds.append(float(slowest[0]) / count)
        moved = 8 * n * (comm.size if operation == "all_gather" else 1)
        points.append((float(moved), float(np.median(seconds)) / (2 if operation == "send" else 1)))
    return points


def _ping_pong(comm: Communicator, x: Any) -> None:
    """Rank 0 sends to rank 1, which sends back."""
    if comm.rank == 0:
        comm.send(x, 1)
        comm.recv_(x, 1)
    elif comm.rank == 1:
        comm.recv_(x, 0)
        comm.send(x, 0)


def measure_overlap(comm: Communicator) -> float:
    """Return the part of a large all-reduce that takes place while the ranks compute: 0 to 1."""
    a = np.ones((256, 256), np.float32)
    x = np.ones(2**19)
    compute, alone, both = np.inf, np.inf, np.inf

    def products(work: Any = None) -> None:
        for _ in range(30):
            _ = a @ a
            if work is not None:
                work.done()  # as backward does: some engines move messages only while they are called

    for _ in range(REPEATS):
        comm.barrier()
        start = time.perf_counter()
        products()
        compute = min(compute, time.perf_counter() - start)
        comm.barrier()
        start = time.perf_counter()
        comm.all_reduce_async(x).wait()
        alone = min(alone, time.perf_counter() - start)
        comm.barrier()
        start = time.perf_counter()
        work = comm.all_reduce_async(x)
        products(work)
        work.wait()
        both = min(both, time.perf_counter() - start)
    hidden = (compute + alone - both) / alone
    return float(np.clip(comm.all_reduce(np.array([hidden]))[0] / comm.size, 0.0, 1.0))


def measure_steps(comm: Communicator, machine: Machine, dtype: str) -> Measured:
    """Return the machine's measurements with what single operations do not tell: step, context, reference.

    A tiny MLP gives the seconds that belong to no operation. One small model of each kind then tells how much
    longer its operations take within a step. They take turns, so that all see the same machine, and are made
    anew several times: where a job's arrays happen to lie in memory changes its speed by some 5 %. Collective.
    """
    measured = machine.measured
    assert measured is not None
    models = list(MODELS)
    configs = [
        replace(reference_config("mlp", dtype), **TINY),
        *(reference_config(model, dtype) for model in models),
    ]
    steps: list[Steps] = [[] for _ in configs]
    for _ in range(BUILDS):
        jobs = [Alone(comm, config) for config in configs]
        counts = [steps_in(comm, job.run, TURN) for job in jobs]
        for _ in range(TURNS):
            for job, count, mine in zip(jobs, counts, steps):
                mine += timed_steps(comm, job.run, count)
        for job in jobs:
            job.run.close()
    tiny, *seconds = [agreed_median(comm, mine)[0] for mine in steps]
    precision = PRECISIONS[dtype]
    fixed = max(
        0.0, tiny - predict(jobs[0].shape, machine, Layout(), configs[0].batch or 0, precision).seconds
    )
    context = {}
    for model, config, job, found in zip(models, configs[1:], jobs[1:], seconds):
        expected = predict(job.shape, machine, Layout(), config.batch or 0, precision)
        context[model] = max(0.5, (found - fixed - expected.update) / expected.compute)
    return replace(measured, step=fixed, context=context, reference=dict(zip(models, seconds)))


def calibrate(
    comm: Communicator, dtype: str = "float32", say: Callable[[str], None] = lambda text: None
) -> Machine:
    """Measure this machine on the ranks of `comm`; a few tens of seconds. Collective.

    Args:
        dtype: of the operations.
        say: called with what is measured next, on rank 0.
    """
    keep_freed_memory()
    tell = say if comm.rank == 0 else (lambda text: None)
    ops: dict[str, Table] = {}
    for name, kind in kinds(float_dtype(dtype)).items():
        tell(f"operation {name}")
        ops[name] = measure_kind(kind, comm)
    tell("optimizer and memory")
    ops |= measure_updates(comm, float_dtype(dtype))
    bandwidth = measure_bandwidth(comm)
    fits: dict[str, dict[int, tuple[float, float]]] = {}
    residuals: dict[str, dict[int, float]] = {}
    samples: dict[str, dict[int, Points]] = {}
    overlap = 0.0
    counts = [n for n in (2, 4, 8, 16, 32, 64) if n < comm.size]
    for ranks in [*counts, comm.size] if comm.size > 1 else []:
        group = comm.split(0 if comm.rank < ranks else None)
        absent = {"send"} if ranks > 2 else set()
        absent |= set() if comm.has_symmetric_memory else {SYMMETRIC}
        for operation in OPERATIONS:
            if operation in absent:
                continue
            tell(f"{operation} on {ranks} ranks")
            points = measure_collective(group, operation) if group is not None else []
            points = comm.broadcast_object(points)
            alpha, beta, error = fit_line(points)
            fits.setdefault(operation, {})[ranks] = alpha, beta
            residuals.setdefault(operation, {})[ranks] = error
            samples.setdefault(operation, {})[ranks] = points
        if group is not None:
            group.free()
        if ranks == comm.size:
            tell("overlap")
            overlap = measure_overlap(comm)
    alpha, beta = fits.get("send", {}).get(2, (0.0, 0.0))
    link = Link(alpha, beta, overlap)
    table = ops["linear"]
    sizes, times = np.meshgrid(*table.axes, indexing="ij"), np.array(table.forward)
    peak = float(np.max(2 * sizes[0] * sizes[1] * sizes[2] / times))
    machine = Machine(
        name=platform.node() or "this machine",
        source=f"minipar calibrate on {comm.size} ranks, {dtype}, {platform.processor() or platform.machine()}",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / comm.size,
        bandwidth=bandwidth, overhead=float(np.min(ops["add"].forward)), matmul={dtype: Rate(peak)},
        node_ranks=comm.size, node=link, cluster=link,
        measured=Measured(comm.size, dtype, ops, fits, residuals, samples),
    )  # fmt: skip
    tell("whole training steps")
    return replace(machine, measured=measure_steps(comm, machine, dtype))
