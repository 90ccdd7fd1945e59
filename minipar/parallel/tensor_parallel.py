"""Tensor parallelism: the layers of a serial model cut over ranks, by a plan.

`parallelize(model, comm, plan)` walks the plan, a table from names (`*` matches any part) to *styles*. A
style says how a module's parameters are placed and what happens around its forward. The pattern behind all
of them (Shoeybi et al. 2019, figure 3):

    x ── copy_to ── A (columns) ── f ── B (rows) ── reduce_from ── y
         backward:                                  forward:
         all-reduce                                 all-reduce

A's outputs are cut by feature, B's inputs likewise, so between the two nothing is sent.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from minipar import ops
from minipar.comm.differentiable import all_gather, copy_to, gather, reduce_from, reduce_scatter, scatter
from minipar.comm.interface import Communicator, balanced
from minipar.errors import UsageError
from minipar.nn import CrossEntropyLoss, Dropout, Embedding, Linear, Module
from minipar.parallel import vocabulary
from minipar.parallel.placement import Shard, place
from minipar.tensor import Tensor

SEQUENCE = 1  # the axis of (B, T, C) that sequence parallelism cuts


class Style:
    """How one module is cut. `apply` places its parameters and wraps its forward."""

    kind: type[Module] = Module

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        """Cut `module`, called `name`, over the ranks of `comm`."""
        raise TypeError(f"{type(self).__name__} does not say how to cut a module")


Plan = Mapping[str, Style | tuple[Style, ...]]


_length: ContextVar[int] = ContextVar("sequence_length", default=0)


class SequenceLength:
    """The whole length of the sequence at hand, set where it is cut and read where it is joined again.

    It cannot be told from a part, since parts are uneven. It lives in the context, as the moment of `random`
    does: each rank-thread has its own, and a recomputed block sees the length of its own forward.
    """

    @property
    def total(self) -> int:
        return _length.get()

    @total.setter
    def total(self, length: int) -> None:
        _length.set(length)

    def counts(self, ranks: int) -> list[int]:
        """Return each rank's length."""
        return balanced(self.total, ranks)


def around(
    module: Module, enter: Callable[..., Any] | None = None, leave: Callable[..., Any] | None = None
) -> None:
    """Run `enter` on a module's input and `leave` on its output, from outside."""
    forward = module.forward

    def wrapped(*inputs: Any) -> Any:
        if enter is not None:
            inputs = (enter(inputs[0]), *inputs[1:])
        output = forward(*inputs)
        return leave(output) if leave is not None else output

    module.forward = wrapped  # type: ignore[method-assign]


def parallelize(model: Module, comm: Communicator, plan: Plan) -> Module:
    """Cut a serial model over the ranks of `comm`, in place, and return it. Nothing is sent.

    A single rank has nothing to cut: the model stays the serial one, bitwise.

    Args:
        model: materialised (each rank then keeps its part) or not (each rank then initialises its part only).
        plan: name patterns to styles; a tuple of styles is applied in order.

    Raises:
        UsageError: a pattern that matches nothing, two patterns that match one module, a module of another
            kind than the style is for, or a size that cannot be cut; the same on every rank. After the last
            of these some modules may be cut already: the model is not to be used then.
    """
    chosen = _resolve(dict(model.named_modules()), plan)
    if comm.size > 1:
        for name, module, styles in chosen:
            for style in styles:
                style.apply(module, name, comm)
    return model


def _resolve(modules: dict[str, Module], plan: Plan) -> list[tuple[str, Module, tuple[Style, ...]]]:
    """Return (name, module, its styles) of every module that the plan names, in the plan's order."""
    chosen: dict[str, str] = {}
    found = []
    for pattern, entry in plan.items():
        styles = entry if isinstance(entry, tuple) else (entry,)
        names = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            known = ", ".join(name for name in modules if name)
            raise UsageError(f"plan: {pattern!r} matches no module; the model has {known}")
        for name in names:
            if name in chosen:
                raise UsageError(
                    f"plan: both {chosen[name]!r} and {pattern!r} match {name}; a module is cut once"
                )
            chosen[name] = pattern
            for style in styles:
                if not isinstance(modules[name], style.kind):
                    raise UsageError(
                        f"plan: {pattern!r} puts {type(style).__name__} on {name},"
                        f" a {type(modules[name]).__name__}; it is for {style.kind.__name__}"
                    )
            found.append((name, modules[name], styles))
    return found


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

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        cut = Shard(0, self.groups, self.unit)
        place(module.weight, f"{name}.weight", cut, comm)
        if module.bias is not None:
            place(module.bias, f"{name}.bias", cut, comm)
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

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        place(module.weight, f"{name}.weight", Shard(1, unit=self.unit), comm)
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

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        place(module.weight, f"{name}.weight", Shard(0), comm)
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

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        place(module.weight, f"{name}.weight", Shard(1), comm)
        counts = module.weight.layout.counts(module.weight.global_shape)
        around(module, leave=lambda y: gather(y, comm, -1, counts))


@dataclass(frozen=True)
class VocabularyHead(Style):
    """A linear layer whose weight is cut by output features and used by name elsewhere: placement only."""

    kind = Linear

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        place(module.weight, f"{name}.weight", Shard(0), comm)


@dataclass(frozen=True)
class VocabularyLoss(Style):
    """Cross-entropy of logits that are cut by vocabulary; the logits are never gathered."""

    size: int
    kind = CrossEntropyLoss

    def apply(self, module: Any, name: str, comm: Communicator) -> None:
        if module.reduction != "sum":
            raise UsageError(
                f"{name}: reduction {module.reduction!r} is not offered over a cut vocabulary; use sum"
            )
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
