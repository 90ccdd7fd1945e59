"""Stages of layers, through which microbatches flow as a schedule says: pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array
from minipar.data import Batch
from minipar.data.tiles import tiles
from minipar.models import Model
from minipar.nn import Parameter
from minipar.parallel import placement
from minipar.parallel.norms import global_norm
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.stage import Stage
from minipar.parallel.placement import Place
from minipar.parallel.strategies.strategy import HeldTensor, Strategy
from minipar.tensor import Tensor


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
        return float(self.executor.pp.all_reduce(np.array([float(total)]))[0])  # only the last stage knows it

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

    def parameters_held(self) -> list[HeldTensor]:
        found = self.inner.parameters_held()  # of a tied weight every stage that uses it has a copy
        return [replace(held, saves=held.saves and held.name in self.stage.owned) for held in found]

    def place(self, p: Parameter) -> Place:
        on, here = placement.Stage(tuple(self.stage.users[p.name])), p.name in self.stage.held
        inner = self.inner.place(p) if here else super().place(p)
        cut = inner.placements if p.layout is not None or self.inner.shard_ranks is not None else ()
        return replace(inner, placements=(on, *cut), here=here)

    def reload(self) -> None:
        self.inner.reload()

    def tensors(self) -> Iterator[tuple[str, Array]]:
        pp, seen = self.executor.pp, set[str]()
        tells = self.batch_ranks.rank == 0 and (self.tp is None or self.tp.rank == 0)
        for stage in range(pp.size):
            if pp.rank == stage:
                for name, a in self.inner.tensors():
                    if pp.rank == 0:
                        seen.add(name)
                        yield name, a
                    elif tells:
                        pp.broadcast_object(name, root=stage)
                        pp.send(np.ascontiguousarray(a), 0)
                if stage and tells:
                    pp.broadcast_object(None, root=stage)
            elif stage and tells:
                while (name := pp.broadcast_object(None, root=stage)) is not None:
                    if pp.rank == 0:
                        a = pp.recv(stage)
                        if name not in seen:  # else a tied weight, of which every stage has a copy
                            seen.add(name)
                            yield name, a
