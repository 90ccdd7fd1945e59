"""Virtual time: declared compute plus the alpha-beta model, the same on any machine at any load."""

import numpy as np
import pytest

from minipar.comm import Clock, launch, world
from minipar.comm.collectives import ALGORITHMS, cost, fastest
from minipar.errors import UsageError

ALPHA, BETA = 1e-5, 1e-9
CLOCK = Clock(ALPHA, BETA)


def test_a_receive_takes_the_later_of_both() -> None:
    def program(sender: float, receiver: float) -> tuple[float, float]:
        comm, x = world(), np.zeros(1000)
        comm.compute(sender if comm.rank == 0 else receiver)
        if comm.rank == 0:
            comm.send(x, 1)
        else:
            comm.recv(0)
        return comm.now()

    message = ALPHA + 8000 * BETA
    assert launch(program, 2, 1.0, 0.0, clock=CLOCK) == [1.0 + message, 1.0 + message]
    assert launch(program, 2, 0.0, 1.0, clock=CLOCK) == [message, 1.0]


def test_isend_overlaps_with_compute() -> None:
    def program() -> float:
        comm = world()
        if comm.rank == 0:
            sending = comm.isend(np.zeros(1000), 1)
            comm.compute(1.0)
            sending.wait()
        else:
            comm.recv(0)
        return comm.now()

    assert launch(program, 2, clock=CLOCK) == [1.0, pytest.approx(ALPHA + 8000 * BETA)]


@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 8, 32))
def test_a_collective_starts_when_the_last_has_arrived(ranks: int) -> None:
    def program() -> float:
        comm = world()
        comm.compute(float(comm.rank))
        comm.all_reduce(np.zeros(1000))
        return comm.now()

    ring = 2 * (ranks - 1) * ALPHA + 2 * (ranks - 1) / ranks * 8000 * BETA
    assert launch(program, ranks, clock=CLOCK) == [pytest.approx(ranks - 1 + ring)] * ranks


def test_async_collectives_overlap_with_compute_but_not_with_each_other() -> None:
    one = cost("ring", 8e6, 4, ALPHA, BETA)

    def program(compute: float) -> float:
        comm = world()
        works = [comm.all_reduce_async(np.zeros(1_000_000)) for _ in range(2)]
        comm.compute(compute)
        for work in works:
            work.wait()
        return comm.now()

    assert launch(program, 4, 0.0, clock=CLOCK) == [pytest.approx(2 * one)] * 4
    assert launch(program, 4, 1.5 * one, clock=CLOCK) == [pytest.approx(2 * one)] * 4
    assert launch(program, 4, 5 * one, clock=CLOCK) == [pytest.approx(5 * one)] * 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranks", (2, 3, 4, 7, 8, 32))
def test_textbook_algorithms_take_what_their_formula_says(algorithm: str, ranks: int) -> None:
    n = 32 * ranks

    def program() -> float:
        comm = world()
        ALGORITHMS[algorithm](comm, np.zeros(n))
        return comm.now()

    measured = max(launch(program, ranks, clock=CLOCK))
    expected = cost(algorithm, 8 * n, ranks, ALPHA, BETA)
    if algorithm == "tree" and ranks & (ranks - 1):  # an incomplete one: its last branch has arrived before
        expected -= ALPHA + 8 * n * BETA
    assert measured == pytest.approx(expected, rel=1e-12)


def test_virtual_time_does_not_depend_on_the_order_of_threads() -> None:
    def program() -> float:
        comm = world()
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for step in range(20):
            comm.compute(0.001 * ((comm.rank * 7 + step) % 5))
            sending = comm.isend(np.zeros(step * 100), after)
            comm.recv(before)
            sending.wait()
            if step % 5 == 0:
                comm.all_reduce(np.zeros(10))
        return comm.now()

    times = [launch(program, 8, clock=CLOCK) for _ in range(5)]
    assert all(other == times[0] for other in times)


def test_without_a_clock_time_is_real_and_compute_is_free() -> None:
    def program() -> float:
        comm = world()
        start = comm.now()
        comm.compute(1000.0)
        return comm.now() - start

    assert all(0 <= seconds < 100 for seconds in launch(program, 2))


def test_costs_choose_as_a_library_does() -> None:
    assert fastest(8, 64, ALPHA, BETA) == "doubling"
    assert fastest(1e8, 64, ALPHA, BETA) == "halving_doubling"
    assert fastest(1e8, 63, ALPHA, BETA) == "ring"
    for algorithm in ALGORITHMS:
        assert cost(algorithm, 1e6, 1, ALPHA, BETA) == 0
    with pytest.raises(UsageError, match="unknown"):
        cost("star", 1, 2, ALPHA, BETA)
    with pytest.raises(UsageError, match="zero or more"):
        Clock(-1.0, 0.0)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("reduce_scatter", 3 * ALPHA + 0.75 * 8000 * BETA),
        ("all_gather", 3 * ALPHA + 0.75 * 8000 * BETA),
        ("broadcast", min(2 * (ALPHA + 8000 * BETA), 5 * ALPHA + 1.5 * 8000 * BETA)),
        ("gather", 2 * ALPHA + 3 * 8000 * BETA),
        ("barrier", 2 * ALPHA),
    ],
)
def test_collective_formulas(operation: str, expected: float) -> None:
    def program() -> float:
        comm, x = world(), np.zeros(1000)
        calls = {
            "reduce_scatter": lambda: comm.reduce_scatter(x),
            "all_gather": lambda: comm.all_gather(x[:250]),
            "broadcast": lambda: comm.broadcast(x),
            "gather": lambda: comm.gather(x),
            "barrier": comm.barrier,
        }
        calls[operation]()
        return comm.now()

    assert launch(program, 4, clock=CLOCK) == [pytest.approx(expected)] * 4
