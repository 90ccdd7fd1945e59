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
    """See plain.gelu.

    The tanh form is computed as x / (1 + exp(-2u)), which is x · (1 + tanh(u)) / 2: NumPy's exp takes half the
    time of its tanh.
    """
    if x.dtype.itemsize == 2:
        return gelu(widen(x), approximate).astype(x.dtype)
    y = np.empty(x.shape, x.dtype)
    flat_x, flat_y, size = x.reshape(-1), y.reshape(-1), block_length(x.dtype, 3)
    scratch = np.empty((2, min(size, x.size)), x.dtype)
    with np.errstate(over="ignore"):  # exp(-2u) is infinite where Φ is zero
        for span in blocks(x.size, size):
            a, u = flat_x[span], flat_y[span]
            if approximate == "none":
                np.multiply(a, math.sqrt(0.5), out=u)
                _erf_(u, *scratch[:, : len(u)])
                u += 1
                u *= a
                u *= 0.5
            else:
                np.multiply(a, a, out=u)
                u *= -2 * GELU_A * GELU_B
                u -= 2 * GELU_A
                u *= a
                np.exp(u, out=u)
                u += 1
                np.divide(a, u, out=u)
    return y


def gelu_backward(g: Array, x: Array, y: Array, approximate: str = "tanh") -> Array:
    """See plain.gelu_backward. Φ(x) is y / x, which is cheaper than an exponential function once more."""
    if x.dtype.itemsize == 2:  # y was rounded, so that y / x is not Φ to float32's precision
        wide = widen(x)
        return gelu_backward(widen(g), wide, gelu(wide, approximate), approximate).astype(x.dtype)
    dx = np.empty(x.shape, x.dtype)
    flat_g, flat_x, flat_y, flat_dx = g.reshape(-1), x.reshape(-1), y.reshape(-1), dx.reshape(-1)
    size = block_length(x.dtype, 6)
    scratch = np.empty((2, min(size, x.size)), x.dtype)
    density = _density_exact if approximate == "none" else _density_tanh
    with np.errstate(invalid="ignore"):  # 0 / 0, mended below
        for span in blocks(x.size, size):
            a, d = flat_x[span], flat_dx[span]
            square, phi = scratch[:, : len(d)]
            np.multiply(a, a, out=square)
            np.divide(flat_y[span], a, out=phi)
            if not square.min() > 0:  # so near to 0 that y / x is no more precise than either
                np.copyto(phi, 0.5, where=square == 0)
            density(a, square, phi, d)
            d *= a
            d += phi  # Φ(x) + x · Φ'(x)
            d *= flat_g[span]
    return dx


def _density_tanh(a: Array, square: Array, phi: Array, d: Array) -> None:
    """d = Φ'(x) = Φ · (1 - Φ) · 2A · (1 + 3 · B · x²), as of any logistic function; takes `square` as scratch."""
    np.subtract(1, phi, out=d)
    d *= phi
    square *= 6 * GELU_A * GELU_B
    square += 2 * GELU_A
    d *= square


def _density_exact(a: Array, square: Array, phi: Array, d: Array) -> None:
    """d = Φ'(x) = exp(-x² / 2) / √(2π)."""
    np.multiply(square, -0.5, out=d)
    np.exp(d, out=d)
    d *= 1 / math.sqrt(2.0 * math.pi)


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
