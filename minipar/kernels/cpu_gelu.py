"""GELU in NumPy, block by block: every intermediate lives and dies in cache."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from minipar.kernels.common import GELU_A, GELU_B, Array, widen
from minipar.kernels.cpu_blocks import block_length, blocks

# erf(z) = 1 - t · (A₁ + A₂ t + ... + A₅ t⁴) · exp(-z²) with t = 1 / (1 + P z) for z ≥ 0, off by at most
# 1.5e-7: Abramowitz & Stegun 1964, 7.1.26. Float32 can tell no more near 1, and SciPy's erf is slower.
ERF_P = 0.3275911
ERF_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # A₅ first


def gelu(x: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu."""
    if x.dtype.itemsize == 2:
        return gelu(widen(x), approximate).astype(x.dtype)
    y = np.empty(x.shape, x.dtype)
    flat_x, flat_y, size = x.reshape(-1), y.reshape(-1), block_length(x.dtype, 3)
    scratch = np.empty((2, min(size, x.size)), x.dtype)
    for span in blocks(x.size, size):
        a, u = flat_x[span], flat_y[span]
        if approximate == "none":
            np.multiply(a, math.sqrt(0.5), out=u)
            _erf_(u, *scratch[:, : len(u)])
        else:
            np.multiply(a, a, out=u)
            _tanh_of_cubic(a, u, u)
        u += 1  # y = a/2 · (1 + u)
        u *= a
        u *= 0.5
    return y


def gelu_backward(g: Array, x: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu_backward. The slope is computed from x again: cheaper than keeping a second array."""
    if x.dtype.itemsize == 2:
        return gelu_backward(widen(g), widen(x), approximate).astype(x.dtype)
    dx = np.empty(x.shape, x.dtype)
    flat_g, flat_x, flat_dx = g.reshape(-1), x.reshape(-1), dx.reshape(-1)
    size = block_length(x.dtype, 5)
    scratch = np.empty((2, min(size, x.size)), x.dtype)
    slope = _slope_exact if approximate == "none" else _slope_tanh
    for span in blocks(x.size, size):
        d = flat_dx[span]
        slope(flat_x[span], d, *scratch[:, : len(d)])
        d *= flat_g[span]
    return dx


def _tanh_of_cubic(a: Array, square: Array, out: Array) -> None:
    """out = tanh(A · (a + B · a³)), from a and a²."""
    np.multiply(square, GELU_A * GELU_B, out=out)
    out += GELU_A
    out *= a
    np.tanh(out, out=out)


def _slope_tanh(a: Array, d: Array, t: Array, s: Array) -> None:
    """d = (1 + t) · (1/2 + (1 - t) · a · A/2 · (1 + 3 · B · a²)), t the tanh; `s` is scratch."""
    np.multiply(a, a, out=d)
    _tanh_of_cubic(a, d, t)
    d *= 1.5 * GELU_A * GELU_B
    d += 0.5 * GELU_A
    d *= a
    np.subtract(1, t, out=s)
    d *= s
    d += 0.5
    t += 1
    d *= t


def _slope_exact(a: Array, d: Array, t: Array, s: Array) -> None:
    """d = (1 + erf(a / √2)) / 2 + a · exp(-a² / 2) / √(2π); `t` and `s` are scratch."""
    np.multiply(a, math.sqrt(0.5), out=d)
    _erf_(d, t, s)
    d += 1
    d *= 0.5
    np.multiply(a, a, out=t)
    t *= -0.5
    np.exp(t, out=t)
    t *= a
    t *= 1 / math.sqrt(2.0 * math.pi)
    d += t


def _erf_(z: Array, t: Array, s: Array) -> None:
    """z = erf(z), in place; `t` and `s` are scratch."""
    if z.dtype != np.float32:
        erf(z, out=z)
        return
    np.abs(z, out=s)
    np.multiply(s, ERF_P, out=t)
    t += 1
    np.divide(1, t, out=t)
    s *= s
    np.negative(s, out=s)
    np.exp(s, out=s)
    s *= t
    p = np.multiply(t, ERF_A[0])
    for coefficient in ERF_A[1:-1]:
        p += coefficient
        p *= t
    p += ERF_A[-1]
    p *= s
    np.subtract(1, p, out=p)  # erf(|z|)
    np.copysign(p, z, out=z)
