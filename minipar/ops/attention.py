"""Scaled dot-product attention as one primitive."""

from __future__ import annotations

from minipar import kernels
from minipar.backend import array_module
from minipar.tensor import primitive


@primitive(fresh=True, precision="low")
def scaled_dot_product_attention(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q kᵀ · scale) v (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (..., Tq, D). k, v: (..., Tk, D). Leading axes are batch and heads.
        mask: boolean (True: may attend) or added to the scores; broadcast to (..., Tq, Tk). It gets no
            gradient: an array, not a tensor that is trained.
        causal: query i sees keys 0 … i only.
        scale: 1/√D unless given.

    Returns:
        (..., Tq, D). A query that may attend to nothing gives zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = kernels.of(q)
    y, probs = kernel.attention(q, k, v, mask, causal, scale)
    return y, lambda g: (*kernel.attention_backward(g, q, k, v, probs, scale, causal=causal), None)


@primitive(fresh=True, precision="low")
def self_attention(qkv, head_dim, causal=True):
    """Attention of a sequence to itself, from one fused projection (B, T, 3·H·D) to (B, T, H·D).

    The gradients of q, k and v are written in place in that layout, and on a CPU they are read there. The
    number of heads H is read off the width, so a slice of the heads is a valid input.

    Raises:
        ValueError: the width is no multiple of 3·D.
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * head_dim):
        raise ValueError(
            f"self_attention: input must be (B, T, 3·H·D) with D = {head_dim}, so a width that"
            f" {3 * head_dim} divides, got {qkv.shape}"
        )
    kernel, xp = kernels.of(qkv), array_module(qkv)
    b, t, width = qkv.shape
    heads = width // (3 * head_dim)
    scale = head_dim**-0.5
    y = xp.empty((b, t, heads, head_dim), dtype=qkv.dtype)
    q, k, v = kernel.split_heads(qkv, head_dim)  # (B, H, T, D)
    _, probs = kernel.attention(q, k, v, None, causal, scale, out=y.swapaxes(1, 2))

    def vjp(g):
        dqkv = xp.empty_like(qkv)
        dheads = g.reshape(b, t, heads, head_dim).swapaxes(1, 2)  # (B, H, T, D)
        into = tuple(kernels.plain.split_heads(dqkv, head_dim))
        kernel.attention_backward(dheads, q, k, v, probs, scale, into, causal)
        return dqkv, None, None

    return y.reshape(b, t, heads * head_dim), vjp
