"""What the training job asks of a kind of parallelism: one interface, one small class for each kind.

A strategy is given a serial model's blocks and loss, adds up gradients microbatch by microbatch, and knows
which tensors this rank's optimizer steps. The kinds themselves are in files of their own; here they only get
the same handles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array, array_module, to_host
from minipar.comm.interface import Communicator
from minipar.data import Batch
from minipar.data.tiles import tiles
from minipar.models import Model
from minipar.nn import Module, Parameter
from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.layer_parallel import LayerParallel
from minipar.parallel.local_sgd import LocalSGD
from minipar.parallel.norms import global_norm
from minipar.parallel.owner_sharding import OwnedPart, ShardedByPolicy
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.parallel.placement import is_sharded
from minipar.parallel.region import Region
from minipar.parallel.zero import Zero
from minipar.tape import no_grad
from minipar.tensor import Tensor


@dataclass(frozen=True)
class Held:
    """A tensor of the model's state as one rank holds it.

    Attributes:
        name: the parameter's, or buffer's, path in the serial model.
        tensor: what this rank holds of it; a parameter's is what the optimizer steps.
        region: where that lies in the serial model's tensor.
        saves: of all ranks that hold these elements, this is the one that writes them into a checkpoint.
    """

    name: str
    tensor: Tensor
    region: Region
    saves: bool


class Strategy:
    """A serial model made parallel.

    Attributes:
        model: the model, its parameters as this rank holds them.
        batch_ranks: the ranks that share the batch; each takes its part of it.
        own_mean: each rank minimises the mean over its own samples instead of its share of the whole batch's.
    """

    own_mean = False

    def __init__(self, model: Any, batch_ranks: Communicator, tp: Communicator | None = None):
        self.model, self.batch_ranks, self.tp = model, batch_ranks, tp
        self.shard_ranks: Communicator | None = (
            None  # the ranks over which optimizer tensors are disjoint parts
        )

    def run(self, inputs: Any) -> Tensor:
        """Return the model's output for this rank's inputs; token ids stay an array, they carry no gradient."""
        return self.model(Tensor(inputs) if inputs.dtype.kind == "f" else inputs)

    def waiting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for one microbatch's backward; all but the last only add to the gradients."""
        return contextlib.nullcontext()

    def add_gradients(self, batch: Batch, count: float, last: bool) -> float:
        """Add the gradients of (sum of losses) / count of this piece of the batch; return its sum of losses.

        Args:
            count: valid targets of the global batch, over the loss scale where there is one.
        """
        with self.waiting(last):
            loss = self.model.loss(self.run(batch.inputs), batch.targets)
            (loss / count).backward()
        return loss.item()

    def finish_gradients(self) -> None:
        """Called once a step, after the last piece."""

    def synchronize(self) -> None:
        """Sum the gradients over the ranks that share the batch, where backward was told to wait."""

    def precision_changed(self) -> None:
        """Called when activations may have another dtype from now on."""

    def evaluate(self, inputs: Any, targets: Any) -> tuple[float, int]:
        """Return this rank's sum of losses and number of hits, without gradients."""
        with no_grad():
            output = self.run(inputs)
            return self.model.loss(output, targets).item(), self.hits(output.data, targets)

    def hits(self, logits: Array, targets: Array) -> int:
        """Return how many targets the largest logit names; with a cut vocabulary the ranks compare their best."""
        xp = array_module(logits)
        width = logits.shape[-1]
        if self.tp is None or self.tp.size == 1 or not _cut_vocabulary(self.model):
            return int((logits.argmax(axis=-1) == targets).sum())
        widths = self.tp.all_gather(np.array([width])).tolist()
        best = logits.max(axis=-1) if width else xp.full(logits.shape[:-1], -xp.inf, logits.dtype)
        place = (
            logits.argmax(axis=-1) + sum(widths[: self.tp.rank])
            if width
            else xp.zeros(logits.shape[:-1], int)
        )
        top = self.tp.all_reduce(xp.ascontiguousarray(best), op="max")
        winner = xp.where(best == top, place, sum(widths))  # the first of equals, as argmax has it
        return int((self.tp.all_reduce(xp.ascontiguousarray(winner), op="min") == targets).sum())

    def optimizer_tensors(self) -> list[tuple[Any, Tensor]]:
        """Return (parameter, the tensor of it that this rank's optimizer steps)."""
        return [(p, p) for p in self.model.parameters()]

    def grad_norm(self) -> float | None:
        """Return the norm of the whole gradient, each element counted once; None where this rank cannot know it."""
        return global_norm(self.optimizer_tensors(), shard_comm=self.shard_ranks, tp=self.tp)

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        """Take the optimizer's step; `targets` is this rank's number of valid targets."""
        optimizer.step()

    def held(self, kind: str) -> dict[str, Array]:
        """Return {name: array} of "data" or "grad" as this rank's tensor-parallel part, for comparison and saving."""
        arrays = {name: getattr(p, kind) for name, p in self.model.named_parameters()}
        return {name: to_host(a) for name, a in arrays.items() if a is not None}

    def state(self) -> dict[str, Array]:
        """Return the serial model's state; complete on rank 0 of the world. Every rank calls it."""
        layouts = {name: p for name, p in self.model.named_parameters() if p.layout is not None}
        state = self.held("data")
        for name, p in layouts.items():
            state[name] = p.layout.whole(state[name], p.global_shape)
        return state | {name: np.array(to_host(b.data)) for name, b in self.model.named_buffers()}

    def gradients_known(self) -> bool:
        """Whether this rank holds the summed gradients before the step."""
        return True

    def parameters_held(self) -> list[Held]:
        """Return this rank's parameters as its optimizer sees them: what a checkpoint saves and loads."""
        first = self.batch_ranks.rank == 0
        return [
            Held(p.name, p, Region(p.global_shape, p.layout), first and self._is_first_of_tp(p))
            for p in self.model.parameters()
        ]

    def _is_first_of_tp(self, p: Parameter) -> bool:
        return self.tp is None or self.tp.rank == 0 or is_sharded(p)

    def buffers_held(self) -> list[Held]:
        """Return this rank's buffers."""
        first = self.batch_ranks.rank == 0 and (self.tp is None or self.tp.rank == 0)
        return [Held(name, b, Region(b.shape), first) for name, b in self.model.named_buffers()]

    def reload(self) -> None:
        """Make the model's weights follow what was written into the tensors of `parameters_held`. Collective."""


