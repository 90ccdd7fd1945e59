"""What the scenarios of communication share: their register, known arrays, and ways to compare ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minipar.comm import Communicator
from minipar.errors import MismatchError

SCENARIOS: dict[str, Callable[[Communicator], None]] = {}
LENGTHS = (0, 1, 2, 3, 7, 100, 20_001)  # none, fewer than ranks, small, and several blocks


def scenario(fn: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    SCENARIOS[fn.__name__] = fn
    return fn


def part(rank: int, n: int, dtype: object = np.float64) -> np.ndarray:
    """Rank `rank`'s array of n elements: known to every rank, different on each."""
    x = np.random.default_rng((rank, n)).integers(-50, 50, n)
    return (x % 2 == 0) if np.dtype(dtype) == bool else x.astype(dtype)


def parts(comm: Communicator, n: int, dtype: object = np.float64) -> list[np.ndarray]:
    return [part(rank, n, dtype) for rank in range(comm.size)]


def same_everywhere(comm: Communicator, x: np.ndarray) -> None:
    copies = comm.all_gather_object((x.tobytes(), x.shape, str(x.dtype)))
    assert len(set(copies)) == 1


def refused(comm: Communicator, call: Callable[[], object], *fragments: str) -> None:
    """Assert that `call` is a MismatchError on every rank, with one text that has these fragments."""
    with pytest.raises(MismatchError) as caught:
        call()
    texts = comm.all_gather_object(str(caught.value))
    assert len(set(texts)) == 1
    for fragment in fragments:
        assert fragment in texts[0], (fragment, texts[0])
