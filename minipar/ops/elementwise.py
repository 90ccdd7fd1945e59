"""Elementwise primitives: each is its formula and, beside it, its gradient.

Two arguments of different shape are broadcast as NumPy does; `unbroadcast` is the adjoint of that: what was
repeated is summed. Two arrays of different dtype are promoted as NumPy does; a number never widens an array.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minipar import kernels
from minipar.backend import Array, array_module, special_functions
from minipar.tensor import Tensor, primitive


def shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of an array, () for a number: all that the gradient of a sum needs to remember."""
    return x.shape if hasattr(x, "shape") else ()


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum `g` over the axes along which an array of `shape` was repeated, giving that shape back."""
    if g.shape == shape:
        return g
    if g.ndim > len(shape):
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    stretched = tuple([i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1])
    return g.sum(axis=stretched, keepdims=True) if stretched else g


def _passed(g: Array, shape: tuple[int, ...]) -> Any:
    """Return `g` itself where the shapes agree, else a thunk that sums it: not run for a constant."""
    return g if g.shape == shape else lambda: unbroadcast(g, shape)


@primitive
def add(a, b):
    shape_a, shape_b = shape_of(a), shape_of(b)
    return a + b, lambda g: (_passed(g, shape_a), _passed(g, shape_b))


@primitive
def sub(a, b):
    shape_a, shape_b = shape_of(a), shape_of(b)
    return a - b, lambda g: (_passed(g, shape_a), lambda: unbroadcast(-g, shape_b))


@primitive
def mul(a, b):
    if not hasattr(b, "shape"):  # a number has no gradient, so `a` need not be kept for it
        return a * b, lambda g: (lambda: g * b, None)
    return a * b, lambda g: (lambda: unbroadcast(g * b, shape_of(a)), lambda: unbroadcast(g * a, shape_of(b)))


@primitive
def div(a, b):
    if not hasattr(b, "shape"):
        return a / b, lambda g: (lambda: g / b, None)
    return a / b, lambda g: (
        lambda: unbroadcast(g / b, shape_of(a)),
        lambda: unbroadcast(-g * a / (b * b), shape_of(b)),
    )


@primitive
def neg(x):
    return -x, lambda g: -g


@primitive(precision="float32")
def pow(x, exponent):
    """x ** exponent. By the exponent it can be differentiated where x ≥ 0 (at x = 0 that gradient is 0)."""
    xp = array_module(x if hasattr(x, "shape") else exponent)

    def by_base(g: Array) -> Array:
        if hasattr(exponent, "shape"):
            lower = xp.where(exponent == 0, 0, exponent - 1)  # at x = 0, 0 · x⁰⁻¹ would be NaN
        else:
            lower = exponent - 1 if exponent else 0
        return unbroadcast(g * (exponent * x**lower), shape_of(x))

    def by_exponent(g: Array) -> Array:
        log = xp.log(xp.where(x == 0, 1, x)) if hasattr(x, "shape") else float(np.log(x or 1))
        return unbroadcast(g * x**exponent * log, shape_of(exponent))

    return x**exponent, lambda g: (lambda: by_base(g), lambda: by_exponent(g))


@primitive
def square(x):
    return x * x, lambda g: g * (2 * x)


@primitive(precision="float32")
def exp(x):
    y = array_module(x).exp(x)
    return y, lambda g: g * y


@primitive(precision="float32")
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


@primitive(fresh=True)
def relu(x):
    y = array_module(x).maximum(x, 0)
    return y, lambda g: g * (y > 0)


@primitive
def silu(x):
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    s = xp.where(x >= 0, 1 / (1 + e), e / (1 + e))  # the sigmoid of x
    return x * s, lambda g: g * (s * (1 + x * (1 - s)))


@primitive
def erf(x):
    y = special_functions(x).erf(x).astype(x.dtype)  # scipy has no float16 form
    return y, lambda g: g * (2 / np.pi**0.5) * array_module(x).exp(-x * x)


@primitive(fresh=True)
def gelu(x, approximate="tanh"):
    """Gaussian error linear unit (Hendrycks and Gimpel 2016).

    Args:
        approximate: "tanh" (GPT-2's form) or "none" (x times the normal distribution function).
    """
    k = kernels.of(x)
    y = k.gelu(x, approximate)
    return y, lambda g: k.gelu_backward(g, x, y, approximate)


def _shared(g: Array, a_wins: Any, a: Any, b: Any) -> Any:
    """Return the gradients of two competitors: all of `g` to the winner, half each where they are equal."""
    xp = array_module(g)
    to_a = xp.where(a == b, g / 2, xp.where(a_wins, g, 0))
    return lambda: unbroadcast(to_a, shape_of(a)), lambda: unbroadcast(g - to_a, shape_of(b))


@primitive
def maximum(a, b):
    """The larger of a and b; where they are equal each gets half of the gradient, as in PyTorch."""
    return array_module(a).maximum(a, b), lambda g: _shared(g, a > b, a, b)


@primitive
def minimum(a, b):
    """The smaller of a and b; where they are equal each gets half of the gradient."""
    return array_module(a).minimum(a, b), lambda g: _shared(g, a < b, a, b)


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
    xp, shape_a, shape_b = array_module(condition), shape_of(a), shape_of(b)
    return xp.where(condition, a, b), lambda g: (
        None,
        lambda: unbroadcast(xp.where(condition, g, 0), shape_a),
        lambda: unbroadcast(xp.where(condition, 0, g), shape_b),
    )


@primitive
def astype(x, dtype):
    """x rounded or widened to `dtype`; the gradient comes back in x's own dtype."""
    before = x.dtype
    return x.astype(dtype), lambda g: (g.astype(before), None)


def _compare(name: str, a: Any, b: Any) -> Tensor:
    """Return a boolean tensor; a comparison has no gradient and is never recorded."""
    a, b = (v.data if isinstance(v, Tensor) else v for v in (a, b))
    return Tensor(getattr(array_module(a if hasattr(a, "shape") else b), name)(a, b))


greater = functools.partial(_compare, "greater")
greater_equal = functools.partial(_compare, "greater_equal")
less = functools.partial(_compare, "less")
less_equal = functools.partial(_compare, "less_equal")
equal = functools.partial(_compare, "equal")
not_equal = functools.partial(_compare, "not_equal")
