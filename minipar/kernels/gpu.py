"""The kernels for CuPy arrays: fused where a formula would make many passes over memory, else plain.

The CUDA code is in gpu_source, convolution in gpu_conv; here are the other calls. What differs from the CPU:

- Two-byte floats go to cuBLAS as they are (gpu_blas): it multiplies them on tensor cores and adds up in float32,
  rounding once.
- Attention keeps its probabilities in the dtype of q, as PyTorch's own formula does.
- Nothing waits for the GPU. So indices are not looked at on the host: one that is out of range gives NaN.

What it reaches on which card: benchmarks/gpu.py, benchmarks/results.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar.backend import device_module
from minipar.kernels import plain
from minipar.kernels.common import Array, check_attention, placed, rows, work_dtype
from minipar.kernels.gpu_blas import matmul
from minipar.kernels.gpu_conv import conv2d, conv2d_backward_input, conv2d_backward_weight
from minipar.kernels.gpu_launch import C_NAMES, contiguous, copy, run, run_numbers, run_rows, sum_rows
from minipar.kernels.plain import (
    avg_pool2d,
    avg_pool2d_backward,
    col2im,
    conv2d_backward_bias,
    embedding_backward,
    group_norm,
    group_norm_backward,
    im2col,
    log_softmax,
    log_softmax_backward,
    max_pool2d,
    max_pool2d_backward,
    rms_norm,
    rms_norm_backward,
    sgd_step_,
    splitmix64,
)

__all__ = [
    "adam_step_", "attention", "attention_backward", "avg_pool2d", "avg_pool2d_backward", "bias_add_", "cast",
    "col2im", "conv2d", "conv2d_backward_bias", "conv2d_backward_input", "conv2d_backward_weight",
    "cross_entropy", "cross_entropy_backward", "dropout_mask", "embedding", "embedding_backward", "gelu",
    "gelu_backward", "group_norm", "group_norm_backward", "im2col", "layer_norm", "layer_norm_backward",
    "linear", "linear_backward_bias", "linear_backward_input", "linear_backward_weight", "log_softmax",
    "log_softmax_backward", "max_pool2d", "max_pool2d_backward", "rms_norm", "rms_norm_backward", "sgd_step_",
    "softmax", "softmax_backward", "split_heads", "splitmix64",
]  # fmt: skip


def cast(x: Array, dtype: Any) -> Array:
    """See plain.cast."""
    dtype = np.dtype(dtype)
    if not x.flags.c_contiguous or not {x.dtype.name, dtype.name} <= C_NAMES.keys():
        return x.astype(dtype)
    y = device_module("cuda").empty(x.shape, dtype)
    run_numbers("cast", {"T": x, "R": y}, x, y)
    return y


# ---- activations and norms ---------------------------------------------------------------------------


def gelu(x: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu."""
    x = contiguous(x)
    y = device_module("cuda").empty_like(x)
    run_numbers("gelu_exact" if approximate == "none" else "gelu", {"T": x}, x, y)
    return y


