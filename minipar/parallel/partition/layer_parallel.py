"""Layer parallelism: whole layers on different ranks, run one after another.

        rank 0            rank 1            rank 2
        blocks 0-1 ─ x ─▶ blocks 2-4 ─ x ─▶ blocks 5-6 ─▶ loss
            step ◀─ dx ─ step       ◀─ dx ─ step

    time ─────────────────────────────────────────▶
    rank 0   F . . . . B           F  forward of its blocks
    rank 1   . F . . B .           B  backward of its blocks
    rank 2   . . F B . .           .  waits

A model that does not fit one rank fits several, each holding its own blocks' weights, gradients and
optimizer state. Only one rank works at a time: this is a pipeline with a single microbatch. Several
microbatches fill the gaps (Huang et al. 2019, GPipe).

A weight that two stages use (GPT's tied embedding) has a copy on each. Each computes the gradient of its own
use; both take the step with the sum of the two, so the copies stay bitwise equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array, array_module, float_dtype, to_device, to_host
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.models import Model
from minipar.nn import Parameter
from minipar.nn.init import Constant
from minipar.parallel.partition.assignment import Assignment
from minipar.tape import no_grad
from minipar.tensor import Tensor, as_input
from minipar.trace import BACKWARD, FORWARD, span


class LayerParallel:
    """A model whose blocks lie on the ranks of `comm`, a contiguous stage of them on each.

    The weights of other ranks' blocks are freed, or never come to be if the model has no values yet.

    Args:
        model: the serial model, with the same values on every rank, or without values.
        comm: the ranks, in the order of the stages.
        assignment: one with stages (`by_cost`, `by_devices`), for this model and as many devices as ranks.
        seed: what this rank's blocks are filled from where they have no values yet.
        dtype: of those values, with `seed`.
        device: of those values, with `seed`.

    Attributes:
        blocks: the blocks that this rank runs.
        tied: the weights held here of which other ranks hold a copy, each with a communicator of these ranks.

    Raises:
        UsageError: an assignment without stages, for another model or number of ranks, or one that differs
            between ranks; the same on every rank.
    """

    def __init__(
        self,
        model: Model,
        comm: Communicator,
        assignment: Assignment,
        *,
        seed: int | None = None,
        dtype: Any = "float32",
        device: str = "cpu",
    ):
        assignment.check(model, comm)
        if assignment.stages is None:
            raise UsageError(
                f"assignment by {assignment.policy} scatters parameters, layer parallelism needs stages of"
                " blocks: use the policy cost or devices, or ShardedByPolicy"
            )
        if assignment.stages[-1].stop != len(model.blocks):
            raise UsageError(
                f"assignment by {assignment.policy} places {assignment.stages[-1].stop} blocks, the model has"
                f" {len(model.blocks)}: give it the cost of every block"
            )
        self.model, self.comm, self.assignment = model, comm, assignment
        self.is_first, self.is_last = comm.rank == 0, comm.rank == comm.size - 1
        stage = assignment.stages[comm.rank]
        self.blocks = model.blocks[stage.start : stage.stop]
        self._hold_own(seed, dtype, device)
        self._join_copies()

    def _hold_own(self, seed: int | None, dtype: Any, device: str) -> None:
        """Fill this rank's weights, free all others."""
        used = {id(p) for block in self.blocks for p in block.parameters()}
        owned = {part.item.name for part in self.assignment.held(self.comm.rank)}
        self.model.assign_paths()
        self._held = {name: p for name, p in self.model.named_parameters() if id(p) in used}
        self._owned = [p for name, p in self._held.items() if name in owned]
        missing = [name for name, p in self._held.items() if not p.is_materialized]
        if seed is None:
            everywhere = [name for names in self.comm.all_gather_object(missing) for name in names]
            if everywhere:
                raise UsageError(f"parameter {everywhere[0]} has no values: give LayerParallel a seed")
        else:
            for name in missing:
                self._held[name].materialize(seed, name, dtype, device)
            for block in self.blocks:
                for _, b in block.named_buffers():
                    b.data = to_device(b.data.astype(float_dtype(dtype)), device)
        for name, p in self.model.named_parameters():
            if name not in self._held and p.is_materialized:
                del p.data  # unmaterialised again: its memory is another rank's business

    def _join_copies(self) -> None:
        """Make a communicator of the holders of each tied weight, and give them its owner's values."""
        assert self.assignment.stages is not None
        stage_of = {b: k for k, stage in enumerate(self.assignment.stages) for b in stage}
        self.tied: list[tuple[Parameter, Communicator]] = []
        for item in self.assignment.items:
            holders = {stage_of[b] for b in item.blocks}
            if len(holders) < 2:
                continue
            group = self.comm.split(0 if self.comm.rank in holders else None)
            if group is not None:
                p = self._held[item.name]
                p.assign_(group.broadcast(p.data, root=0))  # root 0 has the first of its blocks: the owner
                self.tied.append((p, group))

    def parameters(self) -> list[Parameter]:
        """Return the weights held here, copies of tied ones included."""
        return list(self._held.values())

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Return (path, parameter) of the weights held here."""
        return list(self._held.items())

    def optimizer_params(self) -> list[Tensor]:
        """Return what this rank's optimizer is to be built on: the trained weights held here.

        A stage without weights gets an empty tensor that is never stepped, so that every rank can build the
        same optimizer.
        """
        trained: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            nothing = Parameter((0,), Constant(0.0))
            nothing.materialize(0, "")
            trained.append(nothing)
        return trained

    def __call__(self, inputs: Array | None) -> Tensor | None:
        """Run the model on a batch: rank 0 passes it, the last rank gets the output, the others None."""
        _, y = self._forward(inputs)
        return y if self.is_last else None

    def _forward(self, inputs: Array | None) -> tuple[Any, Tensor]:
        """Return this stage's input and output; the input comes from, the output goes to, a neighbour."""
        x: Any
        if not self.is_first:
            x = Tensor(self.comm.recv(self.comm.rank - 1), requires_grad=True)
        elif inputs is None:
            raise UsageError("layer parallelism: rank 0 runs the first block, so it must be given the inputs")
        else:
            x = as_input(inputs)
        y = x
        with span(FORWARD):
            for block in self.blocks:
                y = block(y)
        if not self.is_last:
            self.comm.send(y.data, self.comm.rank + 1)
        return x, y

    def forward_backward(self, inputs: Array | None, targets: Array | None, count: float) -> float:
        """Compute the gradients of one batch; return its mean loss, the same on every rank.

        Args:
            inputs: (N, ...) the whole batch; looked at on rank 0.
            targets: (N, ...) looked at on the last rank.
            count: valid targets in the batch (over the loss scale), which the sum of losses is divided by.
        """
        self.model.zero_grad()
        x, y = self._forward(inputs)
        total = np.zeros(1)
        self.comm.mark(phase="backward")
        if self.is_last:
            loss = self.model.loss(y, targets)
            with span(BACKWARD):
                (loss / count).backward()
            total[0] = loss.item()
        else:
            g = self.comm.recv(self.comm.rank + 1)
            if y.requires_grad:  # not so if nothing up to here is trained
                with span(BACKWARD):
                    y.backward(g)
        if not self.is_first:
            self.comm.send(x.grad, self.comm.rank - 1)
        self._sum_tied()
        return float(self.comm.broadcast(total, root=self.comm.size - 1)[0]) / count

    def _sum_tied(self) -> None:
        """Make each tied weight's gradient the sum over its uses on all stages, bitwise the same on each."""
        for p, group in self.tied:
            if p.requires_grad:
                g = array_module(p.data).zeros_like(p.data) if p.grad is None else p.grad
                p.grad = group.all_reduce(g)

    def evaluate(self, inputs: Array | None, targets: Array | None) -> float:
        """Return the sum of the losses of a batch without computing gradients, the same on every rank."""
        total = np.zeros(1)
        with no_grad():
            y = self(inputs)
            if y is not None:
                total[0] = self.model.loss(y, targets).item()
        return float(self.comm.broadcast(total, root=self.comm.size - 1)[0])

    def grad_norm(self) -> float:
        """Return the 2-norm of the whole gradient, the same on every rank; a tied weight counts once."""
        square = optim.squared_norm(p.grad for p in self._owned)
        return math.sqrt(self.comm.all_reduce(np.array([square]))[0])

    def step(self, optimizer: optim.Optimizer) -> None:
        """Take the optimizer's step on the weights held here."""
        optimizer.step()

    def state_dict(self, root: int = 0) -> dict[str, Array] | None:
        """Return the whole model's state on `root` (host copies, serial names and order), None elsewhere."""
        state = {name: np.array(a) for name, a in self.tensors(root)}
        return state if self.comm.rank == root else None

    def tensors(self, root: int = 0) -> Iterator[tuple[str, Array]]:
        """Yield on `root` (name, host array) of the whole model, one tensor at a time, in serial order.

        Collective: the others yield nothing, and must be asked all the same, for they send.
        """
        assert self.assignment.stages is not None
        owner = {part.item.name: part.device for part in self.assignment.parts}
        buffers = {id(b): k for k, stage in enumerate(self.assignment.stages)
                   for i in stage for _, b in self.model.blocks[i].named_buffers()}  # fmt: skip
        tensors = [(name, p, owner[name]) for name, p in self.model.named_parameters()]
        tensors += [(name, b, buffers[id(b)]) for name, b in self.model.named_buffers()]  # type: ignore[misc]
        for name, t, rank in tensors:
            if self.comm.rank == rank == root:
                yield name, to_host(t.data)
            elif self.comm.rank == rank:
                self.comm.send(to_host(t.data), root)
            elif self.comm.rank == root:
                yield name, self.comm.recv(rank)
