"""The kernels for CuPy arrays: the plain formulas, and new arrays made on the GPU."""

from __future__ import annotations

from minipar.backend import device_module
from minipar.kernels import plain
from minipar.kernels.common import Array
from minipar.kernels.plain import *  # noqa: F403


def dropout_mask(  # type: ignore[no-redef]
    shape: tuple[int, ...], p: float, key: int, start: int = 0
) -> Array:
    """See plain.dropout_mask; the mask lies on the current GPU."""
    return plain.dropout_mask(shape, p, key, start, xp=device_module("cuda"))
