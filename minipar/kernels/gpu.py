"""The kernels for CuPy arrays: the plain formulas, and new arrays made on the GPU."""

from __future__ import annotations

from functools import partial

from minipar.backend import device_module
from minipar.kernels import plain
from minipar.kernels.plain import *  # noqa: F403


def __getattr__(name: str):
    """`dropout_mask` is bound on first use, because CuPy is imported only where there is a GPU."""
    if name == "dropout_mask":
        return partial(plain.dropout_mask, xp=device_module("cuda"))
    raise AttributeError(name)
