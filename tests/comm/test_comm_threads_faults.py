"""What goes wrong on threads is an error on every rank, names who did what, and never hangs."""

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

import numpy as np
import pytest
import threadpoolctl

from minipar.comm import launch, world
from minipar.errors import CommunicationError, HangError, MismatchError, RankFailed, UsageError

X = np.ones(4, np.float32)


def test_a_deadlock_is_reported_at_once_with_what_each_rank_waits_in() -> None:
    def program() -> None:
        comm = world()
        for _ in range(11):
            comm.all_reduce(X)
        comm.mark(step=5, phase="backward")
        if comm.rank == 0:
            comm.all_reduce(X)
        elif comm.rank == 1:
            comm.recv(source=0, tag=3)

    start = time.monotonic()
    with pytest.raises(HangError) as caught:
        launch(program, 3, timeout=60)
    assert time.monotonic() - start < 10, "proven, so not at the time-out"
    assert str(caught.value) == (
        "deadlock, no rank can go on: "
        "rank 0 waits in all_reduce #12 of (4,) float32 (step 5, backward); "
        "rank 1 waits in recv(source=0, tag=3) (step 5, backward); "
        "rank 2 has finished (step 5, backward); its last was all_reduce #11 of (4,) float32"
    )


def circle_of_sends() -> None:
    comm = world()
    comm.send(X, (comm.rank + 1) % comm.size)
    comm.recv((comm.rank - 1) % comm.size)


def skipped_all_reduce() -> None:
    comm = world()
    if comm.rank:
        comm.all_reduce(X)


def one_async_too_many() -> None:
    comm = world()
    works = [comm.all_reduce_async(X) for _ in range(3 + comm.rank)]
    for work in works:
        work.wait()


def send_to_itself() -> None:
    world().send(X, world().rank)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (circle_of_sends, "rank 0 waits in send(dest=1, tag=0) of (4,) float32; rank 1 waits in send(dest=0"),
        (skipped_all_reduce, "rank 0 has finished; rank 1 waits in all_reduce #1 of (4,) float32"),
        (one_async_too_many, "rank 1 waits in all_reduce_async #4 of (4,) float32"),
        (send_to_itself, "send(dest=0, tag=0)"),
    ],
)
def test_deadlocks_that_may_happen_do(program: Callable[[], None], said: str) -> None:
    with pytest.raises(HangError) as caught:
        launch(program, 2, timeout=60)
    assert said in str(caught.value)


def test_alone_a_receive_that_nothing_answers_is_reported() -> None:
    def program() -> None:
        world().recv(0)

    with pytest.raises(HangError, match=r"rank 0 waits in recv\(source=0, tag=0\)"):
        launch(program, 1)


def test_a_hang_that_cannot_be_proven_ends_at_the_timeout() -> None:
    release = threading.Event()

    def program() -> None:
        comm = world()
        if comm.rank == 0:
            comm.barrier()
        else:
            comm.mark(step=1, phase="validation")
            release.wait(20)  # computing, as far as anybody knows

    def run() -> None:
        try:
            launch(program, 2, timeout=0.2)
        except HangError as error:
            messages.append(str(error))

    messages: list[str] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.5)
    release.set()
    thread.join()
    assert messages == [
        "rank 0 has waited 0.2 s: rank 0 waits in barrier #1; "
        "rank 1 is not in a communication (step 1, validation)"
    ]


def test_a_send_from_a_helper_thread_is_not_taken_for_a_deadlock() -> None:
    """Two ranks wait in receives that other threads answer later."""

    def program() -> float:
        comm = world()
        go = threading.Event()

        def later() -> None:
            go.wait(10)
            comm.send(np.full(2, comm.rank), 1 - comm.rank)

        thread = threading.Thread(target=later)
        thread.start()
        comm.barrier()
        first = comm.isend(X, 1 - comm.rank, tag=1)
        comm.recv(1 - comm.rank, tag=1)
        first.wait()
        go.set()
        received = comm.recv(1 - comm.rank)
        thread.join()
        return float(received[0])

    for _ in range(20):
        assert launch(program, 2, timeout=20) == [1.0, 0.0]


def test_the_first_failing_ranks_own_exception_is_raised_with_its_place() -> None:
    others: list[str] = []

    def program() -> None:
        comm = world()
        comm.mark(step=7, phase="forward")
        comm.barrier()
        if comm.rank == 1:
            raise KeyError("weights")
        try:
            comm.recv(1)
        except RankFailed as error:
            others.append(str(error))
            raise

    with pytest.raises(KeyError, match="weights") as caught:
        launch(program, 3)
    assert caught.value.__notes__ == ["raised on rank 1, step 7, forward (of 3 ranks)"]
    assert others == ["rank 1, step 7, forward: KeyError: 'weights'"] * 2


