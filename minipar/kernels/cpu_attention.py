"""Scaled dot-product attention in NumPy: blocks of heads and queries whose scores stay in cache.

Under a causal mask a block of queries needs no keys beyond its own last position, so the products skip
what lies right of the diagonal blocks:

    queries  0.. 63   x . . .      x  keys that the block multiplies
            64..127   x x . .      .  never computed; their probabilities are zeros
           128..191   x x x .

q, k and v are read as they lie: views of one fused (B, T, 3, H, D) projection need no copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from minipar.kernels.common import Array, check_attention, widen
from minipar.kernels.cpu_blocks import blas, block_length, blocks
from minipar.kernels.cpu_softmax import is_moderate

CAUSAL_ROWS = 64  # queries a block: smaller skips more, but BLAS slows down on thin matrices


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """See plain.attention."""
    check_attention(q, k, v)
    if q.dtype.itemsize == 2:
        y, probs = attention(widen(q), widen(k), widen(v), mask, causal, scale)
        if out is None:
            return y.astype(q.dtype), probs
        out[...] = y
        return out, probs
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    (tq, tk), lead = (q.shape[-2], k.shape[-2]), q.shape[:-2]
    if out is None:
        out = np.empty((*lead, tq, v.shape[-1]), q.dtype)
    probs = np.empty((*lead, tq, tk), q.dtype)
    if mask is not None:
        mask = _with_heads(np.broadcast_to(mask, probs.shape))
    qs, ks, vs = (_with_heads(blas(x)) for x in (q, k, v))
    ps = _with_heads(probs)
    ys = _with_heads(out) if len(lead) <= 2 else np.empty((*ps.shape[:-1], v.shape[-1]), q.dtype)
    triangle = np.tri(CAUSAL_ROWS, dtype=q.dtype)
    for at, queries in _query_blocks(ps.shape, ps.dtype, causal):
        keys = slice(0, min(queries.stop, tk) if causal else tk)
        scores = qs[at][:, queries] @ ks[at][:, keys].swapaxes(-1, -2)  # (heads, queries, keys)
        scores *= scale
        corner = triangle[: queries.stop - queries.start, : max(0, keys.stop - queries.start)]
        part = None if mask is None else mask[at][:, queries, keys]
        inverse = _masked_exp_(scores, part, corner if causal else None)
        p = ps[at][:, queries]
        np.multiply(scores, inverse, out=p[..., keys])
        p[..., keys.stop :] = 0
        np.matmul(p[..., keys], vs[at][:, keys], out=ys[at][:, queries])
    if len(lead) > 2:
        out[...] = ys.reshape(out.shape)
    return out, probs


def attention_backward(
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    probs: Array,
    scale: float | None = None,
    out: tuple[Array, Array, Array] | None = None,
    causal: bool = False,
) -> tuple[Array, Array, Array]:
    """See plain.attention_backward. `causal` skips what the causal mask made zero: give it as in forward."""
    if out is None:
        out = np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype), np.empty(v.shape, v.dtype)
    if q.dtype.itemsize == 2 or q.ndim > 4:
        up, wide_q, wide_k, wide_v, wide_p = (_with_heads(widen(x)) for x in (g, q, k, v, probs))
        grads = attention_backward(up, wide_q, wide_k, wide_v, wide_p, scale, None, causal)
        for into, grad in zip(out, grads):
            into[...] = grad.reshape(into.shape)
        return out
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    gs, qs, ks, vs, ps = (_with_heads(blas(x)) for x in (g, q, k, v, probs))
    dqs, dks, dvs = (_with_heads(x) for x in out)
    tq, tk = ps.shape[-2:]
    # The score gradients of a few heads, whole: dk needs all queries. Right of the diagonal blocks stays 0.
    heads, size = _block_sizes(ps.shape, ps.dtype, causal)
    scratch = np.zeros((min(heads, ps.shape[1]), tq, tk), ps.dtype)
    for at in _head_blocks(ps.shape, heads):
        p, whole = ps[at], scratch[: at[1].stop - at[1].start]
        for queries in blocks(tq, size):
            keys = slice(0, min(queries.stop, tk) if causal else tk)
            part = p[:, queries, keys]
            d = gs[at][:, queries] @ vs[at][:, keys].swapaxes(-1, -2)  # gradient of the probabilities
            d -= np.vecdot(d, part)[..., None]
            d *= part
            d *= scale
            np.matmul(d, ks[at][:, keys], out=dqs[at][:, queries])
            whole[:, queries, keys] = d
        for keys in blocks(tk, CAUSAL_ROWS if causal else max(1, tk)):
            queries = slice(keys.start if causal else 0, tq)
            np.matmul(whole[:, queries, keys].swapaxes(-1, -2), qs[at][:, queries], out=dks[at][:, keys])
            np.matmul(p[:, queries, keys].swapaxes(-1, -2), gs[at][:, queries], out=dvs[at][:, keys])
    return out


def _masked_exp_(scores: Array, mask: Array | None, triangle: Array | None) -> Array:
    """Scores (heads, queries, keys) to exp of them, in place, 0 where masked; returns 1 / their row sums.

    `triangle` masks the last keys, those of the diagonal block. Where all scores are moderate, exp needs no
    row maximum, and masking is a product with 0 or 1. A row that is masked throughout has 1 / sum = 1.
    """
    if mask is not None and mask.dtype != bool:
        scores += mask
        mask = None
    masks = [] if mask is None else [(scores, mask)]
    if triangle is not None and triangle.size:
        masks.append((scores[..., -triangle.shape[-1] :], triangle))
    if is_moderate(scores):
        np.exp(scores, out=scores)
        for part, may in masks:
            part *= may
    else:
        for part, may in masks:
            np.copyto(part, -np.inf, where=may == 0)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        scores -= np.where(top == -np.inf, top.dtype.type(0), top)  # -inf - (-inf) would be NaN
        np.exp(scores, out=scores)
    total = scores @ np.ones(scores.shape[-1], scores.dtype)
    total[total == 0] = 1
    return (1 / total)[..., None]


def _with_heads(x: Array) -> Array:
    """x (..., T, D) as (B, H, T, D): leading axes added, or those before the heads flattened."""
    if x.ndim > 4:
        return x.reshape(-1, *x.shape[-3:])
    return x[(None,) * (4 - x.ndim)]


def _block_sizes(shape: tuple[int, ...], dtype: np.dtype, causal: bool) -> tuple[int, int]:
    """(heads, queries) of a block of (B, H, Tq, Tk) scores that stays in cache."""
    rows = block_length(dtype, 2) // max(1, shape[3])
    queries = CAUSAL_ROWS if causal else max(1, min(shape[2], max(CAUSAL_ROWS, rows)))
    return max(1, rows // queries), queries


def _head_blocks(shape: tuple[int, ...], heads: int) -> Iterator[tuple[int, slice]]:
    """(sample, heads) for every block of heads."""
    return ((b, some) for b in range(shape[0]) for some in blocks(shape[1], heads))


def _query_blocks(
    shape: tuple[int, ...], dtype: np.dtype, causal: bool
) -> Iterator[tuple[tuple[int, slice], slice]]:
    """((sample, heads), queries) for every block of scores."""
    heads, size = _block_sizes(shape, dtype, causal)
    return ((at, queries) for at in _head_blocks(shape, heads) for queries in blocks(shape[2], size))
