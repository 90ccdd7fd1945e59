"""The connections beside MPI, and a watchdog whose rank 0 does not react."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from minipar.comm import launch, lines, watchdog, world
from minipar.comm.guard import Journal
from minipar.comm.watchdog import Watchdog

WORDS = "a" * lines.WORD_BYTES, "b" * lines.WORD_BYTES


class AsMPI:
    """A communicator of threads, by the names that mpi4py has for what `connect` needs."""

    def bcast(self, value: Any, root: int) -> Any:
        return world().all_gather_object(value)[root]

    def allgather(self, value: Any) -> list[Any]:
        return world().all_gather_object(value)


@pytest.fixture
def somebody_else() -> Iterator[socket.socket]:
    """A program that listens at another address of this host, and answers whatever is said to it."""
    with socket.create_server(("127.0.0.2", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(lines.WORD_BYTES))

        threading.Thread(target=answer, daemon=True).start()
        yield listener


def test_every_rank_is_connected_to_rank_0() -> None:
    def program() -> tuple[list[int], Any]:
        comm = world()
        made = lines.connect(AsMPI(), comm.rank, comm.size)
        for line in made.values():
            line.send(rank=comm.rank)
        heard = {r: line.receive() for r, line in sorted(made.items())}
        comm.barrier()
        return sorted(made), heard

    first, *others = launch(program, 4)
    assert first == ([1, 2, 3], {r: [{"rank": r}] for r in (1, 2, 3)})
    assert others == [([0], {0: [{"rank": 0}]})] * 3


def test_a_stranger_at_rank_0s_port_is_not_taken_for_it(somebody_else: socket.socket) -> None:
    port = somebody_else.getsockname()[1]
    listener = socket.create_server(("127.0.0.1", port))
    found: dict[int, lines.Line] = {}
    thread = threading.Thread(target=lambda: found.update(lines.accept(listener, WORDS, 1)))
    thread.start()
    (line,) = lines.call_in(["127.0.0.2", "127.0.0.1"], port, WORDS, 7).values()
    thread.join()
    assert line.connection.getpeername()[0] == "127.0.0.1" and list(found) == [7]


def test_a_rank_that_reaches_only_strangers_is_named(
    somebody_else: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "CONNECT_SECONDS", 0.3)
    port = somebody_else.getsockname()[1]

    class Elsewhere(AsMPI):
        def bcast(self, value: Any, root: int) -> Any:
            return ["127.0.0.2"], port, super().bcast(value, root)[2]

    assert launch(lambda: lines.connect(Elsewhere(), world().rank, 2), 2) == [{}, {}]
    assert capfd.readouterr().err == "minipar: no TCP to rank 1: a hang will not tell what they wait for\n"


def test_a_hang_ends_even_if_rank_0_does_not_react(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "MARGIN_SECONDS", 0.1)
    said: list[tuple[str, bool]] = []
    ended, end = threading.Event(), threading.Event()

    def fail(text: str, once: bool = False) -> None:
        said.append((text, once))
        ended.set()
        end.wait(10)  # it never returns in a job, which is at its end

    def program() -> None:
        comm = world()
        if comm.rank == 0:
            silent = lines.connect(AsMPI(), 0, 2)
            assert ended.wait(10)
            assert [list(m) for m in silent[1].receive() or ()] == [["overdue"]], "it is told once"
            silent[1].send(released=True)
            return
        comm.mark(step=3, phase="backward")
        watching = Watchdog(comm.journal, 0.3, fail, pytest.fail)
        watching.connect(AsMPI())
        call = comm.journal.entries[-1]
        comm.journal.wait_begins(call)
        assert ended.wait(10)
        comm.journal.wait_ends()

    launch(program, 2)
    end.set()
    ((text, once),) = said
    assert once and text.startswith("HangError: rank 1 has waited 0.3 s: rank 0 does not answer; rank 1 waits in ")
    assert text.endswith("(step 3, backward)")


def test_the_journal_says_when_its_rank_is_at_its_end() -> None:
    told: list[str] = []
    journal = Journal(1, 2)
    journal.on_move = told.append
    journal.move(3, "forward")
    journal.finish()
    assert told == ["rank 1, step 3, forward", "rank 1, step 3, forward, exit"]
    assert journal.state() == "has finished (step 3, forward)"
