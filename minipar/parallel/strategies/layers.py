"""Whole layers on different ranks, one after the other: layer parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minipar.backend import Array, to_host
from minipar.comm.interface import Communicator
from minipar.data import Batch
from minipar.models import Model
from minipar.nn import Parameter
from minipar.parallel.partition.layer_parallel import LayerParallel
from minipar.parallel.placement import Place, Stage
from minipar.parallel.region import Region
from minipar.parallel.strategies.strategy import HeldTensor, Strategy
from minipar.tape import no_grad
from minipar.tensor import Tensor


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
        with self.waiting(last):
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

    def tensors(self) -> Iterator[tuple[str, Array]]:
        return self.parallel.tensors(root=0)

    def held(self, kind: str) -> dict[str, Array]:
        arrays: Mapping[str, Any] = {name: getattr(p, kind) for name, p in self.parallel.named_parameters()}
        return {name: to_host(a) for name, a in arrays.items() if a is not None}

    def parameters_held(self) -> list[HeldTensor]:
        mine = {part.item.name for part in self.parallel.assignment.held(self.parallel.comm.rank)}
        return [
            HeldTensor(name, p, Region(p.global_shape), name in mine)
            for name, p in self.parallel.named_parameters()
        ]

    def place(self, p: Parameter) -> Place:
        stages = self.parallel.assignment.stages_of(p.name)
        return Place((Stage(stages),), here=self.parallel.comm.rank in stages)

    def buffers_held(self) -> list[HeldTensor]:
        here = {id(b) for block in self.parallel.blocks for _, b in block.named_buffers()}
        return [replace(held, saves=True) for held in super().buffers_held() if id(held.tensor) in here]
