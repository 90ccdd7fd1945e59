"""The flight recorder: where the ranks' last communications part, side by side."""

import numpy as np
import pytest

from minipar.comm import launch, world
from minipar.comm.flight import COLUMNS, entries, parting
from minipar.comm.guard import RECORD_LENGTH
from minipar.errors import CommunicationError, HangError, MismatchError

X = np.ones(4, np.float32)
Record = list[tuple[str, int, str]]


def record(*texts: str, group: str = "world", first: int = 1) -> Record:
    return [(group, first + i, text) for i, text in enumerate(texts)]


def test_the_last_agreement_and_the_first_difference_are_shown() -> None:
    same = [f"all_reduce #{n}" for n in range(1, 9)]
    text = parting({0: record(*same), 1: record(*same[:6], "barrier #7"), 2: record(*same)})
    assert text.split("\n") == [
        "where the ranks part, by their last communications in world:",
        "  ranks 0, 2       rank 1",
        "  all_reduce #5    the same",
        "  all_reduce #6    the same",
        "  all_reduce #7    barrier #7",
        "  all_reduce #8    not called",
    ]


def test_nothing_is_shown_where_nothing_differs() -> None:
    same = record("all_reduce #1", "barrier #2")
    assert parting({0: same, 1: same}) == "" == parting({0: same}) == parting({0: [], 1: []})


def test_a_rank_that_never_called_is_seen_and_one_outside_a_group_is_not() -> None:
    pair = record("all_reduce #1 in world/dp0", group="world/dp0")
    assert "rank 1\n  all_reduce #1    not called" in parting({0: record("all_reduce #1"), 1: []})
    assert parting({0: pair, 1: pair, 2: []}) == ""


def test_what_one_rank_has_forgotten_is_no_difference() -> None:
    long = [f"all_reduce #{n}" for n in range(1, 151)]
    text = parting({0: record(*long[50:], first=51), 1: record(*long[40:140], first=41)})
    assert [line.split()[1] for line in text.split("\n")[2:]] == ["#139", "#140", "#141", "#142"], text
    assert text.count("not called") == 2


def test_what_has_dropped_out_of_a_record_is_not_taken_for_never_called() -> None:
    """A pipeline's messages push the world's collectives out of it; how many there were is known still."""
    forgotten: Record = [("world", 7, ""), *[("world", 0, "send(dest=1)")] * RECORD_LENGTH]
    here = record("all_reduce #6", "all_reduce #7", first=6)
    for other in (here, forgotten):
        assert parting({0: other, 1: forgotten}).startswith("the ranks' last messages")
    text = parting({0: [*here, *record("barrier #8", first=8)], 1: forgotten})
    assert [line.split() for line in text.split("\n")[1:]] == [
        ["rank", "0", "rank", "1"], ["barrier", "#8", "not", "called"],
    ]  # fmt: skip


def test_the_last_number_of_a_forgotten_group_is_kept() -> None:
    def program() -> Record:
        comm = world()
        comm.barrier()
        row = comm.split(0, name="row")
        assert row is not None
        for _ in range(RECORD_LENGTH):
            row.all_reduce(X)
        return entries(comm.journal)

    for found in launch(program, 2):
        assert found[0] == ("world", 2, "") and len(found) == 1 + RECORD_LENGTH  # the split was the second
        assert found[-1] == ("world/row0", 100, "all_reduce #100 of (4,) float32 in world/row0")


def test_many_kinds_of_ranks_are_cut_short() -> None:
    text = parting({rank: record(f"broadcast #1(root={rank})") for rank in range(9)})
    assert text.split("\n")[1].rstrip().endswith(f"and {9 - COLUMNS + 1} others that differ")
    assert "root=2" in text and "root=3" not in text


def test_messages_are_shown_where_all_collectives_agree() -> None:
    text = parting({0: [("world", 0, "send(dest=1)")], 1: [("world", 0, "recv(source=2)")]})
    assert text.split("\n") == [
        "the ranks' last messages:",
        "  rank 0          rank 1",
        "  send(dest=1)    recv(source=2)",
    ]


def test_step_phase_peer_shape_and_dtype_are_kept() -> None:
    def program() -> list[tuple[str, int, str]]:
        comm = world()
        comm.mark(step=4, phase="backward")
        comm.all_reduce(X)
        comm.send(X, 1, tag=3) if comm.rank == 0 else comm.recv(0, tag=3)
        return entries(comm.journal)

    first, second = launch(program, 2)
    assert first == [
        ("world", 1, "all_reduce #1 of (4,) float32 (step 4, backward)"),
        ("world", 0, "send(dest=1, tag=3) of (4,) float32 (step 4, backward)"),
    ]
    assert second[1] == ("world", 0, "recv(source=0, tag=3) (step 4, backward)")


def other_call() -> None:
    world().barrier()
    world().broadcast(X) if world().rank == 1 else world().all_reduce(X)


def none_at_all() -> None:
    world().barrier()
    if world().rank != 1:
        world().all_reduce(X)


def gives_up() -> None:
    comm = world()
    comm.barrier()
    if comm.rank == 1:
        comm.recv(0), comm.recv(2)  # sent when they have called the all-reduce
        comm.abort("enough")
    comm.all_reduce_async(X)
    comm.send(X, 1)
    comm.recv(1)


@pytest.mark.parametrize(
    ("program", "kind", "other"),
    (
        (other_call, MismatchError, "broadcast #2(root=0) of (4,) float32"),
        (none_at_all, HangError, "not called"),
        (gives_up, CommunicationError, "not called"),
    ),
)
def test_mismatches_hangs_and_aborts_carry_it_as_a_note(program, kind, other) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind) as caught:
        launch(program, 3)
    note = caught.value.__notes__[0].split("\n")
    assert note[0] == "where the ranks part, by their last communications in world:"
    assert note[1].split("    ")[0] == "  ranks 0, 2" and note[2].endswith("the same"), note
    assert note[3].startswith("  all_reduce") and " #2 of (4,) float32" in note[3] and note[3].endswith(other)
    assert sum("raised on" in text for text in caught.value.__notes__) == 1, "each rank's error has notes of its own"
