"""Reductions. `axis` is None (all axes), an integer or a tuple; `keepdims` keeps reduced axes at length 1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar.backend import Array, array_module
from minipar.ops.elementwise import sqrt
from minipar.tensor import Tensor, primitive


def _spread(g: Array, ndim: int, axis: Any, keepdims: bool) -> Array:
    """Return `g` with the reduced ones of `ndim` axes back at length 1, so that it broadcasts again."""
    if keepdims:
        return g
    if axis is None:
        return g.reshape((1,) * ndim)
    return array_module(g).expand_dims(g, axis)


def _count(x: Array, axis: Any) -> int:
    """Return how many elements are reduced into one."""
    if axis is None:
        return x.size
    axes = axis if isinstance(axis, tuple) else (axis,)
    return math.prod([x.shape[a] for a in axes])


@primitive(precision="float32")
def sum(x, axis=None, keepdims=False):
    xp, shape = array_module(x), x.shape
    return x.sum(axis=axis, keepdims=keepdims), lambda g: (
        xp.broadcast_to(_spread(g, len(shape), axis, keepdims), shape),
        None,
        None,
    )


@primitive(precision="float32")
def mean(x, axis=None, keepdims=False):
    xp, shape = array_module(x), x.shape
    n = _count(x, axis)
    return x.mean(axis=axis, keepdims=keepdims), lambda g: (
        xp.broadcast_to(_spread(g / n, len(shape), axis, keepdims), shape),
        None,
        None,
    )


def _extreme(x: Array, y: Array, axis: Any, keepdims: bool) -> Any:
    """Return the vjp shared by amax and amin: equal elements share the gradient evenly."""

    def vjp(g: Array) -> Any:
        hit = x == _spread(y, x.ndim, axis, keepdims)
        hits = hit.sum(axis=axis, keepdims=True)
        return hit * (_spread(g, x.ndim, axis, keepdims) / hits.astype(g.dtype)), None, None

    return vjp


@primitive
def amax(x, axis=None, keepdims=False):
    y = x.max(axis=axis, keepdims=keepdims)
    return y, _extreme(x, np.asarray(y) if np.isscalar(y) else y, axis, keepdims)


@primitive
def amin(x, axis=None, keepdims=False):
    y = x.min(axis=axis, keepdims=keepdims)
    return y, _extreme(x, np.asarray(y) if np.isscalar(y) else y, axis, keepdims)


@primitive(precision="float32")
def var(x, axis=None, correction=1, keepdims=False):
    """Variance with divisor n - correction (1: unbiased, PyTorch's default; 0: the mean square deviation).

    Raises:
        ValueError: too few elements for that divisor.
    """
    divisor = _count(x, axis) - correction
    if divisor <= 0:
        raise ValueError(f"var: {_count(x, axis)} elements are too few for correction {correction}")
    centred = x - x.mean(axis=axis, keepdims=True)
    y = (centred * centred).sum(axis=axis, keepdims=keepdims) / divisor
    return y, lambda g: (_spread(g, centred.ndim, axis, keepdims) * centred * (2 / divisor), None, None, None)


def std(x: Tensor, axis: Any = None, correction: int = 1, keepdims: bool = False) -> Tensor:
    """Standard deviation, the square root of `var`."""
    return sqrt(var(x, axis, correction, keepdims))


@primitive(precision="float32")
def logsumexp(x, axis=None, keepdims=False):
    """log of the sum of exp(x), shifted by the maximum so that it neither overflows nor loses small terms."""
    xp = array_module(x)
    top = (x.max if x.size else x.sum)(axis=axis, keepdims=True)  # of nothing: 0, and the result is log 0
    top = xp.where(xp.isfinite(top), top, 0)  # a row of -inf has no maximum to subtract
    total = xp.exp(x - top).sum(axis=axis, keepdims=True)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the value of a row of -inf
        y = xp.log(total) + top  # axes kept
    out = y if keepdims else y.reshape(()) if axis is None else xp.squeeze(y, axis=axis)

    def vjp(g: Array) -> Any:
        probs = xp.exp(x - xp.where(y == -np.inf, 0, y))
        return _spread(g, x.ndim, axis, keepdims) * probs, None, None

    return out, vjp


@primitive(precision="float32")
def prod(x, axis=None, keepdims=False):
    """Product. Its gradient divides by x, so zeros are refused by backward."""
    y = x.prod(axis=axis, keepdims=keepdims)

    def vjp(g: Array) -> Any:
        if (x == 0).any():
            raise ValueError("prod: the gradient at a zero factor is not supported; use exp(sum(log)) or mul")
        return _spread(g * y, x.ndim, axis, keepdims) / x, None, None

    return y, vjp


@primitive(precision="float32")
def cumsum(x, axis):
    xp = array_module(x)
    return x.cumsum(axis=axis), lambda g: (xp.flip(xp.flip(g, axis).cumsum(axis=axis), axis), None)


def argmax(x: Tensor, axis: int | None = None) -> Tensor:
    """Position of the largest element, int64, not differentiable."""
    return Tensor(x.data.argmax(axis=axis))


def max(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Largest element; `amax` under NumPy's name (values only)."""
    return amax(x, axis, keepdims)


def min(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Smallest element; `amin` under NumPy's name (values only)."""
    return amin(x, axis, keepdims)
