"""Partition policies: plain functions that lay a model's parameters over devices and return an `Assignment`.

    items = items_of(model)
    print(by_bytes(items, 3))           # a table: what each device holds, and its share

    policy      what it places                 what it balances
    kind        convolutions and norms whole,  one rule for each kind of layer (`KIND_RULES`)
                linears and embeddings cut
    bytes       whole parameters               bytes, greedily
    count       runs of elements               number of elements, exactly
    cost        whole blocks, in order         time of the slowest stage, exactly
    devices     whole blocks, in order         the same, for devices of unequal speed and memory

The first three scatter parameters, `ShardedByPolicy` trains with them; the last two make stages, which
`LayerParallel` runs. A device may be left with nothing by the first three. A stage without a block would do
nothing but pass its input on, so the last two refuse more devices than blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from minipar.backend import float_dtype
from minipar.data import share
from minipar.errors import UsageError
from minipar.models import Model
from minipar.nn import BatchNorm2d, Conv2d, Embedding, GroupNorm, LayerNorm, Linear, Module, RMSNorm
from minipar.parallel.partition.assignment import Assignment, Device, Item, Part
from minipar.parallel.partition.stage_split import split_stages

POLICIES = ("kind", "bytes", "count", "cost", "devices")

LAYERS: dict[str, tuple[type[Module], ...]] = {
    "convolution": (Conv2d,),
    "linear": (Linear,),
    "embedding": (Embedding,),
    "norm": (LayerNorm, RMSNorm, GroupNorm, BatchNorm2d),
}

WHOLE = None
# Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks": convolutions hold a
# twentieth of AlexNet's parameters and do nine tenths of its work, so cutting them gains no memory; linear
# layers are the other way round and are cut. The axis that is cut, or WHOLE:
KIND_RULES: dict[str, int | None] = {
    "convolution": WHOLE,  # (O, C, kh, kw)
    "linear": 0,  # weight (out, in) and bias (out,): by output features
    "embedding": 1,  # (vocabulary, width): by embedding dimension; 0 cuts the vocabulary
    "norm": WHOLE,
    "other": WHOLE,
}


def items_of(model: Model, dtype: str = "float32") -> list[Item]:
    """Return the model's parameters, a tied one once, in the model's order.

    Cost is the number of elements for each block that uses them: the multiply-adds of a linear layer for one
    row. A convolution uses its weights once a pixel, so give measured costs where these matter.

    Args:
        dtype: that of parameters which have no values yet.

    Raises:
        UsageError: a parameter that is in no block.
    """
    uses: dict[int, tuple[int, ...]] = {}
    for i, block in enumerate(model.blocks):
        for p in block.parameters():
            uses[id(p)] = (*uses.get(id(p), ()), i)
    kinds = {id(v): _kind(module) for _, module in model.named_modules() for v in vars(module).values()}
    items = []
    for name, p in model.named_parameters():
        if id(p) not in uses:
            raise UsageError(f"parameter {name} is in none of the model's blocks, so no policy can place it")
        size = math.prod(p.global_shape)
        itemsize = p.dtype.itemsize if p.is_materialized else float_dtype(dtype).itemsize
        cost = float(size * len(uses[id(p)]))
        items.append(Item(name, kinds[id(p)], p.global_shape, size * itemsize, cost, uses[id(p)]))
    return items


def _kind(module: Module) -> str:
    return next((kind for kind, types in LAYERS.items() if isinstance(module, types)), "other")


def by_kind(items: Sequence[Item], devices: int, rules: Mapping[str, int | None] = KIND_RULES) -> Assignment:
    """Place each parameter by the rule of its kind: cut evenly along an axis, or whole.

    Cut ones go first, device d getting the d-th of `devices` runs whose lengths differ by one at most; whole
    ones then fill up whoever holds fewest bytes, as in `by_bytes`.

    Args:
        rules: the axis to cut by kind, or WHOLE.

    Raises:
        UsageError: a kind without a rule, or an axis that a parameter does not have.
    """
    _check(items, devices)
    parts: list[Part] = []
    whole: list[Item] = []
    for item in items:
        if item.kind not in rules:
            raise UsageError(f"by_kind: {item.name} is of kind {item.kind!r}, for which there is no rule")
        axis = rules[item.kind]
        if axis is WHOLE:
            whole.append(item)
            continue
        if not 0 <= axis < len(item.shape):
            raise UsageError(f"by_kind: {item.name} {item.shape} has no axis {axis} to cut")
        cuts = [share(item.shape[axis], d, devices) for d in range(devices)]
        parts += [Part(item, d, c.start, c.stop, axis) for d, c in enumerate(cuts) if c.start < c.stop]
    loads = [sum(part.bytes for part in parts if part.device == d) for d in range(devices)]
    parts += _largest_first(whole, loads)
    return _assignment("kind", items, devices, parts)


def by_bytes(items: Sequence[Item], devices: int) -> Assignment:
    """Place whole parameters, the largest first, each on the device that holds fewest bytes so far.

    Graham 1969, "Bounds on multiprocessing timing anomalies": the fullest device holds at most
    4/3 − 1/(3·devices) times what it would in the best placement (which is NP-hard to find).
    """
    _check(items, devices)
    return _assignment("bytes", items, devices, _largest_first(items, [0] * devices))


def _largest_first(items: Sequence[Item], loads: list[int]) -> list[Part]:
    """Return each item whole on the least loaded device at its turn; `loads` grows."""
    parts = []
    for item in sorted(items, key=lambda item: -item.bytes):  # stable: equal ones in the model's order
        device = loads.index(min(loads))
        loads[device] += item.bytes
        parts.append(Part(item, device, 0, item.size))
    return parts


def by_count(items: Sequence[Item], devices: int) -> Assignment:
    """Give every device the same number of elements, within one.

    The parameters are laid end to end and the line is cut into equal runs, wherever that falls (Rajbhandari
    et al. 2020, ZeRO, section 5): perfect balance, at the price of pieces that are no tensor's natural part.
    """
    _check(items, devices)
    cuts = [share(sum(item.size for item in items), d, devices) for d in range(devices)]
    parts = []
    offset = 0
    for item in items:
        for d, cut in enumerate(cuts):
            start, stop = max(cut.start - offset, 0), min(cut.stop - offset, item.size)
            if start < stop:
                parts.append(Part(item, d, start, stop))
        offset += item.size
    return _assignment("count", items, devices, parts)


def block_costs(items: Sequence[Item]) -> list[float]:
    """Return the cost of each block: the sum of its items', a tied item's shared among its blocks."""
    costs = [0.0] * (1 + max((b for item in items for b in item.blocks), default=-1))
    for item in items:
        for b in item.blocks:
            costs[b] += item.cost / len(item.blocks)
    return costs


def by_cost(items: Sequence[Item], devices: int, costs: Sequence[float] | None = None) -> Assignment:
    """Cut the row of blocks into one stage per device so that the costliest stage is as cheap as can be.

    Args:
        costs: of every block of the model, for example `agreed_costs`; by default `block_costs(items)`.

    Raises:
        UsageError: more devices than blocks, or costs that are no costs.
    """
    _check(items, devices)
    return _staged("cost", items, [Device(str(d)) for d in range(devices)], costs)


def by_devices(
    items: Sequence[Item], devices: int | Sequence[Device], costs: Sequence[float] | None = None
) -> Assignment:
    """Cut the row of blocks into one stage per device, in their order, so that the slowest stage is fastest.

    The time of a stage is its cost by its device's speed, so a slow device gets less. A device's parameters,
    copies of tied weights included, must fit its memory.

    Args:
        devices: their number, all alike; or the devices themselves (see `parse_devices`).
        costs: as in `by_cost`.

    Raises:
        UsageError: more devices than blocks, no split that fits the memory, or costs that are no costs.
    """
    _check(items, devices if isinstance(devices, int) else len(devices))
    chosen = [Device(str(d)) for d in range(devices)] if isinstance(devices, int) else list(devices)
    return _staged("devices", items, chosen, costs)


def assign(
    policy: str,
    items: Sequence[Item],
    devices: int | Sequence[Device],
    costs: Sequence[float] | None = None,
) -> Assignment:
    """Return the assignment of the policy of that name, one of `POLICIES`.

    Args:
        devices: their number; or, for "devices" only, the devices.
        costs: seconds per block, for "cost" and "devices" only.
    """
    if policy not in POLICIES:
        raise UsageError(f"partition policy {policy!r} is unknown: use one of {', '.join(POLICIES)}")
    if policy == "devices":
        return by_devices(items, devices, costs)
    if not isinstance(devices, int):
        raise UsageError(f"partition by {policy} treats all devices alike; unequal ones need policy devices")
    if policy == "cost":
        return by_cost(items, devices, costs)
    if costs is not None:
        raise UsageError(f"partition by {policy} does not look at costs; they are for cost and devices")
    return {"kind": by_kind, "bytes": by_bytes, "count": by_count}[policy](items, devices)


def _staged(
    policy: str, items: Sequence[Item], devices: list[Device], costs: Sequence[float] | None
) -> Assignment:
    needed = len(block_costs(items))
    costs = block_costs(items) if costs is None else list(costs)
    if len(costs) < needed:
        raise UsageError(f"partition by {policy}: {len(costs)} costs for {needed} blocks; give one for each")
    bad = [c for c in costs if not (math.isfinite(c) and c >= 0)]
    if bad:
        raise UsageError(f"partition by {policy}: a block's cost is {bad[0]}, it must be zero or more")
    if len(devices) > len(costs):
        raise UsageError(
            f"partition by {policy}: {len(devices)} devices for {len(costs)} blocks would leave a stage"
            f" empty; use at most {len(costs)} devices, or more layers"
        )
    held = _stage_bytes(items, len(costs))
    speeds = [device.speed for device in devices]
    limits = [math.inf if device.memory_bytes is None else device.memory_bytes for device in devices]
    stages = split_stages(costs, speeds, lambda k, start, stop: held[start][stop] <= limits[k])
    if stages is None:
        raise UsageError(
            f"partition by {policy}: no split of {len(costs)} blocks fits the devices' memory; one would if"
            f" every device could hold {_smallest_memory(held, limits):,} bytes of parameters"
        )
    stage_of = {b: k for k, stage in enumerate(stages) for b in stage}
    parts = tuple(Part(item, stage_of[item.blocks[0]], 0, item.size) for item in items)
    stage_costs = tuple(math.fsum(costs[stage.start : stage.stop]) for stage in stages)
    return Assignment(policy, tuple(items), tuple(devices), parts, tuple(stages), stage_costs)


def _stage_bytes(items: Sequence[Item], blocks: int) -> list[list[int]]:
    """Return bytes[start][stop] of a stage of blocks start … stop: what it uses twice it holds once."""
    held = [[0] * (blocks + 1) for _ in range(blocks)]
    for start in range(blocks):
        new = [0] * blocks  # bytes that the block adds to a stage beginning at `start`
        for item in items:
            first = next((b for b in item.blocks if b >= start), None)
            if first is not None:
                new[first] += item.bytes
        for stop in range(start + 1, blocks + 1):
            held[start][stop] = held[start][stop - 1] + new[stop - 1]
    return held


def _smallest_memory(held: list[list[int]], limits: list[float]) -> int:
    """Return the least m such that a split fits once every device that holds less can hold m."""
    blocks = len(held)
    sizes = sorted({held[start][stop] for start in range(blocks) for stop in range(start + 1, blocks + 1)})
    alike = [1.0] * len(limits)
    low, high = 0, len(sizes) - 1  # the largest size, the whole model, always fits
    while low < high:
        middle = (low + high) // 2
        raised = [max(limit, sizes[middle]) for limit in limits]
        if split_stages([0.0] * blocks, alike, lambda k, a, b, raised=raised: held[a][b] <= raised[k]):  # type: ignore[misc]
            high = middle
        else:
            low = middle + 1
    return sizes[low]


def _check(items: Sequence[Item], devices: int) -> None:
    if devices < 1:
        raise UsageError(f"partition: {devices} devices cannot hold a model; give at least 1")
    if not items:
        raise UsageError("partition: there are no parameters to place")
    names = [item.name for item in items]
    if len(set(names)) < len(names):
        raise UsageError(f"partition: two items have the name {max(names, key=names.count)!r}")


def _assignment(policy: str, items: Sequence[Item], devices: int, parts: list[Part]) -> Assignment:
    order = {item.name: i for i, item in enumerate(items)}
    ordered = sorted(parts, key=lambda part: (order[part.item.name], part.device))
    return Assignment(policy, tuple(items), tuple(Device(str(d)) for d in range(devices)), tuple(ordered))
