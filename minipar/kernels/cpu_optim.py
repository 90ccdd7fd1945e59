"""SGD and Adam steps in NumPy: a chunk of parameters and its state stays in cache for the whole formula."""

from __future__ import annotations

import math

import numpy as np

from minipar.kernels.common import Array
from minipar.kernels.cpu_blocks import block_length, blocks, scalar


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
    decay, rate, keep, undamped = (scalar(x, p.dtype) for x in (weight_decay, lr, momentum, 1 - dampening))
    sums, temps = np.empty((2, min(size, p.size)), p.dtype)
    for span in blocks(p.size, size):
        w, step = flat_p[span], flat_g[span].astype(p.dtype, copy=False)
        total, temp = sums[: len(w)], temps[: len(w)]
        if weight_decay:
            step = np.add(np.multiply(w, decay, out=total), step, out=total)
        if flat_buf is not None:
            b = flat_buf[span]
            if first:
                np.copyto(b, step)
            else:
                b *= keep
                b += step if dampening == 0 else np.multiply(step, undamped, out=temp)
            step = np.add(np.multiply(b, keep, out=temp), step, out=total) if nesterov else b
        w -= np.multiply(step, rate, out=temp)


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
    decay = scalar(1 - lr * weight_decay if decoupled else weight_decay, p.dtype)
    first_rate, second_rate, second_decay = (scalar(x, p.dtype) for x in (1 - beta1, 1 - beta2, beta2))
    root_correction, epsilon = scalar(math.sqrt(1 - beta2**step), p.dtype), scalar(eps, p.dtype)
    step_size = scalar(lr / (1 - beta1**step), p.dtype)
    flat_p, flat_g, flat_m, flat_v = p.reshape(-1), g.reshape(-1), m.reshape(-1), v.reshape(-1)
    size = block_length(p.dtype, 4)  # of the six, no more than four are in use at a time
    grads, temps = np.empty((2, min(size, p.size)), p.dtype)
    for span in blocks(p.size, size):
        w, first, second = flat_p[span], flat_m[span], flat_v[span]
        grad = flat_g[span].astype(p.dtype, copy=False)
        t, u = temps[: len(w)], grads[: len(w)]
        if weight_decay and decoupled:
            w *= decay
        elif weight_decay:
            np.multiply(w, decay, out=u)
            u += grad
            grad = u
        np.subtract(grad, first, out=t)
        t *= first_rate
        first += t  # m + (1 - β₁)(g - m)
        np.multiply(grad, second_rate, out=t)
        t *= grad
        second *= second_decay
        second += t
        np.sqrt(second, out=t)
        t /= root_correction
        t += epsilon
        np.multiply(first, step_size, out=u)
        u /= t
        w -= u
