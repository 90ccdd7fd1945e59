"""The inner loops of the engine, as fused functions on raw arrays: one contract, three implementations.

`plain` is each kernel's formula in any array module, to be read and to test against; `cpu` has the same
names, written for NumPy so that blocks stay in cache and no pass over memory is wasted; `gpu` has them for
CuPy, fused into CUDA kernels where a formula would make many passes, else the plain ones. Code above asks
`of(x)` for the one that suits an array:

    y = kernels.of(x).gelu(x)
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from minipar.backend import array_module
from minipar.kernels import cpu, gpu, gpu_blas, plain
from minipar.kernels.common import Array

__all__ = ["cpu", "gpu", "gpu_blas", "of", "plain"]


def of(x: Array) -> ModuleType:
    """The kernels for the device that holds `x`: `cpu` for NumPy arrays, `gpu` for CuPy arrays."""
    return cpu if array_module(x) is np else gpu
