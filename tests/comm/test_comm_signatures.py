"""The board by which ranks of one host compare signatures: right whoever is ahead, and never overwritten unread."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar.comm import shared_memory
from minipar.comm.guard import Call
from minipar.comm.shared_memory import WORDS, Line

pytest.importorskip("mpi4py.MPI")

from minipar.comm.progress import LOOKS, Progress
from minipar.comm.signatures import SLOTS, TURNS, Board, Comparison


class Memory:
    """Memory of three ranks, each with one line."""

    def __init__(self) -> None:
        self.words = memoryview(array("q", [0] * (3 * WORDS)))
        self.returned: list[Line] = []

    def give_back(self, line: Line) -> None:
        self.returned.append(line)


def boards(size: int = 3) -> tuple[Memory, list[Board]]:
    memory, lines = Memory(), [Line(0, rank * WORDS) for rank in range(size)]
    return memory, [Board(memory, lines, rank) for rank in range(size)]  # type: ignore[arg-type]


def call(number: int, rows: int = 4) -> Call:
    made = Call()
    made.operation, made.background, made.number, made.dtype = "all_reduce", False, number, np.dtype("f4")
    made.op, made.root, made.counts, made.agree, made.symmetric = "sum", None, None, (rows,), 0
    return made


@pytest.mark.parametrize("seed", range(10))
def test_each_comparison_has_its_own_result_in_whatever_order_ranks_come(seed: int) -> None:
    """Ranks begin and look at random times, up to 3 times as many as a line has room for ahead of each other."""
    draw, rounds = random.Random(seed), 300
    _, ranks = boards()
    for board in ranks:
        board._turn = TURNS - 100  # their numbers begin again on the way
        board._words[board._mine + SLOTS] = TURNS - 100
    rows = [[draw.choice((4, 4, 4, 5)) for _ in ranks] for _ in range(rounds)]
    begun: list[list[Comparison]] = [[] for _ in ranks]
    results: list[list[bool]] = [[] for _ in ranks]
    for _ in range(200 * rounds):
        rank = draw.randrange(len(ranks))
        if draw.random() < 0.5 and len(begun[rank]) < min(rounds, len(results[rank]) + 3 * SLOTS):
            number = len(begun[rank])
            begun[rank].append(ranks[rank].begin(call(number, rows[number][rank])))
        elif len(results[rank]) < len(begun[rank]):
            result = begun[rank][len(results[rank])].result()
            if result is not None:
                results[rank].append(result)
    expected = [len(set(of_ranks)) == 1 for of_ranks in rows]
    assert results == [expected] * len(ranks)
    assert all(c.result() is expected[n] for mine in begun for n, c in enumerate(mine)), "a result stays"


def test_a_rank_that_is_waited_for_is_looked_at_again_and_again() -> None:
    _, (one, other) = boards(2)

    class Late(Progress):
        def until(self, look: Any) -> Any:
            assert look() is None
            other.begin(call(1))
            return look()

    assert one.all_equal(call(1), Late()) is True
    assert one.begin(call(2)).result() is None and other.all_equal(call(2, rows=5), Progress()) is False


def test_a_rank_alone_waits_for_nobody() -> None:
    _, (alone,) = boards(1)
    assert all(alone.all_equal(call(number), Progress()) for number in range(1, 3 * SLOTS))


def test_what_is_queued_in_any_group_moves_on_while_a_rank_waits() -> None:
    class Group:
        asked = 0

        def progress(self) -> None:
            self.asked += 1

    group, progress, looks = Group(), Progress(), iter([None] * (LOOKS + 3) + [False])
    progress.groups[group] = None
    assert progress.until(lambda: next(looks)) is False and group.asked == 3


def test_a_line_is_clean_when_it_is_taken_again() -> None:
    memory = shared_memory.SharedMemory.__new__(shared_memory.SharedMemory)
    memory.words, memory._host, memory._free = memoryview(array("q", [5] * (2 * WORDS))), 0, [WORDS, 0]
    line = memory.take()
    assert line == Line(0, 0) and memory.words[:WORDS].tolist() == [0] * WORDS
    assert memory.take().place == WORDS and memory.take().place == -1
    memory.words[0] = 7
    memory.give_back(line)
    assert memory.take() == line and memory.words[0] == 0


def test_memory_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "memory_directory", lambda: str(tmp_path))
    name, wrong = shared_memory._make_file(100)
    assert Path(name).read_bytes() == bytes(100) and not wrong

    def no_room(descriptor: int, mode: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory, "open", no_room, raising=False)
    name, wrong = shared_memory._make_file(100)
    assert not name and wrong.startswith("no memory to share on ")
    assert wrong.endswith(f"No space left on device; make room in {tmp_path}")
    assert len(list(tmp_path.iterdir())) == 1, "the file without room is gone"
