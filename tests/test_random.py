"""Streams: known values, independence of how they are cut, the laws they follow, the moment."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar import kernels, random


def reference_splitmix64(seed, count):
    """The published generator, one step at a time, in Python integers."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_bits_are_splitmix64():
    assert reference_splitmix64(1234567, 1)[0] == 6457827717110365317  # the published test vector
    for key in (0, 1234567, 2**64 - 3):
        assert random.bits(key, 0, 20).tolist() == reference_splitmix64(key, 20)


def test_the_kernels_draw_the_same_stream():
    key = random.stream(3, "drop")
    mask = kernels.of(np.zeros(1)).dropout_mask((4, 5), 0.3, key, 11)
    np.testing.assert_array_equal(mask.reshape(-1), random.uniform(key, 11, 20) >= 0.3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_a_stream_is_the_same_however_it_is_cut(key, start, a, b):
    for draw in (random.bits, random.uniform, random.normal):
        whole = draw(key, start, a + b)
        np.testing.assert_array_equal(whole, np.concatenate([draw(key, start, a), draw(key, start + a, b)]))


def test_streams_are_told_apart_by_every_part():
    names = [(0,), (1,), ("0",), (0, 1), (0, "1"), (0, "1", "2"), (0, "12"), ("a", "b"), ("ab",), ("a\x1fb",)]
    assert len({random.stream(*n) for n in names}) == len(names)
    assert (
        random.stream(0, "h.0.attn") == 3742876793353169500
    )  # of every machine, in every run: checkpoints rely on it


@pytest.mark.parametrize("draw, mean, std", [(random.uniform, 0.5, 12**-0.5), (random.normal, 0, 1)])
def test_laws(draw, mean, std):
    from scipy import stats

    x = draw(random.stream(0, "law"), 0, 100_000)
    assert abs(x.mean() - mean) < 5 * std / 100_000**0.5
    assert abs(x.std() - std) < 0.01
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.015
    law = stats.uniform if draw is random.uniform else stats.norm
    assert stats.kstest(x, law.cdf).pvalue > 1e-3
    other = draw(random.stream(1, "law"), 0, 100_000)
    assert abs(np.corrcoef(x, other)[0, 1]) < 0.015
    assert np.isfinite(x).all()


def test_the_moment_nests_and_belongs_to_the_thread():
    with random.at(seed=3, step=5):
        with random.at(first_sample=8) as now:
            assert now == random.Moment(3, 5, 8) == random.moment()
            seen = []
            thread = threading.Thread(target=lambda: seen.append(random.moment()))
            thread.start()
            thread.join()
            assert seen == [random.Moment()]
            with random.at(step=0):
                assert random.moment().step == 0
        assert random.moment().first_sample == 0
    assert random.moment() == random.Moment()
