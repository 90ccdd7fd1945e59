"""Memory that all ranks of one host can read and write, and lines of it, which each rank hands out to its groups.

The memory is a file in the file system in memory, without a name as soon as all ranks have mapped it: a job that is
killed later leaves nothing behind. A line is `WORDS` integers of 64 bits, two cache lines long: processors fetch
those in pairs, and a line is written by its own rank only.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from typing import Any, NamedTuple

from minipar.errors import UsageError

MEMORY_DIRECTORY = "/dev/shm"
PIECE_BYTES = 2**20  # written to a file at a time
WORDS, WORD_BYTES = 16, 8
LINES = 1024  # of each rank; MPI has room for fewer groups


class Line(NamedTuple):
    """A rank's line: the world rank that is first on its host, and the place of the first word; -1: none is left."""

    host: int
    place: int


class SharedMemory:
    """This rank's lines, in the memory of its host.

    Args:
        comm: the mpi4py communicator of all ranks; making the memory is collective.
        alike: the mpi4py constant by which MPI finds the ranks that share memory.

    Attributes:
        words: the integers of all ranks of this host.

    Raises:
        UsageError: on every rank, if a host has no room for it.
    """

    def __init__(self, comm: Any, alike: int) -> None:
        host = comm.Split_type(alike)
        self._host: int = host.bcast(comm.Get_rank())
        memory, wrong = map_together(host, host.Get_size() * LINES * WORDS * WORD_BYTES)
        for problem in comm.allgather(wrong):
            if problem:
                raise UsageError(problem)
        assert memory is not None  # or something would be wrong
        self.words = memoryview(memory).cast("q")
        first = host.Get_rank() * LINES * WORDS
        self._free = [first + line * WORDS for line in reversed(range(LINES))]
        host.Free()

    def take(self) -> Line:
        """Return a line of zeros, this rank's until it is given back."""
        if not self._free:
            return Line(self._host, -1)
        place = self._free.pop()
        for word in range(place, place + WORDS):
            self.words[word] = 0
        return Line(self._host, place)

    def give_back(self, line: Line) -> None:
        """Let the line be taken again. No other rank may still read it."""
        self._free.append(line.place)


def map_together(comm: Any, nbytes: int) -> tuple[mmap.mmap | None, str]:
    """Map the same new memory of zeros on every rank of a host. Collective.

    Args:
        comm: an mpi4py communicator of ranks that are all on one host.

    Returns:
        The memory and "", or None and what is wrong.
    """
    name, wrong = comm.bcast(_make_file(nbytes) if comm.Get_rank() == 0 else None)
    if wrong:
        return None, wrong
    memory = None
    try:
        with open(name, "r+b") as file:
            memory = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:  # a limit of this process: what it may map, or how many files it may open
        wrong = f"no memory to share on {socket.gethostname()}: {error}"
    problems = comm.allgather(wrong)  # after which all have mapped it, or will not
    if comm.Get_rank() == 0:
        os.unlink(name)
    wrong = next(filter(None, problems), "")
    return (None if wrong else memory), wrong


def _make_file(nbytes: int) -> tuple[str, str]:
    """Make a file of zeros; return its name and what is wrong, one of them empty."""
    name, directory = "", memory_directory()
    try:
        descriptor, name = tempfile.mkstemp(prefix="minipar-memory-", dir=directory)
        with open(descriptor, "wb") as file:
            for start in range(0, nbytes, PIECE_BYTES):
                # All of it: where there is no room, a hole would kill whoever fills it.
                file.write(bytes(min(PIECE_BYTES, nbytes - start)))
    except OSError as error:
        if name:
            os.unlink(name)
        return "", f"no memory to share on {socket.gethostname()}: {error}; make room in {directory}"
    return name, ""


def memory_directory() -> str:
    """Return a directory of the file system in memory where there is one: a full disk does not touch that."""
    return MEMORY_DIRECTORY if has_memory_directory() else tempfile.gettempdir()


def has_memory_directory() -> bool:
    """Return whether there is a file system in memory, as on Linux, that this process may write to."""
    return os.access(MEMORY_DIRECTORY, os.W_OK)
