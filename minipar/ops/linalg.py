"""Matrix products: where nearly all the time of training goes.

A gradient that is itself a product is returned as a thunk: it is computed only if it is wanted, and a
weight's may be put off.
"""

from __future__ import annotations

import functools
from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module, is_gpu_array
from minipar.kernels.common import widen
from minipar.ops.elementwise import unbroadcast
from minipar.tape import Placeable
from minipar.tensor import primitive


def _product(a: Array, b: Array) -> Array:
    """a @ b; two-byte floats are added up in float32 and rounded once: by upcasting, or on a GPU's tensor cores."""
    if is_gpu_array(a):
        return kernels.gpu_blas.matmul(a, b)
    if a.dtype.itemsize == 2 and a.dtype == b.dtype:
        return (a.astype("float32") @ b.astype("float32")).astype(a.dtype)
    return a @ b


def _t(x: Array) -> Array:
    return x.swapaxes(-1, -2)


@primitive(precision="low")
def matmul(a, b):
    """(..., n, k) @ (..., k, m) → (..., n, m), leading axes broadcast; a vector is one row or column.

    Raises:
        ValueError: the inner sizes k differ, or an operand is a single number.
    """
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: {a.shape} @ {b.shape} is not (..., n, k) @ (..., k, m) with one k")
    y = _product(a, b)

    def vjp(g: Array) -> Any:
        rows, cols = a, b
        if b.ndim == 1:
            cols, g = b[:, None], g[..., None]  # (k, 1), (..., n, 1)
        if a.ndim == 1:
            rows, g = a[None, :], g[..., None, :]  # (1, k), (..., 1, m)
        return (
            lambda: unbroadcast(_product(g, _t(cols)), rows.shape).reshape(a.shape),
            lambda: unbroadcast(_product(_t(rows), g), cols.shape).reshape(b.shape),
        )

    return y, vjp


@primitive(handles=("weight",), precision="low")
def linear(x, weight, bias=None, *, unrounded=False):
    """x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None → (..., out).

    Args:
        unrounded: return float32 where x is a two-byte float: a term of a sum over ranks, which is rounded
            once (see `rounded`).

    Raises:
        ValueError: shapes that do not belong together.
    """
    w = weight.data
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"linear: weight {w.shape} is (out, in) and needs input (..., in), got {x.shape}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"linear: weight {w.shape} needs bias {w.shape[:1]}, got {bias.shape}")
    k = kernels.of(x)

    def vjp(g: Array) -> Any:
        g = g.astype(x.dtype, copy=False) if unrounded else g
        return (
            lambda: k.linear_backward_input(g, weight.data),
            Placeable(lambda out: k.linear_backward_weight(g, x, out), g.dtype),
            lambda: k.linear_backward_bias(g),
        )

    return k.linear(widen(x) if unrounded else x, w, bias), vjp


@primitive(handles=("weight",), precision="low")
def rounded(x, weight):
    """x in the dtype in which `weight` is computed with: the end of a sum of unrounded linear layers."""
    return x.astype(weight.dtype, copy=False), lambda g: (g, None)


@primitive(handles=("weight",))
def embedding(weight, ids):
    """Rows of `weight` (V, C) picked by integer `ids` (...) → (..., C).

    Raises:
        ValueError: ids that are no integers, or one outside [0, V).
    """
    w = weight.data
    k, rows = kernels.of(w), w.shape[0]
    return k.embedding(w, ids), lambda g: (lambda: k.embedding_backward(g, ids, rows), None)


@primitive(precision="low")
def _einsum(*operands, subscripts):
    xp = array_module(operands[0])
    inputs, output = subscripts.split("->")
    terms = inputs.split(",")
    dtype = operands[0].dtype
    half = dtype.itemsize == 2 and all(a.dtype == dtype for a in operands)  # rounded once, as in matmul

    def contract(path: str, arrays: Any) -> Array:
        if half and is_gpu_array(operands[0]) and kernels.gpu_blas.contracts(path):
            return kernels.gpu_blas.contract(path, *arrays)
        if half:
            return xp.einsum(path, *(a.astype("float32") for a in arrays), optimize=True).astype(dtype)
        return xp.einsum(path, *arrays, optimize=True)

    def vjp(g: Array) -> Any:
        def gradient(i: int) -> Array:
            # Swap operand i and the output. Letters that only operand i has were summed: broadcast them back.
            others = [t for j, t in enumerate(terms) if j != i]
            known = set(output).union(*others)
            kept = "".join(c for c in terms[i] if c in known)
            arrays = [g] + [a for j, a in enumerate(operands) if j != i]
            dx = contract(",".join([output, *others]) + "->" + kept, arrays)
            shape = tuple(n if c in known else 1 for c, n in zip(terms[i], operands[i].shape))
            return xp.broadcast_to(dx.reshape(shape), operands[i].shape).copy()

        return tuple([functools.partial(gradient, i) for i in range(len(operands))])

    return contract(subscripts, operands), vjp


def einsum(subscripts: str, *operands: Any) -> Any:
    """Einstein summation with an explicit output: einsum("bij,bjk->bik", a, b).

    Raises:
        ValueError: no "->", an ellipsis, a letter repeated within one operand (a diagonal), or lengths of a
            letter that differ.
    """
    subscripts = subscripts.replace(" ", "")
    if "->" not in subscripts or "." in subscripts:
        raise ValueError(f"einsum: {subscripts!r} must name its output with '->' and use no '...'")
    terms = subscripts.split("->")[0].split(",")
    lengths: dict[str, int] = {}
    if [len(t) for t in terms] != [len(a.shape) for a in operands]:
        raise ValueError(f"einsum: {subscripts!r} does not fit operands {[a.shape for a in operands]}")
    for term, operand in zip(terms, operands):
        if len(set(term)) != len(term):
            raise ValueError(f"einsum: {term!r} repeats a letter; diagonals are not supported")
        for letter, n in zip(term, operand.shape):
            if lengths.setdefault(letter, n) != n:  # NumPy would repeat a length of 1
                raise ValueError(f"einsum: {letter!r} of {subscripts!r} is {lengths[letter]} and {n} long")
    return _einsum(*operands, subscripts=subscripts)
