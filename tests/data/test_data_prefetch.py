"""The background thread of a loader: same batches, bounded, exceptions in place, ended in every case."""

import contextvars
import gc
import itertools
import subprocess
import sys
import threading

import pytest
from data_helpers import Numbers, flat, ids, prefetchers, same

from minipar.data import Loader
from minipar.data.prefetch import Prefetch
from minipar.errors import UsageError


def test_prefetched_equals_made_on_demand():
    ahead, on_demand = (Loader(Numbers(23), 4, prefetch=prefetch).steps(20) for prefetch in (3, 0))
    for one, other in zip(ahead, on_demand, strict=True):
        same(one, other)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_prefetch_batches_are_made_ahead(depth):
    made = threading.Semaphore(0)
    dataset = Numbers(100)

    def counting(inputs, targets, keys):
        made.release()
        return inputs, targets

    stream = Loader(dataset, 2, prefetch=depth, transform=counting).steps(20)
    next(stream)
    for _ in range(1 + depth):
        assert made.acquire(timeout=30)  # they do get made while the consumer is away
    assert not made.acquire(timeout=0.05)
    assert dataset.fetched == 1 + depth
    stream.close()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_exception_comes_where_its_batch_would(prefetch):
    loader = Loader(Numbers(20, fail_at=9), 4, shuffle=False, prefetch=prefetch)
    seen = []
    with pytest.raises(OSError, match="sample 9 cannot be read"):
        for batch in loader:
            seen.append(batch.index)
    assert seen == [0, 1] and loader.state_dict()["index"] == 2
    loader.dataset.fail_at = None
    assert [batch.index for batch in loader] == [2, 3, 4]  # and can be tried again


def test_threads_end_on_break_close_error_exit_and_collection():
    loader = Loader(Numbers(1000), 2)
    for batch in loader:
        assert prefetchers()
        if batch.index == 3:
            break
    assert prefetchers() == []
    stream = loader.forever()
    assert next(stream).index == 4 and len(prefetchers()) == 1
    stream.close()
    assert prefetchers() == []
    with loader as entered:
        held = loader.forever()
        next(held)
        assert entered is loader and len(prefetchers()) == 1
    assert prefetchers() == []
    with pytest.raises(ZeroDivisionError):
        for _ in Loader(Numbers(1000), 2):
            1 / 0  # noqa: B018
    assert prefetchers() == []
    cycle = [Loader(Numbers(1000), 2).forever()]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    assert prefetchers() == []


def test_prefetch_by_itself():
    ahead = Prefetch(iter(range(5)), 2)
    assert list(ahead) == [0, 1, 2, 3, 4] and list(ahead) == []
    ahead = Prefetch(itertools.count(), 2)
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert list(ahead) == [] and prefetchers() == []
    dropped = Prefetch(itertools.count(), 2)
    assert next(dropped) == 0
    del dropped
    gc.collect()
    assert prefetchers() == []


def test_a_second_iteration_ends_the_first_by_name():
    loader = Loader(Numbers(100), 2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert next(second).index == 1 and len(prefetchers()) == 1
    with pytest.raises(UsageError, match="was ended by close, rewind, load_state_dict or another iteration"):
        next(first)
    assert next(second).index == 2  # the second is not disturbed
    for disturb in (loader.close, loader.rewind, lambda: loader.load_state_dict(loader.state_dict())):
        stream = loader.forever()
        next(stream)
        disturb()
        with pytest.raises(UsageError, match="cannot go on"):
            next(stream)


def test_the_thread_runs_in_a_copy_of_the_consumers_context():
    variable = contextvars.ContextVar("variable", default="outside")
    seen = []

    def look(inputs, targets, keys):
        seen.append(variable.get())
        variable.set("changed in the thread")
        return inputs, targets

    variable.set("of the consumer")
    for _ in Loader(Numbers(4), 4, transform=look):
        pass
    assert seen == ["of the consumer"] and variable.get() == "of the consumer"


def test_the_interpreter_ends_with_an_iteration_under_way():
    script = ("import numpy as np\nfrom minipar.data import Loader, WindowDataset\n"
              "stream = Loader(WindowDataset(np.arange(1000), 4), 2).forever()\nprint(next(stream).step)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_rank_threads_each_have_their_own_loader():
    results = {}

    def run(rank):
        results[rank] = list(Loader(Numbers(30), 7, rank=rank, ranks=4).steps(10))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    serial = ids(Loader(Numbers(30), 7).steps(10))
    assert [flat(results[rank][step] for rank in range(4)) for step in range(10)] == serial
