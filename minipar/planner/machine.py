"""A machine in numbers: how fast a rank computes, and how fast ranks reach each other. Read and written as JSON.

    machine = read_machine("machine.json")       # what `minipar calibrate` wrote
    machine = preset("a100-80gb")                # or a data sheet's

Seconds, bytes, and operations a second throughout; β is seconds a byte, the inverse of a bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from minipar.errors import DataError, UsageError
from minipar.planner.machine_checks import impossible_values, missing_keys

FORMAT = "minipar machine 1"


@dataclass(frozen=True)
class Link:
    """One level of the network: α seconds a message, β seconds a byte.

    Attributes:
        overlap: the part of a transfer that takes place while the ranks compute, if they let it: 1 where a
            network card does the work, 0 where the computing core itself copies the bytes.
    """

    alpha: float
    beta: float
    overlap: float = 1.0


@dataclass(frozen=True)
class Rate:
    """How fast matrix products are: peak · efficiency operations a second once they are large.

    Attributes:
        tile: sizes are rounded up to a multiple of this, as blocks of a product are computed whole.
        ramp: starting and ending a tile costs as much as this many steps of the inner size k.
    """

    peak: float
    efficiency: float = 1.0
    tile: int = 1
    ramp: float = 0.0


@dataclass(frozen=True)
class Table:
    """Measured seconds of one kind of operation over a grid of sizes; forward, and backward as a whole.

    Between the points it is interpolated, and above them continued, linearly in the logarithms. Below the
    smallest size it stays what it is there: starting an operation costs as much for one element as for ten.
    """

    axes: tuple[tuple[float, ...], ...]
    forward: Any  # nested lists of seconds, one level an axis
    backward: Any

    def paced(self, factor: float) -> Table:
        """Return the same table with all seconds times `factor`."""
        forward, backward = (factor * np.asarray(x, dtype=float) for x in (self.forward, self.backward))
        return Table(self.axes, forward.tolist(), backward.tolist())

    def seconds(self, size: tuple[float, ...], work: str) -> float:
        """Return the seconds of "forward" or "backward" at this size."""
        values = np.log(np.asarray(self.forward if work == "forward" else self.backward, dtype=float))
        return float(np.exp(_interpolate(self.axes, values, size)))


def _interpolate(axes: tuple[tuple[float, ...], ...], values: Any, size: tuple[float, ...]) -> Any:
    """Interpolate in what follows the first axis, at the two points of it around `size[0]`, then between them."""
    if not axes:
        return values
    points = np.log(axes[0])
    x = float(np.log(max(size[0], 1e-9)))
    if len(points) == 1:
        return _interpolate(axes[1:], values[0], size[1:])
    i = min(max(int(np.searchsorted(points, x)) - 1, 0), len(points) - 2)
    weight = (x - points[i]) / (points[i + 1] - points[i])
    below, above = (_interpolate(axes[1:], values[j], size[1:]) for j in (i, i + 1))
    return below + max(weight, 0.0) * (above - below)


@dataclass(frozen=True)
class Measured:
    """What `minipar calibrate` measured with so many ranks busy at once.

    Attributes:
        ranks: how many worked at the same time.
        dtype: of all operations.
        ops: seconds by kind of operation.
        fits: {operation: {ranks: (α, β)}} of whole collectives: seconds = α + β·bytes. "send" is a message.
        residuals: {operation: {ranks: largest relative error of the fit}}.
        samples: {operation: {ranks: [(bytes, seconds)]}}: what was fitted.
        step: seconds of every training step that belong to no operation (batches, records, Python).
        context: by model, how much longer its operations take one after another in a step than each by itself,
            with its own data still in the caches.
        reference: by model, seconds of its reference step (`planner.reference`): the pace of that hour.
    """

    ranks: int
    dtype: str
    ops: Mapping[str, Table]
    fits: Mapping[str, Mapping[int, tuple[float, float]]]
    residuals: Mapping[str, Mapping[int, float]]
    samples: Mapping[str, Mapping[int, list[tuple[float, float]]]]
    step: float = 0.0
    context: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)

    def paced(self, factor: float) -> Measured:
        """Return these measurements with all seconds times `factor`."""
        return replace(
            self, ops={kind: table.paced(factor) for kind, table in self.ops.items()}, step=factor * self.step,
            fits={o: {n: (factor * a, factor * b) for n, (a, b) in rows.items()} for o, rows in self.fits.items()},
            samples={
                o: {n: [(size, factor * s) for size, s in points] for n, points in rows.items()}
                for o, rows in self.samples.items()
            },
            reference={model: factor * seconds for model, seconds in self.reference.items()},
        )  # fmt: skip

    def collective(self, operation: str, n_bytes: float, ranks: int) -> float | None:
        """Return the seconds of a collective on this many ranks; None if it was not measured.

        Between the measured sizes they are interpolated, linearly in the logarithms. Above the largest they grow in
        proportion to the bytes, and below the smallest they stay. The fit α + βn has no part in it: over five orders
        of magnitude it is a good picture and a poor clock, since caches end within them.
        """
        points = self.samples.get(operation, {}).get(ranks)
        if not points:
            return None
        if n_bytes > points[-1][0]:
            return points[-1][1] * n_bytes / points[-1][0]
        sizes, seconds = zip(*points)
        return float(np.exp(np.interp(np.log(max(n_bytes, 1.0)), np.log(sizes), np.log(seconds))))


@dataclass(frozen=True)
class Machine:
    """A machine of equal ranks, `node_ranks` to a node.

    Attributes:
        source: where the numbers come from.
        memory: bytes of one rank.
        bandwidth: bytes a second that a rank reads and writes in its memory.
        overhead: seconds to start one operation.
        matmul: rates of matrix products by precision: float16, float32, float64.
        node, cluster: links inside a node and between nodes.
        measured: tables that replace these formulas, where this machine was measured.
        wire: an injected network (`minipar run --latency …`) that every message passes on top of that.
    """

    name: str
    source: str
    memory: float
    bandwidth: float
    overhead: float
    matmul: Mapping[str, Rate]
    node_ranks: int
    node: Link
    cluster: Link
    measured: Measured | None = None
    wire: Link | None = None

    def rate(self, precision: str) -> Rate:
        """Return the rate of matrix products in a precision.

        Raises:
            UsageError: the machine's description has none.
        """
        if precision not in self.matmul:
            known = ", ".join(self.matmul)
            raise UsageError(f"machine {self.name} has no rate for {precision}; it has {known}")
        return self.matmul[precision]

    def paced(self, factor: float) -> Machine:
        """Return this machine in an hour in which all that it does takes `factor` times as long.

        An imitated network's wire keeps its time: that is no work of the machine's.
        """
        node, cluster = (
            replace(link, alpha=factor * link.alpha, beta=factor * link.beta) for link in (self.node, self.cluster)
        )
        rates = {name: replace(rate, peak=rate.peak / factor) for name, rate in self.matmul.items()}
        measured = None if self.measured is None else self.measured.paced(factor)
        return replace(
            self, bandwidth=self.bandwidth / factor, overhead=self.overhead * factor, matmul=rates,
            node=node, cluster=cluster, measured=measured,
        )  # fmt: skip

    def slowed(self, alpha: float, beta: float) -> Machine:
        """Return this machine behind a network of α seconds a message and β seconds a byte.

        That of `minipar run --latency … --bandwidth …`: what was measured is what the copying itself costs,
        and stays; the wire comes on top, and what is on the wire costs no core any time.
        """
        return replace(self, wire=Link(alpha, beta, 1.0))


def write_machine(machine: Machine, path: Path) -> None:
    """Write a machine as JSON.

    Raises:
        DataError: the file cannot be written.
    """
    known = {key: value for key, value in asdict(machine).items() if key != "wire"}
    try:
        path.write_text(json.dumps({"format": FORMAT, **known}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def read_machine(path: Path) -> Machine:
    """Read a machine that `write_machine` wrote, or that was written by hand.

    Raises:
        UsageError: there is no such file.
        DataError: no JSON, another format, keys that are missing or values that cannot be; all of them are named.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"machine file {path} cannot be read: {error.strerror}; write one with minipar calibrate"
        ) from None
    except ValueError as error:
        raise DataError(f"machine file {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"machine file {path} holds a {type(found).__name__}, it must be an object")
    if found.get("format", FORMAT) != FORMAT:
        raise DataError(
            f"machine file {path} is of format {found['format']!r}, this minipar reads {FORMAT!r}; write the file anew"
            " with minipar calibrate"
        )
    missing = missing_keys(found, tuple(f.name for f in fields(Measured)))
    if missing:
        keys = ", ".join(missing)
        raise DataError(f"machine file {path} lacks {keys}; add them, or write the file anew with minipar calibrate")
    try:
        machine = _machine(found)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"machine file {path}: {error}; write the file anew with minipar calibrate") from None
    if bad := impossible_values(machine):
        raise DataError(f"machine file {path}: {', '.join(bad)} cannot be; give positive numbers")
    return machine


