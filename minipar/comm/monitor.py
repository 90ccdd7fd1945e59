"""A rank that is killed cannot say so, and mpirun then kills all others before they can: a monitor says it.

Each rank of an MPI job starts a child, a few lines of shell, that outlives it for a moment. The child waits at
a pipe. A rank that ends in order says so there; a pipe that just closes means that its rank was killed, or
crashed in native code, and the child prints which rank, and at which step, before it ends itself.

Only the first of a host's ranks to die has the word, and its line comes before mpirun's own clean-up, for
certain with MPICH: mpirun's proxy notices a death when the rank's process-management socket closes, or when
anything is printed. The child holds that socket and the output pipes open as well, so its line is the first
that the proxy sees. The word is a directory per host and job: whoever renames it has it.

Limits: on several hosts each host's first dead rank is named; the first line is the cause. A child process that
a rank made by `fork` keeps the pipe open until it ends too. If a rank's monitor is killed with it, one of the ranks
that mpirun kills next is named in its stead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from minipar.comm.shared_memory import memory_directory
from minipar.errors import UsageError

PLACE_BYTES = 200  # room for "in step 17, backward"
JOB = "MINIPAR_JOB"  # environment variable: the launcher's name for its job, by which it finds the places
DIED = "killed by a signal, crashed in native code, or ended by os._exit"
# Its standard input is the pipe; $1 the word, $2 this rank. A terminal's Ctrl-C does not reach it.
CHILD = """
IFS= read -r said
[ "$said" = finished ] && exit
mv "$1" "$1.$2" 2>/dev/null || { rm -rf "$1.taken"; exit; }
read -r place < "$1.$2/$2"
printf 'minipar: rank %s died%s (DIED)\\n' "$2" "${place:+ $place}" >&2
rm -rf "$1.$2"
""".replace("DIED", DIED)


class Monitor:
    """This rank's child and its share of the host's word.

    Args:
        comm: the MPI communicator of all ranks; making the monitors is collective.

    Raises:
        UsageError: on every rank, if a host has no directory for temporary files.
    """

    def __init__(self, comm: Any) -> None:
        self.rank: int = comm.Get_rank()
        host = socket.gethostname()
        hosts: list[str] = comm.allgather(host)
        self._first = hosts.index(host) == self.rank  # of this host's ranks
        made, wrong = "", ""
        if self._first:
            try:
                made = tempfile.mkdtemp(prefix=_prefix(os.environ.get(JOB, "")), dir=memory_directory())
            except OSError as error:
                wrong = f"no directory for temporary files on {host}: {error}; set TMPDIR"
        words: list[tuple[str, str]] = comm.allgather((made, wrong))
        for _, wrong in words:
            if wrong:
                raise UsageError(wrong)
        self._word = Path(words[hosts.index(host)][0])
        self._place = os.open(self._word / str(self.rank), os.O_WRONLY | os.O_CREAT, 0o600)
        self.note(f"rank {self.rank}")
        self._has_word = False
        self._start(self._word)

    def _start(self, word: Path) -> None:
        """Start the child. It shares this process's output, and its line to the process manager."""
        read, self._pipe = os.pipe()
        manager = os.environ.get("PMI_FD", "")
        self._child = subprocess.Popen(
            ["/bin/sh", "-c", CHILD, "minipar-monitor", str(word), str(self.rank)],
            stdin=read, start_new_session=True, pass_fds=[int(manager)] if manager.isdigit() else [],
        )  # fmt: skip
        os.close(read)

    def note(self, place: str) -> None:
        """Note where the rank is: "rank 1, step 5, backward"; said if it dies now."""
        _, _, rest = place.partition(", ")
        text = f"in {rest}" if rest else ""
        os.pwrite(self._place, text.encode()[: PLACE_BYTES - 1].ljust(PLACE_BYTES - 1) + b"\n", 0)

    def place_of(self, rank: int) -> str:
        """Return where a rank is, as `places` does; "" for one of another host, or once the word is taken."""
        return _read(self._word).get(rank, "")

    def take_word(self) -> bool:
        """Return whether this rank has the word: nobody else on its host has spoken, nor will."""
        if not self._has_word:
            taken = self._word.with_name(f"{self._word.name}.taken")
            try:
                self._word.rename(taken)
            except FileNotFoundError:
                return False
            self._has_word = True
            shutil.rmtree(taken, ignore_errors=True)  # a monitor may be at it as well
        return True

    def finish(self) -> None:
        """Say that this rank ends in order. The host's first rank says so when all have, and clears up."""
        if self._first:
            self.take_word()
        with contextlib.suppress(BrokenPipeError):  # the child was killed: there is nobody to tell
            os.write(self._pipe, b"finished\n")
        self._child.wait()


def places(job: str) -> dict[int, str]:
    """Return where this host's ranks of a job are: "in step 5, backward", or "" where one has not said.

    Args:
        job: what the ranks find in the environment variable JOB.
    """
    found: dict[int, str] = {}
    for word in Path(memory_directory()).glob(f"{_prefix(job)}*"):
        found.update(_read(word))
    return found


def _read(word: Path) -> dict[int, str]:
    try:
        return {int(file.name): file.read_text(errors="replace").strip() for file in word.iterdir()}
    except FileNotFoundError:  # the job has just ended
        return {}


def _prefix(job: str) -> str:
    return f"minipar-job-{job}-" if job else "minipar-job-"
