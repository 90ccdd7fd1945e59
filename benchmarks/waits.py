"""Counts how often a piece of work waits for the GPU: every value that is read back, every stream waited for.

    with Waits(cupy) as waits:
        step()
    print(waits.total, waits)      # 2 (get 1, item 1)

A wait lets the GPU run dry: the host queues its next kernel only when everything before is done. What is counted is
what Python asks for; what CuPy's compiled code waits for within itself is not seen, but a step that can be captured
as a CUDA graph has none of that.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

READS = ("get", "item", "tolist", "__float__", "__int__", "__complex__", "__bool__", "__index__")


class Waits:
    """A context in which waits for the GPU are counted; one that happens within another counts once.

    Args:
        cupy: the module, whose classes are changed inside and put back after.

    Attributes:
        counts: by the name of what waited.
    """

    def __init__(self, cupy: Any):
        self.counts: Counter[str] = Counter()
        self._places = [(cupy.ndarray, name) for name in READS if hasattr(cupy.ndarray, name)]
        self._places += [(_owner(kind, "synchronize"), "synchronize") for kind in (cupy.cuda.Stream, cupy.cuda.Event)]
        self._before: list[tuple[type, str, Any]] = []
        self._within = False

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())) or "none"

    def __enter__(self) -> Self:
        for owner, name in self._places:
            self._before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, self._counted(name, getattr(owner, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        for owner, name, before in reversed(self._before):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._before.clear()

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return function(*args, **kwargs)
            self.counts[name] += 1
            self._within = True
            try:
                return function(*args, **kwargs)
            finally:
                self._within = False

        return counted


def _owner(kind: type, name: str) -> type:
    """Return the class, of `kind` or above it, that defines a method."""
    return next(c for c in kind.__mro__ if name in vars(c))
