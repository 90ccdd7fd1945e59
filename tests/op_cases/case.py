"""One case of an operation: the same line drives the numeric check, the dtype check and the parity test."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import Tensor
from minipar.backend import Array, is_gpu_array, to_device

DRAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda z: z,
    "positive": lambda z: np.abs(z) + 0.5,
    "apart": lambda z: z + 0.3 * np.sign(z),  # away from 0, where relu and abs have their kink
}


@dataclass(frozen=True)
class Case:
    """`fn` of arrays drawn in `shapes` by the law `draw`; `torch(T, *tensors)` is the same in PyTorch."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    torch: Callable[..., Any] | None = None
    draw: str = "normal"

    def inputs(self, dtype: Any = np.float64) -> list[np.ndarray]:
        """Return the arrays, the same at every call."""
        rng = np.random.default_rng(zlib.crc32(repr(self.shapes).encode()))
        return [np.asarray(DRAWS[self.draw](rng.standard_normal(s))).astype(dtype) for s in self.shapes]


def beside(x: Tensor, constant: np.ndarray) -> Array:
    """Return a constant on the device of a tensor: arrays of one operation have to be on one."""
    return to_device(constant, "cuda") if is_gpu_array(x.data) else constant


Cases = dict[str, list[Case]]


def listed(cases: Cases) -> list[Any]:
    """Return (name, case) pairs with readable ids for pytest.mark.parametrize."""
    import pytest

    return [
        pytest.param(name, case, id=f"{name}-{i}")
        for name, group in sorted(cases.items())
        for i, case in enumerate(group)
    ]
