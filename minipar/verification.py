"""Proof that a parallel run equals the serial one: every loss, every gradient, every weight, at every step.

Both jobs start from one seed and take SGD steps, since Adam would hide a gradient that is off by a factor.
Each rank runs the serial job beside its part of the parallel one and compares what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minipar.agreement import agreed
from minipar.backend import Array, to_host
from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.data import Data
from minipar.data.dataset import Dataset
from minipar.errors import UsageError
from minipar.training import Job, load_data

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
KINDS = ("loss", "gradient", "weight")


@dataclass
class Worst:
    """The largest relative error seen of one kind, and where it was."""

    error: float = 0.0
    where: str = "-"
    compared: int = 0

    def see(self, error: float, where: str) -> None:
        """Take note of one comparison; NaN counts as infinitely wrong."""
        self.compared += 1
        error = error if error == error else float("inf")
        if error > self.error:
            self.error, self.where = error, where


@dataclass
class Report:
    """What a verification found.

    Attributes:
        worst: by kind; only the kinds that this verification compares.
        tolerance: largest relative error allowed.
        replicas_differ: elements of weights that were not bitwise equal on all ranks, summed over steps.
    """

    tolerance: float
    worst: dict[str, Worst] = field(default_factory=lambda: {kind: Worst() for kind in KINDS})
    replicas_differ: int = 0

    @property
    def holds(self) -> bool:
        """Whether something of every kind was compared, all within tolerance, and replicas are equal."""
        equal = all(w.compared and w.error <= self.tolerance for w in self.worst.values())
        return equal and not self.replicas_differ


def relative_errors(parallel: Mapping[str, Array], serial: Mapping[str, Array], scale: float) -> Iterable[tuple[str, float]]:
    """Yield (name, max|a - b| / max(max|b|, 1e-3 · scale)) of each tensor.

    Args:
        scale: the model's largest gradient. The floor keeps tensors that are zero but for rounding (an
            attention key's bias has a gradient of exactly zero) from being judged by their noise.
    """
    for name in parallel.keys() & serial.keys():
        a, b = parallel[name], serial[name]
        if a.shape != b.shape:
            yield name, float("inf")
        elif a.size:
            yield name, float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-3 * scale, 1e-300)


class Fewer:
    """The first samples of a data set, so that a short run crosses an epoch with its unequal last batch."""

    def __init__(self, dataset: Dataset, length: int):
        self.dataset, self.length = dataset, min(length, len(dataset))

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Array, dtype: Any = None) -> tuple[Array, Array]:
        return self.dataset.fetch(indices, dtype)


def _gradients(job: Job) -> dict[str, Array]:
    return {name: to_host(p.grad) for name, p in job.model.named_parameters() if p.grad is not None}


def _state(job: Job) -> dict[str, Array]:
    """Weights, and what else the model learns: running statistics."""
    return {name: to_host(t.data) for name, t in [*job.model.named_parameters(), *job.model.named_buffers()]}


def verify(config: TrainConfig, comm: Communicator, data: Data | None = None) -> Report:
    """Run the job serially and in parallel and return the comparison, the same on every rank.

    Raises:
        UsageError: a setting under which the two are not meant to be equal.
    """
    full = agreed(comm, lambda: _prepare(config, data))
    assert config.batch is not None and config.steps is not None
    short = Fewer(full.train, config.batch * max(config.steps // 2, 1) + config.batch // 2 + 1)
    shared = Data(short, full.valid, full.info, full.vocabulary)
    alone = comm.split(comm.rank)
    assert alone is not None
    serial = Job(_serial(config), alone, shared)
    parallel = Job(config, comm, shared)
    report = Report(TOLERANCE[config.dtype])
    if parallel.local:
        del report.worst["gradient"]  # local SGD's ranks never hold the global one
    for step, (a, b) in enumerate(zip(parallel.loader.steps(config.steps), serial.loader.steps(config.steps)), 1):
        _compare_step(report, comm, parallel, serial, a, b, step)
    _agree(report, comm)
    return report


def _prepare(config: TrainConfig, data: Data | None) -> Data:
    """Refuse settings under which a parallel run is not meant to equal the serial one; return the data."""
    local = config.aggregation == "local"
    if config.optimizer != "sgd":
        raise UsageError(f"verify compares under --optimizer sgd: {config.optimizer} hides a gradient off by a factor")
    if local and (config.average_every or 1) > 1:
        raise UsageError("verify: averaging parameters every few steps is not serial training; use --average-every 1")
    if local and config.momentum:
        raise UsageError("verify: local SGD keeps each rank's own momentum, which serial training has not; use --momentum 0")
    if local and config.clip:
        raise UsageError("verify: local SGD clips each rank's own gradient, which is not serial clipping; use --clip 0")
    return load_data(config) if data is None else data


def _serial(config: TrainConfig) -> TrainConfig:
    return replace(config, dp=None, aggregation="all_reduce", average_every=None, accumulate=1, overlap=None)


def _compare_step(
    report: Report, comm: Communicator, parallel: Job, serial: Job, batch: Any, whole: Any, step: int
) -> None:
    place = f"step {step}, rank {comm.rank}"
    comm.mark(step=step, phase="verify")
    loss, expected = parallel.forward_backward(batch), serial.forward_backward(whole)
    report.worst["loss"].see(abs(loss - expected) / max(abs(expected), 1e-300), place)
    theirs = _gradients(serial)
    scale = max((float(np.abs(g).max()) for g in theirs.values() if g.size), default=0.0)
    if parallel.local is None:
        ours = _gradients(parallel)
        holds_gradients = comm.rank == 0 or parallel.config.aggregation == "all_reduce"
        for name in theirs.keys() ^ ours.keys() if holds_gradients else ():
            report.worst["gradient"].see(float("inf"), f"{name} has a gradient on one side only, {place}")
        for name, error in relative_errors(ours, theirs, scale):
            report.worst["gradient"].see(error, f"{name}, {place}")
    parallel.update(batch)
    serial.update(whole)
    state = _state(parallel)
    for name, error in relative_errors(state, _state(serial), scale):
        report.worst["weight"].see(error, f"{name}, {place}")
    for value in state.values():
        low, high = comm.all_reduce(value, op="min"), comm.all_reduce(value, op="max")
        report.replicas_differ += int((low != high).sum())


def _agree(report: Report, comm: Communicator) -> None:
    """Make the report of every rank the one of all ranks."""
    everyone: list[Report] = comm.all_gather_object(report)
    for kind in report.worst:
        merged = max((r.worst[kind] for r in everyone), key=lambda w: w.error)
        compared = sum(r.worst[kind].compared for r in everyone)
        report.worst[kind] = Worst(merged.error, merged.where, compared)
    report.replicas_differ = max(r.replicas_differ for r in everyone)
