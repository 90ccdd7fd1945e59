"""Loaders: every sample once, the same batches under any layout, resume at any point."""

import itertools
import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from data_helpers import Numbers, flat, ids, same
from hypothesis import given, settings
from hypothesis import strategies as st

from minipar.data import Batch, Loader, WindowDataset, share
from minipar.errors import DataError, UsageError

layouts = st.fixed_dictionaries({
    "length": st.integers(1, 40), "batch": st.integers(1, 17), "ranks": st.integers(1, 6),
    "seed": st.integers(0, 9), "gap": st.integers(0, 3)})


# --- what a batch is -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_ranks_hold_contiguous_balanced_parts_of_the_serial_batch(layout):
    length, batch, ranks = layout["length"], layout["batch"], layout["ranks"]
    dataset = Numbers(length, layout["gap"])
    make = lambda **more: list(Loader(dataset, batch, seed=layout["seed"], prefetch=0, **more))
    serial = make()
    parallel = [make(rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sorted(flat(serial)) == list(range(length))  # each sample once an epoch
    assert all(whole.samples == batch for whole in serial[:-1])
    assert serial[-1].samples == (length - 1) % batch + 1
    for index, whole in enumerate(serial):
        pieces = [rank[index] for rank in parallel]
        np.testing.assert_array_equal(np.concatenate([piece.inputs for piece in pieces]), whole.inputs)
        np.testing.assert_array_equal(np.concatenate([piece.targets for piece in pieces]), whole.targets)
        sizes = [piece.local_samples for piece in pieces]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
        assert [piece.offset for piece in pieces] == [0, *itertools.accumulate(sizes[:-1])]
        assert {piece.samples for piece in pieces} == {whole.samples} == {len(whole.indices)}
        assert {piece.count for piece in pieces} == {whole.count} == {int((whole.targets != -100).sum())}
        assert sum(piece.local_count for piece in pieces) == whole.count == whole.local_count
        assert {(piece.step, piece.epoch, piece.index) for piece in pieces} == {(index, 0, index)}


def test_count_uses_targets_alone_where_the_data_set_has_them(monkeypatch):
    dataset = WindowDataset(np.arange(41), 4)
    fetched, fetch = [], dataset.fetch
    monkeypatch.setattr(dataset, "fetch", lambda *given: fetched.append(len(given[0])) or fetch(*given))
    for batch in Loader(dataset, 4, rank=1, ranks=2, prefetch=0):
        assert batch.count == batch.samples * 4
    assert fetched == [2, 2, 1]  # its own samples only


@given(st.integers(0, 50), st.integers(1, 12))
def test_share_covers_everything_once(length, parts):
    cuts = [share(length, part, parts) for part in range(parts)]
    assert [place for cut in cuts for place in range(length)[cut]] == list(range(length))
    assert all(0 <= cut.start <= cut.stop <= length for cut in cuts)


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(1, 9))
def test_split_into_microbatches(layout, pieces):
    rank = layout["ranks"] - 1
    dataset = Numbers(layout["length"], layout["gap"])
    for batch in Loader(dataset, layout["batch"], rank=rank, ranks=layout["ranks"], prefetch=0):
        micro = batch.split(pieces)
        assert len(micro) == pieces
        np.testing.assert_array_equal(np.concatenate([piece.inputs for piece in micro]), batch.inputs)
        np.testing.assert_array_equal(np.concatenate([piece.targets for piece in micro]), batch.targets)
        np.testing.assert_array_equal(np.concatenate([piece.indices for piece in micro]), batch.indices)
        sizes = [piece.local_samples for piece in micro]
        assert max(sizes) - min(sizes) <= 1
        assert [piece.offset - batch.offset for piece in micro] == [0, *itertools.accumulate(sizes[:-1])]
        for piece in micro:
            assert (piece.samples, piece.count, piece.step) == (batch.samples, batch.count, batch.step)
        assert sum(piece.local_count for piece in micro) == batch.local_count


def test_batch_unpacks_and_is_frozen():
    batch = next(iter(Loader(Numbers(5), 3, prefetch=0)))
    inputs, targets = batch
    assert inputs is batch.inputs and targets is batch.targets
    with pytest.raises(FrozenInstanceError):
        batch.count = 1
    with pytest.raises(UsageError, match="number of microbatches"):
        batch.split(0)
    by_hand = Batch(inputs, targets, batch.indices, offset=0, samples=3, count=3)
    assert by_hand.local_count == 3


def test_dtype_reaches_floating_inputs_only():
    assert next(iter(Loader(Numbers(5), 3, dtype=np.float64))).inputs.dtype == np.float64
    assert next(iter(Loader(Numbers(5), 3))).inputs.dtype == np.float32
    assert next(iter(Loader(WindowDataset(np.arange(9), 2), 3, dtype="float64"))).inputs.dtype == np.int64


# --- order -----------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch():
    order = lambda seed, epoch, **more: Loader(Numbers(50), 8, seed=seed, **more).order(epoch).tolist()
    assert order(1, 0) == order(1, 0) == order(1, 0, rank=2, ranks=3) == order(1, 0, drop_last=True)
    assert order(1, 0) == np.random.default_rng([1, 0]).permutation(50).tolist()
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 4, shuffle=False) == list(range(50))


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 60), st.booleans())
def test_samples_of_the_first_steps(layout, steps, drop_last):
    batch = min(layout["batch"], layout["length"]) if drop_last else layout["batch"]
    loader = Loader(Numbers(layout["length"]), batch, drop_last=drop_last, prefetch=0)
    assert loader.samples_of(steps) == sum(b.samples for b in loader.steps(steps))


