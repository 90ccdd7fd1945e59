"""GELU in NumPy, block by block: every intermediate lives and dies in cache."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from minipar.kernels.common import GELU_A, GELU_B, Array, widen
from minipar.kernels.cpu_blocks import block_length, blocks


def gelu(x: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu."""
    if x.dtype.itemsize == 2:
        return gelu(widen(x), approximate).astype(x.dtype)
    y = np.empty(x.shape, x.dtype)
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for span in blocks(x.size, block_length(x.dtype, 2)):
        a, u = flat_x[span], flat_y[span]
        if approximate == "none":
            np.multiply(a, 1 / math.sqrt(2.0), out=u)
            erf(u, out=u)
        else:
            _inner(a, u)
            np.tanh(u, out=u)
        u += 1  # y = x/2 · (1 + u)
        u *= a
        u *= 0.5
    return y


def gelu_backward(g: Array, x: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu_backward. The slope is computed from x again: cheaper than keeping a second array."""
    if x.dtype.itemsize == 2:
        return gelu_backward(widen(g), widen(x), approximate).astype(x.dtype)
    dx = np.empty(x.shape, x.dtype)
    flat_g, flat_x, flat_dx = g.reshape(-1), x.reshape(-1), dx.reshape(-1)
    size = block_length(x.dtype, 4)
    scratch = np.empty(min(size, x.size), x.dtype)
    slope = _slope_exact if approximate == "none" else _slope_tanh
    for span in blocks(x.size, size):
        d = flat_dx[span]
        slope(flat_x[span], d, scratch[: d.size])
        d *= flat_g[span]
    return dx


def _inner(a: Array, u: Array) -> None:
    """u = A · (a + B · a³), the argument of GELU's tanh."""
    np.multiply(a, a, out=u)
    u *= GELU_A * GELU_B
    u += GELU_A
    u *= a


def _slope_tanh(a: Array, d: Array, t: Array) -> None:
    """d = h + 2 · h · (1 - h) · a · A · (1 + 3 · B · a²) with h = (1 + tanh) / 2."""
    _inner(a, t)
    np.tanh(t, out=t)
    t *= 0.5
    t += 0.5  # h
    np.multiply(a, a, out=d)
    d *= 6 * GELU_A * GELU_B
    d += 2 * GELU_A
    d *= a
    d *= t
    t -= 1  # d · (1 - h) = -(d · t)
    d *= t
    t += 1
    np.subtract(t, d, out=d)


def _slope_exact(a: Array, d: Array, t: Array) -> None:
    """d = (1 + erf(a / √2)) / 2 + a · exp(-a² / 2) / √(2π)."""
    np.multiply(a, a, out=t)
    t *= -0.5
    np.exp(t, out=t)
    t *= a
    t *= 1 / math.sqrt(2.0 * math.pi)
    np.multiply(a, 1 / math.sqrt(2.0), out=d)
    erf(d, out=d)
    d += 1
    d *= 0.5
    d += t
