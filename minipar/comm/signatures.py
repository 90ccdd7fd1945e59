"""Do all ranks of a group ask for the same? Their signatures are compared before any data moves.

Every rank counts the comparisons of its group, so that the how-manieth one meets the same one of the others. What
is compared is 46 bits of digest. Two ways, with one interface:

- `Board`, for ranks of one host: each rank posts its digest in memory that all of them read. That takes little time
  and, what counts for more, little memory: after a message of 16 MiB all caches are cold, and an all-reduce of two
  integers took 50 µs there, for code and data that had to be fetched again (`benchmarks/communication.py`).
- `Reduction`, for ranks of several hosts: an all-reduce of the digest and its negative gives the highest and the
  lowest one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

from mpi4py import MPI

from minipar.comm.guard import Call
from minipar.comm.progress import LOOKS, Progress
from minipar.comm.shared_memory import WORDS, Line, SharedMemory

Signature = tuple[Any, ...]

DIGEST_BITS = 46
TURNS = 2**16  # a word is digest · TURNS + turn: its lowest bits tell the turn, all but the multiples of TURNS
LAST_TURN = TURNS - 1
SLOTS = 8  # words of a rank's line for its latest digests; the one after them: how many comparisons it is done with
LAST_SLOT = SLOTS - 1
assert SLOTS < WORDS


@cache
def digest_of(signature: Signature) -> int:
    """Return 46 bits that are the same on all ranks, which Python's own hash of a text is not."""
    return int.from_bytes(hashlib.blake2b(repr(signature).encode(), digest_size=8).digest()) >> 64 - DIGEST_BITS


def signature_of(call: Call, turn: int) -> Signature:
    """Return what must be equal on all ranks; the number of the call counts by what it is beside the turn."""
    return (
        call.operation, call.background, call.dtype, call.op, call.root, call.counts, call.agree, call.symmetric,
        call.number - turn,
    )  # fmt: skip


class Comparison(ABC):
    """One call beside those of the other ranks of the group."""

    @abstractmethod
    def result(self) -> bool | None:
        """Return whether all ranks ask for the same; None while one has not asked. The first result stays."""


class Signatures(ABC):
    """The comparisons of a group, as one rank takes part in them: in the order of its calls.

    Attributes:
        one_host: whether all ranks of the group share memory.
    """

    one_host: bool

    @abstractmethod
    def begin(self, call: Call) -> Comparison:
        """Tell the other ranks of this call, and return its comparison. Does not wait for anyone."""

    def all_equal(self, call: Call, progress: Progress) -> bool:
        """Return, once every rank has asked, whether all ask for the same."""
        return progress.until(self.begin(call).result)

    @abstractmethod
    def free(self) -> None:
        """Give up what the group holds; all ranks have had the results of all comparisons."""


class Digests(dict[Signature, int]):
    """The digest of each signature that has been asked for, where a word has it: above the bits of the turn."""

    def __missing__(self, signature: Signature) -> int:
        digest = self[signature] = digest_of(signature) * TURNS
        return digest


