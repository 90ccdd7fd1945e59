"""What a rank is doing, in words: the record behind every message about wrong or stuck communication.

A `Call` is one communication as a rank asked for it. Its `signature` is what every rank of the group must
agree on before any data moves; `mismatch` says who called what, and in which point they differ. A `Journal`
is one rank's memory: where the program is (step, phase), its last 100 communications, and the one that it
waits in now. `report` turns the journals of all ranks into the text of a hang.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from minipar.comm.ledger import Ledger

RECORD_LENGTH = 100  # communications that a journal remembers


class Call:
    """One communication as one rank asked for it.

    Attributes:
        operation: its name without `_` or `_async`, as in the ledger.
        background: True for the `_async` form, which only matches `_async` on the other ranks.
        group: the communicator's name.
        number: 1 for the group's first collective on this rank, and so on; 0 for point-to-point.
        shape, dtype: of the array passed, or None.
        agree: the part of the shape that must be equal on all ranks; None where lengths may differ.
        symmetric: the number of the symmetric array that is passed; 0 for ordinary memory.
        op, root, counts, peer, tag: as passed, or None.
        step, phase: where the program said it was (`Communicator.mark`).
        since: `time.monotonic()` at the call.
    """

    __slots__ = (
        "agree", "background", "counts", "dtype", "group", "number", "op", "operation", "peer", "phase",
        "root", "shape", "since", "step", "symmetric", "tag",
    )  # fmt: skip

    operation: str
    background: bool
    group: str
    number: int
    shape: tuple[int, ...] | None
    dtype: Any
    agree: tuple[int, ...] | None
    symmetric: int
    op: str | None
    root: int | None
    counts: tuple[int, ...] | None
    peer: int | None
    tag: int | None
    step: int | None
    phase: str | None
    since: float

    @property
    def signature(self) -> tuple[Any, ...]:
        """What all ranks of the group must have in common; in the order of `SIGNATURE`."""
        return (
            self.operation + "_async" if self.background else self.operation,
            self.number,
            self.dtype,
            self.op,
            self.root,
            self.counts,
            self.agree,
            self.symmetric,
        )

    def __str__(self) -> str:
        text = self.operation + ("_async" if self.background else "")
        if self.number:
            text += f" #{self.number}"
        details = []
        if self.peer is not None:
            details.append(f"{'dest' if self.operation == 'send' else 'source'}={self.peer}")
            details.append(f"tag={self.tag}")
        if self.root is not None:
            details.append(f"root={self.root}")
        if self.op not in (None, "sum"):
            details.append(f"op={self.op}")
        if self.counts is not None:
            details.append(f"counts={list(self.counts)}")
        if self.symmetric:
            details.append(f"symmetric array {self.symmetric}")
        if details:
            text += f"({', '.join(details)})"
        if self.shape is not None:
            text += f" of {self.shape} {self.dtype}"
        elif self.dtype is not None:
            text += f" of {self.dtype}"
        if self.group != "world":
            text += f" in {self.group}"
        return text


SIGNATURE = ("operation", "sequence number", "dtype", "op", "root", "counts", "shape", "symmetric array")
PLURAL = {"waits": "wait", "has": "have", "is": "are", "does": "do", "was": "were"}


def numbered(ranks: Iterable[int]) -> str:
    """Return "rank 2", or "ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def grouped(texts: dict[int, str]) -> str:
    """Return "rank 0 waits in this; ranks 1-3 wait in that": ranks with the same text are taken together.

    Args:
        texts: for each rank, the rest of a sentence that begins with its name, from the verb on.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank in sorted(texts):
        ranks_of.setdefault(texts[rank], []).append(rank)
    sentences = []
    for text, ranks in ranks_of.items():
        if len(ranks) > 1:
            verb, rest = text.split(" ", 1)
            text = f"{PLURAL.get(verb, verb)} {rest.replace('its last was', 'their last was')}"
        sentences.append(f"{numbered(ranks)} {text}")
    return "; ".join(sentences)


def mismatch(calls: dict[int, tuple[tuple[Any, ...], str]]) -> str:
    """Return the message about calls that do not agree: ranks, operations, and what differs.

    Args:
        calls: for each rank (as numbered in the world) its call's `signature` and its text.
    """
    signatures = [signature for signature, _ in calls.values()]
    differ = [
        name for name, *values in zip(SIGNATURE, *signatures) if any(value != values[0] for value in values)
    ]
    if "operation" in differ:  # what else differs follows from that
        differ = ["operation"]
    texts = {rank: f"called {text}" for rank, (_, text) in calls.items()}
    return f"{grouped(texts)}: they differ in {' and '.join(differ)}"


class Journal:
    """One rank's memory of its communication, shared by its communicators of one world."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.ledger = Ledger()
        self.step: int | None = None
        self.phase: str | None = None
        self.entries: deque[Call] = deque(maxlen=RECORD_LENGTH)
        self.numbers: dict[str, int] = {}  # of each group's last collective, which the entries may have forgotten
        self.waiting: Call | None = None  # the communication that the rank is inside of
        self.waiting_since = 0.0
        self.finished = False
        self.on_move: Callable[[str], None] | None = None  # told the place whenever it changes

    def move(self, step: int | None, phase: str | None) -> None:
        """Note where the program is; what is None stays, but a new step ends the phase of the one before."""
        if step is not None:
            self.step, self.phase = step, phase
        elif phase is not None:
            self.phase = phase
        if self.on_move is not None:
            self.on_move(self.place())

    def finish(self) -> None:
        """Note that the rank's program has ended."""
        self.finished = True
        if self.on_move is not None:
            self.on_move(f"{self.place()}, exit")

    def place(self) -> str:
        """Return "rank 1", with the step and the phase where the program has told them."""
        parts = [f"rank {self.rank}"]
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.phase is not None:
            parts.append(self.phase)
        return ", ".join(parts)

    def wait_begins(self, call: Call) -> None:
        """Note that the rank now waits for `call` to complete."""
        self.waiting_since = time.monotonic()
        self.waiting = call

    def wait_ends(self) -> None:
        """Note that it does no longer."""
        self.waiting = None

    def state(self) -> str:
        """Return what the rank does, as the end of a sentence that begins with its name."""
        where = ", ".join(
            [f"step {self.step}"] * (self.step is not None) + [str(self.phase)] * (self.phase is not None)
        )
        where = f" ({where})" if where else ""
        last = f"; its last was {self.entries[-1]}" if self.entries else ""
        if self.finished:
            return f"has finished{where}{last}"
        waiting = self.waiting
        if waiting is not None:
            return f"waits in {waiting}{where}"
        return f"is not in a communication{where}{last}"


def report(states: dict[int, str], reason: str) -> str:
    """Return the message of a hang: the reason, then what each rank does (`Journal.state`)."""
    return f"{reason}: {grouped(states)}"
