"""The recipe: a serial model and a mesh in, the same model distributed out.

    mesh = Mesh(minipar.world(), dp=2, tp=2)
    strategy = distribute(model, mesh, seed=0, zero=1)

Order matters and is the same for every combination: first layers are cut (tensor parallelism decides what a
rank's parameters *are*), then values come to be, each rank drawing its own slices, and last the ranks that
share the batch agree on how to sum gradients (data parallelism, ZeRO, owners, or local steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minipar.errors import UsageError
from minipar.mesh import Mesh
from minipar.models import Model
from minipar.parallel.partition.assignment import Assignment
from minipar.parallel.partition.policies import by_cost, items_of
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.stage import Stage
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
        convolution: how a ConvNet's convolutions are cut: output, input or region.
        zero: ZeRO stage over mesh.dp; 0 for plain data parallelism.
        assignment: parameters laid over ranks by a policy; one with stages runs layers on different ranks.
        aggregation: "all_reduce", "master", or "local" (parameter averaging).
        average_every: steps between averages, for "local".
        bucket_mb, overlap: see `DataParallel`.
        schedule: of the pipeline over mesh.pp, a name in `pipeline.schedules`.
        microbatches: pieces of each part of the batch in a pipeline; by default twice the stages.
        chunks: virtual stages a rank, for the interleaved schedule.
        recompute: keep each block's input only, and run its forward again in backward.
        pipelined: run mesh.pp as a pipeline with this schedule, cut as `assignment` says or by cost; otherwise an
            assignment with stages runs them one after another.
    """

    plan: Plan | None = None
    sequence_parallel: bool = False
    convolution: str = "output"
    zero: int = 0
    assignment: Assignment | None = None
    aggregation: str = "all_reduce"
    average_every: int = 1
    bucket_mb: float = 4.0
    overlap: bool | None = None
    schedule: str = "1f1b"
    microbatches: int | None = None
    chunks: int | None = None
    recompute: bool = False
    pipelined: bool = False

    def check(self, mesh: Mesh) -> None:
        """Refuse combinations that cannot be, or that nobody has given a meaning.

        Raises:
            UsageError: names the two and the reason.
        """
        if self.sequence_parallel and mesh.tp.size == 1:
            raise UsageError(
                "sequence parallelism cuts activations over tensor-parallel ranks: it needs --tp above 1"
            )
        if self.zero and self.aggregation != "all_reduce":
            raise UsageError(
                f"ZeRO owns how gradients are summed; aggregation {self.aggregation} does not go with it"
            )
        if mesh.pp.size > 1 and self.zero > 1:
            raise UsageError(
                f"ZeRO {self.zero} with a pipeline is refused: every microbatch would reduce-scatter"
                " (and with stage 3 gather) every unit again, so traffic grows with their number; use ZeRO 1"
            )
        if mesh.pp.size > 1 and self.aggregation != "all_reduce":
            raise UsageError(
                f"aggregation {self.aggregation} is for data parallelism alone, not with a pipeline"
            )
        if self.assignment is not None and not (self.assignment.stages is not None and self.pipelined):
            if mesh.tp.size > 1 or self.zero or self.aggregation != "all_reduce":
                raise UsageError(
                    "a partition policy lays out whole parameters itself: not with tensor parallelism, ZeRO or"
                    " another aggregation"
                )
            if self.recompute and self.assignment.stages is not None:
                raise UsageError(
                    "layer parallelism runs its blocks itself and does not recompute; a pipeline does"
                )


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
        UsageError: a combination or a size that cannot be; before anything is sent.
    """
    recipe = recipe or Recipe()
    recipe.check(mesh)
    if mesh.tp.size > 1:
        plan = recipe.plan or default_plan(
            model, sequence_parallel=recipe.sequence_parallel, convolution=recipe.convolution
        )
        parallelize(model, mesh.tp, plan)
    if recipe.recompute:
        recompute_blocks(model)
    if recipe.pipelined:
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
        return AveragedParameters(model, mesh.dp, mesh.tp, recipe.average_every, recipe.bucket_mb)
    if mesh.dp.size == 1:
        return Strategy(model, mesh.dp, mesh.tp)
    return Replicas(
        model,
        mesh.dp,
        mesh.tp,
        bucket_mb=recipe.bucket_mb,
        overlap=recipe.overlap,
        aggregation=recipe.aggregation,
    )


def _pipeline(model: Model, mesh: Mesh, recipe: Recipe, seed: int, dtype: str, device: str) -> Strategy:
    """Cut the model into stages, distribute this rank's stage over mesh.dp, and put the executor on top."""
    stages = mesh.pp.size
    microbatches = recipe.microbatches or 2 * stages
    schedule = build_schedule(recipe.schedule, stages, microbatches, recipe.chunks)
    chunks = 1 + max(action.chunk for actions in schedule for action in actions)
    assignment = recipe.assignment or by_cost(items_of(model, dtype), stages * chunks)
    assert assignment.stages is not None
    stage = Stage(model, mesh.pp, assignment.stages)
    inner: Strategy
    if recipe.zero:
        inner = Sharded(
            Zero(stage, mesh.dp, recipe.zero).materialize(seed, dtype, device), stage, mesh.dp, mesh.tp
        )
    else:
        stage.materialize(seed, dtype, device)
        inner = Strategy(stage, mesh.dp, mesh.tp)
        if mesh.dp.size > 1:
            inner = Replicas(stage, mesh.dp, mesh.tp, bucket_mb=recipe.bucket_mb, overlap=recipe.overlap)
    announce = _announce_sequence if recipe.sequence_parallel else lambda inputs: None
    executor = Executor(stage, model, mesh.pp, schedule, recompute=recipe.recompute, announce=announce)
    return Pipelined(inner, stage, model, executor)


def _announce_sequence(ids: Any) -> None:
    """Tell this stage the length of the sequence (B, T), of which it gets parts only."""
    SequenceLength().total = ids.shape[SEQUENCE]