def _machine(found: dict[str, Any]) -> Machine:
    measured = found.get("measured")
    return Machine(
        name=str(found["name"]), source=str(found.get("source", "")), memory=float(found["memory"]),
        bandwidth=float(found["bandwidth"]), overhead=float(found["overhead"]),
        matmul={name: Rate(**rate) for name, rate in found["matmul"].items()},
        node_ranks=int(found["node_ranks"]), node=Link(**found["node"]), cluster=Link(**found["cluster"]),
        measured=None if measured is None else _measured(measured),
    )  # fmt: skip


def _measured(found: dict[str, Any]) -> Measured:
    def by_ranks(table: Any, value: Any) -> dict[str, dict[int, Any]]:
        return {op: {int(n): value(v) for n, v in rows.items()} for op, rows in table.items()}

    ops = {
        kind: Table(tuple(tuple(axis) for axis in table["axes"]), table["forward"], table["backward"])
        for kind, table in found["ops"].items()
    }
    return Measured(
        int(found["ranks"]), str(found["dtype"]), ops,
        by_ranks(found["fits"], lambda v: (float(v[0]), float(v[1]))), by_ranks(found["residuals"], float),
        by_ranks(found["samples"], lambda rows: [(float(n), float(s)) for n, s in rows]), float(found["step"]),
        {model: float(x) for model, x in found["context"].items()},
        {model: float(x) for model, x in found["reference"].items()},
    )  # fmt: skip
