"""Parameter sharding by policy: data parallelism in which every piece of every parameter has one owner.

    backward      each rank: gradients of its share of the batch
    reduce        the sum of each piece's gradients goes to its owner, and to nobody else
    step          the owner updates its piece: it alone keeps optimizer state for it
    broadcast     every owner sends its new values to all

Any assignment will do: whole parameters on balanced devices, rows of an embedding, runs of elements. What a
policy lays out decides how the optimizer's memory and work are shared. Rajbhandari et al. 2020, "ZeRO", is
the case of equal runs.

With the pieces laid end to end in the order of their owners, "reduce each to its owner" is one
reduce-scatter with unequal counts, and "each owner broadcasts" is one all-gather.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array, array_module
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.kernels.common import work_dtype
from minipar.models import Model
from minipar.nn import BatchNorm2d
from minipar.parallel.partition.assignment import Assignment, Part
from minipar.tensor import Tensor, as_input


class OwnedPart(Tensor):
    """The master copy of a piece of a parameter, on the rank that owns it: what the optimizer sees.

    Attributes:
        name: the parameter's path.
        part: which piece of it; None on a rank that owns nothing.
        global_shape: the whole parameter's shape.
    """

    __slots__ = ("global_shape", "name", "part")

    def __init__(self, data: Array, part: Part | None):
        super().__init__(data, requires_grad=True)
        self.part = part
        self.name = part.item.name if part else ""
        self.global_shape = part.item.shape if part else (0,)


class ShardedByPolicy:
    """A model trained on shares of the batch, each piece of its parameters updated by the owner alone.

    Every rank keeps the whole model to compute with; the master copies, the summed gradients and the
    optimizer state lie with the owners.

    Args:
        model: a materialised model, the same on every rank in all but its values; the owners' are taken.
        comm: the ranks that share the batch.
        assignment: one for this model and as many devices as ranks.

    Attributes:
        owned: the pieces that this rank owns.

    Raises:
        UsageError: an assignment for another model or number of ranks, or one that differs between ranks;
            parameters of several dtypes, or not contiguous in memory.
    """

    def __init__(self, model: Model, comm: Communicator, assignment: Assignment):
        assignment.check(model, comm)
        self.model, self.comm, self.assignment = model, comm, assignment
        self.params = dict(model.named_parameters())
        first = next(iter(self.params.values())).data
        for name, p in self.params.items():
            if p.dtype != first.dtype:
                raise UsageError(f"parameter {name} is {p.dtype}, others {first.dtype}: all must be alike")
            if not p.data.flags.c_contiguous:
                raise UsageError(f"parameter {name} is not contiguous in memory: it cannot be cut")
        self.pieces = [assignment.held(d) for d in range(comm.size)]  # by owner
        self.elements = [assignment.elements(d) for d in range(comm.size)]
        # Each owner's gradients are followed by one flag per piece: summed over the ranks, it says whether
        # any rank used the parameter. One that nobody used gets no step, as in the serial run.
        self.counts = [n + len(held) for n, held in zip(self.elements, self.pieces)]
        self.master = array_module(first).empty(self.elements[comm.rank], first.dtype)
        self.owned: list[OwnedPart] = []
        at = 0
        for part in self.pieces[comm.rank]:
            piece = part.of(self.params[part.item.name].data)
            data = self.master[at : at + part.elements].reshape(piece.shape)
            data[...] = piece
            self.owned.append(OwnedPart(data, part))
            at += part.elements
        self._broadcast()
        for _, buffer in model.named_buffers():
            buffer.assign_(comm.broadcast(buffer.data, root=0))
        for _, module in model.named_modules():
            if isinstance(module, BatchNorm2d):
                module.reduce = comm.all_reduce  # its statistics are the whole batch's

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def optimizer_params(self) -> list[Tensor]:
        """Return what this rank's optimizer is to be built on: the pieces it owns.

        A rank that owns nothing gets an empty tensor that is never stepped, so that every rank can build the
        same optimizer.
        """
        return [*self.owned] or [OwnedPart(self.master, None)]

    def forward_backward(self, inputs: Array, targets: Array, count: int) -> float:
        """Compute the gradients of one batch; return its mean loss, the same on every rank.

        Args:
            inputs: (n, ...) this rank's share of the batch, possibly empty.
            targets: (n, ...) its targets.
            count: valid targets in the whole batch, which the sum of losses is divided by.
        """
        self.model.zero_grad()
        loss = self.model.loss(self.model(as_input(inputs)), targets)
        (loss / count).backward()
        self.synchronize()
        return float(self.comm.all_reduce(np.array([loss.item()]))[0]) / count

    def synchronize(self) -> None:
        """Sum the gradients of all ranks, each piece's on its owner; the model's own gradients are freed.

        Call it once a step, after the backward of the last microbatch.
        """
        # Two-byte floats are summed in float32 and rounded once; `buckets` has the reason.
        flat = array_module(self.master).zeros(sum(self.counts), work_dtype(self.master.dtype))
        at = 0
        for held in self.pieces:
            flags = at + sum(part.elements for part in held)
            for i, part in enumerate(held):
                g = self.params[part.item.name].grad
                if g is not None:
                    flat[at : at + part.elements] = part.of(g).reshape(-1)
                    flat[flags + i] = 1
                at += part.elements
            at = flags + len(held)
        self.model.zero_grad()
        mine = self.comm.reduce_scatter(flat, self.counts)
        used = mine[self.elements[self.comm.rank] :].tolist()
        mine = mine.astype(self.master.dtype, copy=False)
        at = 0
        for t, flag in zip(self.owned, used):
            t.grad = mine[at : at + t.size].reshape(t.shape) if flag else None
            at += t.size

    def grad_norm(self) -> float:
        """Return the 2-norm of the whole gradient, the same on every rank; each element counts once."""
        square = optim.squared_norm(t.grad for t in self.owned)
        return math.sqrt(self.comm.all_reduce(np.array([square]))[0])

    def step(self, optimizer: optim.Optimizer) -> None:
        """Let each owner take the optimizer's step on its pieces, then give everyone the new values."""
        optimizer.step()
        self._broadcast()

    def reload(self) -> None:
        """Give every rank the values that were written into the owned pieces from outside. Collective."""
        self._broadcast()

    def _broadcast(self) -> None:
        """Set every rank's model to the owners' master copies."""
        values = self.comm.all_gather(self.master, self.elements)
        at = 0
        for held in self.pieces:
            for part in held:
                target = part.of(self.params[part.item.name].data)
                target[...] = values[at : at + part.elements].reshape(target.shape)
                at += part.elements
        for p in self.params.values():
            p.version += 1
