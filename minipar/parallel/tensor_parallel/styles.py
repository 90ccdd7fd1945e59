"""The styles in which a module is cut: linear layers, embeddings, the vocabulary's loss, and a region's ends.

Each is a line of a plan, which `parallelize` applies. What a style does to a module stands in its `cuts`, how
its parameters are placed, and in its `apply`, what happens to activations before and after its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipar import ops
from minipar.comm.differentiable import all_gather, copy_to, gather, reduce_from, reduce_scatter, scatter
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import CrossEntropyLoss, Dropout, Embedding, Linear
from minipar.parallel.placement import Shard
from minipar.parallel.tensor_parallel import vocabulary
from minipar.parallel.tensor_parallel.parallelize import SEQUENCE, SequenceLength, Style, around
from minipar.tensor import Tensor

# --- Linear layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column(Style):
    """Linear cut by output features: x (..., in) → (..., out/ranks); weight Shard(0), bias Shard(0).

    Args:
        groups, unit: see `Shard`; a fused query-key-value projection has 3 groups of heads.
        gathered: join the outputs to (..., out) on every rank.
        sequence: the input is cut along this sequence and is gathered first.
    """

    groups: int = 1
    unit: int = 1
    gathered: bool = False
    sequence: SequenceLength | None = None
    kind = Linear

    def cuts(self, module: Any) -> dict[str, Shard]:
        cut = Shard(0, self.groups, self.unit)
        return {"weight": cut} if module.bias is None else {"weight": cut, "bias": cut}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        counts = module.weight.layout.counts(module.weight.global_shape)
        leave = (lambda y: gather(y, comm, -1, counts)) if self.gathered else None
        around(module, _enter(comm, self.sequence), leave)


@dataclass(frozen=True)
class Row(Style):
    """Linear cut by input features: x (..., in/ranks) → (..., out), summed; weight Shard(1).

    The bias is whole on every rank and is added once, to the sum. In mixed precision the sum is taken in
    float32 and rounded once, as within one matrix product: with float16 terms the result would depend on how
    many ranks there are, and a ReLU behind it would open for other samples than in the serial run.

    Args:
        unit: see `Shard`.
        scattered: the input is whole on every rank and its part is taken first.
        sequence: the sum is left cut along this sequence.
    """

    unit: int = 1
    scattered: bool = False
    sequence: SequenceLength | None = None
    kind = Linear

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(1, unit=self.unit)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        counts = module.weight.layout.counts(module.weight.global_shape)

        def forward(x: Tensor) -> Tensor:
            if self.scattered:
                x = scatter(x, comm, -1, counts)
            part = ops.linear(x, module.weight, unrounded=True)  # (..., out), this rank's share of the sum
            if self.sequence:
                y = reduce_scatter(part, comm, SEQUENCE)
                y = y if module.bias is None else y + ops.rounded(copy_to(module.bias, comm), module.weight)
            else:
                y = reduce_from(part, comm)
                y = y if module.bias is None else y + ops.rounded(module.bias, module.weight)
            return ops.rounded(y, module.weight)

        module.forward = forward


# --- Embeddings and the loss ------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabularyEmbedding(Style):
    """Embedding cut by rows: ids (...) → (..., width), each rank looking up its range; weight Shard(0)."""

    kind = Embedding

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(0)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        total = module.weight.global_shape[0]
        start = vocabulary.first_row(total, comm)

        def forward(ids: Any) -> Tensor:
            ids = ids.data if isinstance(ids, Tensor) else ids
            vocabulary.check_ids(f"{name}: ids", ids, total)
            return reduce_from(vocabulary.embed(module.weight, ids, start), comm)

        module.forward = forward


@dataclass(frozen=True)
class WidthEmbedding(Style):
    """Embedding cut by width: each rank has a piece of every row, the pieces are joined; weight Shard(1)."""

    kind = Embedding

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(1)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        counts = module.weight.layout.counts(module.weight.global_shape)
        around(module, leave=lambda y: gather(y, comm, -1, counts))


@dataclass(frozen=True)
class VocabularyHead(Style):
    """A linear layer whose weight is cut by output features and used by name elsewhere: placement only."""

    kind = Linear

    def cuts(self, module: Any) -> dict[str, Shard]:
        return {"weight": Shard(0)}

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        """Its forward stays as it is."""


@dataclass(frozen=True)
class VocabularyLoss(Style):
    """Cross-entropy of logits that are cut by vocabulary; the logits are never gathered."""

    size: int
    kind = CrossEntropyLoss

    def check(self, module: Any, name: str) -> None:
        if module.reduction != "sum":
            raise UsageError(
                f"{name}: reduction {module.reduction!r} is not offered over a cut vocabulary; use sum"
            )

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        start = vocabulary.first_row(self.size, comm)

        def forward(logits: Tensor, targets: Any) -> Tensor:
            targets = targets.data if isinstance(targets, Tensor) else targets
            return vocabulary.cross_entropy(
                logits, targets, comm, self.size, start, module.ignore_index, module.label_smoothing
            )

        module.forward = forward


# --- Where a region begins or ends ------------------------------------------------------------------------


def _enter(comm: Communicator, sequence: SequenceLength | None) -> Callable[[Tensor], Tensor]:
    """Return what turns an activation into one that each rank uses in its own way."""
    if sequence is None:
        return lambda x: copy_to(x, comm)
    return lambda x: all_gather(x, comm, SEQUENCE, sequence.counts(comm.size))  # (B, T/ranks, C) → (B, T, C)


@dataclass(frozen=True)
class EnterAfter(Style):
    """After this module each rank goes on with its own columns, so the gradients of its output are summed."""

    sequence: SequenceLength | None = None

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        around(module, leave=_enter(comm, self.sequence))


@dataclass(frozen=True)
class SequenceScatter(Style):
    """After this module the sequence is cut: (B, T, C) → (B, T/ranks, C). Korthikanti et al. 2022."""

    sequence: SequenceLength

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        def leave(x: Tensor) -> Tensor:
            self.sequence.total = x.shape[SEQUENCE]
            return scatter(x, comm, SEQUENCE, self.sequence.counts(comm.size))

        around(module, leave=leave)


@dataclass(frozen=True)
class PartialGradients(Style):
    """A module whose whole parameters see only this rank's part of the activation: gradients are summed.

    Layer norm under sequence parallelism.
    """

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        forward = module.forward
        whole = {key: p for key, p in vars(module).items() if isinstance(p, Tensor)}

        def wrapped(*inputs: Any) -> Any:
            vars(module).update({key: copy_to(p, comm) for key, p in whole.items()})
            try:
                return forward(*inputs)
            finally:
                vars(module).update(whole)

        module.forward = wrapped


@dataclass(frozen=True)
class CutDropout(Style):
    """Dropout of an activation that is cut along axis 1: its mask is this rank's part of the serial mask.

    Args:
        total: the axis' whole length.
    """

    total: int | SequenceLength
    kind = Dropout

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        def window() -> tuple[int, int]:
            total = self.total if isinstance(self.total, int) else self.total.total
            return sum(balanced(total, comm.size)[: comm.rank]), total

        module.window = window