def test_epochs_follow_each_other_and_differ():
    loader = Loader(Numbers(10), 4, seed=3)
    first, second = list(loader), list(loader)
    assert [batch.epoch for batch in first + second] == [0] * 3 + [1] * 3
    assert [batch.step for batch in first + second] == list(range(6))
    assert ids(first) != ids(second)
    loader.rewind()
    assert ids(loader.steps(6)) == ids(first + second)
    loader.rewind(1)
    assert ids(loader) == ids(second)
    stream = loader.forever()
    loader.rewind()
    assert ids(itertools.islice(stream, 6)) == ids(first + second)
    stream.close()
    assert list(loader.steps(0)) == []


def test_drop_last():
    loader = Loader(Numbers(11), 4, drop_last=True)
    assert len(loader) == 2 and [batch.samples for batch in loader] == [4, 4]
    assert len(Loader(Numbers(12), 4, drop_last=True)) == 3
    assert len(Loader(Numbers(11), 4)) == 3


# --- position --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 12), st.integers(0, 3), st.booleans(), st.booleans())
def test_resume_at_any_point_equals_going_on(layout, stop, prefetch, shuffle, drop_last):
    drop_last = drop_last and layout["length"] >= layout["batch"]
    rank, ranks = layout["ranks"] - 1, layout["ranks"]
    make = lambda rank, ranks, prefetch: Loader(
        Numbers(layout["length"], layout["gap"]), layout["batch"], rank=rank, ranks=ranks,
        seed=layout["seed"], shuffle=shuffle, drop_last=drop_last, prefetch=prefetch)
    whole = list(make(rank, ranks, 0).steps(stop + 5))
    first = make(0, ranks + 1, prefetch)  # saved by another layout
    for _ in first.steps(stop):
        pass
    resumed = make(rank, ranks, prefetch)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one, other in zip(resumed.steps(5), whole[stop:], strict=True):
        same(one, other)


def test_position_is_that_of_the_last_batch_handed_out_not_of_the_last_made():
    dataset = Numbers(40)
    loader = Loader(dataset, 4, prefetch=3)
    stream = loader.steps(8)
    next(stream), next(stream)
    assert (loader.state_dict()["epoch"], loader.state_dict()["index"]) == (0, 2)
    fresh = Loader(Numbers(40), 4)
    fresh.load_state_dict(loader.state_dict())
    same(next(fresh.steps(1)), next(stream))
    stream.close()
    assert next(loader.steps(1)).step == 3  # the loader itself goes on there too


