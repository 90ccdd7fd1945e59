"""A profile run: how many seconds each block of a model takes, forward and backward.

The partition policies `by_cost` and `by_devices` balance stages by these numbers. Clocks differ from rank to
rank, so ranks that are to agree on an assignment take `agreed_costs`: one rank measures and tells the others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from minipar.agreement import agreed
from minipar.backend import Array, array_module, is_floating, is_gpu_array, synchronize
from minipar.comm.interface import Communicator
from minipar.errors import UsageError
from minipar.models import Model
from minipar.nn import Module
from minipar.tensor import Tensor, as_input


def profile_blocks(model: Model, inputs: Array, repeats: int = 3, dtype: Any = None) -> list[float]:
    """Return seconds per block: its forward, and its backward from a gradient of ones.

    Each block runs once to warm up and `repeats` times under the clock; the least counts, being the least
    disturbed. A block without values is filled for its turn and emptied again, so the whole model need not
    fit. Gradients are forgotten; buffers are left as they were.

    Args:
        inputs: a batch for the first block: floats, or integer ids.
        repeats: timed runs.
        dtype: for blocks without values; by default the dtype of `inputs` if it is floating, else float32.

    Raises:
        UsageError: repeats below 1, or a model with gradient hooks (already wrapped for parallel training).
    """
    if repeats < 1:
        raise UsageError(f"profile_blocks: repeats = {repeats} must be at least 1")
    if any(p.hooks for p in model.parameters()):
        raise UsageError("profile_blocks: the model has gradient hooks; measure before it is made parallel")
    dtype = dtype or (inputs.dtype if is_floating(inputs.dtype) else "float32")
    model.assign_paths()
    buffers = [(b, b.data.copy()) for _, b in model.named_buffers()]
    x = as_input(inputs)
    seconds = []
    try:
        for i, block in enumerate(model.blocks):
            with _values(block, dtype, "cuda" if is_gpu_array(inputs) else "cpu"):
                times = []
                for _ in range(repeats + 1):
                    again = x.detach().requires_grad_(i > 0) if isinstance(x, Tensor) else x
                    elapsed, y = _once(block, again)
                    times.append(elapsed)
            seconds.append(min(times[1:]))
            x = y.detach()
    finally:
        model.zero_grad()
        for buffer, values in buffers:
            buffer.data = values
    return seconds


def _once(block: Module, x: Any) -> tuple[float, Tensor]:
    data = x.data if isinstance(x, Tensor) else x
    synchronize(data)
    start = time.perf_counter()
    y = block(x)
    if y.requires_grad:
        y.backward(array_module(y.data).ones_like(y.data))
    synchronize(y.data)
    return time.perf_counter() - start, y


@contextlib.contextmanager
def _values(block: Module, dtype: Any, device: str) -> Iterator[None]:
    """Inside, every parameter of the block has values."""
    missing = [p for p in block.parameters() if not p.is_materialized]
    for p in missing:
        p.materialize(0, p.name, dtype, device)
    try:
        yield
    finally:
        for p in missing:
            del p.data


def agreed_costs(
    model: Model, inputs: Array, comm: Communicator, repeats: int = 3, dtype: Any = None
) -> list[float]:
    """Return `profile_blocks` as rank 0 of `comm` measured it; the same list on every rank.

    Ranks other than 0 wait, so that they do not disturb the clock, and may pass any `inputs`.
    """

    def measure() -> list[float]:
        return profile_blocks(model, inputs, repeats, dtype) if comm.rank == 0 else []

    costs: list[float] = comm.broadcast_object(agreed(comm, measure))
    return costs
