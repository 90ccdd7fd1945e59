"""Every kernel as its plain formula, for any array module: the contract that the fast kernels meet.

Read a function here to know what it computes; read its namesake in `cpu_*.py` to see how the same is
computed without wasted passes over memory. CuPy arrays use these too. The rules of all kernels:

- They take and give raw arrays, never modify an input unless the name ends in `_`, and never return an
  alias of one, but for `split_heads`.
- float32 in gives float32 out, float64 gives float64; two-byte floats are computed in float32 and
  rounded once. A parameter's gradient has the parameter's dtype if the kernel sees the parameter, else g's.
- Inputs may be strided, and sizes may be zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar.backend import array_module, special_functions
from minipar.kernels.common import (
    GELU_A,
    GELU_B,
    Array,
    by_channel,
    check_attention,
    check_indices,
    rows,
    widen,
)
from minipar.kernels.plain_conv import (
    avg_pool2d,
    avg_pool2d_backward,
    col2im,
    conv2d,
    conv2d_backward_bias,
    conv2d_backward_input,
    conv2d_backward_weight,
    im2col,
    max_pool2d,
    max_pool2d_backward,
)
from minipar.kernels.plain_linear import (
    bias_add_,
    embedding,
    embedding_backward,
    linear,
    linear_backward_bias,
    linear_backward_input,
    linear_backward_weight,
)
from minipar.kernels.plain_optim import adam_step_, sgd_step_
from minipar.kernels.plain_random import dropout_mask, splitmix64

__all__ = [
    "adam_step_", "attention", "attention_backward", "avg_pool2d", "avg_pool2d_backward", "bias_add_", "cast",
    "col2im", "conv2d", "conv2d_backward_bias", "conv2d_backward_input", "conv2d_backward_weight",
    "cross_entropy", "cross_entropy_backward", "dropout_mask", "embedding", "embedding_backward", "gelu",
    "gelu_backward", "group_norm", "group_norm_backward", "im2col", "layer_norm", "layer_norm_backward",
    "linear", "linear_backward_bias", "linear_backward_input", "linear_backward_weight", "log_softmax",
    "log_softmax_backward", "max_pool2d", "max_pool2d_backward", "rms_norm", "rms_norm_backward", "sgd_step_",
    "softmax", "softmax_backward", "split_heads", "splitmix64",
]  # fmt: skip


def _like(x: Array, dtype) -> Array:
    """`x` rounded to `dtype` (no copy if it has it already: only ever used on fresh arrays)."""
    return x.astype(dtype, copy=False)


# ---- activations -------------------------------------------------------------------------------------


def gelu(x: Array, approximate: str = "tanh") -> Array:
    """x · Φ(x) (Hendrycks & Gimpel 2016), Φ by erf (`approximate="none"`) or by its tanh form."""
    xp, w = array_module(x), widen(x)
    if approximate == "none":
        y = 0.5 * w * (1 + special_functions(w).erf(w / math.sqrt(2.0)))
    else:
        y = 0.5 * w * (1 + xp.tanh(GELU_A * (w + GELU_B * w * w * w)))
    return _like(y, x.dtype)


def gelu_backward(g: Array, x: Array, y: Array, approximate: str = "tanh") -> Array:
    """dx = g · (Φ(x) + x · Φ'(x)). `y` is gelu's result, for kernels that make use of it."""
    xp, w = array_module(x), widen(x)
    if approximate == "none":
        cumulative = 0.5 * (1 + special_functions(w).erf(w / math.sqrt(2.0)))
        slope = cumulative + w * xp.exp(-0.5 * w * w) / math.sqrt(2.0 * math.pi)
    else:
        t = xp.tanh(GELU_A * (w + GELU_B * w * w * w))
        slope = 0.5 * (1 + t) + 0.5 * w * (1 - t * t) * GELU_A * (1 + 3 * GELU_B * w * w)
    return _like(widen(g) * slope, x.dtype)


def cast(x: Array, dtype: Any) -> Array:
    """x in another dtype: always new memory."""
    return x.astype(dtype)


# ---- norms over the last axis ------------------------------------------------------------------------


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """Ba, Kiros & Hinton 2016 over the last axis of x (..., C): (y (..., C), mean (..., 1), rstd (..., 1)).

    `rstd` is 1 / sqrt(variance + eps), the variance without Bessel's correction. `mean` and `rstd` stay in
    the working precision (float32 for float16).
    """
    xp, w = array_module(x), widen(x)
    mean = w.mean(-1, keepdims=True)
    centred = w - mean
    rstd = 1 / xp.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * widen(weight)
    if bias is not None:
        y = y + widen(bias)
    return _like(y, x.dtype), mean, rstd


def layer_norm_backward(
    g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """(dx (..., C), dweight (C,) or None without a weight, dbias (C,))."""
    up, xhat = widen(g), (widen(x) - mean) * rstd
    gw = up if weight is None else up * widen(weight)
    dx = rstd * (gw - gw.mean(-1, keepdims=True) - xhat * (gw * xhat).mean(-1, keepdims=True))
    kind = g.dtype if weight is None else weight.dtype
    dweight = None if weight is None else _like(rows(up * xhat).sum(0), kind)
    return _like(dx, x.dtype), dweight, _like(rows(up).sum(0), kind)


def rms_norm(x: Array, weight: Array | None, eps: float) -> tuple[Array, Array]:
    """Zhang & Sennrich 2019 over the last axis: (y, rstd (..., 1)), rstd = 1/sqrt(mean(x²) + eps)."""
    xp, w = array_module(x), widen(x)
    rstd = 1 / xp.sqrt((w * w).mean(-1, keepdims=True) + eps)
    y = w * rstd
    if weight is not None:
        y = y * widen(weight)
    return _like(y, x.dtype), rstd


def rms_norm_backward(g: Array, x: Array, rstd: Array, weight: Array | None) -> tuple[Array, Array | None]:
    """(dx (..., C), dweight (C,) or None without a weight)."""
    up, xhat = widen(g), widen(x) * rstd
    gw = up if weight is None else up * widen(weight)
    dx = rstd * (gw - xhat * (gw * xhat).mean(-1, keepdims=True))
    dweight = None if weight is None else _like(rows(up * xhat).sum(0), weight.dtype)
    return _like(dx, x.dtype), dweight


def group_norm(
    x: Array, groups: int, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """Wu & He 2018: x (N, C, *) normalised over each of `groups` groups of channels and all their positions.

    Returns (y (N, C, *), mean (N, G), rstd (N, G)), the last two in the working precision. The variance is
    without Bessel's correction; weight and bias are (C,).
    """
    w = by_channel(widen(x))
    per_group = (len(x), groups, w.shape[1] // groups * w.shape[2])
    normal, mean, rstd = layer_norm(w.reshape(per_group), None, None, eps)
    y = normal.reshape(w.shape)
    if weight is not None:
        y = y * widen(weight)[:, None]
    if bias is not None:
        y = y + widen(bias)[:, None]
    return _like(y.reshape(x.shape), x.dtype), mean[..., 0], rstd[..., 0]


def group_norm_backward(
    g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """(dx (N, C, *), dweight (C,) or None without a weight, dbias (C,))."""
    up, w = by_channel(widen(g)), by_channel(widen(x))
    per_group = (*mean.shape, w.shape[1] // mean.shape[1] * w.shape[2])
    xhat = (w.reshape(per_group) - mean[..., None]) * rstd[..., None]
    gw = (up if weight is None else up * widen(weight)[:, None]).reshape(per_group)
    dx = gw - gw.mean(-1, keepdims=True) - xhat * (gw * xhat).mean(-1, keepdims=True)
    kind = g.dtype if weight is None else weight.dtype
    dweight = None if weight is None else _like((up * xhat.reshape(w.shape)).sum((0, 2)), kind)
    return _like((dx * rstd[..., None]).reshape(x.shape), x.dtype), dweight, _like(up.sum((0, 2)), kind)


# ---- softmax and cross-entropy -----------------------------------------------------------------------


def _shifted(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """(max, x - max, sum of exp(x - max)); a row of nothing, or of -inf alone, has max 0 and sum 1 instead of NaN."""
    xp = array_module(x)
    top = x.max(axis, keepdims=True) if x.shape[axis] else x.sum(axis, keepdims=True)
    top = xp.where(top == -np.inf, xp.zeros_like(top), top)
    z = x - top
    total = xp.exp(z).sum(axis, keepdims=True)
    return top, z, xp.where(total == 0, xp.ones_like(total), total)


def softmax(x: Array, axis: int) -> Array:
    """exp(x) / sum(exp(x)) along `axis`, exact for any finite x. A row of all -inf gives zeros."""
    _, z, total = _shifted(widen(x), axis)
    return _like(array_module(x).exp(z) / total, x.dtype)


def softmax_backward(g: Array, y: Array, axis: int) -> Array:
    """dx = y · (g - sum(g · y)), from the forward's result y."""
    up, w = widen(g), widen(y)
    return _like(w * (up - (up * w).sum(axis, keepdims=True)), y.dtype)


def log_softmax(x: Array, axis: int) -> Array:
    """log(softmax(x)) along `axis`, exact for any finite x. A row of all -inf gives -inf."""
    _, z, total = _shifted(widen(x), axis)
    return _like(z - array_module(x).log(total), x.dtype)


def log_softmax_backward(g: Array, y: Array, axis: int) -> Array:
    """dx = g - exp(y) · sum(g), from the forward's result y."""
    up = widen(g)
    return _like(up - array_module(y).exp(widen(y)) * up.sum(axis, keepdims=True), y.dtype)


def cross_entropy(
    logits: Array, targets: Array, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Losses (N,) of logits (N, V) against class targets (N,), and what backward needs beside the logits.

    Losses are in the working precision: float32 for two-byte floats, too.

    loss = -(1 - s) · logp[target] - s/V · sum(logp) with s = label_smoothing (Szegedy et al. 2016). Rows
    whose target is `ignore_index` have loss 0. `saved` (2, N) holds each row's max and 1 / sum(exp(z - max)):
    two numbers a row instead of a second (N, V) array, and exact for large logits, which a rounded
    logsumexp is not. Raises UsageError (a ValueError) for a target outside 0..V-1.
    """
    xp, z = array_module(logits), widen(logits)
    check_indices("targets", targets, z.shape[1], ignore_index)
    top, z, total = _shifted(z, 1)
    valid = targets != ignore_index
    picked = z[xp.arange(len(targets)), xp.where(valid, targets, 0)]
    loss = xp.log(total[:, 0]) - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(1)
    return _like(xp.where(valid, loss, 0), z.dtype), xp.stack([top[:, 0], 1 / total[:, 0]])


def cross_entropy_backward(
    g: Array,
    logits: Array,
    targets: Array,
    saved: Array,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """dlogits (N, V) = g · (softmax(logits) - (1 - s) · onehot(target) - s/V) from g (N,); 0 if ignored."""
    xp = array_module(logits)
    p = xp.exp(widen(logits) - saved[0][:, None]) * saved[1][:, None]  # (N, V)
    valid = targets != ignore_index
    if label_smoothing:
        p -= label_smoothing / p.shape[1]
    p[xp.arange(len(targets)), xp.where(valid, targets, 0)] -= 1 - label_smoothing
    p *= widen(g)[:, None]
    return _like(xp.where(valid[:, None], p, 0), logits.dtype)


# ---- attention ---------------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(q kᵀ · scale + mask) v (Vaswani et al. 2017): (out (..., Tq, Dv), probs (..., Tq, Tk)).

    q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv). `mask` broadcasts to (..., Tq, Tk) and is boolean (True
    may attend) or float (added to the scores); `causal` lets query i attend to keys 0..i; both may be given.
    `scale` is 1/sqrt(D) by default. A fully masked query gives zeros. `probs` stay in the working precision.
    The result is written to `out` where it is given.
    """
    check_attention(q, k, v)
    xp = array_module(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (widen(q) * scale) @ xp.swapaxes(widen(k), -1, -2)  # (..., Tq, Tk)
    if mask is not None and mask.dtype == bool:
        scores = xp.where(mask, scores, -np.inf).astype(scores.dtype, copy=False)
    elif mask is not None:
        scores = scores + mask.astype(scores.dtype, copy=False)
    if causal:
        may = xp.tri(scores.shape[-2], scores.shape[-1], dtype=bool)
        scores = xp.where(may, scores, -np.inf).astype(scores.dtype, copy=False)
    probs = softmax(scores, -1)
    y = _like(probs @ widen(v), q.dtype)
    if out is None:
        return y, probs
    out[...] = y
    return out, probs


def split_heads(qkv: Array, head_dim: int) -> Array:
    """The heads of a fused projection (B, T, 3·H·D): (3, B, H, T, D), a view of it."""
    b, t, width = qkv.shape
    return qkv.reshape(b, t, 3, width // (3 * head_dim), head_dim).transpose(2, 0, 3, 1, 4)


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
    """(dq, dk, dv) of attention, shaped as q, k, v and written to the arrays of `out` where it is given.

    `causal` is a promise that `probs` came from a causal forward, so that a kernel may skip its zeros.
    """
    xp = array_module(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    up = widen(g)
    dscores = softmax_backward(up @ xp.swapaxes(widen(v), -1, -2), probs, -1) * scale  # (..., Tq, Tk)
    grads = (
        _like(dscores @ widen(k), q.dtype),
        _like(xp.swapaxes(dscores, -1, -2) @ widen(q), k.dtype),
        _like(xp.swapaxes(probs, -1, -2) @ up, v.dtype),
    )
    if out is None:
        return grads
    for into, grad in zip(out, grads):
        into[...] = grad
    return out
