"""Each rank keeps a part of the parameters' state: ZeRO, and owners as a partition policy lays them out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array, to_host
from minipar.comm.interface import Communicator
from minipar.models import Model
from minipar.nn import Module, Parameter
from minipar.parallel.partition.owner_sharding import OwnedPart, ShardedByPolicy
from minipar.parallel.placement import Flat, Place
from minipar.parallel.region import Region
from minipar.parallel.strategies.strategy import HeldTensor, Strategy
from minipar.parallel.zero.zero import Zero
from minipar.tensor import Tensor, as_input


class Sharded(Strategy):
    """ZeRO."""

    def __init__(self, zero: Zero, model: Module, dp: Communicator, tp: Communicator | None):
        super().__init__(model, dp, tp)
        self.zero, self.shard_ranks = zero, dp

    def run(self, inputs: Any) -> Tensor:
        return self.zero(as_input(inputs))

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

    def tensors(self) -> Iterator[tuple[str, Array]]:
        parameters = dict(self.model.named_parameters())
        for name, local in self.zero.full_by_unit():
            yield name, self._whole(parameters[name], local)
        for name, b in self.model.named_buffers():
            yield name, to_host(b.data)

    def parameters_held(self) -> list[HeldTensor]:
        found = []
        for piece in (piece for unit in self.zero.units for piece in unit.pieces):
            p = piece.param
            region = Region(p.global_shape, p.layout, start=piece.start)
            found.append(HeldTensor(p.name, piece.tensor, region, self._is_first_of_tp(p)))
        return found

    def place(self, p: Parameter) -> Place:
        """Stages 1 and 2 keep whole parameters and step a range of them, stage 3 keeps the range alone."""
        pieces = [piece for unit in self.zero.units for piece in unit.pieces if piece.param is p]
        flat = Flat(pieces[0].start, pieces[0].start + pieces[0].tensor.size) if pieces else Flat(0, 0)
        cut = super().place(p)
        if self.zero.stage < 3:
            return replace(cut, steps=str(flat))
        return Place((flat,) if p.layout is None else (*cut.placements, flat))

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
            (t.part, to_host(t.grad)) for t in self.sharded.owned if isinstance(t, OwnedPart) and t.grad is not None
        ]
        whole: dict[str, Array] = {}
        for parts in self.batch_ranks.all_gather_object(mine):
            for part, g in parts:
                target = whole.setdefault(part.item.name, np.zeros(part.item.shape, g.dtype))
                part.of(target)[...] = g.reshape(part.of(target).shape)
        return whole

    def parameters_held(self) -> list[HeldTensor]:
        return [
            HeldTensor(t.name, t, Region(t.global_shape, part=t.part), True)
            for t in self.sharded.owned
            if t.part is not None
        ]

    def place(self, p: Parameter) -> Place:
        """Every rank computes with the whole parameter; an owner has a copy of its part, and steps that."""
        mine = [t for t in self.sharded.owned if t.name == p.name]
        steps = ", ".join(str(t.part) for t in mine) or "nothing"
        return replace(super().place(p), steps=steps, master=sum(t.data.nbytes for t in mine))

    def reload(self) -> None:
        self.sharded.reload()
