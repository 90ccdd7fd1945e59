"""The monitors of one host: the first rank to die is named, with its step; one that ends in order is not."""

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipar.comm import monitor as module
from minipar.comm.monitor import Monitor, places

RANKS = 3


class Host:
    """What a monitor needs of an MPI communicator: all ranks are on this host, and share this directory."""

    def __init__(self, rank: int, word: Path) -> None:
        self.rank, self.word = rank, word

    def Get_rank(self) -> int:
        return self.rank

    def allgather(self, mine: Any) -> list[Any]:
        if isinstance(mine, tuple):
            if mine[0]:  # what the first has made; here the test's own takes its place
                os.rmdir(mine[0])
            mine = (str(self.word), "")
        return [mine] * RANKS


def rank(
    number: int, word: Path, output: int, ready: int, go: tuple[int, int], ends: Callable[[Monitor], None]
) -> int:
    """Begin a process that is a rank: it goes on with `ends` when it reads from `go`. Return its id."""
    child = os.fork()
    if child == 0:
        try:
            os.close(go[1])  # so that it ends with this test, however that ends
            os.dup2(output, 2)
            monitor = Monitor(Host(number, word))
            monitor.note(f"rank {number}, step 4, backward")
            monitor.note(f"rank {number}, step {number + 5}, forward")
            os.write(ready, b".")
            os.read(go[0], 1)
            ends(monitor)
        finally:
            os._exit(0)
    return child


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., tuple[list[int], int, int]]:
    """Start all ranks: returns their process ids, where their output comes out, and where a byte lets one go on."""

    def start(ends: Callable[[Monitor], None]) -> tuple[list[int], int, int]:
        (tmp_path / "word").mkdir()
        hear, output = os.pipe()
        is_ready, ready = os.pipe()
        go, let_go = os.pipe()
        children = [rank(number, tmp_path / "word", output, ready, (go, let_go), ends) for number in range(RANKS)]
        for descriptor in (output, ready, go):
            os.close(descriptor)
        assert b"".join(os.read(is_ready, 1) for _ in range(RANKS)) == b"..."
        os.close(is_ready)
        return children, hear, let_go

    return start


def all_of(hear: int) -> str:
    text = b""
    while data := os.read(hear, 4096):
        text += data
    os.close(hear)
    return text.decode()


def test_the_first_to_die_is_named_and_those_that_follow_are_not(ranks: Any, tmp_path: Path) -> None:
    children, hear, let_go = ranks(lambda monitor: None)
    os.kill(children[1], signal.SIGKILL)
    assert select.select([hear], [], [], 10)[0], "nothing is said"
    first = os.read(hear, 4096).decode()
    assert first == (
        "minipar: rank 1 died in step 6, forward (killed by a signal, crashed in native code, or ended by os._exit)\n"
    )
    for child in (children[0], children[2]):
        os.kill(child, signal.SIGKILL)
    os.close(let_go)
    assert all_of(hear) == ""
    for child in children:
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == [], "nothing of it stays"


def test_ranks_that_end_in_order_are_silent(ranks: Any, tmp_path: Path) -> None:
    children, hear, let_go = ranks(lambda monitor: monitor.finish())
    for _ in children:
        os.write(let_go, b".")
    os.close(let_go)
    for child in children:
        os.waitpid(child, 0)
    assert all_of(hear) == "" and list(tmp_path.iterdir()) == []


def test_a_rank_that_ends_the_job_has_the_word(ranks: Any, tmp_path: Path) -> None:
    """It speaks for itself; it and those that are killed because of it are not named by monitors."""

    def ends(monitor: Monitor) -> None:
        os.write(2, b"T" if monitor.take_word() and monitor.take_word() else b"F")
        os.kill(os.getpid(), signal.SIGKILL)

    children, hear, let_go = ranks(ends)
    for _ in children:
        os.write(let_go, b".")
    os.close(let_go)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(all_of(hear)) == ["F", "F", "T"] and list(tmp_path.iterdir()) == []


def test_where_living_ranks_are_is_known_to_their_launcher_and_to_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory_directory", lambda: str(tmp_path))
    word = tmp_path / "minipar-job-abc-1"
    word.mkdir()
    made = [Monitor(Host(number, word)) for number in range(RANKS)]
    made[1].note("rank 1, step 4, backward")
    assert places("abc") == {0: "", 1: "in step 4, backward", 2: ""} and places("abcd") == {}
    assert [made[0].place_of(rank) for rank in (1, 2, 7)] == ["in step 4, backward", "", ""], "7 is of another host"
    for monitor in reversed(made):
        monitor.finish()
    assert places("abc") == {} and made[0].place_of(1) == ""