def _cut_vocabulary(model: Model) -> bool:
    wte = getattr(model, "wte", None)
    return wte is not None and is_sharded(wte.weight) and wte.weight.layout.placement.dim == 0


class Replicas(Strategy):
    """Data parallelism."""

    def __init__(self, model: Module, dp: Communicator, tp: Communicator | None, **options: Any):
        super().__init__(model, dp, tp)
        self.parallel = DataParallel(model, dp, **options)

    def waiting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.parallel.no_sync()

    def synchronize(self) -> None:
        self.parallel.synchronize()

    def grad_norm(self) -> float | None:
        return super().grad_norm() if self.gradients_known() else None

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.parallel.step(optimizer)

    def gradients_known(self) -> bool:
        return self.parallel.aggregation == "all_reduce" or self.batch_ranks.rank == 0


class AveragedParameters(Strategy):
    """Local SGD."""

    own_mean = True

    def __init__(self, model: Model, dp: Communicator, tp: Communicator | None, every: int, bucket_mb: float):
        super().__init__(model, dp, tp)
        self.local = LocalSGD(model, dp, every, bucket_mb)

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.local.step(optimizer, targets)

    def gradients_known(self) -> bool:
        return False


class Sharded(Strategy):
    """ZeRO."""

    def __init__(self, zero: Zero, model: Module, dp: Communicator, tp: Communicator | None):
        super().__init__(model, dp, tp)
        self.zero, self.shard_ranks = zero, dp

    def run(self, inputs: Any) -> Tensor:
        return self.zero(Tensor(inputs) if inputs.dtype.kind == "f" else inputs)

    def waiting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.zero.no_sync()

    def synchronize(self) -> None:
        self.zero.synchronize()

    def optimizer_tensors(self) -> list[tuple[Any, Tensor]]:
        return list(self.zero.shards())

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.zero.step(optimizer)

    def held(self, kind: str) -> dict[str, Array]:
        return {name: to_host(a) for name, a in self.zero.full(kind).items()}  # type: ignore[arg-type]

    def parameters_held(self) -> list[Held]:
        found = []
        for piece in (piece for unit in self.zero.units for piece in unit.pieces):
            p = piece.param
            region = Region(p.global_shape, p.layout, start=piece.start)
            found.append(Held(p.name, piece.tensor, region, self._is_first_of_tp(p)))
        return found

    def reload(self) -> None:
        self.zero.reload()


