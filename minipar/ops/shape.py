"""Primitives that move elements without changing them. The adjoint of moving out is adding back in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from minipar import backend
from minipar.backend import Array, array_module
from minipar.errors import UsageError
from minipar.ops.elementwise import unbroadcast
from minipar.tensor import Tensor, primitive


@primitive
def reshape(x, shape):
    before = x.shape
    return x.reshape(shape), lambda g: (g.reshape(before), None)


@primitive
def permute(x, axes):
    inverse = tuple(int(i) for i in np.argsort([a % x.ndim for a in axes]))
    return x.transpose(axes), lambda g: (g.transpose(inverse), None)


@primitive
def swapaxes(x, a, b):
    return x.swapaxes(a, b), lambda g: (g.swapaxes(a, b), None, None)


def transpose(x: Tensor, a: int | None = None, b: int | None = None) -> Tensor:
    """Swap axes a and b (PyTorch's meaning); without them reverse all axes."""
    if a is None and b is None:
        return permute(x, tuple(reversed(range(x.ndim))))
    if a is None or b is None:
        raise UsageError("transpose swaps two axes: give both, or neither to reverse all of them")
    return swapaxes(x, a, b)


def flatten(x: Tensor, start: int = 0) -> Tensor:
    """Merge axes `start` and all after it: (B, C, H, W) → (B, C·H·W) for start=1."""
    if x.ndim == start + 1:
        return x
    return reshape(x, (*x.shape[:start], int(np.prod(x.shape[start:], dtype=np.int64))))


def unsqueeze(x: Tensor, axis: int) -> Tensor:
    """Insert an axis of length 1 at `axis`."""
    axis = axis % (x.ndim + 1)
    return reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def squeeze(x: Tensor, axis: int) -> Tensor:
    """Remove `axis`, which must have length 1."""
    axis = axis % x.ndim
    if x.shape[axis] != 1:
        raise ValueError(f"squeeze: axis {axis} of shape {x.shape} has length {x.shape[axis]}, not 1")
    return reshape(x, x.shape[:axis] + x.shape[axis + 1 :])


@primitive
def broadcast_to(x, shape):
    before = x.shape
    return array_module(x).broadcast_to(x, shape), lambda g: (unbroadcast(g, before), None)


@primitive
def getitem(x, index):
    """x[index]: basic slices give views; integer and boolean arrays gather, their gradient scatter-adds."""
    index = tuple(_plain(i) for i in index) if isinstance(index, tuple) else _plain(index)
    parts = index if isinstance(index, tuple) else (index,)
    advanced = any(hasattr(i, "dtype") or isinstance(i, list) for i in parts)
    xp, shape = array_module(x), x.shape

    def vjp(g: Array) -> Any:
        def scatter() -> Array:
            dx = xp.zeros(shape, dtype=g.dtype)
            if advanced:
                xp.add.at(dx, index, g)  # an index may repeat, so add; do not assign
            else:
                dx[index] = g
            return dx

        return scatter, None

    return x[index], vjp


def _plain(index: Any) -> Any:
    return index.data if isinstance(index, Tensor) else index


@primitive
def _concat(*arrays, axis):
    xp = array_module(arrays[0])
    stops = np.cumsum([a.shape[axis] for a in arrays])[:-1].tolist()
    return xp.concatenate(arrays, axis=axis), lambda g: tuple(xp.split(g, stops, axis=axis))


def concat(tensors: list[Tensor] | tuple[Tensor, ...], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis; all other axes must agree."""
    if not tensors:
        raise ValueError("concat: no tensors to join")
    return _concat(*tensors, axis=axis)


def stack(tensors: list[Tensor] | tuple[Tensor, ...], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis."""
    if len({t.shape for t in tensors}) != 1:
        raise ValueError(f"stack: tensors must have one shape, got {[t.shape for t in tensors]}")
    return _concat(*(unsqueeze(t, axis) for t in tensors), axis=axis)


@primitive
def _split(x, sizes, axis):
    xp = array_module(x)
    stops = np.cumsum(sizes)[:-1].tolist()
    parts, shape, dtype = tuple(xp.split(x, stops, axis=axis)), x.shape, x.dtype

    def vjp(gs: list[Array | None]) -> Any:
        def join() -> Array:
            dx = xp.zeros(shape, dtype=dtype)
            for part, g in zip(xp.split(dx, stops, axis=axis), gs):
                if g is not None:
                    part[...] = g
            return dx

        return join, None, None

    return parts, vjp


def split(x: Tensor, sizes: int | list[int] | tuple[int, ...], axis: int = 0) -> tuple[Tensor, ...]:
    """Cut `axis` into pieces: of length `sizes` each (the last may be shorter), or of the lengths listed.

    Raises:
        ValueError: the lengths do not add up to the axis.
    """
    n = x.shape[axis]
    if isinstance(sizes, int):
        if sizes < 1:
            raise ValueError(f"split: pieces of length {sizes} are not possible, use at least 1")
        sizes = [min(sizes, n - i) for i in range(0, n, sizes)]
    if sum(sizes) != n or min(sizes, default=0) < 0:
        raise ValueError(f"split: sizes {list(sizes)} add up to {sum(sizes)}, axis {axis} has length {n}")
    return _split(x, tuple(sizes), axis) if len(sizes) > 1 else (x,)


def chunk(x: Tensor, chunks: int, axis: int = 0) -> tuple[Tensor, ...]:
    """Cut `axis` into `chunks` pieces of equal length, the last may be shorter (PyTorch's rule)."""
    if chunks < 1:
        raise ValueError(f"chunk: {chunks} pieces are not possible, use at least 1")
    return split(x, max(-(-x.shape[axis] // chunks), 1), axis)


@primitive
def pad(x, widths, value=0.0):
    """Add `value` around x: `widths` is one (before, after) pair per axis, as in numpy.pad."""
    if len(widths) != x.ndim or any(len(pair) != 2 for pair in widths):
        raise ValueError(f"pad: widths {widths} must be one (before, after) pair for each axis of {x.shape}")
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape))
    return array_module(x).pad(x, widths, constant_values=value), lambda g: (g[inner], None, None)


@primitive
def gather(x, index, axis):
    """Pick along `axis` by an integer array of x's shape elsewhere (numpy.take_along_axis, torch.gather)."""
    xp, shape = array_module(x), x.shape
    if index.ndim != x.ndim or any(
        n != m for i, (n, m) in enumerate(zip(index.shape, shape)) if i != axis % x.ndim
    ):
        raise ValueError(f"gather: index {index.shape} must have the shape of x {shape} but for axis {axis}")

    def vjp(g: Array) -> Any:
        def scatter() -> Array:
            dx = xp.zeros(shape, dtype=g.dtype)
            grid = list(xp.ogrid[tuple(slice(n) for n in index.shape)])
            grid[axis] = index
            xp.add.at(dx, tuple(grid), g)  # an index may repeat, so add; do not assign
            return dx

        return scatter, None, None

    return xp.take_along_axis(x, index, axis=axis), vjp


@primitive
def flip(x, axis):
    xp = array_module(x)
    return xp.flip(x, axis), lambda g: (xp.flip(g, axis), None)


@primitive
def roll(x, shift, axis):
    xp = array_module(x)
    return xp.roll(x, shift, axis), lambda g: (xp.roll(g, _negated(shift), axis), None, None)


def _negated(shift: Any) -> Any:
    return tuple(-s for s in shift) if isinstance(shift, tuple) else -shift


@primitive
def tril(x, diagonal=0):
    """Zero above the diagonal of the last two axes."""
    xp = array_module(x)
    return xp.tril(x, diagonal), lambda g: (xp.tril(g, diagonal), None)


@primitive
def contiguous(x):
    """The same values in one contiguous block of memory; no copy if they already lie so."""
    return backend.contiguous(x), lambda g: g