def test_state_of_something_else_is_refused_by_name():
    state = Loader(Numbers(20), 4, seed=1).state_dict()
    for other, named in [(Loader(Numbers(21), 4, seed=1), "length 20 .now 21"),
                         (Loader(Numbers(20), 5, seed=1), "batch 4 .now 5"),
                         (Loader(Numbers(20), 4, seed=2), "seed 1 .now 2"),
                         (Loader(Numbers(20), 4, seed=1, shuffle=False), "shuffle True .now False"),
                         (Loader(Numbers(20), 4, seed=1, drop_last=True), "drop_last False .now True"),
                         (Loader(Numbers(20), 5, seed=2), "batch 4 .now 5., seed 1 .now 2")]:
        with pytest.raises(UsageError, match=named):
            other.load_state_dict(state)
        assert next(other.steps(1)).step == 0  # untouched
    loader = Loader(Numbers(20), 4, seed=1)
    for damage in ({"index": 5}, {"index": -1}, {"epoch": -1}, {"epoch": "0"}, {"index": None}):
        with pytest.raises(DataError, match="position is epoch"):
            loader.load_state_dict(state | damage)
    with pytest.raises(DataError, match="lacks index, seed"):
        loader.load_state_dict({key: value for key, value in state.items() if key not in ("index", "seed")})


# --- transforms ------------------------------------------------------------------------------------------


def jitter(inputs, targets, keys):
    noise = [generator.standard_normal(2) for generator in keys.generators()]
    return inputs + np.array(noise).reshape(-1, 2), targets


@pytest.mark.parametrize("prefetch", [0, 2])
def test_transform_draws_the_same_under_any_layout(prefetch):
    options = {"seed": 5, "dtype": "float64", "transform": jitter, "prefetch": prefetch}
    make = lambda **layout: list(Loader(Numbers(11, gap=3), 4, **layout, **options).steps(6))
    serial = make()
    parallel = [make(rank=rank, ranks=3) for rank in range(3)]
    for step, whole in enumerate(serial):
        np.testing.assert_array_equal(np.concatenate([rank[step].inputs for rank in parallel]), whole.inputs)
    noise = [{sample: row - sample for sample, row in
              zip(flat(epoch), np.concatenate([batch.inputs for batch in epoch]))}
             for epoch in (serial[:3], serial[3:])]
    assert len({tuple(drawn.round(9)) for epoch in noise for drawn in epoch.values()}) == 22  # all differ


@pytest.mark.parametrize("transform", [
    lambda inputs, targets, keys: (inputs[1:], targets),
    lambda inputs, targets, keys: (inputs, targets[1:]),
    lambda inputs, targets, keys: (inputs, np.full_like(targets, -100)),
], ids=["inputs", "targets", "ignored"])
def test_transform_must_keep_the_counts(transform):
    with pytest.raises(UsageError, match=r"the transform made .* must keep these numbers"):
        next(iter(Loader(Numbers(8), 4, transform=transform)))


# --- wrong use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, arguments, message", [
    (0, {}, "no samples"),
    (5, {"batch": 0}, "batch must be a whole number of at least 1, not 0"),
    (5, {"batch": 2.0}, "batch must be"),
    (5, {"ranks": 0}, "ranks must be"),
    (5, {"rank": 2, "ranks": 2}, "rank 2 of 2 ranks: ranks are numbered from 0 to 1"),
    (5, {"rank": -1}, "rank must be"),
    (5, {"seed": -1}, "seed must be"),
    (5, {"prefetch": -1}, "prefetch must be"),
    (5, {"batch": 6, "drop_last": True}, "batch 6 is more than the 5 samples"),
])
def test_arguments_are_checked(length, arguments, message):
    with pytest.raises(UsageError, match=message):
        Loader(Numbers(length), **({"batch": 2} | arguments))


def test_numbers_of_steps_and_epochs_are_checked():
    with pytest.raises(UsageError):
        Loader(Numbers(5), 2).steps(-1)
    with pytest.raises(UsageError):
        Loader(Numbers(5), 2).rewind(-1)
