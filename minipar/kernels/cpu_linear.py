"""Linear layers and embeddings in NumPy: one matrix product each, in the layout that BLAS takes as it lies.

Transposes are flags of the product, not copies. Measured on OpenBLAS: one product over all rows with the
bias added after is faster than a block of rows at a time, and `ones @ g` sums rows twice as fast as
`g.sum(0)`.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csc_array

from minipar.kernels.common import Array, check_indices, rows, widen
from minipar.kernels.cpu_blocks import blas


def bias_add_(y: Array, bias: Array) -> Array:
    """See plain.bias_add_."""
    y += bias.astype(y.dtype, copy=False)
    return y


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """See plain.linear."""
    y = blas(rows(widen(x))) @ blas(widen(weight)).T
    if bias is not None:
        y += widen(bias)
    return y.reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype, copy=False)


def linear_backward_input(g: Array, weight: Array) -> Array:
    """See plain.linear_backward_input."""
    dx = blas(rows(widen(g))) @ blas(widen(weight))
    return dx.reshape(*g.shape[:-1], weight.shape[1]).astype(g.dtype, copy=False)


def linear_backward_weight(g: Array, x: Array, out: Array | None = None) -> Array:
    """See plain.linear_backward_weight."""
    a, b = blas(rows(widen(g))).T, blas(rows(widen(x)))
    return (a @ b).astype(g.dtype, copy=False) if out is None else np.matmul(a, b, out=out)


def linear_backward_bias(g: Array) -> Array:
    """See plain.linear_backward_bias."""
    flat = blas(rows(widen(g)))
    return (np.ones(len(flat), flat.dtype) @ flat).astype(g.dtype, copy=False)


def embedding(weight: Array, ids: Array) -> Array:
    """See plain.embedding."""
    check_indices("ids", ids, weight.shape[0])
    return weight.take(ids, axis=0, mode="clip")  # checked above, so nothing is ever clipped


def embedding_backward(g: Array, ids: Array, vocabulary: int) -> Array:
    """See plain.embedding_backward.

    A product with the sparse one-hot matrix (V, N) of the ids: one pass over g in order, hence the same
    sum on every run, and nothing of size N·V is made.
    """
    flat = rows(widen(g))
    count = len(flat)
    entries = np.ones(count, flat.dtype), ids.reshape(-1), np.arange(count + 1)
    one_hot = csc_array(entries, (vocabulary, count))
    return (one_hot @ flat).astype(g.dtype, copy=False)
