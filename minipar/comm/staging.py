"""GPU arrays on an MPI that only knows host memory: copies there and back.

The stream is synchronised first, since MPI would otherwise read whatever the memory held before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minipar.backend import Array, synchronize, to_host


class Staged(NamedTuple):
    """Arrays that MPI may use, and where the result goes afterwards."""

    x: Array
    out: Array | None
    target: Any  # the GPU array that `out` is copied to, or None


def stage(x: Array, out: Array | None) -> Staged:
    """Return `x` and `out` as arrays that MPI can read and write; as they are if they are NumPy's."""
    if type(x) is np.ndarray:
        return Staged(x, out, None)
    synchronize(x)
    host = to_host(x)
    if out is None:
        return Staged(host, None, None)
    if out is x:
        return Staged(host, host, out)
    return Staged(host, np.empty(out.shape, out.dtype), out)


def unstage(staged: Staged) -> None:
    """Copy the result to the GPU array that it is meant for, if there is one."""
    if staged.target is not None:
        staged.target.set(staged.out)
        synchronize(staged.target)
