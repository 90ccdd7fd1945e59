"""The memory ledger: bytes that a rank holds, by kind, counted from the arrays that are alive.

`held` counts; `zero_formula` says what ZeRO promises (Rajbhandari et al. 2020, section 5 and figure 1). An
array that is a view is counted as the memory behind it, once, however many views there are. So a flat array
counts with its padding, and a small view that keeps a large array alive counts as the large one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import FunctionType
from typing import Any

from minipar.backend import Array, is_gpu_array
from minipar.comm.differentiable import Lent
from minipar.nn import Module, Parameter
from minipar.optim import Optimizer
from minipar.parallel.zero.zero import Zero
from minipar.tape import Deferred, Edge, Node, Placeable
from minipar.tensor import Handle, Tensor

Root = Tensor | Edge | Deferred  # what keeps a graph alive
KINDS = ("parameters", "gradients", "optimizer", "activations", "messages")


@dataclass(frozen=True)
class Held:
    """Bytes by kind.

    Attributes:
        parameters: of the model, its buffers included: whole ones and shards.
        gradients: whole ones, sums, and those that wait to be sent.
        optimizer: the state arrays, such as Adam's moments.
        activations: what the recorded operations keep for backward.
        messages: units of ZeRO that are being received or sent at this moment.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, kind) for kind in KINDS)

    def __str__(self) -> str:
        rows = [(kind, f"{getattr(self, kind):,}") for kind in (*KINDS, "total")]
        width = max(len(size) for _, size in rows)
        return "\n".join(f"{kind:<12}{size:>{width}} bytes" for kind, size in rows)


def held(
    model: Module | Zero,
    optimizer: Optimizer | None = None,
    output: Tensor | None = None,
    under_way: Sequence[Root] = (),
) -> Held:
    """Return what this rank holds now.

    Args:
        model: a model, also a data-parallel or tensor-parallel one, or its ZeRO wrapper.
        optimizer: whose state counts.
        output: a loss or other result, not yet gone through backward, whose graph keeps activations.
        under_way: more of that kind, as a pipeline has them: where backwards will begin, weight gradients put off.
    """
    plain = model.model if isinstance(model, Zero) else model
    tensors = [p for p in plain.parameters() if p.is_materialized]
    values: list[Any] = [*(p.data for p in tensors), *(b.data for _, b in plain.named_buffers())]
    gradients: list[Any] = [g for p in plain.parameters() for g in (p.grad, p.grad_buffer)]
    messages = 0
    if isinstance(model, Zero):
        for unit in model.units:
            values += [unit.own, unit.whole, *(piece.tensor.data for piece in unit.pieces)]
            gradients += [unit.gradient, *(piece.tensor.grad for piece in unit.pieces)]
        messages = model.scatters.bytes_under_way()
        messages += model.gathers.bytes_under_way() if model.gathers else 0
    entries = optimizer.state.values() if optimizer else ()
    state = [value for entry in entries for value in entry.values() if hasattr(value, "nbytes")]
    parameters = _owners(values)
    saved = _owners(saved_arrays(*([] if output is None else [output]), *under_way))
    return Held(
        parameters=sum(parameters.values()),
        gradients=sum(_owners(gradients).values()),
        optimizer=sum(_owners(state).values()),
        activations=sum(size for owner, size in saved.items() if owner not in parameters),
        messages=messages,
    )


def _owners(arrays: Iterable[Array | None]) -> dict[int, int]:
    """Return {identity: bytes} of the memory behind the arrays, each once."""
    found = {}
    for x in arrays:
        if x is not None:
            owner: Any = x
            while _is_array(owner.base):
                owner = owner.base
            found[id(owner)] = owner.nbytes
    return found


def _is_array(x: Any) -> bool:
    return is_gpu_array(x) or (hasattr(x, "nbytes") and hasattr(x, "base") and hasattr(x, "strides"))


def saved_arrays(*roots: Root) -> Iterator[Array]:
    """Yield every array that the graphs behind `roots` keep for backward: what their closures captured.

    Parameters are captured as handles and are not activations; the models themselves are passed over.
    """
    nodes: list[Node] = []
    stack: list[Any] = []
    for root in roots:
        if isinstance(root, list):
            stack += [work for _, work in root]
        elif (edge := root.edge() if isinstance(root, Tensor) else root) is not None:
            nodes.append(edge[0])
    seen: set[int] = {id(node) for node in nodes}
    while nodes or stack:
        if not stack:
            node = nodes.pop()
            stack.append(node.vjp)
            for following in node.edges:
                if following is not None and id(following[0]) not in seen:
                    seen.add(id(following[0]))
                    nodes.append(following[0])
            continue
        x = stack.pop()
        if id(x) in seen or x is None:
            continue
        seen.add(id(x))
        if _is_array(x):
            yield x
        elif isinstance(x, Handle):
            stack.append(x.tensor)
        elif isinstance(x, Parameter | Lent | Module):
            continue
        elif isinstance(x, Tensor):
            stack.append(x.data)
        elif isinstance(x, FunctionType):
            stack += [cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell)]
            stack += x.__defaults__ or ()
        elif isinstance(x, Placeable):
            stack.append(x.compute)
        elif isinstance(x, functools.partial):
            stack += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, tuple | list | set):
            stack += x
        elif isinstance(x, dict):
            stack += x.values()


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that was deleted, or not yet set
        return False
    return True


def zero_formula(numel: int, ranks: int, stage: int, itemsize: int, state: int) -> dict[str, Fraction]:
    """Return ZeRO's bytes a rank by kind, before padding: exact, so fractions.

    With Ψ elements over N ranks, parameters are Ψ (Ψ/N in stage 3), gradients Ψ (Ψ/N from stage 2 on), and
    optimizer state state·Ψ (state·Ψ/N from stage 1 on), each times the size of an element. Here gradients
    are meant at the end of the last backward, before stage 1's sum, after which it keeps Ψ/N, too.

    Args:
        numel: Ψ.
        stage: 0 (plain data parallelism) to 3.
        itemsize: bytes of an element.
        state: arrays of state that the optimizer keeps (2 for Adam, 1 for momentum, 0 for plain SGD).
    """
    size, parts = numel * itemsize, zero_parts(ranks, stage)
    return {kind: part * size * (state if kind == "optimizer" else 1) for kind, part in parts.items()}


def zero_parts(ranks: int, stage: int) -> dict[str, Fraction]:
    """Return which part of a model's parameters, gradients and optimizer state one of the ranks holds."""
    first = {"parameters": 3, "gradients": 2, "optimizer": 1}  # the stage from which on it is divided
    return {kind: Fraction(1, ranks if stage >= divided else 1) for kind, divided in first.items()}
