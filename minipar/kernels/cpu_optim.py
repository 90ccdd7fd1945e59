"""SGD and Adam steps in NumPy: a chunk of parameters and its state stays in cache for the whole formula."""

from __future__ import annotations

import math

import numpy as np

from minipar.kernels.common import Array
from minipar.kernels.cpu_blocks import block_length, blocks


def sgd_step_(
    p: Array,
    g: Array,
    buf: Array | None,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first: bool,
) -> None:
    """See plain.sgd_step_."""
    if not (p.flags.c_contiguous and (buf is None or buf.flags.c_contiguous)):
        dense_p, dense_buf = p.copy(), None if buf is None else buf.copy()
        sgd_step_(dense_p, g, dense_buf, lr, momentum, dampening, nesterov, weight_decay, first)
        p[...] = dense_p
        if buf is not None:
            buf[...] = dense_buf
        return
    flat_p, flat_g = p.reshape(-1), g.reshape(-1)
    flat_buf = buf.reshape(-1) if buf is not None and momentum else None
    size = block_length(p.dtype, 5)
    sums, temps = np.empty((2, min(size, p.size)), p.dtype)
    for span in blocks(p.size, size):
        w, step = flat_p[span], flat_g[span].astype(p.dtype, copy=False)
        total, temp = sums[: len(w)], temps[: len(w)]
        if weight_decay:
            step = np.add(np.multiply(w, weight_decay, out=total), step, out=total)
        if flat_buf is not None:
            b = flat_buf[span]
            if first:
                np.copyto(b, step)
            else:
                b *= momentum
                b += step if dampening == 0 else np.multiply(step, 1 - dampening, out=temp)
            step = np.add(np.multiply(b, momentum, out=temp), step, out=total) if nesterov else b
        w -= np.multiply(step, lr, out=temp)


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
    """See plain.adam_step_."""
    if not (p.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous):
        dense_p, dense_m, dense_v = p.copy(), m.copy(), v.copy()
        adam_step_(dense_p, g, dense_m, dense_v, lr, beta1, beta2, eps, weight_decay, step, decoupled)
        p[...], m[...], v[...] = dense_p, dense_m, dense_v
        return
    root_correction = math.sqrt(1 - beta2**step)
    step_size = lr / (1 - beta1**step)
    flat_p, flat_g, flat_m, flat_v = p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1)
    size = block_length(p.dtype, 6)
    grads, temps = np.empty((2, min(size, p.size)), p.dtype)
    for span in blocks(p.size, size):
        w, first, second = flat_p[span], flat_m[span], flat_v[span]
        grad = flat_g[span].astype(p.dtype, copy=False)
        t, u = temps[: len(w)], grads[: len(w)]
        if weight_decay and decoupled:
            w *= 1 - lr * weight_decay
        elif weight_decay:
            np.multiply(w, weight_decay, out=u)
            u += grad
            grad = u
        np.subtract(grad, first, out=t)
        t *= 1 - beta1
        first += t  # m + (1 - β₁)(g - m)
        np.multiply(grad, 1 - beta2, out=t)
        t *= grad
        second *= beta2
        second += t
        np.sqrt(second, out=t)
        t /= root_correction
        t += eps
        np.multiply(first, step_size, out=u)
        u /= t
        w -= u
