"""The recipe: a serial model and a mesh in, the same model distributed out.

    mesh = Mesh(minipar.world(), dp=2, tp=2)
    strategy = distribute(model, mesh, Recipe(zero=1), seed=0)

Order matters and is the same for every combination: first layers are cut (tensor parallelism decides what a
rank's parameters *are*), then values come to be, each rank drawing its own slices, and last the ranks that
share the batch agree on how to sum gradients (data parallelism, ZeRO, owners, or local steps).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minipar.agreement import agreed
from minipar.errors import UsageError
from minipar.mesh import Mesh
from minipar.models import Model
from minipar.parallel.buckets import BUCKET_MB
from minipar.parallel.data_parallel import ALL_AGGREGATIONS
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.policies import by_cost, items_of
from minipar.parallel.pipeline.action import Schedule, sizes
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.resolve import known_schedule, resolve_schedule
from minipar.parallel.pipeline.stage import Stage, check_cuts
from minipar.parallel.pipeline.tile_check import check_tiles
from minipar.parallel.strategies import (
    AveragedParameters,
    ByOwner,
    Layers,
    Pipelined,
    Replicas,
    Sharded,
    Strategy,
)
from minipar.parallel.tensor_parallel.parallelize import SEQUENCE, Plan, SequenceLength, parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.zero.zero import Zero
from minipar.recompute import recompute_blocks


@dataclass(frozen=True)
class Recipe:
    """How a model is distributed over a mesh; the sizes of the axes are the mesh's.

    Attributes:
        plan: how layers are cut over mesh.tp; None for the model's default.
        sequence_parallel: also cut activations between the cut layers along the sequence.
        convolution: how convolutions are cut: output, input or region; None for output, or what `plan` says.
        zero: ZeRO stage over mesh.dp; 0 for plain data parallelism.
        assignment: parameters laid over ranks by a policy; one with stages runs layers on different ranks.
        aggregation: "all_reduce", "master", or "local" (parameter averaging).
        average_every: steps between averages, for "local"; None for 1.
        bucket_mb, overlap: see `DataParallel`; None for its default, and where gradients have no buckets.
        schedule: of the pipeline over mesh.pp: a name in `pipeline.schedules`, a CSV file, or lists of actions; None
            for 1F1B.
        microbatches: pieces of each part of the batch in a pipeline; by default twice the stages, or what a
            schedule that is no name says.
        chunks: virtual stages a rank, for the interleaved schedule.
        tiles: (rows, columns) of tiles that images are cut into, to be the microbatches of the pipeline.
        recompute: keep each block's input only, and run its forward again in backward.
        pipelined: whether an assignment with stages is run as a pipeline with this schedule, or its stages one
            after another; without such an assignment mesh.pp is a pipeline, cut by size.
    """

    plan: Plan | None = None
    sequence_parallel: bool = False
    convolution: str | None = None
    zero: int = 0
    assignment: Assignment | None = None
    aggregation: str = "all_reduce"
    average_every: int | None = None
    bucket_mb: float | None = None
    overlap: bool | None = None
    schedule: str | Schedule | None = None
    microbatches: int | None = None
    chunks: int | None = None
    tiles: tuple[int, int] | None = None
    recompute: bool = False
    pipelined: bool = False

    def is_pipeline(self, sizes: Mapping[str, int]) -> bool:
        """Whether the pp axis of a mesh of these sizes is run as a pipeline."""
        staged = self.assignment is not None and self.assignment.stages is not None
        return self.pipelined if staged else sizes["pp"] > 1

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse combinations that cannot be, or that nobody has given a meaning, and options that would do nothing.

        Args:
            sizes: the mesh's, by axis (`Mesh.shape`).

        Raises:
            UsageError: names the two and the reason.
        """
        pp, tp = sizes["pp"], sizes["tp"]
        self._check_aggregation()
        self._check_pipeline(sizes)
        if self.sequence_parallel and tp == 1:
            raise UsageError(
                "sequence parallelism cuts activations over tensor-parallel ranks: it needs --tp above 1"
            )
        if self.convolution is not None and tp == 1:
            raise UsageError("--convolution says how --tp cuts a convolution; give --tp above 1")
        if self.convolution is not None and self.plan is not None:
            raise UsageError("a plan says itself how it cuts each convolution: leave convolution out, or the plan")
        staged = self.assignment is not None and self.assignment.stages is not None
        if self.assignment is not None and not (staged and self.pipelined):
            if tp > 1 or self.zero or self.aggregation != "all_reduce":
                raise UsageError(
                    f"partition by {self.assignment.policy} lays out whole parameters itself: not with tensor"
                    " parallelism, ZeRO or another aggregation"
                )
            if self.recompute and staged:
                raise UsageError(
                    "layer parallelism runs its blocks itself and does not recompute; a pipeline does"
                )
        if self.zero and self.aggregation != "all_reduce":
            raise UsageError(
                f"ZeRO owns how gradients are summed; aggregation {self.aggregation} does not go with it"
            )
        self._check_buckets(sizes)
        self._check_data_parallel(sizes)
        if pp > 1 and self.zero > 1:
            raise UsageError(
                f"ZeRO {self.zero} with a pipeline is refused: every microbatch would reduce-scatter"
                " (and with stage 3 gather) every unit again, so traffic grows with their number; use ZeRO 1"
            )
        if pp > 1 and self.aggregation != "all_reduce":
            raise UsageError(
                f"aggregation {self.aggregation} is for data parallelism alone, not with a pipeline"
            )
        if pp > 1 and self.assignment is not None and not staged:
            raise UsageError(
                f"partition by {self.assignment.policy} with a pipeline is refused: it places parameters, not"
                " whole blocks; use cost or devices, or leave it out"
            )
        if self.tiles is not None and tp > 1:
            raise UsageError("tiles with tensor parallelism are refused: no plan cuts a layer of such a model")
        if self.tiles is not None and self.microbatches not in (None, math.prod(self.tiles)):
            raise UsageError(
                f"{self.microbatches} microbatches and {self.tiles[0]} × {self.tiles[1]} tiles: tiles are the"
                f" microbatches, {math.prod(self.tiles)} of them; leave --microbatches out"
            )

    def _check_aggregation(self) -> None:
        """Refuse an unknown aggregation, and what is about another one."""
        if self.aggregation not in ALL_AGGREGATIONS:
            raise UsageError(
                f"aggregation {self.aggregation!r} is unknown: use one of {', '.join(ALL_AGGREGATIONS)}"
            )
        if self.average_every is not None and self.aggregation != "local":
            raise UsageError("--average-every is for --aggregation local")
        if self.overlap and self.aggregation != "all_reduce":
            raise UsageError(
                f"--overlap is for --aggregation all_reduce; {self.aggregation} sends after backward"
            )

    def _check_pipeline(self, sizes: Mapping[str, int]) -> None:
        """Refuse what describes a pipeline where there is none, and a schedule's name that nobody knows."""
        for name in ("schedule", "microbatches", "chunks", "tiles"):
            if getattr(self, name) is not None and not self.is_pipeline(sizes):
                raise UsageError(f"--{name} describes a pipeline; give --pp above 1")
        if isinstance(self.schedule, str):
            known_schedule(self.schedule)

    def _check_buckets(self, sizes: Mapping[str, int]) -> None:
        """Refuse what says how gradients travel in buckets where there are none."""
        policy = "a partition policy" if self.assignment is not None and not self.is_pipeline(sizes) else None
        without = f"ZeRO {self.zero}" if self.zero else policy
        for option, value in (("--bucket-mb", self.bucket_mb), ("--overlap", self.overlap)):
            if without and value is not None:
                raise UsageError(
                    f"{option} is about the buckets of data parallelism, of which {without} has none: leave it out"
                )

    def _check_data_parallel(self, sizes: Mapping[str, int]) -> None:
        """Refuse what says how ranks share a batch where all ranks go to other axes. One rank alone may be told."""
        if sizes["dp"] > 1 or sizes["tp"] * sizes["pp"] == 1:
            return
        said = {
            f"--aggregation {self.aggregation}": self.aggregation != "all_reduce",
            "--bucket-mb": self.bucket_mb is not None,
            "--overlap": bool(self.overlap),
        }
        for option, given in said.items():
            if given:
                raise UsageError(
                    f"{option} is about ranks that share the batch, and the other axes leave none: tp {sizes['tp']},"
                    f" pp {sizes['pp']}; leave it out, or use more ranks"
                )

    @property
    def largest_bucket(self) -> float:
        """MiB of the largest bucket."""
        return BUCKET_MB if self.bucket_mb is None else self.bucket_mb


