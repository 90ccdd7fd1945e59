"""The tape itself: backward of graphs of up to 100,000 nodes, and what an operation costs beside its arithmetic."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from peers import HOW, missing
from table import Line

SMALL, LARGE = 10_000, 100_000  # nodes
ROUNDS = 9


def ours(nodes: int) -> float:
    """Return the seconds of a chain of small operations, forward and backward."""
    from minipar import Tensor

    return chain(Tensor(np.ones(4, np.float32), requires_grad=True), nodes)


def torchs(nodes: int) -> float:
    """The same in PyTorch."""
    import torch

    torch.set_num_threads(1)
    return chain(torch.ones(4, requires_grad=True), nodes)


def chain(y: Any, nodes: int) -> float:
    start = time.perf_counter()
    for _ in range(nodes - 1):
        y = y * 1.0001
    y.sum().backward()
    return time.perf_counter() - start


def hips(nodes: int) -> float:
    """The same in HIPS autograd."""
    from autograd import grad

    def f(x: Any) -> Any:
        y = x
        for _ in range(nodes - 1):
            y = y * 1.0001
        return y.sum()

    start = time.perf_counter()
    grad(f)(np.ones(4))
    return time.perf_counter() - start


def backward(nodes: int) -> float:
    """Return the seconds of backward alone, garbage collection held off as for any timing."""
    from minipar import Tensor

    y = Tensor(np.ones(4, np.float32), requires_grad=True)
    for _ in range(nodes - 1):
        y = y * 1.0001
    y = y.sum()
    gc.disable()
    start = time.perf_counter()
    y.backward()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds


def medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of the seconds that each function returns; they take turns, and the first warms up.

    The garbage collector leaves alone what there is after that turn: it would go through all of PyTorch's modules
    again and again, in the time of whoever makes the most objects.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = run()
            if turn:
                seconds[name].append(taken)
        if not turn:
            gc.collect()
            gc.freeze()
    gc.unfreeze()
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(quick: bool) -> list[Line]:
    """Return the lines of the tape."""
    small, large = (n // 100 if quick else n for n in (SMALL, LARGE))
    rounds, times, lines = (1 if quick else ROUNDS), large // small, []
    peers = {package: peer for package, peer in {"torch": torchs, "autograd": hips}.items() if missing(package) is None}
    runs: dict[str, Callable[[], float]] = {"minipar": lambda: ours(small)}
    runs |= {package: lambda peer=peer: peer(small) for package, peer in peers.items()}  # type: ignore[misc]
    found = medians(runs, rounds)
    mine, work = found["minipar"], "an operation on 4 numbers, forward and backward"
    for package in ("torch", "autograd"):
        µs, why = mine / small * 1e6, missing(package)
        if why is None:
            lines.append(Line(work, µs, "µs", found[package] / small * 1e6, HOW[package], found[package] / mine))
        else:
            lines.append(Line(work, µs, "µs", None, HOW[package], note=why))
    runs = {"one": lambda: backward(large), "many": lambda: sum(backward(small) for _ in range(times))}
    found = medians(runs, rounds)
    one, many = found["one"], found["many"]
    note = "linear: 1; the loop has no recursion"
    peer = f"{times} × {small:,} nodes"
    lines.append(Line(f"backward of {large:,} nodes", one * 1e3, "ms", many * 1e3, peer, many / one, 0.8, note))
    return lines
