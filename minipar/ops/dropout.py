"""Dropout whose mask is a function of position, so that every layout draws the serial run's mask."""

from __future__ import annotations

from typing import Any

from minipar import kernels
from minipar.backend import array_module
from minipar.tensor import primitive


@primitive(fresh=True)
def dropout(x, p, key, start=0):
    """Zero each element with probability p and scale the rest by 1/(1-p) (Srivastava et al. 2014).

    Args:
        x: any shape; element i, counted row by row, has the global index start + i.
        p: probability in [0, 1).
        key: the mask's stream, `random.stream(seed, step, layer)`.
        start: global index of x's first element; or, where x is a part of a larger array, a list with that of
            each x[i].
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p = {p} must lie in [0, 1)")
    scale = 1 / (1 - p)
    mask = kernels.of(x).dropout_mask
    if isinstance(start, list):
        keep = array_module(x).empty(x.shape, dtype=bool)
        for row, first in zip(keep, start):
            row[...] = mask(x.shape[1:], p, key, first)
    else:
        keep = mask(x.shape, p, key, start)

    def apply(g: Any) -> Any:
        y = g * keep
        y *= g.dtype.type(scale)
        return y

    return apply(x), lambda g: (apply(g), None, None)