def distribute(
    model: Model,
    mesh: Mesh,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> Strategy:
    """Distribute an unmaterialised serial model over a mesh, and give it its values.

    Args:
        model: changed in place.
        seed, dtype, device: of the initialisation; any layout starts from the serial one, bitwise.

    Raises:
        UsageError: a combination or a size that cannot be, or a mistake in a schedule; on every rank.
        DataError: a schedule's file that cannot be read; on every rank.
    """
    recipe = Recipe() if recipe is None else recipe
    agreed(mesh.world, functools.partial(_cut_layers, model, mesh, recipe))
    if recipe.recompute:
        recompute_blocks(model)
    strategy = _strategy(model, mesh, recipe, seed, dtype, device)
    strategy.tell_parameters()
    return strategy


def _strategy(model: Model, mesh: Mesh, recipe: Recipe, seed: int, dtype: str, device: str) -> Strategy:
    """Give the model its values on the ranks that are to hold them, and wrap it."""
    if recipe.is_pipeline(mesh.shape):
        return _pipeline(model, mesh, recipe, seed, dtype, device)
    if recipe.assignment is not None and recipe.assignment.stages is not None:
        return Layers(model, mesh.pp, recipe.assignment, seed, dtype, device)
    if recipe.zero:
        zero = Zero(model, mesh.dp, recipe.zero).materialize(seed, dtype, device)
        return Sharded(zero, model, mesh.dp, mesh.tp)
    model.materialize(seed, dtype, device)
    if recipe.assignment is not None:
        return ByOwner(model, mesh.dp, recipe.assignment)
    if recipe.aggregation == "local":
        return AveragedParameters(model, mesh.dp, mesh.tp, recipe.average_every or 1, recipe.largest_bucket)
    if mesh.dp.size == 1:
        return Strategy(model, mesh.dp, mesh.tp)
    return Replicas(
        model,
        mesh.dp,
        mesh.tp,
        bucket_mb=recipe.largest_bucket,
        overlap=recipe.overlap,
        aggregation=recipe.aggregation,
    )


def _cut_layers(model: Model, mesh: Mesh, recipe: Recipe) -> None:
    """Refuse what cannot be, and cut layers over mesh.tp. Nothing is sent."""
    recipe.check(mesh.shape)
    if recipe.tiles is not None:
        check_tiles(model, recipe.tiles)
    if mesh.tp.size > 1:
        plan = recipe.plan or default_plan(
            model, sequence_parallel=recipe.sequence_parallel, convolution=recipe.convolution
        )
        parallelize(model, mesh.tp, plan)


def _pipeline(model: Model, mesh: Mesh, recipe: Recipe, seed: int, dtype: str, device: str) -> Strategy:
    """Cut the model into stages, distribute this rank's stage over mesh.dp, and put the executor on top."""
    stages = mesh.pp.size
    microbatches = math.prod(recipe.tiles) if recipe.tiles is not None else recipe.microbatches
    schedule = resolve_schedule(mesh.world, recipe.schedule, stages, microbatches, recipe.chunks)
    cuts = agreed(mesh.world, lambda: stages_of(model, recipe, stages, sizes(schedule).chunks, dtype))
    stage = Stage(model, mesh.pp, cuts)
    inner: Strategy
    if recipe.zero:
        inner = Sharded(
            Zero(stage, mesh.dp, recipe.zero).materialize(seed, dtype, device), stage, mesh.dp, mesh.tp
        )
    else:
        stage.materialize(seed, dtype, device)
        inner = Strategy(stage, mesh.dp, mesh.tp)
        if mesh.dp.size > 1:
            inner = Replicas(stage, mesh.dp, mesh.tp, bucket_mb=recipe.largest_bucket, overlap=recipe.overlap)
    announce = _announce_sequence if recipe.sequence_parallel else lambda inputs: None
    executor = Executor(stage, model, mesh.pp, schedule, recompute=recipe.recompute, announce=announce)
    return Pipelined(inner, stage, model, executor, recipe.tiles)


def stages_of(model: Model, recipe: Recipe, stages: int, chunks: int, dtype: str) -> list[range]:
    """Return the blocks of each virtual stage, as the assignment says or balanced by size.

    Raises:
        UsageError: fewer blocks than virtual stages, or a model that cannot run in microbatches.
    """
    if len(model.blocks) < stages * chunks:
        each = f" of {chunks} chunks" if chunks > 1 else ""
        raise UsageError(
            f"pipeline: {len(model.blocks)} blocks cannot fill {stages} stages{each}, each needs one at least;"
            f" use at most {len(model.blocks) // chunks} stages, or more layers"
        )
    assignment = recipe.assignment or by_cost(items_of(model, dtype), stages * chunks)
    assert assignment.stages is not None
    check_cuts(model, assignment.stages, stages)
    return list(assignment.stages)


def _announce_sequence(ids: Any) -> None:
    """Tell this stage the length of the sequence (B, T), of which it gets parts only."""
    SequenceLength().total = ids.shape[SEQUENCE]
