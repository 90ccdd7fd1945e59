"""An assignment: which device holds which parameter, or which slice of it, as plain data.

This is what a partition policy (`partition`) returns: look at it with `print`, `table()` or
`plot.partition_bars`, and train with it through `LayerParallel` (where it has stages) or `ShardedByPolicy`.
An assignment in which some element is held twice, or not at all, cannot be made.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from minipar.backend import Array
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.nn import Module

KINDS = ("convolution", "linear", "embedding", "norm", "other")


@dataclass(frozen=True)
class Device:
    """A place for parameters.

    Attributes:
        name: for tables and messages.
        speed: work in unit time, relative to the other devices.
        memory_bytes: how many bytes of parameters it can hold; None is no limit.
    """

    name: str
    speed: float = 1.0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Item:
    """One parameter, as a policy sees it.

    Attributes:
        name: its path in the model.
        kind: the layer it belongs to, one of `KINDS`.
        shape: its shape in the serial model.
        bytes: its size.
        cost: the work it stands for, in any unit.
        blocks: numbers of the model's blocks that use it, ascending; a tied weight has several.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    cost: float
    blocks: tuple[int, ...] = (0,)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A contiguous piece of one parameter, or all of it, on one device.

    Attributes:
        item: the parameter.
        device: number of the device that holds the piece.
        start: the piece is start … stop (exclusive) along `axis`,
        stop: or of the elements in memory order where `axis` is None.
        axis: the axis that is cut.
    """

    item: Item
    device: int
    start: int
    stop: int
    axis: int | None = None

    @property
    def extent(self) -> int:
        """The length of what is cut."""
        return self.item.size if self.axis is None else self.item.shape[self.axis]

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole parameter."""
        return self.stop - self.start == self.extent

    @property
    def elements(self) -> int:
        return self.item.size // max(self.extent, 1) * (self.stop - self.start)

    @property
    def bytes(self) -> int:
        return self.item.bytes * self.elements // max(self.item.size, 1)

    @property
    def cost(self) -> float:
        """The parameter's cost, in proportion to the elements."""
        return self.item.cost * self.elements / max(self.item.size, 1)

    def __str__(self) -> str:
        """Return "all", elements as "Flat(3:17)", or a slice as "[:, 3:5]"."""
        if self.is_whole:
            return "all"
        run = f"{self.start}:{self.stop}"
        return f"Flat({run})" if self.axis is None else f"[{':, ' * self.axis}{run}]"

    def of(self, array: Array) -> Array:
        """Return this piece of the whole parameter's (C-contiguous) array, as a view."""
        if self.axis is None:
            return array.reshape(-1)[self.start : self.stop]
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True)
class Assignment:
    """Every element of a parameter set on exactly one device.

    Attributes:
        policy: the name of the policy that made it.
        items: the parameters, in the model's order.
        devices: the devices; one rank each.
        parts: the pieces, in the order of `items`.
        stages: the blocks that each device runs, or None where the policy does not go by blocks.
        stage_costs: the cost of each stage where there are stages.

    Raises:
        UsageError: an element that no device holds, or more than one; a device that does not exist.
    """

    policy: str
    items: tuple[Item, ...]
    devices: tuple[Device, ...]
    parts: tuple[Part, ...]
    stages: tuple[range, ...] | None = None
    stage_costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        pieces: dict[str, list[Part]] = {item.name: [] for item in self.items}
        for part in self.parts:
            if part.item.name not in pieces or not 0 <= part.device < len(self.devices):
                raise UsageError(
                    f"assignment by {self.policy}: {part.item.name} on device {part.device}: there is no such"
                    f" parameter or device (devices: {len(self.devices)})"
                )
            pieces[part.item.name].append(part)
        for item in self.items:
            _check_covered(self.policy, item, sorted(pieces[item.name], key=lambda part: part.start))

    def held(self, device: int) -> list[Part]:
        """Return what `device` holds, in the model's order."""
        return [part for part in self.parts if part.device == device]

    def elements(self, device: int) -> int:
        """Return how many elements `device` holds."""
        return sum(part.elements for part in self.held(device))

    def bytes(self, device: int) -> int:
        """Return how many bytes of parameters `device` holds, copies of tied weights not counted."""
        return sum(part.bytes for part in self.held(device))

    def copies(self, device: int) -> list[Item]:
        """Return the tied weights that `device` uses in its stage while another device owns them."""
        if self.stages is None:
            return []
        mine, owned = self.stages[device], {part.item.name for part in self.held(device)}
        return [item for item in self.items if item.name not in owned and any(b in mine for b in item.blocks)]

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Return the stages whose blocks use the parameter, the owner's first; () where there are no stages."""
        blocks = next(item.blocks for item in self.items if item.name == name)
        return tuple(k for k, stage in enumerate(self.stages or ()) if any(b in stage for b in blocks))

    def cost(self, device: int) -> float:
        """Return the cost of what `device` holds or, where there are stages, runs."""
        if self.stages is not None:
            return self.stage_costs[device]
        return sum(part.cost for part in self.held(device))

    def bars(self) -> list[dict[str, int]]:
        """Return for each device its bytes by kind of layer: the bars of a picture."""
        bars = [dict.fromkeys(KINDS, 0) for _ in self.devices]
        for part in self.parts:
            bars[part.device][part.item.kind] += part.bytes
        return bars

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's rows: device, parameters, elements, bytes, share of cost."""
        total = sum(map(self.cost, range(len(self.devices)))) or 1.0
        rows: list[tuple[str, ...]] = []
        for d, device in enumerate(self.devices):
            held = self.held(d)
            whole = sum(part.is_whole for part in held)
            what = [f"{whole} whole"] * (whole > 0) + [f"{len(held) - whole} in part"] * (len(held) > whole)
            if self.stages is not None:
                first, last = self.stages[d].start, self.stages[d].stop - 1
                what.insert(0, f"block {first}" if first == last else f"blocks {first}-{last}")
            what += [f"copy of {item.name}" for item in self.copies(d)]
            copied = sum(item.bytes for item in self.copies(d))
            size = f"{self.bytes(d):,}" + (f" + {copied:,} copied" if copied else "")
            name = device.name if device.speed == 1.0 else f"{device.name}, speed {device.speed:g}"
            share = f"{self.cost(d) / total:.1%}"
            rows.append((name, ", ".join(what) or "nothing", f"{self.elements(d):,}", size, share))
        return rows

    def table(self) -> Table:
        """Return the table: one row a device."""
        table = Table(title=f"{len(self.items)} parameters by {self.policy}", title_justify="left")
        for heading in ("device", "parameters", "elements", "bytes", "share of cost"):
            table.add_column(heading, justify="left" if heading in ("device", "parameters") else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def check(self, model: Module, comm: Communicator) -> None:
        """Raise UsageError, the same on every rank, unless this fits the model and the ranks.

        The ranks compare what they hold: an assignment by measured costs must come from one measurement.
        """
        if len(self.devices) != comm.size:
            raise UsageError(
                f"assignment by {self.policy} is for {len(self.devices)} devices, there are {comm.size} ranks"
            )
        own = {name: p.global_shape for name, p in model.named_parameters()}
        theirs = {item.name: item.shape for item in self.items}
        differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            raise UsageError(
                f"assignment by {self.policy} is for another model: {name} is {theirs.get(name, 'missing')}"
                f" there, {own.get(name, 'missing')} in this one"
            )
        digest = hashlib.sha256(repr((self.parts, self.stages)).encode()).hexdigest()
        if len(set(comm.all_gather_object(digest))) > 1:
            raise UsageError(
                f"assignment by {self.policy} differs between ranks: make it on one rank and broadcast it,"
                " or measure its costs with agreed_costs"
            )


def _check_covered(policy: str, item: Item, parts: list[Part]) -> None:
    """Raise unless `parts`, ascending, cover the item end to end along one axis."""
    if len({part.axis for part in parts}) > 1:
        raise UsageError(f"assignment by {policy}: {item.name} is cut along more than one axis")
    at, extent = 0, parts[0].extent if parts else item.size
    for start, stop in [*((part.start, part.stop) for part in parts), (extent, extent)]:
        if start != at:
            fault = f"{start} … {at} is held twice" if start < at else f"{at} … {start} is held by no device"
            along = "elements" if not parts or parts[0].axis is None else f"axis {parts[0].axis}"
            raise UsageError(f"assignment by {policy}: {item.name} {item.shape}, {along} {fault}")
        at = stop
