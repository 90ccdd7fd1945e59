"""From settings to a layout: the mesh's sizes, the devices of a policy, the recipe, and whether they all fit.

Nothing here communicates. So what cannot be is refused before any rank has sent a word, and since the answer
depends on the settings and the number of ranks alone, with the same message on every rank.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from minipar.agreement import on_every_rank
from minipar.config import STAGED_POLICIES, TrainConfig
from minipar.data.tiles import parse_tiles
from minipar.errors import MiniparError
from minipar.mesh import resolve
from minipar.models import Model
from minipar.parallel.distribute import Recipe, stages_of
from minipar.parallel.partition.assignment import Assignment, Device
from minipar.parallel.partition.devices import parse_devices, parse_memory, parse_speeds
from minipar.parallel.partition.policies import assign, items_of
from minipar.parallel.pipeline.action import sizes as sizes_of
from minipar.parallel.pipeline.resolve import DEFAULT_SCHEDULE, is_file
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.tensor_parallel.parallelize import check_plan
from minipar.parallel.tensor_parallel.plans import default_plan


def axes_of(config: TrainConfig, ranks: int) -> dict[str, int]:
    """Return the size of each axis of the mesh.

    Raises:
        UsageError: they do not multiply to the number of ranks.
    """
    if config.partition in STAGED_POLICIES and config.pp == 1:
        return resolve(ranks, 1, None, config.tp)  # whole layers on the ranks, without a pipeline
    return resolve(ranks, config.dp, config.pp, config.tp)


def microbatches_of(config: TrainConfig) -> int | None:
    """Return how many microbatches the settings ask for; None leaves it to the schedule."""
    return math.prod(parse_tiles(config.tiles)) if config.tiles else config.microbatches


def devices_of(config: TrainConfig, ranks: int) -> int | list[Device]:
    """Return what a partition policy lays parameters over: so many devices alike, or those of --devices.

    Without --speeds they are equally fast, and differ in their memory alone.

    Raises:
        UsageError: text that names no devices, or not as many as `ranks`.
    """
    c = config
    if c.devices is None:
        return ranks
    memory = parse_memory(c.memory) if c.memory is not None else None
    speeds = parse_speeds(c.speeds) if c.speeds is not None else None if memory else {}
    return parse_devices(c.devices, speeds, memory, ranks=ranks)


def recipe_of(config: TrainConfig, assignment: Assignment | None) -> Recipe:
    """Return how the model is distributed over the mesh."""
    c: Any = config
    return Recipe(
        sequence_parallel=c.sequence_parallel, convolution=c.convolution, zero=c.zero,
        assignment=assignment, aggregation=c.aggregation, average_every=c.average_every,
        bucket_mb=c.bucket_mb, overlap=c.overlap, schedule=c.schedule, microbatches=c.microbatches,
        chunks=c.chunks, tiles=parse_tiles(c.tiles) if c.tiles else None, recompute=c.recompute,
        pipelined=c.pp > 1,
    )  # fmt: skip


def check_layout(config: TrainConfig, ranks: int, model: Model) -> dict[str, int]:
    """Refuse a layout that does not fit the ranks or the model; return the size of each axis of the mesh.

    Args:
        config: resolved settings.
        model: of these settings, without values. What the data decide of it (classes, vocabulary) may be
            anything; nor are a schedule's file and the devices' memory looked into.

    Raises:
        UsageError: names what does not fit, and what would; to be raised on every rank.
    """
    try:
        sizes = axes_of(config, ranks)
        recipe_of(config, _blank_assignment(config)).check(sizes)
        chunks = _chunks(config)
        if config.partition is not None and chunks is not None:
            _provisional_assignment(config, ranks if config.pp == 1 else config.pp * chunks, model)
        if config.pp > 1 and chunks is not None:
            stages_of(model, recipe_of(config, None), config.pp, chunks, str(config.dtype))
        if sizes["tp"] > 1:
            plan = default_plan(
                model, sequence_parallel=config.sequence_parallel, convolution=config.convolution
            )
            check_plan(model, sizes["tp"], plan)
    except MiniparError as error:
        raise on_every_rank(error) from None
    return sizes


def _blank_assignment(config: TrainConfig) -> Assignment | None:
    """Return an assignment of nothing: enough to tell whether its policy goes with the rest of a recipe."""
    if config.partition is None:
        return None
    return Assignment(config.partition, (), (), (), () if config.partition in STAGED_POLICIES else None)


def _chunks(config: TrainConfig) -> int | None:
    """Return the virtual stages a rank; None where a file says it."""
    schedule = config.schedule or DEFAULT_SCHEDULE
    if config.pp == 1:
        return 1
    if is_file(schedule):
        return None
    pieces = microbatches_of(config) or 2 * config.pp
    return sizes_of(build_schedule(schedule, config.pp, pieces, config.chunks)).chunks


def _provisional_assignment(config: TrainConfig, ranks: int, model: Model) -> Assignment:
    """Return the policy's assignment as if all blocks cost the same and every device had room."""
    assert config.partition is not None
    devices = devices_of(config, ranks)
    if not isinstance(devices, int):
        devices = [replace(device, memory_bytes=None) for device in devices]
    costs = [1.0] * len(model.blocks) if config.partition in STAGED_POLICIES else None
    return assign(config.partition, items_of(model, str(config.dtype)), devices, costs)