class Board(Signatures):
    """The comparisons of ranks that share memory.

    A rank's line holds its latest digests, each in one word with the number of its turn: the two change at once, and
    a reader that finds its own word there knows all that it needs. The word of turn n gives way to that of turn
    n + 8 when all others have seen it; a program that begins more than 8 in the background posts the rest later.
    Where a write must not come before a read, it depends on that read, and then no processor changes the order.

    Args:
        memory: that of the host.
        lines: of all ranks of the group.
        rank: this one's number among them.
    """

    one_host = True

    def __init__(self, memory: SharedMemory, lines: Sequence[Line], rank: int) -> None:
        self._memory = memory
        self._words = memory.words
        self._line = lines[rank]
        self._mine = self._line.place
        self._others = tuple(line.place for other, line in enumerate(lines) if other != rank)
        self._turn = 0  # comparisons begun
        self._clear = SLOTS  # up to this turn a word may be written: all others have seen the one in its place
        self._digests = Digests()

    def begin(self, call: Call) -> Comparison:
        turn = self._turn = self._turn + 1
        return Posted(self, turn, self._digests[signature_of(call, turn)] + turn)

    def all_equal(self, call: Call, progress: Progress) -> bool:
        # As `signature_of`, `post` and `look`, but in one piece and with few names, since every blocking collective
        # pays for it: after a large message each function and each name more is one more to be fetched from memory.
        turn = self._turn = self._turn + 1
        signature = (
            call.operation, call.background, call.dtype, call.op, call.root, call.counts, call.agree, call.symmetric,
            call.number - turn,
        )  # fmt: skip
        word = self._digests[signature] + turn
        if turn > self._clear and not self._may_write(turn):
            return progress.until(Posted(self, turn, word).result)
        words, slot, looks = self._words, turn & LAST_SLOT, 0
        words[self._mine + slot] = word
        for other in self._others:
            while words[other + slot] != word:
                looks += 1
                if looks > LOOKS:  # it is late, or asks for something else
                    return progress.until(Posted(self, turn, word).result)
        words[self._mine + SLOTS] = turn
        return True

    def post(self, turn: int, word: int) -> bool:
        """Write this rank's word of a turn, unless the one in its place is still to be read."""
        if turn > self._clear and not self._may_write(turn):
            return False
        self._words[self._mine + (turn & LAST_SLOT)] = word
        return True

    def _may_write(self, turn: int) -> bool:
        """Look whether all others have seen the word whose place that of a turn takes."""
        self._clear = min([self._words[other + SLOTS] for other in self._others], default=turn) + SLOTS
        return turn <= self._clear

    def look(self, turn: int, word: int) -> bool | None:
        """Compare this rank's word of a turn with those of the others; None while one is not there."""
        words, slot, equal = self._words, turn & LAST_SLOT, True
        for other in self._others:
            found = words[other + slot]
            if found != word:
                if found & LAST_TURN != word & LAST_TURN:
                    return None
                equal = False
        words[self._mine + SLOTS] = turn
        return equal

    def free(self) -> None:
        self._memory.give_back(self._line)


class Posted(Comparison):
    """A comparison by the board; `result` is asked in the order of turns."""

    __slots__ = ("_board", "_posted", "_result", "_turn", "_word")

    def __init__(self, board: Board, turn: int, word: int) -> None:
        self._board, self._turn, self._word = board, turn, word
        self._result: bool | None = None
        self._posted = board.post(turn, word)

    def result(self) -> bool | None:
        if self._result is None:
            if not self._posted:
                self._posted = self._board.post(self._turn, self._word)
            if self._posted:
                self._result = self._board.look(self._turn, self._word)
        return self._result


class Reduction(Signatures):
    """The comparisons of ranks that do not share memory, by messages over `comm`."""

    one_host = False

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._turn = 0  # comparisons begun

    def begin(self, call: Call) -> Comparison:
        self._turn += 1
        digest = digest_of(signature_of(call, self._turn))
        mine, highest = array("q", (digest, -digest)), array("q", (0, 0))
        return Reduced(self._comm.Iallreduce(mine, highest, MPI.MAX), mine, highest)

    def free(self) -> None:
        """Nothing: the communicator belongs to the group."""


class Reduced(Comparison):
    """A comparison by the highest digest and the highest negative one."""

    def __init__(self, request: Any, mine: array[int], highest: array[int]) -> None:
        self._request, self._mine, self._highest = request, mine, highest  # which MPI reads and writes

    def result(self) -> bool | None:
        return self._highest[0] == -self._highest[1] if self._request.Test() else None


def signatures_of(comm: Any, memory: SharedMemory) -> Signatures:
    """Return how the ranks of a group compare their signatures. Collective.

    Args:
        comm: an mpi4py communicator of the group on which there are no other collectives.
        memory: that of this rank's host.
    """
    line = memory.take()
    lines: list[Line] = comm.allgather(line)
    if len({host for host, _ in lines}) == 1 and all(place >= 0 for _, place in lines):
        return Board(memory, lines, comm.Get_rank())
    if line.place >= 0:
        memory.give_back(line)
    return Reduction(comm)
