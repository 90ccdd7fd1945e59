"""Proof that a parallel run equals the serial one: every loss, every gradient, every weight, at every step.

Both jobs start from one seed and take SGD steps, since Adam would hide a gradient that is off by a factor.
Each rank runs the serial job beside its part of the parallel one and compares what it holds.

In mixed precision (`--amp`) the serial job takes over the parallel one's weights after every step, so that
each step is compared from the same weights. Left alone, differences of one rounding would grow: a ReLU that
opens for one more sample changes a small model's gradient by a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from minipar.agreement import agreed, on_every_rank
from minipar.backend import Array, to_host
from minipar.comm.interface import Communicator
from minipar.config import TrainConfig
from minipar.data import Data
from minipar.data.dataset import Dataset, targets_of
from minipar.errors import UsageError
from minipar.training import Job, fitting_axes, load_data

# Low precision: 16 units in the last place (2^-10 and 2^-7). A gradient is rounded once on its way through
# each layer, and sums that are split over ranks round differently; the worst measured was 5 units.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "fp16": 16 * 2.0**-10, "bf16": 16 * 2.0**-7}
LOSS_SCALE = 2.0**10  # fixed in a verification: an adapted one may take different steps in the two runs
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
        replicas_differ: parameters of which two ranks held copies that were not bitwise equal, counted anew at
            each step.
        layout: how the parallel run's ranks worked together, in words.
    """

    tolerance: float
    worst: dict[str, Worst] = field(default_factory=lambda: {kind: Worst() for kind in KINDS})
    replicas_differ: int = 0
    layout: str = ""

    @property
    def holds(self) -> bool:
        """Whether something of every kind was compared, all within tolerance, and replicas are equal."""
        equal = all(w.compared and w.error <= self.tolerance for w in self.worst.values())
        return equal and not self.replicas_differ


def relative_error(ours: Array, part: Array, whole: Array, scale: float) -> float:
    """Return max|a - b| / max(max|b|, 1e-3 · scale) of one tensor.

    Args:
        ours: what this rank holds.
        part: the same part of the serial tensor; `whole`: all of it, to whose size errors are relative.
        scale: the model's largest gradient. The floor keeps tensors that are zero but for rounding (an
            attention key's bias has a gradient of exactly zero) from being judged by their noise.
    """
    if ours.shape != part.shape:
        return float("inf")
    if not ours.size:
        return 0.0
    return float(np.abs(ours - part).max()) / max(float(np.abs(whole).max()), 1e-3 * scale, 1e-300)


class Fewer:
    """The first samples of a data set, so that a short run crosses an epoch with its unequal last batch."""

    def __init__(self, dataset: Dataset, length: int):
        self.dataset, self.length = dataset, min(length, len(dataset))

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Array, dtype: Any = None) -> tuple[Array, Array]:
        return self.dataset.fetch(indices, dtype)

    def targets(self, indices: Array) -> Array:
        return targets_of(self.dataset, indices)