def test_sys_exit_ends_like_a_return_or_a_failure() -> None:
    def program(code: int) -> str:
        if world().rank == 1:
            raise SystemExit(code)
        return "done"

    assert launch(program, 2, 0) == ["done", None]
    with pytest.raises(SystemExit) as caught:
        launch(program, 2, 3)
    assert caught.value.code == 3


def test_abort_names_the_reason() -> None:
    def program() -> None:
        comm = world()
        comm.mark(step=3)
        if comm.rank == 1:
            comm.abort("the loss is NaN")
        comm.barrier()

    with pytest.raises(CommunicationError, match="rank 1, step 3: aborted: the loss is NaN"):
        launch(program, 2)


def test_a_wrong_receive_is_a_mismatch_on_both_ranks() -> None:
    def program(shape: tuple[int, ...], dtype: type) -> str:
        comm = world()
        with pytest.raises(MismatchError) as caught:
            comm.recv(0, shape=shape, dtype=dtype) if comm.rank else comm.send(X, 1)
        return str(caught.value)

    for shape, dtype in (((5,), np.float32), ((4,), np.float64)):
        texts = launch(program, 2, shape, dtype)
        assert texts[0] == texts[1]
        assert "rank 1 called recv(source=0, tag=0)" in texts[0] and "rank 0 called send(dest=1" in texts[0]


def test_work_that_fails_in_the_helper_raises_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise MemoryError("no room")

    def program() -> None:
        work = world().all_reduce_async(X)
        with pytest.raises(MemoryError, match="no room"):
            work.wait()

    monkeypatch.setattr("minipar.comm.threads.share", broken)
    launch(program, 2)


# What launch gives to the ranks -----------------------------------------------------------------------


def test_launch_passes_arguments_and_returns_results_by_rank() -> None:
    def program(a: int, *, b: int) -> tuple[int, int, int]:
        return a, b, world().rank

    assert launch(program, 3, 1, b=2) == [(1, 2, 0), (1, 2, 1), (1, 2, 2)]
    with pytest.raises(UsageError, match="ranks=0"):
        launch(program, 0)


def test_launches_nest() -> None:
    def inner(outer_rank: int) -> int:
        return 10 * outer_rank + world().rank

    def outer() -> list[int]:
        before = world()
        result = launch(inner, 3, before.rank)
        assert world() is before
        before.barrier()
        return result

    assert launch(outer, 2) == [[0, 1, 2], [10, 11, 12]]


def test_context_variables_are_copied_into_each_rank() -> None:
    mode: ContextVar[str] = ContextVar("mode", default="none")
    mode.set("outside")

    def program() -> str:
        comm = world()
        seen = mode.get()
        mode.set(f"rank {comm.rank}")
        comm.barrier()
        return seen + ", " + mode.get()

    assert launch(program, 2) == ["outside, rank 0", "outside, rank 1"]
    assert mode.get() == "outside"


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_while_any_launch_runs() -> None:
    before = blas_threads()
    overlap = threading.Barrier(2, timeout=20)
    seen: list[set[int]] = []

    def program(first: bool) -> None:
        overlap.wait()  # both launches run
        if first:
            overlap.wait()  # the second has ended
            seen.append(blas_threads())
        else:
            seen.append(blas_threads())

    def second() -> None:
        launch(program, 1, False)
        overlap.wait()

    thread = threading.Thread(target=second)
    thread.start()
    launch(program, 1, True)
    thread.join()
    assert seen == [{1}, {1}]
    assert blas_threads() == before


def test_async_moves_on_while_the_rank_does_not_communicate() -> None:
    """Every rank polls nothing and calls nothing after issuing; the result is there all the same."""
    sums: list[np.ndarray] = [np.ones(50_000), np.ones(50_000)]
    issued = threading.Barrier(2, timeout=20)

    def program() -> bool:
        comm = world()
        work = comm.all_reduce_async_(sums[comm.rank])
        issued.wait()
        deadline = time.monotonic() + 20
        while sums[comm.rank][-1] != 2 and time.monotonic() < deadline:
            continue
        return bool((work.wait() == 2).all())

    assert launch(program, 2) == [True, True]


def test_the_record_keeps_the_last_hundred_communications() -> None:
    def program() -> list[str]:
        comm = world()
        for step in range(150):
            comm.mark(step=step)
            comm.all_reduce(X)
        assert [call.step for call in comm.journal.entries] == list(range(50, 150))
        return [str(call) for call in comm.journal.entries]

    for entries in launch(program, 2):
        assert entries[0] == "all_reduce #51 of (4,) float32" and len(entries) == 100


def test_sixty_four_ranks() -> None:
    def program() -> float:
        comm = world()
        row = comm.split(comm.rank // 8, name="row")
        assert row is not None
        return float(row.all_reduce(comm.all_reduce(np.ones(100)))[0])

    assert launch(program, 64) == [512.0] * 64
