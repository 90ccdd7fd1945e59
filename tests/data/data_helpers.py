"""A data set whose samples are their own numbers, and ways to look at the batches made of it."""

import itertools
import threading

import numpy as np


class Numbers:
    """Sample i is ([i, i], i % 7); every `gap`-th target is ignored. It lacks the optional `targets`."""

    def __init__(self, length, gap=0, fail_at=None):
        self.length, self.gap, self.fail_at, self.fetched = length, gap, fail_at, 0

    def __len__(self):
        return self.length

    def fetch(self, indices, dtype=None):
        self.fetched += 1
        if self.fail_at is not None and self.fail_at in indices:
            raise OSError(f"sample {self.fail_at} cannot be read")
        targets = np.asarray(indices, np.int64) % 7
        if self.gap:
            targets = np.where(indices % self.gap == 0, -100, targets)
        return np.asarray(indices, dtype or np.float32)[:, None] * np.ones(2, dtype or np.float32), targets


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name == "minipar-prefetch"]


def ids(batches):
    return [batch.indices.tolist() for batch in batches]


def flat(batches):
    return list(itertools.chain.from_iterable(ids(batches)))


def same(one, other):
    assert one.step == other.step and one.epoch == other.epoch and one.index == other.index
    assert (one.offset, one.samples, one.count) == (other.offset, other.samples, other.count)
    for name in ("inputs", "targets", "indices"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