def verify(config: TrainConfig, comm: Communicator, data: Data | None = None) -> Report:
    """Run the job serially and in parallel and return the comparison, the same on every rank.

    Raises:
        UsageError: a setting under which the two are not meant to be equal.
    """
    _check(config)
    fitting_axes(config, comm.size)
    full = agreed(comm, lambda: load_data(config) if data is None else data)
    if config.amp == "fp16":
        config = replace(config, loss_scale=config.loss_scale or LOSS_SCALE)
    assert config.batch is not None and config.steps is not None
    short = Fewer(full.train, config.batch * max(config.steps // 2, 1) + config.batch // 2 + 1)
    shared = Data(short, full.valid, full.info, full.vocabulary)
    with comm.scope():
        return _run_both(config, comm, shared)


def _run_both(config: TrainConfig, comm: Communicator, data: Data) -> Report:
    """Train serially on every rank, and on all ranks together; compare each step."""
    assert config.steps is not None
    alone = comm.split(comm.rank)
    assert alone is not None
    serial = Job(_serial(config), alone, data)
    parallel = Job(config, comm, data)
    report = Report(TOLERANCE[str(config.dtype) if config.amp == "off" else config.amp], layout=parallel.layout())
    if parallel.strategy.own_mean:
        del report.worst["gradient"]  # local SGD's ranks never hold the global one
    for step, (a, b) in enumerate(
        zip(parallel.loader.steps(config.steps), serial.loader.steps(config.steps)), 1
    ):
        _compare_step(report, comm, parallel, serial, a, b, step)
    _agree(report, comm)
    return report


def _check(config: TrainConfig) -> None:
    """Refuse, on every rank, settings under which a parallel run is not meant to equal the serial one."""
    reason = _why_unequal(config)
    if reason is not None:
        raise on_every_rank(UsageError(reason))


def _why_unequal(config: TrainConfig) -> str | None:
    """Return why the two are not meant to be equal; None where they are."""
    local = config.aggregation == "local"
    if config.optimizer != "sgd":
        return (
            f"verify compares under --optimizer sgd: {config.optimizer} hides a gradient off by a factor"
        )
    if config.amp != "off" and config.convolution == "input":
        return (
            f"verify: the sums of --convolution input round differently in {config.amp} than serial ones, and a"
            " ReLU behind them may open for other pixels; verify this cut without --amp, or another cut"
        )
    if local and (config.average_every or 1) > 1:
        return (
            "verify: averaging parameters every few steps is not serial training; use --average-every 1"
        )
    if local and config.momentum:
        return (
            "verify: local SGD keeps each rank's own momentum, serial training has one; use --momentum 0"
        )
    if local and config.clip:
        return (
            "verify: local SGD clips each rank's own gradient, which is not serial clipping; use --clip 0"
        )
    return None


def _serial(config: TrainConfig) -> TrainConfig:
    return replace(
        config, dp=None, tp=1, pp=1, schedule=None, microbatches=None, chunks=None, tiles=None, recompute=False,
        sequence_parallel=False, convolution=None, zero=0, partition=None,
        devices=None,
        speeds=None, memory=None, aggregation="all_reduce", average_every=None, accumulate=1, overlap=None,
    )  # fmt: skip


def _compare_step(
    report: Report, comm: Communicator, parallel: Job, serial: Job, batch: Any, whole: Any, step: int
) -> None:
    place = f"step {step}, rank {comm.rank}"
    comm.mark(step=step, phase="verify")
    loss, expected = parallel.forward_backward(batch), serial.forward_backward(whole)
    report.worst["loss"].see(abs(loss - expected) / max(abs(expected), 1e-300), place)
    theirs = serial.strategy.held("grad")
    scale = max((float(np.abs(g).max()) for g in theirs.values() if g.size), default=0.0)
    if "gradient" in report.worst:
        ours = parallel.strategy.held("grad")
        _compare(report, "gradient", comm, parallel, ours, theirs, scale, place)
    parallel.update(batch)
    serial.update(whole)
    state = parallel.strategy.held("data")
    buffers = {name: to_host(b.data) for name, b in parallel.model.named_buffers()}
    expected_state = serial.strategy.held("data") | {
        n: to_host(b.data) for n, b in serial.model.named_buffers()
    }
    scale /= serial.precision.scaler.get_scale()  # gradients were compared with the loss scale in them
    _compare(report, "weight", comm, parallel, state | buffers, expected_state, scale, place)
    report.replicas_differ += _differing_replicas(comm, parallel, state | buffers)
    if serial.config.amp != "off":
        whole_state = parallel.strategy.state()  # complete on rank 0
        serial.model.load_state_dict(comm.all_gather_object(whole_state if comm.rank == 0 else None)[0])


def _compare(
    report: Report,
    kind: str,
    comm: Communicator,
    parallel: Job,
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    scale: float,
    place: str,
) -> None:
    """Compare what this rank holds with its part of the serial arrays; every array must be on some rank."""
    layouts = {name: p.layout for name, p in parallel.model.named_parameters() if p.layout is not None}
    for name in ours.keys() & theirs.keys():
        part = layouts[name].local(theirs[name]) if name in layouts else theirs[name]
        report.worst[kind].see(relative_error(ours[name], part, theirs[name], scale), f"{name}, {place}")
    for name in set().union(*comm.all_gather_object(list(ours))) ^ theirs.keys():
        report.worst[kind].see(float("inf"), f"{name} has a {kind} on one side only, {place}")


def _differing_replicas(comm: Communicator, parallel: Job, state: Mapping[str, Array]) -> int:
    """Return how many parameters have two copies, on any two ranks, that are not bitwise equal."""
    parts = {name: _part(p) for name, p in parallel.model.named_parameters()}
    mine = {(name, parts.get(name)): blake2b(np.ascontiguousarray(a)).digest() for name, a in state.items()}  # type: ignore[arg-type]
    first: dict[Any, bytes] = {}
    differ = set()
    for digests in comm.all_gather_object(mine):
        for key, digest in digests.items():
            if first.setdefault(key, digest) != digest:
                differ.add(key)
    return len(differ)


def _part(p: Any) -> str | None:
    """Name the part of a parameter that this rank holds; ranks with the same part hold copies."""
    if p.layout is None:
        return None
    return str(p.layout.placement.intervals(p.global_shape, p.layout.axis.size)[p.layout.axis.rank])


def _agree(report: Report, comm: Communicator) -> None:
    """Make the report of every rank the one of all ranks."""
    everyone: list[Report] = comm.all_gather_object(report)
    for kind in report.worst:
        merged = max((r.worst[kind] for r in everyone), key=lambda w: w.error)
        compared = sum(r.worst[kind].compared for r in everyone)
        report.worst[kind] = Worst(merged.error, merged.where, compared)
    report.replicas_differ = max(r.replicas_differ for r in everyone)
