"""Elementwise primitives: each is its formula and, beside it, its gradient.

Two arguments of different shape are broadcast as NumPy does; `unbroadcast` is the adjoint of that: what was
repeated is summed.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minipar import kernels
from minipar.backend import Array, array_module, special_functions
from minipar.tensor import Tensor, primitive


def unbroadcast(g: Array, like: Any) -> Array:
    """Sum `g` over the axes along which `like` (an array or a number) was repeated, giving its shape back."""
    shape = np.shape(like)
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


@primitive
def add(a, b):
    return a + b, lambda g: (unbroadcast(g, a), unbroadcast(g, b))


@primitive
def sub(a, b):
    return a - b, lambda g: (unbroadcast(g, a), lambda: unbroadcast(-g, b))


@primitive
def mul(a, b):
    return a * b, lambda g: (lambda: unbroadcast(g * b, a), lambda: unbroadcast(g * a, b))


@primitive
def div(a, b):
    return a / b, lambda g: (lambda: unbroadcast(g / b, a), lambda: unbroadcast(-g * a / (b * b), b))


@primitive
def neg(x):
    return -x, lambda g: -g


@primitive
def pow(x, exponent):
    """x ** exponent for a constant number or array `exponent`; use exp(b log(a)) to differentiate by both."""
    return x**exponent, lambda g: (lambda: unbroadcast(g * exponent * x ** (exponent - 1), x), None)


@primitive
def square(x):
    return x * x, lambda g: g * (2 * x)


@primitive
def exp(x):
    y = array_module(x).exp(x)
    return y, lambda g: g * y


@primitive
def log(x):
    return array_module(x).log(x), lambda g: g / x


@primitive
def sqrt(x):
    y = array_module(x).sqrt(x)
    return y, lambda g: g / (2 * y)


@primitive
def abs(x):
    xp = array_module(x)
    return xp.abs(x), lambda g: g * xp.sign(x)


@primitive
def sin(x):
    xp = array_module(x)
    return xp.sin(x), lambda g: g * xp.cos(x)


@primitive
def cos(x):
    xp = array_module(x)
    return xp.cos(x), lambda g: -g * xp.sin(x)


@primitive
def tanh(x):
    y = array_module(x).tanh(x)
    return y, lambda g: g * (1 - y * y)


@primitive
def sigmoid(x):
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))  # at most 1, so nothing overflows
    y = xp.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return y, lambda g: g * y * (1 - y)


@primitive
def relu(x):
    xp = array_module(x)
    y = xp.maximum(x, 0)
    return y, lambda g: g * (y > 0)


@primitive
def silu(x):
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    s = xp.where(x >= 0, 1 / (1 + e), e / (1 + e))  # the sigmoid of x
    return x * s, lambda g: g * (s * (1 + x * (1 - s)))


@primitive
def erf(x):
    return special_functions(x).erf(x), lambda g: g * (2 / np.pi**0.5) * array_module(x).exp(-x * x)


@primitive
def gelu(x, approximate="tanh"):
    """Gaussian error linear unit (Hendrycks and Gimpel 2016).

    Args:
        approximate: "tanh" (GPT-2's form) or "none" (x times the normal distribution function).
    """
    k = kernels.of(x)
    return k.gelu(x, approximate), lambda g: k.gelu_backward(g, x, approximate)


@primitive
def maximum(a, b):
    """The larger of a and b; where they are equal each gets half of the gradient, as in PyTorch."""
    share = lambda: (a > b) + 0.5 * (a == b)
    return array_module(a).maximum(a, b), lambda g: (
        lambda: unbroadcast(g * share().astype(g.dtype), a),
        lambda: unbroadcast(g * (1 - share()).astype(g.dtype), b),
    )


@primitive
def minimum(a, b):
    """The smaller of a and b; where they are equal each gets half of the gradient."""
    share = lambda: (a < b) + 0.5 * (a == b)
    return array_module(a).minimum(a, b), lambda g: (
        lambda: unbroadcast(g * share().astype(g.dtype), a),
        lambda: unbroadcast(g * (1 - share()).astype(g.dtype), b),
    )


@primitive
def clamp(x, low=None, high=None):
    """x limited to [low, high]; the gradient passes where x lies within, bounds included."""
    xp = array_module(x)
    inside = xp.ones(x.shape, dtype=bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return xp.clip(x, low, high), lambda g: (g * inside, None, None)


@primitive
def where(condition, a, b):
    """a where `condition` (boolean) holds, else b."""
    xp = array_module(condition)
    return xp.where(condition, a, b), lambda g: (
        None,
        lambda: unbroadcast(xp.where(condition, g, 0), a),
        lambda: unbroadcast(xp.where(condition, 0, g), b),
    )


@primitive
def astype(x, dtype):
    """x rounded or widened to `dtype`; the gradient comes back in x's own dtype."""
    return x.astype(dtype), lambda g: (g.astype(x.dtype), None)


def _compare(name: str, a: Any, b: Any) -> Tensor:
    """Return a boolean tensor; a comparison has no gradient and is never recorded."""
    a, b = (v.data if isinstance(v, Tensor) else v for v in (a, b))
    return Tensor(getattr(array_module(a), name)(a, b))


greater = functools.partial(_compare, "greater")
greater_equal = functools.partial(_compare, "greater_equal")
less = functools.partial(_compare, "less")
less_equal = functools.partial(_compare, "less_equal")
equal = functools.partial(_compare, "equal")
not_equal = functools.partial(_compare, "not_equal")
