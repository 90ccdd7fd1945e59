"""What the training job asks of a kind of parallelism: one interface, one small class for each kind.

A strategy is given a serial model's blocks and loss, adds up gradients microbatch by microbatch, and knows
which tensors this rank's optimizer steps. The kinds themselves are in files of their own; here they only get
the same handles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import optim
from minipar.backend import Array, array_module, summand, to_host
from minipar.comm.interface import Communicator
from minipar.data import Batch
from minipar.kernels.common import widen
from minipar.models import Model
from minipar.nn import Parameter
from minipar.parallel.batch_norm import refuse_microbatches
from minipar.parallel.norms import global_norm
from minipar.parallel.partition.owner_sharding import OwnedPart
from minipar.parallel.placement import Place, Replicate, describe, held_bytes, is_sharded
from minipar.parallel.region import Region
from minipar.tape import no_grad
from minipar.tensor import Tensor, as_input
from minipar.trace import BACKWARD, FORWARD, span


@dataclass(frozen=True)
class HeldTensor:
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
        """Return the model's output for this rank's inputs."""
        return self.model(as_input(inputs))

    def waiting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for one microbatch's backward; all but the last only add to the gradients.

        Raises:
            UsageError: the model has batch norm, whose statistics would be those of one microbatch.
        """
        if not last:
            refuse_microbatches(self.model)
        return contextlib.nullcontext()

    def add_gradients(self, batch: Batch, count: float, last: bool) -> Any:
        """Add the gradients of (sum of losses) / count of this piece of the batch; return its sum of losses.

        Args:
            count: valid targets of the global batch, over the loss scale where there is one.

        Returns:
            A number, or a scalar array where the GPU has not been waited for: add up, then take `float` of it.
        """
        with self.waiting(last):
            self.batch_ranks.mark(phase="forward")
            with span(FORWARD):
                loss = self.model.loss(self.run(batch.inputs), batch.targets)
            self.batch_ranks.mark(phase="backward")
            with span(BACKWARD):
                (loss / count).backward()
        return summand(loss.data)

    def finish_gradients(self) -> None:
        """Called once a step, after the last piece."""

    def synchronize(self) -> None:
        """Sum the gradients over the ranks that share the batch, where backward was told to wait."""

    def precision_changed(self) -> None:
        """Called when activations may have another dtype from now on."""

    def finish_steps(self) -> None:
        """Bring together what steps have left different on the ranks (local SGD), so that they hold one model."""

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
        best = widen(best)  # MPI knows no maximum of bfloat16
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

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, host array) of every tensor of the serial model, complete on rank 0 of the world.

        Collective: every rank goes through all of them, in step with the others; what it is given on another
        rank is not to be relied on. No more is brought together at a time than one tensor (one unit of ZeRO).
        """
        for name, p in self.model.named_parameters():
            yield name, self._whole(p, p.data)
        for name, b in self.model.named_buffers():
            yield name, to_host(b.data)

    @staticmethod
    def _whole(p: Parameter, local: Array) -> Array:
        """Return the serial parameter on the host from what each tensor-parallel rank holds of it."""
        return to_host(local if p.layout is None else p.layout.whole(local, p.global_shape))

    def state(self) -> dict[str, Array]:
        """Return the serial model's state; complete on rank 0 of the world. Every rank calls it."""
        return {name: np.array(a) for name, a in self.tensors()}

    def gradients_known(self) -> bool:
        """Whether this rank holds the summed gradients before the step."""
        return True

    def parameters_held(self) -> list[HeldTensor]:
        """Return this rank's parameters as its optimizer sees them: what a checkpoint saves and loads."""
        first = self.batch_ranks.rank == 0
        return [
            HeldTensor(p.name, p, Region(p.global_shape, p.layout), first and self._is_first_of_tp(p))
            for p in self.model.parameters()
        ]

    def place(self, p: Parameter) -> Place:
        """Return how the parameter lies on the mesh, as this rank sees it."""
        return Place((p.layout.placement if p.layout is not None else Replicate(),))

    def tell_parameters(self) -> None:
        """Let every parameter know its place; `describe` and `str` read it there."""
        for p in self.model.parameters():
            p.place = self.place(p)

    def parameter_bytes(self) -> int:
        """Return the bytes of parameters that this rank keeps between steps."""
        return sum(map(held_bytes, self.model.parameters()))

    def __str__(self) -> str:
        """Return a line for each parameter: placement, global and local shape, bytes on this rank."""
        return describe(self.model)

    def _is_first_of_tp(self, p: Parameter) -> bool:
        return self.tp is None or self.tp.rank == 0 or is_sharded(p)

    def buffers_held(self) -> list[HeldTensor]:
        """Return this rank's buffers."""
        first = self.batch_ranks.rank == 0 and (self.tp is None or self.tp.rank == 0)
        return [HeldTensor(name, b, Region(b.shape), first) for name, b in self.model.named_buffers()]

    def reload(self) -> None:
        """Make the model's weights follow what was written into the tensors of `parameters_held`. Collective."""


def _cut_vocabulary(model: Model) -> bool:
    wte = getattr(model, "wte", None)
    return wte is not None and is_sharded(wte.weight) and wte.weight.layout.placement.dim == 0


def matrix_like(p: Any) -> bool:
    """Whether weight decay is for this parameter: two or more axes in the serial model."""
    shape = p.global_shape if isinstance(p, Parameter | OwnedPart) else p.shape
    return len(shape) >= 2
