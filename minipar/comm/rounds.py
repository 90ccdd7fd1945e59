"""The work of a collective among rank-threads, done in everybody's arrays at once.

A `Round` is one collective: rank r brings its input to `given[r]` and its output to `outs[r]`. `share` is
what one rank does of it once all have arrived: rank r reduces slice r of all inputs and writes it into all
outputs, so the work is spread evenly, no element is written by two ranks, and NumPy releases the
interpreter lock meanwhile. The same shares, done one after another, make up a small collective or one in
the background.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minipar.backend import Array, array_module, synchronize
from minipar.comm.fabric import Gate
from minipar.comm.guard import Call
from minipar.comm.member import UFUNCS

BLOCK = 32768  # elements reduced at a time: input and output blocks stay in the cache


class Round:
    """One collective of a group: what each rank brought, and how far it is."""

    def __init__(self, size: int) -> None:
        self.calls: list[Any] = [None] * size
        self.given: list[Any] = [None] * size
        self.outs: list[Any] = [None] * size
        self.missing = size  # ranks that have not arrived
        self.working = size  # ranks whose share is not done
        self.ready = Gate()  # all have arrived and agree
        self.end = Gate()  # all shares are done
        self.small = False  # the last to arrive does all shares
        self.error: Exception | None = None  # raised on every rank
        self.nbytes = 0
        self.start = 0.0  # virtual time: the latest arrival
        self.finish = 0.0  # virtual time: when all leave


class Message:
    """One side of a message: the array that is sent, or where it goes; the gate opens once it is copied."""

    def __init__(self, call: Call, array: Array | None, time: float) -> None:
        self.call = call
        self.array = array
        self.gate = Gate()
        self.time = time  # virtual time: of the start of a send, then of the arrival
        self.error: str | None = None


class Group:
    """What the ranks of one communicator share."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)
        self.rounds: dict[int, Round] = {}  # by number: collectives that not all ranks have reached
        self.mail: dict[tuple[int, int, int], tuple[deque[Message], deque[Message]]] = {}
        self.busy_until = 0.0  # virtual time at which the last collective ends
        self.helper: ThreadPoolExecutor | None = None  # one thread, for the `_async` forms


def reduce_blocks(sources: Sequence[Array], targets: Sequence[Array], op: str) -> None:
    """Reduce equally long 1-D arrays in their order, and write the result into every target.

    A target may be one of the sources: a block is read from all before it is written to any.
    """
    xp = array_module(sources[0])
    ufunc = getattr(xp, UFUNCS[op])
    n = sources[0].size
    block = BLOCK if xp is np else max(n, 1)
    scratch = xp.empty(min(n, block), sources[0].dtype)
    for start in range(0, n, block):
        piece = slice(start, start + block)
        total = scratch[: min(block, n - start)]
        if len(sources) == 1:
            xp.copyto(total, sources[0][piece])
        else:
            ufunc(sources[0][piece], sources[1][piece], out=total)
        for source in sources[2:]:
            ufunc(total, source[piece], out=total)
        for target in targets:
            xp.copyto(target[piece], total)


def share(call: Call, rank: int, given: Sequence[Array], outs: Sequence[Array | None]) -> None:
    """Do `rank`'s share of a collective, on the arrays of all ranks."""
    size, x, out, op = len(given), given[rank], outs[rank], call.op or "sum"
    if call.operation in ("all_reduce", "reduce"):
        piece = slice(rank * x.size // size, (rank + 1) * x.size // size)
        targets = [target.reshape(-1)[piece] for target in outs if target is not None]
        reduce_blocks([source.reshape(-1)[piece] for source in given], targets, op)
    elif call.operation == "reduce_scatter":
        assert out is not None and call.counts is not None
        first = sum(call.counts[:rank])
        rows = slice(first, first + call.counts[rank])
        reduce_blocks([source[rows].reshape(-1) for source in given], [out.reshape(-1)], op)
    elif call.operation == "broadcast":
        if rank != call.root:
            out[...] = given[call.root or 0]  # type: ignore[index]
    else:  # all_gather
        array_module(x).concatenate(given, out=out)
    synchronize(x)
