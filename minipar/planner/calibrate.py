"""Measure this machine: single operations, memory, messages and collectives, on all ranks at once.

    minipar calibrate --ranks 2 --out machine.json

`calibrate` runs on every rank of a communicator and returns the same machine on each. The collectives'
times are fitted by α + βn, the sum of squared relative errors being least; `machine.json` keeps the points and
the largest error of each fit.
"""

from __future__ import annotations

import functools
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
from minipar.config import TrainConfig
from minipar.planner.layout import PRECISIONS, Layout
from minipar.planner.machine import Link, Machine, Measured, Rate, Table
from minipar.planner.measure_ops import REPEATS, kinds, measure_bandwidth, measure_kind, measure_updates
from minipar.planner.shapes import Shape, shape_of
from minipar.planner.step_time import predict
from minipar.training import Job, load_data

SIZES = (8, 4096, 65_536, 524_288, 4_194_304)  # bytes of the whole vector
ROUNDS = 20  # of which the quickest counts: both ranks have to be undisturbed at the same moment
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send")

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
    """Return (bytes, seconds) of one operation on a communicator: the quickest repetition's slowest rank."""
    points: Points = []
    for size in sizes:
        n = max(size // 8, 1)
        whole, part = np.ones(n), np.ones(max(n // comm.size, 1))
        x = part if operation == "all_gather" else whole
        run: Callable[[Any], Any] = functools.partial(_ping_pong, comm)
        if operation != "send":
            run = getattr(comm, operation)
        count = 10 if size <= 65_536 else 2
        best = np.inf
        for _ in range(ROUNDS):
            comm.barrier()
            start = time.perf_counter()
            for _ in range(count):
                run(x)
            seconds = np.array([time.perf_counter() - start])
            best = min(best, float(comm.all_reduce(seconds, op="max")[0]) / count)
        moved = x.nbytes * (comm.size if operation == "all_gather" else 1)
        points.append((float(moved), best / (2 if operation == "send" else 1)))
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


def step_alone(comm: Communicator, config: TrainConfig) -> tuple[float, Shape]:
    """Return the seconds of a step that each rank trains by itself, all at once, and the model's shape.

    By the process' own clock, which counts the thread that makes batches and nothing of other programs.
    """
    alone = comm.split(comm.rank)
    assert alone is not None
    resolved = config.resolved()
    job = Job(resolved, alone, load_data(resolved))
    run = job.train()
    next(run)  # which makes the optimizer's state
    seconds = []
    for _ in run:
        seconds.append(time.process_time())
    step = float(np.median(np.diff(seconds)))
    shape = shape_of(config.model, job.model.config)  # type: ignore[attr-defined]
    return float(comm.all_reduce(np.array([step]))[0]) / comm.size, shape


def measure_steps(comm: Communicator, machine: Machine, dtype: str) -> tuple[float, dict[str, float]]:
    """Return what single operations do not tell: `Measured.step`, and `Measured.context` by model.

    A tiny MLP gives the seconds that belong to no operation. One small model of each kind then tells how much
    longer its operations take within a step.
    """

    def config(model: str, steps: int, **sizes: Any) -> TrainConfig:
        return TrainConfig(model=model, steps=steps, dtype=dtype, device="cpu", **sizes)

    batch = 16
    seconds, shape = step_alone(comm, config("mlp", 60, width=32, layers=2, batch=batch))
    fixed = max(0.0, seconds - predict(shape, machine, Layout(), batch, PRECISIONS[dtype]).seconds)
    references = {
        "mlp": (config("mlp", 30, width=256, layers=4, batch=256), 256),
        "convnet": (config("convnet", 14), 64),
        "gpt": (config("gpt", 8, batch=8), 8),
    }
    context = {}
    for model, (settings, batch) in references.items():
        seconds, shape = step_alone(comm, settings)
        expected = predict(shape, machine, Layout(), batch, PRECISIONS[dtype])
        context[model] = max(0.5, (seconds - fixed - expected.update) / expected.compute)
    return fixed, context


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
        for operation in OPERATIONS:
            if operation == "send" and ranks > 2:
                continue
            tell(f"{operation} on {ranks} ranks")
            points = measure_collective(group, operation) if group is not None else []
            points = comm.broadcast_object(points)
            alpha, beta, error = fit_line(points)
            fits.setdefault(operation, {})[ranks] = alpha, beta
            residuals.setdefault(operation, {})[ranks] = error
            samples.setdefault(operation, {})[ranks] = points
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
    fixed, context = measure_steps(comm, machine, dtype)
    assert machine.measured is not None
    return replace(machine, measured=replace(machine.measured, step=fixed, context=context))