class ByOwner(Strategy):
    """Parameters owned by ranks as a policy lays them out."""

    def __init__(self, model: Model, dp: Communicator, assignment: Any):
        super().__init__(model, dp)
        self.sharded = ShardedByPolicy(model, dp, assignment)

    def finish_gradients(self) -> None:
        self.sharded.synchronize()

    def optimizer_tensors(self) -> list[tuple[Any, Tensor]]:
        return [(t, t) for t in self.sharded.optimizer_params()]

    def grad_norm(self) -> float | None:
        return self.sharded.grad_norm()

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.sharded.step(optimizer)

    def held(self, kind: str) -> dict[str, Array]:
        if kind == "data":
            return super().held(kind)
        mine = [
            (t.part, t.grad) for t in self.sharded.owned if isinstance(t, OwnedPart) and t.grad is not None
        ]
        whole: dict[str, Array] = {}
        for parts in self.batch_ranks.all_gather_object(mine):
            for part, g in parts:
                target = whole.setdefault(part.item.name, np.zeros(part.item.shape, g.dtype))
                part.of(target)[...] = g.reshape(part.of(target).shape)
        return whole

    def parameters_held(self) -> list[Held]:
        return [
            Held(t.name, t, Region(t.global_shape, part=t.part), True)
            for t in self.sharded.owned
            if t.part is not None
        ]

    def reload(self) -> None:
        self.sharded.reload()


class Layers(Strategy):
    """Whole layers on different ranks."""

    def __init__(
        self, model: Model, ranks: Communicator, assignment: Any, seed: int, dtype: str, device: str
    ):
        alone = ranks.split(ranks.rank)
        assert alone is not None
        super().__init__(
            model, alone
        )  # no rank shares the batch: the first reads all inputs, the last all targets
        self.parallel = LayerParallel(model, ranks, assignment, seed=seed, dtype=dtype, device=device)

    def add_gradients(self, batch: Batch, count: float, last: bool) -> float:
        return self.parallel.forward_backward(batch.inputs, batch.targets, count) * count

    def evaluate(self, inputs: Any, targets: Any) -> tuple[float, int]:
        with no_grad():
            output = self.parallel(inputs)
        sums = np.zeros(2)
        if output is not None:
            with no_grad():
                sums[:] = self.model.loss(output, targets).item(), self.hits(output.data, targets)
        loss, hits = self.parallel.comm.broadcast(sums, root=self.parallel.comm.size - 1).tolist()
        return loss, int(hits)

    def optimizer_tensors(self) -> list[tuple[Any, Tensor]]:
        return [(p, p) for p in self.parallel.optimizer_params()]

    def grad_norm(self) -> float | None:
        return self.parallel.grad_norm()

    def state(self) -> dict[str, Array]:
        return self.parallel.state_dict(root=0) or {}

    def held(self, kind: str) -> dict[str, Array]:
        arrays: Mapping[str, Any] = {name: getattr(p, kind) for name, p in self.parallel.named_parameters()}
        return {name: to_host(a) for name, a in arrays.items() if a is not None}

    def parameters_held(self) -> list[Held]:
        mine = {part.item.name for part in self.parallel.assignment.held(self.parallel.comm.rank)}
        return [
            Held(name, p, Region(p.global_shape), name in mine)
            for name, p in self.parallel.named_parameters()
        ]

    def buffers_held(self) -> list[Held]:
        here = {id(b) for block in self.parallel.blocks for _, b in block.named_buffers()}
        return [replace(held, saves=True) for held in super().buffers_held() if id(held.tensor) in here]


