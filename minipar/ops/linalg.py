"""Matrix products: where nearly all the time of training goes.

A gradient that is itself a product is returned as a thunk: it is computed only if it is wanted, and a
weight's may be put off.
"""

from __future__ import annotations

from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module
from minipar.ops.elementwise import unbroadcast
from minipar.tensor import primitive


def _product(a: Array, b: Array) -> Array:
    """a @ b; float16 is multiplied in float32 and rounded once, as a tensor core does."""
    if a.dtype == "float16" and b.dtype == "float16":
        return (a.astype("float32") @ b.astype("float32")).astype("float16")
    return a @ b


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)


@primitive
def matmul(a, b):
    """(..., n, k) @ (..., k, m) → (..., n, m), leading axes broadcast; a vector counts as one row or column."""
    y = _product(a, b)

    def vjp(g: Array) -> Any:
        rows, cols = a if a.ndim > 1 else a[None, :], b if b.ndim > 1 else b[:, None]
        full = g if a.ndim > 1 else g[..., None, :] if b.ndim > 1 else g[..., None]
        full = full if b.ndim > 1 or a.ndim == 1 else full[..., None]
        if a.ndim == 1 and b.ndim == 1:
            full = g.reshape(1, 1)
        return (
            lambda: unbroadcast(_product(full, _t(cols)), rows).reshape(a.shape),
            lambda: unbroadcast(_product(_t(rows), full), cols).reshape(b.shape),
        )

    return y, vjp


@primitive(handles=("weight",))
def linear(x, weight, bias=None):
    """x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None → (..., out).

    Raises:
        ValueError: the last axis of x is not `in`.
    """
    w = weight.data
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"linear: input {x.shape} has {x.shape[-1]} features, weight {w.shape} expects {w.shape[1]}")
    k = kernels.of(x)
    return k.linear(x, w, bias), lambda g: (
        lambda: k.linear_backward_input(g, weight.data),
        lambda: k.linear_backward_weight(g, x),
        None if bias is None else lambda: k.linear_backward_bias(g),
    )


@primitive(handles=("weight",))
def embedding(weight, ids):
    """Rows of `weight` (V, C) picked by integer `ids` (...) → (..., C).

    Raises:
        IndexError: an id lies outside [0, V).
    """
    w = weight.data
    rows = w.shape[0]
    if ids.size and not (0 <= int(ids.min()) and int(ids.max()) < rows):
        raise IndexError(f"embedding: ids from {int(ids.min())} to {int(ids.max())}, the table has rows 0 to {rows - 1}")
    k = kernels.of(w)
    return k.embedding(w, ids), lambda g: (lambda: k.embedding_backward(g, ids, rows), None)


@primitive
def _einsum(*operands, subscripts):
    xp = array_module(operands[0])
    inputs, output = subscripts.split("->")
    terms = inputs.split(",")

    def vjp(g: Array) -> Any:
        def gradient(i: int) -> Array:
            # Swap operand i and the output. Letters that only operand i has were summed: broadcast them back.
            others = [t for j, t in enumerate(terms) if j != i]
            known = set(output).union(*others)
            kept = "".join(c for c in terms[i] if c in known)
            arrays = [g] + [a for j, a in enumerate(operands) if j != i]
            dx = xp.einsum(",".join([output, *others]) + "->" + kept, *arrays, optimize=True)
            shape = tuple(n if c in known else 1 for c, n in zip(terms[i], operands[i].shape))
            return xp.broadcast_to(dx.reshape(shape), operands[i].shape).copy()

        return tuple((lambda i=i: gradient(i)) for i in range(len(operands)))

    return xp.einsum(subscripts, *operands, optimize=True), vjp


def einsum(subscripts: str, *operands: Any) -> Any:
    """Einstein summation with an explicit output: einsum("bij,bjk->bik", a, b).

    Raises:
        ValueError: no "->", an ellipsis, or a letter repeated within one operand (a diagonal).
    """
    subscripts = subscripts.replace(" ", "")
    if "->" not in subscripts or "." in subscripts:
        raise ValueError(f"einsum: {subscripts!r} must name its output with '->' and use no '...'")
    for term in subscripts.split("->")[0].split(","):
        if len(set(term)) != len(term):
            raise ValueError(f"einsum: {term!r} repeats a letter; diagonals are not supported")
    return _einsum(*operands, subscripts=subscripts)