def gelu_backward(g: Array, x: Array, y: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu_backward. `y` is not used: arithmetic costs a GPU less than reading another array."""
    g, x = contiguous(g), contiguous(x)
    d = device_module("cuda").empty_like(x)
    name = "gelu_exact_backward" if approximate == "none" else "gelu_backward"
    run_numbers(name, {"T": x, "G": g}, g, x, d)
    return d


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """See plain.layer_norm."""
    if weight is None or bias is None or x.size == 0 or bias.dtype != weight.dtype:
        return plain.layer_norm(x, weight, bias, eps)
    xp = device_module("cuda")
    x, weight, bias = (contiguous(a) for a in (x, weight, bias))
    y = xp.empty_like(x)
    mean, rstd = (xp.empty((*x.shape[:-1], 1), work_dtype(x.dtype)) for _ in range(2))
    run_rows("layer_norm", {"T": x, "S": weight}, x, weight, bias, y, mean, rstd, float(eps))
    return y, mean, rstd


def layer_norm_backward(
    g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None
) -> tuple[Array, Array | None, Array]:
    """See plain.layer_norm_backward."""
    if weight is None or x.size == 0:
        return plain.layer_norm_backward(g, x, mean, rstd, weight)
    g, x, weight = (contiguous(a) for a in (g, x, weight))
    dx = device_module("cuda").empty_like(x)
    run_rows("layer_norm_backward", {"T": x, "G": g, "S": weight}, g, x, mean, rstd, weight, dx)
    dweight = sum_rows("by_x", {"T": rows(x), "G": g}, g, x, mean, rstd)
    dbias = _sum_rows(g)
    return dx, dweight.astype(weight.dtype, copy=False), dbias.astype(weight.dtype, copy=False)


# ---- softmax and cross-entropy -----------------------------------------------------------------------


def softmax(x: Array, axis: int) -> Array:
    """See plain.softmax."""
    if x.size == 0:
        return plain.softmax(x, axis)
    return _softmax(x.swapaxes(axis, -1)).swapaxes(axis, -1)


def softmax_backward(g: Array, y: Array, axis: int) -> Array:
    """See plain.softmax_backward."""
    if y.size == 0:
        return plain.softmax_backward(g, y, axis)
    return _softmax_backward(g.swapaxes(axis, -1), y.swapaxes(axis, -1)).swapaxes(axis, -1)


def _softmax(x: Array, queries: int = 0) -> Array:
    """softmax over the last axis; with `queries` x is (..., queries, keys), and no query sees a later key."""
    x = contiguous(x)
    y = device_module("cuda").empty_like(x)
    run_rows("softmax", {"T": x}, x, y, queries)
    return y


def _softmax_backward(g: Array, y: Array, scale: float = 1.0, queries: int = 0) -> Array:
    """The gradient of `_softmax`'s x, times `scale`."""
    g, y = contiguous(g), contiguous(y)
    d = device_module("cuda").empty_like(y)
    run_rows("softmax_backward", {"T": y, "G": g}, g, y, d, float(scale), queries)
    return d


def cross_entropy(
    logits: Array, targets: Array, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """See plain.cross_entropy; but a target outside 0..V-1 gives a loss of NaN."""
    if logits.size == 0:
        return plain.cross_entropy(logits, targets, ignore_index, label_smoothing)
    xp = device_module("cuda")
    logits, targets = contiguous(logits), xp.ascontiguousarray(targets, np.int64)
    work = work_dtype(logits.dtype)
    losses, saved = xp.empty(len(logits), work), xp.empty((2, len(logits)), work)
    run_rows("cross_entropy", {"T": logits}, logits, targets, losses, saved, ignore_index, float(label_smoothing))
    return losses, saved


def cross_entropy_backward(
    g: Array,
    logits: Array,
    targets: Array,
    saved: Array,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """See plain.cross_entropy_backward."""
    if logits.size == 0:
        return plain.cross_entropy_backward(g, logits, targets, saved, ignore_index, label_smoothing)
    xp = device_module("cuda")
    g, logits, targets = contiguous(g), contiguous(logits), xp.ascontiguousarray(targets, np.int64)
    d, options = xp.empty_like(logits), (ignore_index, float(label_smoothing))
    run_rows("cross_entropy_backward", {"T": logits, "G": g}, g, logits, targets, saved, d, *options)
    return d


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
    """See plain.attention; `probs` have the dtype of q."""
    check_attention(q, k, v)
    if q.size == 0 or k.size == 0:
        return plain.attention(q, k, v, mask, causal, scale, out)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = contiguous(q), contiguous(k), contiguous(v)
    scores = matmul(q, k.swapaxes(-1, -2), scale)  # (..., Tq, Tk)
    if mask is not None:
        added = device_module("cuda").where(mask, 0, -np.inf) if mask.dtype == bool else mask
        scores = scores + added.astype(scores.dtype, copy=False)
    probs = _softmax(scores, q.shape[-2] if causal else 0)
    y = matmul(probs, v)
    if out is None:
        return y, probs
    copy(y, out)
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
    """See plain.attention_backward."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    g, q, k, v = contiguous(g), contiguous(q), contiguous(k), contiguous(v)
    dprobs = matmul(g, v.swapaxes(-1, -2))  # (..., Tq, Tk)
    dscores = _softmax_backward(dprobs, probs, scale, q.shape[-2] if causal else 0)
    grads = matmul(dscores, k), matmul(dscores.swapaxes(-1, -2), q), matmul(probs.swapaxes(-1, -2), g)
    if out is None:
        return grads
    for into, grad in zip(out, grads):
        copy(grad, into)
    return out


def split_heads(qkv: Array, head_dim: int) -> Array:
    """See plain.split_heads. A copy: cuBLAS walks batch and heads by one stride, and backward uses it again."""
    return contiguous(plain.split_heads(qkv, head_dim))


# ---- linear layers, embeddings, randomness -----------------------------------------------------------


def bias_add_(y: Array, bias: Array) -> Array:
    """See plain.bias_add_."""
    if y.size == 0 or not y.flags.c_contiguous:
        return plain.bias_add_(y, bias)
    run_rows("bias_add", {"T": y, "B": bias}, y, contiguous(bias))
    return y


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """See plain.linear."""
    y = matmul(rows(x), weight.T).astype(x.dtype, copy=False)
    if bias is not None:
        bias_add_(y, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linear_backward_input(g: Array, weight: Array) -> Array:
    """See plain.linear_backward_input."""
    dx = matmul(rows(g), weight.astype(g.dtype, copy=False))
    return dx.reshape(*g.shape[:-1], weight.shape[1])


def linear_backward_weight(g: Array, x: Array, out: Array | None = None) -> Array:
    """See plain.linear_backward_weight."""
    return placed(matmul(rows(g).T, rows(x.astype(g.dtype, copy=False))), out)


def linear_backward_bias(g: Array) -> Array:
    """See plain.linear_backward_bias."""
    if g.size == 0:
        return plain.linear_backward_bias(g)
    return _sum_rows(g).astype(g.dtype, copy=False)


def _sum_rows(g: Array) -> Array:
    """g (..., C) summed over all leading axes, in the working precision."""
    g = rows(contiguous(g))
    return sum_rows("sum", {"T": g}, g)


def embedding(weight: Array, ids: Array) -> Array:
    """See plain.embedding; but an id outside 0..V-1 gives a row of NaN."""
    out = device_module("cuda").empty((ids.size, weight.shape[1]), weight.dtype)
    weight = contiguous(weight)
    run("embedding", weight, weight, ids.reshape(-1, 1), *weight.shape, out)
    return out.reshape(*ids.shape, weight.shape[1])


def dropout_mask(shape: tuple[int, ...], p: float, key: int, start: int = 0) -> Array:
    """See plain.dropout_mask; the mask lies on the current GPU."""
    return plain.dropout_mask(shape, p, key, start, xp=device_module("cuda"))


# ---- the optimizer -----------------------------------------------------------------------------------


def adam_step_(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
) -> None:
    """See plain.adam_step_. One pass: everything is read once and written once.

    `lr` and `step` may be scalar arrays on the GPU, from which the numbers below are then computed there: so a
    captured graph counts its own steps.
    """
    shrink = 1 - lr * weight_decay if decoupled else 1.0
    decay = 0.0 if decoupled else weight_decay
    root_correction, step_size = (1 - beta2**step) ** 0.5, lr / (1 - beta1**step)
    varying: list[Any] = [shrink, root_correction, step_size]
    work = work_dtype(p.dtype)  # a kernel takes arrays of just the dtype that it names, and any number
    varying = [x.astype(work) if hasattr(x, "dtype") else x for x in varying]
    run("adam", p, p, g, m, v, 1 - beta1, beta2, eps, decay, *varying, p, m, v)