class Pipelined(Strategy):
    """A pipeline whose stages are themselves distributed over the ranks that share the batch.

    Args:
        inner: this rank's stage over mesh.dp (plain, data parallel or ZeRO 1).
        executor: runs the schedule, which says into how many microbatches each part of the batch is cut.
        grid: (rows, columns) of tiles that images are cut into instead; they are the microbatches then.
    """

    def __init__(
        self,
        inner: Strategy,
        stage: Stage,
        model: Model,
        executor: Executor,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__(model, inner.batch_ranks, inner.tp)
        self.inner, self.stage, self.executor, self.grid = inner, stage, executor, grid

    def cut(self, batch: Batch) -> list[Batch]:
        """Return the microbatches of this rank's part of the batch."""
        return tiles(batch, *self.grid) if self.grid else batch.split(self.executor.microbatches)

    def add_gradients(self, batch: Batch, count: float, last: bool) -> float:
        with self.inner.waiting(last=False):  # replicas are summed once, when every microbatch is through
            total = self.executor.run(self.cut(batch), count)
        if last:
            self._sum_over_ranks()
        return float(self.executor.pp.all_reduce(np.array([total]))[0])  # only the last stage knows it

    def _sum_over_ranks(self) -> None:
        if self.inner.shard_ranks is not None:
            self.stage.sum_tied(self.inner.shard_ranks)
            self.inner.synchronize()
        else:
            self.inner.synchronize()
            self.stage.sum_tied()

    def precision_changed(self) -> None:
        self.executor.forget_shapes()

    def evaluate(self, inputs: Any, targets: Any) -> tuple[float, int]:
        return self.executor.evaluate(inputs, targets, self.hits)

    def optimizer_tensors(self) -> list[tuple[Any, Tensor]]:
        return self.inner.optimizer_tensors()

    def grad_norm(self) -> float | None:
        pairs = [(p, t) for p, t in self.optimizer_tensors() if p.name in self.stage.owned]
        norm = global_norm(pairs, shard_comm=self.inner.shard_ranks, tp=self.tp)
        return float(self.executor.pp.all_reduce(np.array([norm**2]))[0]) ** 0.5

    def step(self, optimizer: optim.Optimizer, targets: int) -> None:
        self.inner.step(optimizer, targets)

    def held(self, kind: str) -> dict[str, Array]:
        return self.inner.held(kind)

    def parameters_held(self) -> list[Held]:
        found = self.inner.parameters_held()  # of a tied weight every stage that uses it has a copy
        return [replace(held, saves=held.saves and held.name in self.stage.owned) for held in found]

    def reload(self) -> None:
        self.inner.reload()

    def state(self) -> dict[str, Array]:
        whole: dict[str, Array] = {}
        for part in self.executor.pp.all_gather_object(self.inner.state()):
            whole |= part
        return whole


def matrix_like(p: Any) -> bool:
    """Whether weight decay is for this parameter: two or more axes in the serial model."""
    shape = p.global_shape if isinstance(p, Parameter | OwnedPart) else p.shape
    return len(shape) >= 2
