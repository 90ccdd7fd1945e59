"""Linear layers and embeddings as plain formulas: matrix products over flattened leading axes."""

from __future__ import annotations

from minipar.backend import array_module
from minipar.kernels.common import Array, check_indices, placed, rows, widen


def bias_add_(y: Array, bias: Array) -> Array:
    """y (..., C) += bias (C,), in place; returns y."""
    y += bias.astype(y.dtype, copy=False)
    return y


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y (..., out) = x (..., in) weight(out, in)ᵀ + bias (out,)."""
    y = widen(x) @ widen(weight).T
    return (y if bias is None else y + widen(bias)).astype(x.dtype, copy=False)


def linear_backward_input(g: Array, weight: Array) -> Array:
    """dx (..., in) = g (..., out) weight (out, in)."""
    return (widen(g) @ widen(weight)).astype(g.dtype, copy=False)


def linear_backward_weight(g: Array, x: Array, out: Array | None = None) -> Array:
    """dweight (out, in) = gᵀ x, summed over all leading axes of g (..., out) and x (..., in).

    It is written into `out`, if that is given: an array of its shape and of g's dtype.
    """
    return placed((rows(widen(g)).T @ rows(widen(x))).astype(g.dtype, copy=False), out)


def linear_backward_bias(g: Array) -> Array:
    """dbias (out,) = g (..., out) summed over all leading axes."""
    return rows(widen(g)).sum(0).astype(g.dtype, copy=False)


def embedding(weight: Array, ids: Array) -> Array:
    """Rows of weight (V, C) by ids (...): (..., C). Raises UsageError for an id outside 0..V-1."""
    check_indices("ids", ids, weight.shape[0])
    return weight[ids]


def embedding_backward(g: Array, ids: Array, vocabulary: int) -> Array:
    """dweight (vocabulary, C): each row of g (..., C) added to the row that its id names.

    On a GPU the additions to one row come in no fixed order.
    """
    xp, up = array_module(g), widen(g)
    dweight = xp.zeros((vocabulary, g.shape[-1]), up.dtype)
    xp.add.at(dweight, ids.reshape(-1), rows(up))
    return dweight.astype(g.dtype, copy=False)
