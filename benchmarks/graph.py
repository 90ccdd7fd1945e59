"""The tape itself: backward of graphs of up to 100,000 nodes, and what an operation costs beside its arithmetic."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from machine import median_seconds
from peers import HOW, missing
from table import Line

NODES = (10_000, 100_000)


def ours(nodes: int) -> float:
    """Return seconds an operation for a chain of small operations, forward and backward."""
    from minipar import Tensor

    return chain(lambda: Tensor(np.ones(4, np.float32), requires_grad=True), nodes)


def torchs(nodes: int) -> float:
    """The same in PyTorch."""
    import torch

    torch.set_num_threads(1)
    return chain(lambda: torch.ones(4, requires_grad=True), nodes)


def hips(nodes: int) -> float:
    """The same in HIPS autograd."""
    from autograd import grad

    def f(x: Any) -> Any:
        y = x
        for _ in range(nodes - 1):
            y = y * 1.0001
        return y.sum()

    return median_seconds(lambda: grad(f)(np.ones(4)), 3) / nodes


def chain(start: Callable[[], Any], nodes: int) -> float:
    def run() -> None:
        y = start()
        for _ in range(nodes - 1):
            y = y * 1.0001
        y.sum().backward()

    return median_seconds(run, 3 if nodes > 10_000 else 9) / nodes


def backward_seconds(nodes: int) -> float:
    """Return the time of backward alone, garbage collection held off as for any timing."""
    from minipar import Tensor

    times = []
    for _ in range(3):
        y = Tensor(np.ones(4, np.float32), requires_grad=True)
        for _ in range(nodes - 1):
            y = y * 1.0001
        y = y.sum()
        gc.disable()
        start = time.perf_counter()
        y.backward()
        times.append(time.perf_counter() - start)
        gc.enable()
    return statistics.median(times)


def measure(quick: bool) -> list[Line]:
    """Return the lines of the tape."""
    nodes = 100 if quick else 10_000
    peers: dict[str, Callable[[int], float]] = {"torch": torchs, "autograd": hips}
    work, lines = "an operation on 4 numbers, forward and backward", []
    for package, peer in peers.items():
        mine, why = ours(nodes), missing(package)
        if why is None:
            theirs = peer(nodes)
            lines.append(Line(work, mine * 1e6, "µs", theirs * 1e6, HOW[package], theirs / mine))
        else:
            lines.append(Line(work, mine * 1e6, "µs", None, HOW[package], note=why))
    small, large = (n // 100 if quick else n for n in NODES)
    seconds = {n: backward_seconds(n) for n in (small, large)}
    growth = seconds[large] / seconds[small] / (large / small)
    lines.append(
        Line(
            f"backward of {large:,} nodes", seconds[large] * 1e3, "ms", seconds[small] * 1e3 * large / small,
            f"{large // small} × {small:,} nodes", 1 / growth, 0.8, "linear: 1; the loop has no recursion",
        )
    )  # fmt: skip
    return lines
