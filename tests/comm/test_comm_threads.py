"""The scenarios on threads, and random sizes."""

import numpy as np
import pytest
from comm_scenarios import SCENARIOS
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar.comm import balanced, launch, world
from minipar.comm.collectives import ALGORITHMS


@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_on_threads(name: str, ranks: int) -> None:
    launch(lambda: SCENARIOS[name](world()), ranks, timeout=20)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_alone(name: str) -> None:
    SCENARIOS[name](world())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_counts_round_trip(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    width = data.draw(st.integers(0, 3))

    def program() -> None:
        comm = world()
        x = np.random.default_rng(comm.rank).integers(0, 99, (sum(counts), width))
        total = comm.all_reduce(x)
        chunk = comm.reduce_scatter(x, counts)
        assert chunk.shape == (counts[comm.rank], width)
        assert np.array_equal(comm.all_gather(chunk, counts), total)

    launch(program, len(counts), timeout=20)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(ALGORITHMS)), st.integers(1, 9), st.integers(0, 40), st.sampled_from("fdle"))
def test_textbook_algorithms_of_any_size(name: str, ranks: int, n: int, char: str) -> None:
    def program() -> bytes:
        comm = world()
        x = np.random.default_rng((comm.rank, n)).integers(-9, 9, n).astype(char)
        result = ALGORITHMS[name](comm, x)
        assert result.dtype == x.dtype and np.array_equal(result, comm.all_reduce(x))
        return result.tobytes()

    assert len(set(launch(program, ranks, timeout=20))) == 1


@given(st.integers(0, 1000), st.integers(1, 50))
def test_balanced(n: int, size: int) -> None:
    counts = balanced(n, size)
    assert sum(counts) == n and len(counts) == size
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
